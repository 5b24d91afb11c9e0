"""The everyday tasks: what the folder holds, which rows are held out, and that make.py writes the same rows again."""
import importlib.metadata, json, re
from collections import Counter

import pytest
from tasks.rows import as_read, load_tasks
from runtime.files import ROOT

FOLDER = ROOT / "tasks/everyday"
DATA = load_tasks(FOLDER)
PINNED = (ROOT / "requirements-bench.txt").read_text()
PINS = re.findall(r"^(Faker|Babel|num2words|inflect|pycountry)==(\S+)", PINNED, re.M)
NEW_FRAME = re.compile(r"(\nGive the [^\n]+:| \| [^\n]+ =|\nA:)$")
CHOICES = {"intent", "language", "quantity", "tone"}


def lines(task, split):
    return [json.loads(line) for line in (FOLDER / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def make():
    """make.py, whose rows depend on the versions of its packages."""
    installed = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    if any(installed.get(name.lower()) != version for name, version in PINS):
        pytest.skip("needs the packages of requirements-bench.txt in these versions")
    from tasks.everyday import make
    return make


def test_sixteen_tasks_in_two_megabytes():
    assert len(DATA) == 16 and len(PINS) == 5
    assert {task for task, splits in DATA.items() if not splits["train"][0].open} == CHOICES
    assert {tuple(map(len, splits.values())) for splits in DATA.values()} == {(1000, 200)}
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.suffix in (".jsonl", ".py", ".md")) <= 2_000_000


@pytest.mark.parametrize("task", DATA)
def test_rows(task):
    train, evaluation = DATA[task].values()
    prompts = {split: {as_read(row.prompt) for row in rows} for split, rows in DATA[task].items()}
    assert [len(own) for own in prompts.values()] == [1000, 200] and not prompts["train"] & prompts["eval"]
    for row in train + evaluation:
        assert row.prompt == row.prompt.strip()
        assert all(re.fullmatch(r" \S(.*\S)?", choice) for choice in row.choices)  # a line after one space
    if task in CHOICES:
        assert len({tuple(row.choices) for row in train + evaluation}) == 1
        held_out = [row for row, line in zip(evaluation, lines(task, "eval")) if line.get("held_out")]
        for rows in (train, evaluation, held_out):
            gold = Counter(row.gold for row in rows)
            assert len(gold) == len(train[0].choices) and max(gold.values()) - min(gold.values()) <= 1


@pytest.mark.parametrize("task", DATA)
def test_a_third_of_the_evaluation_rows_has_new_wordings(task):
    evaluation = lines(task, "eval")
    assert sum(row.get("held_out", False) for row in evaluation) == 67
    for row in evaluation + lines(task, "train"):
        assert bool(NEW_FRAME.search(row["prompt"])) == row.get("held_out", False)


def test_the_new_wordings_are_new(make):
    for task in make.TASKS:
        for label in make.CHOICES[task][1] if task in make.CHOICES else [None]:
            (known_frames, known), (new_frames, new) = make.wordings(task, label)
            assert len(known) >= 5 and len(new) >= 2 and not {*known, *known_frames} & {*new, *new_frames}
            assert not any(NEW_FRAME.search(frame.format(text="", cue="c")) for frame in known_frames)


@pytest.mark.parametrize("task", ["plural", "quantity", "contact"])
def test_the_same_rows_again(make, task, tmp_path):
    for split in make.ROWS:
        make.write(tmp_path / task / f"{split}.jsonl", make.rows(task, split))
        assert (tmp_path / task / f"{split}.jsonl").read_bytes() == (FOLDER / task / f"{split}.jsonl").read_bytes()
