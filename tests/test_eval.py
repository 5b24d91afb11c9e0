"""acc_norm, exact match and log_loss against naive loops; ties; lift; the table; --show; inference as the README has it."""
import contextlib, io, json, re
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from conftest import lora_hooks, tiny_base, tiny_model
from test_bases import of_task, plain_greedy, random_adapters
from test_cli import command, fingerprint
from test_portal import make_portal
from transformers import AutoModelForCausalLM

import eval as evaluation, train
from bases import load_base
from cli import ROOT, append_jsonl, write_json
from data import Row, encode, load_tasks
from eval import adapters_of, decode, evaluate, lift, log_curves, read_results, score, unpack, write_results
from portal import MODULES, save_portal
from train import fit, portal_learner

ROWS = [Row("one", "w1 w2 w3", [" w4", " w5 w6", " w49"], 1), Row("two", "w9 w8", [" w7 w1 w2", " w7 w3"], 0),
        Row("one", "w4", [" w3", " w2"], 0), Row("two", "w30 w31 w32 w33 w34 w35 w36", [" w1", " w22", " w3", " w44 w5"], 2)] * 2


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_equals_a_naive_loop_over_choices(architecture, adapted):
    base, model = tiny_base(architecture, bos=True), tiny_model(architecture)
    adapters = random_adapters(base, tasks=2) if adapted else None
    items, _ = encode(base.tokenizer, ROWS, ["one", "two"])
    for max_tokens in (1, 60, 10_000):
        got = evaluate(base, adapters, items, max_tokens)
        for t, task in enumerate(["one", "two"]):
            handles = lora_hooks(model, *of_task(adapters, t)) if adapted else []
            correct, nll, tokens = [], 0.0, 0
            for row in (row for row in ROWS if row.task == task):
                scores = []
                for k, choice in enumerate(row.choices):
                    prompt = base.tokenizer(row.prompt).input_ids
                    ids = prompt + base.tokenizer(choice, add_special_tokens=False).input_ids
                    with torch.no_grad():
                        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                    total = sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
                    scores.append(total / len(choice))
                    if k == row.gold:
                        nll, tokens = nll - total, tokens + len(ids) - len(prompt)
                correct.append(max(range(len(scores)), key=scores.__getitem__) == row.gold)
            for h in handles:
                h.remove()
            assert got[t]["correct"] == correct and got[t]["acc_norm"] == sum(correct) / len(correct)
            assert got[t]["log_loss"] == pytest.approx(nll / tokens, rel=1e-5) and got[t]["rows"] == 4


def test_a_tie_never_favours_the_gold_choice():
    base = tiny_base()
    items, _ = encode(base.tokenizer, [Row("one", "w1 w2", [" w4", " w4"], gold) for gold in (0, 1)], ["one"])
    assert evaluate(base, None, items, 100)[0]["acc_norm"] == 0


def test_a_decoded_text_has_as_many_lines_as_its_gold_completion_and_a_limit():
    """Prompts are single words here; the stand-in for a base says what its table holds."""
    says, limits = {5: " Paris\nQ: and then", 6: "\n Paris", 7: " one\ntwo\nthree", 8: " a"}, []
    def generate(prompts, adapters, tasks, limit):
        limits.append(limit)
        return [says[prompt[0]] for prompt in prompts]
    base = SimpleNamespace(generate=generate, tokenizer=tiny_base().tokenizer)
    rows = [Row("t", f"w{i}", [gold]) for i, gold in enumerate([" Paris", " Paris", " one\ntwo\n", " a" * 10], 1)]
    items, _ = encode(base.tokenizer, rows, ["t"])
    assert decode(base, None, items, 1) == [" Paris", "", " one\ntwo", " a"] and set(limits) == {22}  # 2 (10 + EOS)
    assert decode(base, None, items[:3], 100) == [" Paris", "", " one\ntwo"] and limits[-1] == 16


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_exact_match_and_log_loss_of_completions_equal_a_naive_loop(architecture):
    base, model = tiny_base(architecture), tiny_model(architecture)
    prompts = ["w1 w2 w3", "w9 w8", "w4", "w30 w31 w32 w33 w34 w35"]
    base.tokenizer.add_tokens([f"x{i}" for i in range(8)])                           # a word for each of the 64 logits
    adapters, said = random_adapters(base), {}
    def as_task(t):
        stack = contextlib.ExitStack()
        for handle in lora_hooks(model, *of_task(adapters, t)):
            stack.callback(handle.remove)
        return stack
    for t in (0, 1):
        with as_task(t):
            said.update({(t, prompt): plain_greedy(model, base.tokenizer(prompt).input_ids, 16) for prompt in prompts})
    eos = next(token for new in said.values() for token in new[1:7]                  # half of the rows or so end there
               if 2 <= sum(token in other[:7] for other in said.values()) <= 5
               and all(other[0] != token for other in said.values()))
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(eos)
    rows, correct, nll, tokens = [], {0: [], 1: []}, {0: 0.0, 1: 0.0}, {0: 0, 1: 0}
    for (t, prompt), new in said.items():
        gold = new[:new.index(eos)] if eos in new[:7] else new[:5]                   # the others go on behind their gold
        rows.append(Row(f"task {t}", prompt, [f" {base.tokenizer.decode(gold)} "]))
        correct[t].append(eos in new[:7])
        ids = base.tokenizer(prompt).input_ids
        with as_task(t), torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids + gold + [eos]])).logits[0].double().log_softmax(-1)
        nll[t] -= sum(log_p[i - 1, token].item() for i, token in enumerate(gold + [eos], len(ids)))
        tokens[t] += len(gold) + 1                                                   # EOS counts
    assert 0 < sum(map(sum, correct.values())) < len(rows)
    rows.insert(2, Row("task 2", "w1", [" w1", " w2"], 1))                           # a task of choices in between
    items, _ = encode(base.tokenizer, rows, ["task 0", "task 1", "task 2"])
    for max_tokens in (1, 10_000):
        cells = evaluate(base, adapters, items, max_tokens)
        assert "metric" not in cells[2] and cells[2]["rows"] == 1
        for t in (0, 1):
            assert cells[t]["correct"] == correct[t] and cells[t]["metric"] == "exact_match"
            assert cells[t]["acc_norm"] == sum(correct[t]) / 4
            assert cells[t]["log_loss"] == pytest.approx(nll[t] / tokens[t], rel=1e-4)


def test_training_on_completions_teaches_them_and_where_they_end(tmp_path):
    """Two tasks with the same prompts and other answers of one to three words."""
    base = tiny_base()
    portal = make_portal(base, modules=MODULES, tasks=("one", "two"), random=False)
    golds = {"one": [" w5", " w6 w7"], "two": [" w11 w12 w13", " w8 w9"]}
    rows = {task: [Row(task, f"w{i} w{i + 20}", [gold]) for i, gold in enumerate(texts)] for task, texts in golds.items()}
    both = {task: (r, r) for task, r in rows.items()}                                # to be learned by heart
    learner = portal_learner(portal, both, 60, 2, 2e-2)
    fit("test", [base], portal.adapters, [learner], both, epochs=60, batch_size=2, max_tokens=100, seed=0,
        log=tmp_path / "log.jsonl", z=portal.z)
    learner.load_best()
    prompts = [row.prompt for r in rows.values() for row in r]
    texts = base.generate(prompts, portal.adapters("tiny"), [0, 0, 1, 1], 10)
    assert texts == [text.strip() for text in golds["one"] + golds["two"]]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["held_acc_norm"] < log[-1]["held_acc_norm"] == 1


@pytest.fixture
def opened(world, monkeypatch):
    """A trained run with a task of choices, "one", and one of completions, "say"; -> its folder."""
    monkeypatch.setitem(train.REAL, "sizes", dict(d_z=8, d_e=4, hidden=16, d_c=12))
    monkeypatch.setitem(train.REAL, "lora", dict(epochs=1, batch_size=2, lr=1e-3, least=1, max_tokens=200))
    for split, n in (("train", 6), ("eval", 4)):
        rows = [{"task": "say", "prompt": f"w{i} w{n}", "completion": f" w{i + 7} w{i}"} for i in range(n)]
        (world / "data" / "say").mkdir(exist_ok=True)
        (world / "data" / "say" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--bases ./base-a --data data --tasks one,say --epochs 1 --batch-size 2 --lr 0.1 --run r"
    assert command(train, *flags.split()) == 0
    return world / "r"


def test_a_run_with_completions_end_to_end(opened, capsys):
    before = fingerprint(opened)
    assert command(evaluation, "--run", opened, "--show", "2") == 0
    assert fingerprint(opened) == before                                             # nothing fitted, nothing written
    out = capsys.readouterr().out
    base, tasks = load_base("./base-a"), ["one", "say"]
    adapters = adapters_of(opened, "portal", "base-a", base)
    rows = [row for task, splits in load_tasks(opened.parent / "data", tasks).items() for row in splits["eval"]]
    shown = [row for row in rows if f"base-a, {row.task}:\n    {row.prompt}\n" in out]
    assert [row.task for row in shown] == ["one"] * 2 + ["say"] * 2
    for item in encode(base.tokenizer, shown, tasks)[0]:
        block = out.split(f"{item.row.task}:\n    {item.row.prompt}\n")[1].split("\n\n")[0]
        if item.row.open:
            for what, with_ in (("before", None), ("after ", adapters)):
                text = base.generate([item.prompt], with_, [item.task], 16)[0].strip()
                assert f"  {what} {text!r}" in block
            assert f"  gold   {item.row.choices[0].strip()!r}" in block
        else:
            pairs = zip(*(score(base, a, [item], 100)[0] for a in (None, adapters)))
            for k, (choice, pair) in enumerate(zip(item.row.choices, pairs)):
                numbers = " ".join(f"{lp / len(choice):8.3f}" for lp in pair)
                assert pair[0] != pair[1]
                assert f"{'*' if k == item.row.gold else ' '} {numbers}  {choice!r}" in block
    assert command(evaluation, "--run", opened, "--task", "say", "--show", "1") == 0
    out = capsys.readouterr().out
    assert out.count("base-a, say:") == 1 and "base-a, one:" not in out

    assert command(evaluation, "--run", opened) == 0
    found = [json.loads(line) for line in (opened / "results.jsonl").read_text().splitlines()]
    contract = {"method", "base", "role", "task", "seed", "n", "select", "acc_norm", "log_loss", "rows", "seconds", "correct"}
    assert {(row["task"], row["method"]) for row in found} == {(t, m) for t in tasks for m in ("base", "lora", "portal")}
    for row in found:
        assert set(row) == contract | ({"metric"} if row["task"] == "say" else set())
        assert sum(unpack(row["correct"], row["rows"])) / row["rows"] == row["acc_norm"]
    assert "Exact match of the decoded text stands for acc_norm in say." in (opened / "results.md").read_text()


def test_inference_as_the_readme_has_it(tmp_path, monkeypatch):
    """The README's python blocks, run on a random toy: every row as the plain model with its task's LoRA has it."""
    section = (ROOT / "README.md").read_text().split("## One base, many tasks at inference")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))
    base, run = load_base("toy-qwen-l"), tmp_path / "out" / "toy"
    portal = make_portal(base, tasks=load_tasks(ROOT / "toy" / "data"))
    save_portal(run, portal)
    write_json(run / "portal.json", dict(config=vars(portal.cfg), bases=[], seed=0, data=""))
    monkeypatch.chdir(tmp_path)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    adapters = portal.adapters("toy-qwen-l").map(torch.detach)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy" / "toy-qwen-l", dtype=torch.float32)
    prompt, = {p for p in re.findall(r'\["(Words.*?)"\] \* 3', code)}
    texts = []
    for task in ("largest", "first", "animal"):
        handles = lora_hooks(model, *of_task(adapters, portal.cfg.tasks.index(task)))
        texts.append(base.tokenizer.decode(plain_greedy(model, base.tokenizer(prompt.replace("\\n", "\n")).input_ids, 1)))
        for h in handles:
            h.remove()
    assert names["texts"] == texts and len(set(texts)) > 1
    picked = []
    for row, got in zip(names["rows"], names["log_p"]):
        handles = lora_hooks(model, *of_task(adapters, portal.cfg.tasks.index(row.task)))
        ids, want = base.tokenizer(row.prompt).input_ids, []
        for choice in row.choices:
            new = base.tokenizer(choice).input_ids
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids + new])).logits[0].log_softmax(-1)
            want.append(sum(log_p[i - 1, token].item() for i, token in enumerate(new, len(ids))))
        for h in handles:
            h.remove()
        assert got == pytest.approx(want, rel=1e-3)
        picked.append(row.choices[want.index(max(want))])
    assert printed.getvalue() == f"{texts}\n{picked}\n"


def test_lift():
    assert lift(0.792, 0.667, 0.795) == pytest.approx(0.977, abs=1e-3)              # the write-up's 8B row
    assert lift(0.7, 0.6, 0.6) is None and lift(0.7, 0.6, 0.5) is None


def test_a_log_becomes_a_plot_of_its_numbers(tmp_path, monkeypatch, capsys):
    def epoch(what, number, loss, acc):
        append_jsonl(tmp_path / "log.jsonl", dict(event="epoch", what=what, epoch=number, loss=loss, held_acc_norm=acc))
    epoch("train", 1, 2.0, 0.25), epoch("train", 2, 1.0, 0.5), epoch("train", 3, 0.5, 0.25)
    epoch("port a", 1, 9.0, 0.0), epoch("port a", 2, 8.0, 0.0)
    append_jsonl(tmp_path / "log.jsonl", dict(event="something else"))
    epoch("train", 3, 0.25, 1.0)                                                     # epoch 3 again, after a kill
    epoch("port a", 1, 4.0, None)                                                    # refitted, with nothing held out
    assert log_curves(tmp_path / "log.jsonl") == {"train": {1: (2.0, 0.25), 2: (1.0, 0.5), 3: (0.25, 1.0)}, "port a": {1: (4.0, None)}}
    drawn, savefig = [], Figure.savefig
    def spy(figure, *args, **kwargs):
        drawn.extend({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes)
        return savefig(figure, *args, **kwargs)
    monkeypatch.setattr(Figure, "savefig", spy)
    assert command(evaluation, "--log", tmp_path / "log.jsonl") == 0
    assert drawn == [{"train": [[1, 2.0], [2, 1.0], [3, 0.25]], "port a": [[1, 4.0]]},
                     {"train": [[1, 0.25], [2, 0.5], [3, 1.0]], "port a": []}]
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    write_json(tmp_path / "portal.json", {})
    assert command(evaluation, "--log", "--run", tmp_path) == 0 and len(drawn) == 4
    (tmp_path / "log.jsonl").write_text('{"event": "epoch"}\n')
    capsys.readouterr()
    assert command(evaluation, "--log", "--run", tmp_path) == 2
    assert command(evaluation, "--log", tmp_path / "nowhere.jsonl") == 2
    assert re.search(r"log.jsonl:1: not a row.*\n.*nowhere.jsonl: not readable", capsys.readouterr().err)


def test_the_table_takes_the_last_row_of_a_cell(tmp_path):
    write_json(tmp_path / "portal.json", {"bases": [{"base": "a"}]})
    def row(method, task, acc, n=10):
        for select in ("best", "final"):
            append_jsonl(tmp_path / "results.jsonl", dict(method=method, base="a", role="seen", task=task, seed=0, n=n,
                                                          select=select, acc_norm=acc, log_loss=1.0, rows=5, seconds=0.1))
    for task, base, lora, portal in (("one", 0.2, 0.9, 0.1), ("two", 0.4, 0.7, 0.6)):
        row("base", task, base, n=0), row("lora", task, lora), row("portal", task, portal)
    row("portal", "one", 0.8)
    assert read_results(tmp_path)["a", 10, "portal", "best"]["one"]["acc_norm"] == 0.8
    write_results(tmp_path, ["one", "two"])
    text = (tmp_path / "results.md").read_text()
    assert "| a | seen | 10 | portal | 0.700 | 0.700 | 1.000 | 80% | 88% |" in text  # (.7 - .3) / (.8 - .3), .7 / .8
    assert "| one | 0.200 | 0.900 | 0.800 |" in text and (tmp_path / "a-n10.png").stat().st_size > 1000
