"""The three commands end to end on tiny bases, and bad input: one line on stderr, exit code 2, nothing saved lost."""
import hashlib, itertools, json, os, pathlib, re, subprocess, sys
from types import SimpleNamespace

import pytest
import torch
from conftest import save_tiny, write_task

import cli, data, eval as evaluation, export, interop, port, portal, train
from cli import run_main

QUICK = "--data data --n 8 --epochs 2 --batch-size 2".split()
TRAIN = ["--bases", "./base-a,./base-b", *QUICK]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train.REAL, "sizes", dict(d_z=8, d_e=4, hidden=16, d_c=12))
    monkeypatch.setitem(train.REAL, "lora", dict(epochs=2, batch_size=2, lr=1e-3, least=1, max_tokens=200))


def command(module, *argv):
    """Run a command in this process -> its exit code."""
    try:
        run_main(lambda: module.main([str(a) for a in argv]))
    except SystemExit as stop:
        return stop.code
    return 0


def fingerprint(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def trained(world):
    assert command(train, *TRAIN) == 0
    return world / "out" / "base-a+base-b"


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
    assert set(rows[0]) == {"method", "base", "role", "task", "seed", "n", "select", "acc_norm", "log_loss", "rows", "seconds", "correct"}
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
    monkeypatch.setattr(port, "ALIGN", 9)
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
            core = portal.load_portal(trained, [name], final=final and name == "base-a")
            if final and path.exists():
                core.converters[name] = portal.load_converter(core.cfg, path)
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
    assert sorted(os.listdir(trained.parent)) == ["base-a+base-b"]                   # nothing half made is left


def edit(path, number, change):
    lines = path.read_text().splitlines()
    lines[number - 1] = change if isinstance(change, str) else json.dumps({**json.loads(lines[number - 1]), **change})
    path.write_text("\n".join(lines) + "\n")


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


def one_line(capsys, words):
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


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
    fails(["held-out loss is not finite", "base-a"], train, *TRAIN, "--overwrite", "--lr", "1e38", "--epochs", "1", "--batch-size", "64")
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


def test_a_dry_run_rehearses_the_fit_and_writes_nothing(world, capsys, monkeypatch):
    batches, one_round = [], train.one_round
    def spy(bases, generate, learners, items, *rest):
        batches.append({name: [(item.row.prompt, item.length()) for item in own] for name, own in items.items()})
        return one_round(bases, generate, learners, items, *rest)
    monkeypatch.setattr(train, "one_round", spy)
    before = fingerprint(world)
    with monkeypatch.context() as patch:                                             # a clock that ticks at every look
        patch.setattr(train, "time", SimpleNamespace(time=itertools.count().__next__))
        assert command(train, *TRAIN, "--dry-run") == 0
    assert fingerprint(world) == before and not (world / "out").exists()
    # 7 rows of the largest task are left to fit on, 4 rounds; a tick a round, and one to score what two bases hold out
    said = "8 rounds of 1.00 s and 2 evaluations of 2.0 s on held-out rows, 0:00:12 in all; peak memory"
    assert said in capsys.readouterr().out
    dry, longest = batches[:], 0
    for splits in data.load_tasks(world / "data").values():
        rows = data.sample(splits["train"], 8, 0)[0]
        longest += sum(sorted(len(r.prompt.split()) + len(r.choices[r.gold].split()) - 1 for r in rows)[-2:])
    assert all(sum(length for _, length in own) == longest for own in dry[0].values())
    batches.clear()
    assert command(train, *TRAIN) == 0
    assert len(dry) == 4 and dry[1:] == batches[:3]                                  # then the rounds the fit starts with

    write_task(world / "aside", "four")
    before = fingerprint(world)
    ports = "--to", "./base-c,./base-b", "--n", "2,8"
    for lines, *argv in ((1, train, *TRAIN), (4, port, *ports), (1, train, "--add-task", "aside/four")):
        capsys.readouterr()
        assert command(*argv, "--dry-run") == 0                                      # what is there already is no error
        assert capsys.readouterr().out.count("nothing was written") == lines
    assert fingerprint(world) == before


@pytest.mark.parametrize("module", [train, port, evaluation, export, interop])
def test_the_help_has_every_flag_in_its_group_and_the_presets(module, capsys, monkeypatch):
    parts = {train: lambda preset: preset, port: lambda preset: preset["port"], evaluation: lambda preset: preset["lora"]}
    part = parts.get(module)
    if part:
        monkeypatch.setitem(part(train.TOY), "batch_size", 77)
        monkeypatch.setitem(part(train.REAL), "batch_size", 66)
        monkeypatch.setitem(part(train.REAL), "max_tokens", part(train.TOY)["max_tokens"])
    required = ["--to", "a", "--task", "b", "--out", "c"] if module is export else []
    assert command(module, *required, "--nonsense") == 2
    accepted = set(re.findall(r"--[a-z-]+", capsys.readouterr().err.split("accepted:")[1]))
    assert command(module, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python ") and module.__doc__.strip() in text
    title, found = None, {}
    for line in text.split(module.__doc__.strip())[1].splitlines():
        if re.fullmatch(r"[a-z ]+:", line):
            title = line[:-1]
        invocation = re.match(r"  (?:-h, )?(--[a-z-]+)(?: A,B, (--task) )?", line)
        found.update({flag: title for flag in (invocation.groups() if invocation else ()) if flag})
    assert set(found) == accepted
    groups = {"--" + flag: group for group, flags in cli.FLAGS.items() for flag in flags}
    groups |= {"--help": "options"} | ({} if module is export else {"--task": groups["--tasks"]})
    assert found == {flag: groups[flag] for flag in found}
    text = " ".join(text.split())
    if part:
        assert "(default: 77 on the toy, else 66)" in text and "padding included (default: 4096)" in text
    if module is train:
        assert "k,v,o,gate,up,down (default: q,v)" in text and "adapters (default: 8)" in text


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


def test_a_swap_of_folders_that_fails_half_way_restores_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir(), (tmp_path / "run" / "old").touch()
    rename = pathlib.Path.rename
    def fails_on_new(self, target):
        if ".new" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)
    monkeypatch.setattr(pathlib.Path, "rename", fails_on_new)
    with pytest.raises(KeyboardInterrupt), cli.new_folder(tmp_path / "run") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["old"]


def test_no_run_yet(world, capsys):
    assert command(evaluation) == 2
    one_line(capsys, ["no run in out", "train.py"])


def test_an_interrupted_training_leaves_the_old_run(trained, monkeypatch, capsys):
    before = fingerprint(trained)
    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "evaluate", stop)                                     # after the first epoch
    assert command(train, *TRAIN, "--overwrite") == 130
    assert fingerprint(trained) == before
    assert sorted(os.listdir(trained.parent)) == [f".{trained.name}.part", trained.name]  # what it goes on from: test_resume


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.json"
    cli.write_json(path, {"a": 1})
    def half(temporary):
        temporary.write_text("{half")
        raise OSError(28, "disk full")
    with pytest.raises(cli.BadInput, match="f.json: not written .disk full"):
        cli.write_whole(path, half)
    assert os.listdir(tmp_path) == ["f.json"] and json.loads(path.read_text()) == {"a": 1}


def test_the_newest_run_is_the_one_used(world, capsys):
    for name, date in (("older", "2026-01-01T00:00:00Z"), ("newer", "2026-02-01T00:00:00Z")):
        cli.write_json(world / "out" / name / "portal.json", {"trained": date})
    assert cli.find_run(None) == pathlib.Path("out/newer")


def test_as_a_process(world):
    """Once for real: exit code 2, one line, no traceback."""
    done = subprocess.run([sys.executable, str(cli.ROOT / "data.py"), "--tasks", "rte,nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unknown task 'nonsense'" in done.stderr
