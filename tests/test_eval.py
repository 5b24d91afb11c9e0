"""acc_norm and log_loss against a naive loop over choices; ties; lift; the table."""
import pytest
import torch
from conftest import lora_hooks, tiny_base, tiny_model
from test_bases import of_task, random_adapters

from cli import append_jsonl, write_json
from data import Row, encode
from eval import evaluate, lift, read_results, write_results

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


def test_lift():
    assert lift(0.792, 0.667, 0.795) == pytest.approx(0.977, abs=1e-3)              # the write-up's 8B row
    assert lift(0.7, 0.6, 0.6) is None and lift(0.7, 0.6, 0.5) is None


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
