"""The toy on disk: build.py writes the same tasks, and the bases do every skill by name and no task."""
import pytest

from bases import TOY, load_base
from data import load_tasks
from runtime.files import ROOT
from toy import build


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(ROOT / "toy" / "data")


def test_fourteen_tasks_and_two_kept_aside(tasks):
    aside = load_tasks(ROOT / "toy" / "data_aside")
    assert len(tasks) == 14 and sorted(aside) == sorted(build.ASIDE) and set(tasks) | set(aside) == set(build.SKILLS)
    for task, splits in {**tasks, **aside}.items():
        assert len(splits["train"]) == 1000 and len(splits["eval"]) == 200
        assert not {r.prompt for r in splits["train"]} & {r.prompt for r in splits["eval"]}
        for row in splits["train"][:50] + splits["eval"]:
            words = row.prompt.removeprefix("Words: ").removesuffix("\nAnswer:").split(", ")
            assert row.choices[row.gold] == " " + build.SKILLS[task](words) and len(set(row.choices)) == 4
            assert all(c[1:] in words for c in row.choices) and task not in row.prompt


def test_the_tasks_on_disk_are_those_that_the_builder_writes(tmp_path):
    build.write_tasks(build, {task: tmp_path / task for task in ("largest", "fourth")})
    for path in tmp_path.glob("*/*"):
        folder = ROOT / "toy" / ("data_aside" if path.parent.name in build.ASIDE else "data")
        assert path.read_bytes() == (folder / path.parent.name / path.name).read_bytes()
    assert len(list(tmp_path.glob("*/*"))) == 4


@pytest.mark.parametrize("name", TOY)
def test_a_base_knows_the_skills_and_not_the_tasks(name, tasks):
    assert (TOY[name] / "model.safetensors").stat().st_size < 1_000_000
    base = load_base(name)
    accuracy = build.accuracy(base, [row for skill in build.SKILLS for row in build.questions(build, skill, 100)])
    assert len(accuracy) == 16 and min(accuracy.values()) >= 0.95, accuracy
    rows = [row for splits in tasks.values() for row in splits["eval"][:50]]
    assert sum(build.accuracy(base, rows).values()) / 14 <= 0.45  # refuses a prompt that is cut


def test_the_bases_are_unlike():
    small, medium, large, gemma = bases = [load_base(name) for name in TOY]
    assert len({base.dims["q"] for base in bases}) == len(TOY) == 4
    assert large.layers > medium.layers and large.dims["q"][0] > medium.dims["q"][0]
    qwen_ids, gemma_ids = (base.tokenizer("Words: red, cat\nAnswer:").input_ids for base in (small, gemma))
    assert qwen_ids != gemma_ids and gemma_ids[0] == gemma.tokenizer.bos_token_id
    assert small.tokenizer.bos_token_id is None
    assert "sliding_attention" in gemma.config.layer_types
