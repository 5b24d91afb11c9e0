"""The toy as committed: the tasks are what the recipe writes, the bases know every skill by name and no task."""
import json, random

import pytest
import torch

from bases import TOY, load_base
from cli import ROOT
from data import encode, load_tasks
from eval import evaluate
from toy import build

DATA = ROOT / "toy" / "data"


def test_fourteen_tasks_and_two_kept_aside():
    tasks, aside = load_tasks(DATA), load_tasks(ROOT / "toy" / "data_aside")
    assert len(tasks) == 14 and sorted(aside) == sorted(build.ASIDE) and set(tasks) | set(aside) == set(build.SKILLS)
    for task, splits in {**tasks, **aside}.items():
        assert len(splits["train"]) == 1000 and len(splits["eval"]) == 200
        assert not {r.prompt for r in splits["train"]} & {r.prompt for r in splits["eval"]}
        for row in splits["train"][:50] + splits["eval"]:
            words = row.prompt.removeprefix("Words: ").removesuffix("\nAnswer:").split(", ")
            assert row.choices[row.gold] == " " + build.SKILLS[task](words) and len(set(row.choices)) == 4
            assert all(c[1:] in words for c in row.choices) and task not in row.prompt


def test_the_recipe_writes_the_committed_tasks():
    for task in ("largest", "fourth"):
        rng = random.Random(f"task {task}")
        folder = ROOT / "toy" / ("data_aside" if task in build.ASIDE else "data") / task
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        assert [build.task_row(rng, task) for _ in range(20)] == rows[:20]


@pytest.mark.parametrize("name", TOY)
@torch.no_grad()
def test_a_base_knows_the_skills_and_not_the_tasks(name):
    assert (TOY[name] / "model.safetensors").stat().st_size < 1_000_000
    tokenizer, model = build.load(name)
    accuracy = {skill: build.asked_by_name(tokenizer, model, skill) for skill in build.SKILLS}
    assert min(accuracy.values()) >= 0.95, accuracy
    base, tasks = load_base(name), load_tasks(DATA)
    items, cut = encode(base.tokenizer, [row for splits in tasks.values() for row in splits["eval"][:50]], list(tasks))
    cells = evaluate(base, None, items, 4096)
    assert not cut and sum(c["acc_norm"] for c in cells.values()) / 14 <= 0.45


def test_the_bases_are_unlike():
    bases = {name: load_base(name) for name in TOY}
    assert len({b.dims["q"] for b in bases.values()}) == 4
    assert bases["toy-qwen-l"].layers > bases["toy-qwen-m"].layers and bases["toy-qwen-l"].dims["q"][0] > bases["toy-qwen-m"].dims["q"][0]
    qwen, gemma = (bases[n].tokenizer("Words: red, cat\nAnswer:").input_ids for n in ("toy-qwen-s", "toy-gemma"))
    assert qwen != gemma and gemma[0] == bases["toy-gemma"].tokenizer.bos_token_id and bases["toy-qwen-s"].tokenizer.bos_token_id is None
    assert "sliding_attention" in bases["toy-gemma"].config.layer_types
