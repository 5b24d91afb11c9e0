"""The three commands end to end on tiny bases, and bad input: one line on stderr, exit code 2, nothing saved lost."""
import json, os, subprocess, sys

import pytest
import torch
from conftest import QUICK, TRAIN, command, edit, fingerprint, one_line

import eval as evaluation, port, train
from runtime import files
from runtime.saved import load_converter, load_portal


def test_train_port_eval(trained, capsys):
    assert {"portal.json", "core.safetensors", "latents.safetensors", "log.jsonl"} <= set(os.listdir(trained))
    saved = json.loads((trained / "portal.json").read_text())
    assert saved["config"]["tasks"] == ["one", "three", "two"] and [b["base"] for b in saved["bases"]] == ["base-a", "base-b"]
    before = {k: v for k, v in fingerprint(trained).items() if k != "log.jsonl"}
    assert command(port, "--to", "./base-c", "--n", "4,8", "--epochs", "2", "--batch-size", "2") == 0
    assert "run: out/base-a+base-b" in capsys.readouterr().out
    after = fingerprint(trained)
    assert all(after[k] == v for k, v in before.items())                             # core, latents, converters: untouched
    provenance = json.loads((trained / "converters" / "base-c.json").read_text())
    assert provenance["n"] == 8 and provenance["ported"] and provenance["id"].endswith("base-c")
    assert {"base-a.safetensors", "base-b.safetensors", "base-c.safetensors", "base-c@4.safetensors"} <= set(os.listdir(trained / "converters"))
    every = ["--methods", ",".join(evaluation.METHODS)]
    assert command(evaluation, *every) == 0
    rows = [json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"method", "base", "role", "task", "seed", "n", "select", "acc_norm", "log_loss", "rows", "seconds", "correct",
                            "acc_norm_harness", "measured_on", "fitted"}
    assert {(r["method"], r["base"]) for r in rows} == {(m, b) for m in evaluation.METHODS for b in ("base-a", "base-b", "base-c")}
    bare = [(r["task"], r["select"]) for r in rows if (r["method"], r["base"]) == ("base", "base-c")]
    assert len(bare) == len(set(bare)) == 6                                          # once, not once a sample
    assert {r["role"] for r in rows if r["base"] == "base-c"} == {"unseen"} and {r["n"] for r in rows if r["base"] == "base-c"} == {0, 4, 8}
    assert {"results.md", "base-a-n8.png", "base-c-n4.png", "base-c-n8.png"} <= set(os.listdir(trained))
    assert set(os.listdir(trained / "baselines")) == {*evaluation.METHODS} - {"base", "portal"}
    fitted = (trained / "baselines" / "lora" / "base-c.safetensors").stat().st_mtime_ns
    assert command(evaluation, *every, "--bases", "./base-c", "--tasks", "one") == 0         # what is fitted is not fitted again
    assert (trained / "baselines" / "lora" / "base-c.safetensors").stat().st_mtime_ns == fitted
    again = [json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()][len(rows):]
    same = {(r["method"], r["n"], r["select"]): r["acc_norm"] for r in rows if (r["base"], r["task"]) == ("base-c", "one")}
    assert {(r["method"], r["n"], r["select"]): r["acc_norm"] for r in again} == same


def test_an_aligned_port(trained, monkeypatch):
    """Each port of a sweep is aligned with the source base nearest in depth, on prompts of its own training rows."""
    calls, align = [], port.align
    monkeypatch.setattr("starts.align.ALIGN", 9)
    monkeypatch.setattr(port, "align", lambda *args: (calls.append(args), align(*args)))
    assert command(port, "--to", "./base-c", "--n", "2,8", "--epochs", "1", "--align") == 0
    prompts = {json.loads(line)["prompt"] for path in (trained.parents[1] / "data").glob("*/train.jsonl")
               for line in path.read_text().splitlines()}
    assert [len(texts) for *_, texts in calls] == [3, 9] and {text for *_, texts in calls for text in texts} <= prompts
    assert calls[0][3].name == "base-a" and calls[0][3] is calls[1][3]               # loaded once
    for tag in ("base-c@2", "base-c"):
        assert json.loads((trained / "converters" / f"{tag}.json").read_text())["aligned"] == "base-a"
    assert command(port, "--to", "./base-c", "--n", "8", "--epochs", "1", "--overwrite") == 0 and len(calls) == 2
    assert json.loads((trained / "converters" / "base-c.json").read_text())["aligned"] is None


def test_the_last_epoch_is_kept_beside_the_selected_one(trained, monkeypatch):
    """adapters_of: a seen base's final state is the final core's, a ported base's is the selected core's."""
    from bases import load_base
    assert command(port, "--to", "./base-c", "--n", "8", "--epochs", "3", "--batch-size", "2") == 0
    for name in ("base-a", "base-c"):
        base = load_base(f"./{name}")
        for final in (False, True):
            path = trained / "final" / "converters" / f"{name}.safetensors"
            core = load_portal(trained, [name], final=final and name == "base-a")
            if final and path.exists():
                core.converters[name] = load_converter(core.cfg, path)
            got = evaluation.adapters_of(trained, "portal", name, base, final)
            assert all(torch.allclose(g, w) for g, w in zip(got.tensors(), core.adapters(name).tensors()))


def test_same_seed_same_numbers(world):
    for run in ("x", "y"):
        assert command(train, *TRAIN, "--run", run) == 0
    a, b = (fingerprint(world / run) for run in ("x", "y"))
    tensors = [k for k in a if k.endswith(".safetensors")]
    assert tensors and all(a[k] == b[k] for k in tensors)
    assert command(train, *TRAIN, "--run", "z", "--seed", "1") == 0
    assert fingerprint(world / "z")["core.safetensors"] != a["core.safetensors"]


def test_overwrite_replaces_the_whole_run(trained):
    assert command(port, "--to", "./base-c", "--n", "4", "--epochs", "1") == 0
    assert command(train, *TRAIN, "--overwrite", "--seed", "3") == 0
    assert not (trained / "converters" / "base-c.json").exists() and json.loads((trained / "portal.json").read_text())["seed"] == 3
    assert sorted(os.listdir(trained.parent)) == [".base-a+base-b.lock", "base-a+base-b"]                 # nothing half made is left


BAD_TRAIN = {  # name: (flags, what to break first, words of the one line)
    "unknown base": (["--bases", "qwen99", *QUICK], None, ["unknown base 'qwen99'", "qwen3-1.7b"]),
    "not a model": (["--bases", "./data", *QUICK], None, ["./data", "not a model", "config.json"]),
    "unknown task": ([*TRAIN, "--tasks", "one,four"], None, ["unknown task 'four'", "one, three, two"]),
    "not JSON": (TRAIN, lambda w: edit(w / "data/two/train.jsonl", 3, "{oops"), ["two/train.jsonl:3", "not JSON"]),
    "gold_idx": (TRAIN, lambda w: edit(w / "data/two/eval.jsonl", 2, {"gold_idx": 9}), ["two/eval.jsonl:2", "gold_idx is 9"]),
    "blank choice": (TRAIN, lambda w: edit(w / "data/one/train.jsonl", 1, {"choices": [" a", " "]}), ["train.jsonl:1", "blank"]),
    "white space": (TRAIN, lambda w: edit(w / "data/one/train.jsonl", 1, {"prompt": "a "}), ["train.jsonl:1", "white space"]),
    "no rows": (TRAIN, lambda w: (w / "data/one/train.jsonl").write_text(""), ["'one'", "no training rows"]),
    "n of 0": ([*TRAIN, "--n", "0"], None, ["--n", "'0'", "above 0"]),
    "n of words": ([*TRAIN, "--n", "many"], None, ["--n", "'many'", "whole number"]),
    "unknown option": ([*TRAIN, "--learning-rate", "1"], None, ["--learning-rate", "accepted", "--lr"]),
    "unknown module": ([*TRAIN, "--modules", "q,w"], None, ["--modules", "q,k,v,o,gate,up,down"]),
    "two of a name": (["--bases", "./base-a,base-a", *QUICK], None, ["same short name"]),
    "a lr of nan": ([*TRAIN, "--lr", "nan"], None, ["--lr", "'nan'"]),
    "device": ([*TRAIN, "--device", "tpu9"], None, ["--device", "tpu9", "cpu"]),
    "no data": (["--bases", "./base-a", "--data", "nowhere"], None, ["nowhere", "no tasks"]),
    "someone's folder": ([*TRAIN, "--run", "data"], None, ["data", "neither empty nor a run"]),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_bad_input_to_train(world, capsys, name):
    argv, break_it, words = BAD_TRAIN[name]
    if break_it:
        break_it(world)
    before = fingerprint(world)
    assert command(train, *argv) == 2
    one_line(capsys, words)
    assert fingerprint(world) == before


def test_bad_input_to_a_trained_run(trained, capsys, world):
    def fails(words, module, *argv, changed=()):
        capsys.readouterr()
        before = fingerprint(trained)
        assert command(module, *argv) == 2
        one_line(capsys, words)
        assert {k: v for k, v in fingerprint(trained).items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    fails(["already holds a trained run;", "--overwrite"], train, *TRAIN)
    fails(["portal.json", "neither empty nor a run folder"], train, *TRAIN, "--run", trained / "portal.json")
    fails(["--seed", "2^63"], train, *TRAIN, "--overwrite", "--seed", "9" * 30)
    fails(["--device", "meta"], train, *TRAIN, "--overwrite", "--device", "meta")
    fails(["scores are not finite", "base-a"], train, *TRAIN, "--overwrite", "--lr", "1e38", "--epochs", "1", "--batch-size", "64")
    fails(["of another configuration", "--overwrite"], train, *TRAIN, "--modules", "all")
    fails(["already seen base-a", "--overwrite"], port, "--to", "./base-a")
    fails(["already seen base-a", "--overwrite"], port, "--to", "./base-a", "--n", "2,4")
    fails(["--to is needed"], port)
    fails(["--n", "'0'"], port, "--to", "./base-c", "--n", "4,0")
    fails(["'base-z' is not in", "base-a, base-b"], evaluation, "--bases", "base-z")
    fails(["unknown task 'nine'", "one, three, two"], evaluation, "--tasks", "nine")
    fails(["nowhere", "not a run folder"], evaluation, "--run", "nowhere")
    fails(["not finite", "base-a", "task", "round"], train, *TRAIN, "--overwrite", "--lr", "1e38")
    core = trained / "core.safetensors"
    whole = core.read_bytes()
    core.write_bytes(whole[:-9])
    fails(["core.safetensors", "not a whole safetensors file"], port, "--to", "./base-c")
    core.write_bytes(whole)
    assert command(port, "--to", "./base-c", "--n", "4", "--epochs", "1") == 0
    fails(["already seen base-c", "--overwrite"], port, "--to", "./base-c")
    assert command(port, "--to", "./base-c", "--n", "4", "--epochs", "1", "--overwrite") == 0


def test_a_sweep_does_not_replace_a_port_on_more_rows(trained):
    def counts(n, *flags):
        assert command(port, "--to", "./base-c", "--n", n, "--epochs", "1", *flags) == 0
        return {p.stem: json.loads(p.read_text())["n"] for p in (trained / "converters").glob("base-c*.json")}
    assert counts("8") == {"base-c": 8}
    assert counts("2,4", "--overwrite") == {"base-c": 8, "base-c@2": 2, "base-c@4": 4}
    assert counts("6", "--overwrite") == {"base-c": 6, "base-c@2": 2, "base-c@4": 4}  # asked for by itself, it does


def test_a_single_row_a_task(trained):
    """Nothing can be held out, so the last epoch is the one that counts."""
    assert command(port, "--to", "./base-c", "--n", "1", "--epochs", "2") == 0
    assert json.loads((trained / "converters" / "base-c.json").read_text())["epoch_selected"] == 2
    assert json.loads((trained / "log.jsonl").read_text().splitlines()[-1])["held_acc_norm"] is None


def test_an_interrupted_training_leaves_the_old_run(trained, monkeypatch, capsys):
    before = fingerprint(trained)
    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "evaluate", stop)                                     # after the first epoch
    assert command(train, *TRAIN, "--overwrite") == 130
    assert fingerprint(trained) == before
    assert sorted(os.listdir(trained.parent)) == [f".{trained.name}.lock", f".{trained.name}.part", trained.name]


def test_as_a_process(world):
    """Once for real: exit code 2, one line, no traceback."""
    done = subprocess.run([sys.executable, str(files.ROOT / "data.py"), "--tasks", "rte,nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unknown task 'nonsense'" in done.stderr
