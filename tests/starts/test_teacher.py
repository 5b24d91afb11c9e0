"""A teacher's answers: probabilities of choices and decoded completions, against a plain model's; ports and training that read no label."""
import json
from types import SimpleNamespace

import numpy as np
import torch
from conftest import QUICK, command, edit, fingerprint, one_line, tiny_base, tiny_model
from helpers import hooked, plain_greedy, random_adapters
from safetensors.torch import load_file

import export, port, train
from bases import load_tokenizer
from starts.teacher import LIMIT, soft_rows
from tasks.rows import Row


def test_a_teachers_weights_are_its_probabilities_of_the_choices():
    base = tiny_base(dtype=torch.float64)
    adapters = random_adapters(base, dtype=torch.float64)
    rows = [Row("one", "w1 w2", [" w3", " w4 w5 w6", " w7 w8"], 2), Row("two", "w9", [" w3 w4", " w5"], 0)]
    soft = soft_rows(base, adapters, rows, ["zero", "one", "two"], 99)
    model = tiny_model(dtype=torch.float64)
    for t, row in enumerate(rows, 1):
        made, log_p = soft[id(row)], []
        for choice in row.choices:
            prompt, both = (base.tokenizer(text).input_ids for text in (row.prompt, row.prompt + choice))
            with hooked(model, adapters, t):
                found = model(input_ids=torch.tensor([both])).logits[0].log_softmax(-1).detach()
            log_p.append(sum(float(found[k - 1, both[k]]) for k in range(len(prompt), len(both))))
        np.testing.assert_allclose(made.weights, np.exp(log_p) / np.exp(log_p).sum(), atol=1e-5)
        assert made.gold == int(np.argmax([lp / len(choice) for lp, choice in zip(log_p, row.choices)]))
        assert made[:3] == row[:3] and not made.open


def test_a_teachers_completions_are_what_it_decodes(capsys):
    base, model = tiny_base(dtype=torch.float64), tiny_model(dtype=torch.float64)
    for each in (base.model, model):
        each.get_output_embeddings().weight.data[base.tokenizer.eos_token_id] *= 3       # so that some answers end
    adapters = random_adapters(base, dtype=torch.float64)
    rows = [Row(task, f"w{k} w{k + 1}", [f" w{k + 7}" * 40]) for k in range(8) for task in ("one", "two")]
    soft, want = soft_rows(base, adapters, rows, ["zero", "one", "two"], 99), {}
    for row in rows:
        with hooked(model, adapters, 1 + (row.task == "two")):
            ids = plain_greedy(model, base.tokenizer(row.prompt).input_ids, LIMIT)
        text = base.tokenizer.decode(ids[:ids.index(3)]) if 3 in ids else "<unk>"
        if text and not any(token in text for token in ("<pad>", "<bos>", "<unk>", "<eos>")):
            want[id(row)] = row._replace(choices=[" " + text])
    assert soft == want and 3 < len(want) < 14 and any(" " in row.choices[0][1:] for row in want.values())
    left = 8 - sum(row.task == "one" for row in want.values())
    assert f"one: {left} of 8 rows are left out: tiny's answer is empty" in capsys.readouterr().out


def test_which_texts_are_answers(monkeypatch, capsys):
    """A tokenizer that keeps the space before a text says itself whether there is one."""
    texts = [" red", "red", "", "  ", " two words  ", " " + "x" * 70, " " + "y" * 70, " a<|endoftext|>"]
    def decode(teacher, adapters, items, max_tokens):
        longer = 2 * len(items[0].continuations[0]) > LIMIT if items else False
        return [texts[int(item.row.prompt)] + "y" * (longer and "y" in texts[int(item.row.prompt)]) for item in items]
    monkeypatch.setattr("starts.teacher.decode", decode)
    teacher = SimpleNamespace(name="t", tokenizer=load_tokenizer("toy-qwen-s"), packs=True)
    rows = [Row("one", str(k), [" label"]) for k in range(len(texts))]
    found = soft_rows(teacher, None, rows, ["one"], 99)
    assert [found[id(row)].choices[0] for row in rows if id(row) in found] == [" red", "red", " two words", " " + "x" * 70]
    assert "one: 4 of 8 rows are left out: t's answer is empty, holds a special token, or has not ended" in capsys.readouterr().out


def relabel(data):
    """Every label becomes another."""
    for file in data.glob("*/train.jsonl"):
        for k, line in enumerate(file.read_text().splitlines(), 1):
            row = json.loads(line)
            edit(file, k, {"gold_idx": (row["gold_idx"] + 1) % len(row["choices"])})


def test_a_port_to_a_teacher_reads_no_label(trained, monkeypatch, capsys):
    def ported(*flags):
        argv = ["--to", "base-c", "--n", 8, "--epochs", 2, "--batch-size", 2, "--overwrite", *flags]
        assert command(port, *argv) == 0
        return fingerprint(trained / "converters")["base-c.safetensors"]
    labelled, taught = ported(), ported("--teacher", "base-b")
    assert json.loads((trained / "converters" / "base-c.json").read_text())["teacher"] == "base-b"
    relabel(trained.parents[1] / "data")
    assert ported("--teacher", "base-b") == taught != labelled != ported()
    assert ported("--teacher", "base-a") != taught
    def completed(with_):
        for path in (trained.parents[1] / "data" / "one").iterdir():
            path.write_text("".join(json.dumps({"task": "one", "prompt": f"w{k}", "completion": with_}) + "\n" for k in range(9)))
    completed(" w1")
    before = fingerprint(trained)
    monkeypatch.setattr("starts.teacher.decode", lambda teacher, adapters, items, max_tokens:   # it never ends
                        ["w1 " * (2 * len(item.continuations[0])) for item in items])
    for teacher, words in (("base-x", ["base-x", "base-a"]), ("base-b", ["--teacher", "one", "ends within 64 tokens"])):
        capsys.readouterr()
        assert command(port, "--to", "base-c", "--teacher", teacher, "--overwrite") == 2
        one_line(capsys, words)
    assert fingerprint(trained) == before
    monkeypatch.setattr("starts.teacher.decode", lambda teacher, adapters, items, max_tokens:
                        [f"w{item.prompt[0] % 9} w2" if item.prompt[0] % 3 else "" for item in items])
    opened = ported("--teacher", "base-b")
    assert "one: 3 of 8 rows are left out: base-b's answer" in capsys.readouterr().out
    completed(" w5 w6 w7 w8")
    assert ported("--teacher", "base-b") == opened != ported()


def test_loras_without_a_run_are_learned_and_carried(trained, capsys):
    """The run's own adapters, exported and read from PEFT folders, teach the same."""
    world = trained.parents[1]
    assert command(export, "--run", trained, "--to", "base-a", "--task", "all", "--out", "loras") == 0
    (world / "others").mkdir()
    for task, other in (("one", "two"), ("two", "three"), ("three", "one")):         # other LoRAs teach something else
        (world / "others" / task).symlink_to(world / "loras" / other)
    found = []
    for teacher in (["base-a"], ["./base-a", "--adapters", "loras"], ["./base-a", "--adapters", "others"]):
        flags = ["--to", "base-c", "--n", 8, "--epochs", 1, "--batch-size", 2, "--overwrite", "--teacher", *teacher]
        assert command(port, *flags) == 0
        found.append(load_file(trained / "converters" / "base-c.safetensors"))
        p = json.loads((trained / "converters" / "base-c.json").read_text())
        assert (p["teacher"], p["adapters"]) == ("base-a", str(world / teacher[2]) if len(teacher) > 1 else None)
    same, other = (max(float((a - found[0][name]).abs().max()) for name, a in one.items()) for one in found[1:])
    assert same < 1e-3 < other / 2

    flags = ["--bases", "./base-b,./base-c", *QUICK, "--run", "new", "--overwrite", "--teacher", "./base-a", "--adapters", "loras"]
    cores = []
    for _ in range(2):
        assert command(train, *flags) == 0
        cores.append(fingerprint(world / "new")["core.safetensors"])
        relabel(world / "data")
    assert cores[0] == cores[1]
    assert [(b["base"], b["teacher"], b["adapters"]) for b in json.loads((world / "new" / "portal.json").read_text())["bases"]] == [
        (name, "base-a", str(world / "loras")) for name in ("base-b", "base-c")]
    (world / "loras" / "one").rename(world / "loras" / "other")
    before = fingerprint(world)
    for module, argv, words in ((train, flags, ["loras/one", "no PEFT adapter"]), (train, flags[:-2], ["--adapters DIR", "together"]),
                                (port, ["--to", "base-c", "--adapters", "loras"], ["--adapters", "--teacher BASE"])):
        capsys.readouterr()
        assert command(module, *argv) == 2
        one_line(capsys, words)
    assert fingerprint(world) == before
