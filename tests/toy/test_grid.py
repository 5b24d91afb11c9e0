"""The second toy: a reader that knows strings alone finds every answer, and the bases do all skills by name."""
import random, re

import pytest

from bases import load_base
from toy import build
from tasks.rows import Row, load_tasks
from toy import grid


def read(text, name, kind):
    """The word of `kind` in `name`'s record, by string matching alone."""
    record, = re.findall(rf"\b{name} ([a-z ]+)", text)
    word, = [word for word in record.split() if word in grid.KINDS[kind]]
    return word


def test_ninety_six_skills_of_twelve_names_and_eight_kinds():
    assert len(grid.SKILLS) == 96 and set(grid.SKILLS.values()) == {(n, k) for n in grid.NAMES for k in grid.KINDS}
    words = [*grid.NAMES, *grid.KINDS, *(word for own in grid.KINDS.values() for word in own)]
    assert len(words) == len(set(words)) == 12 + 8 + 64


def test_the_gold_choice_is_what_the_text_says():
    for task, (name, kind) in grid.SKILLS.items():
        splits = grid.task_rows(task, 30, 10)
        assert len(splits["train"]) == 30 and len(splits["eval"]) == 10
        assert not {r["prompt"] for r in splits["train"]} & {r["prompt"] for r in splits["eval"]}
        for row in splits["train"] + splits["eval"]:
            text = row["prompt"].removeprefix("Words: ").removesuffix("\nAnswer:")
            assert row["choices"][row["gold_idx"]] == " " + read(text, name, kind)
            assert len(set(row["choices"])) == 4 and set(row["choices"]) <= {" " + w for w in re.split("[; ]+", text)}
            record, = [r.split()[1:] for r in text.split("; ") if r.split()[0] == name]
            rival, = {choice[1:] for choice in row["choices"]} - set(record)  # the kind alone does not exclude it
            assert rival in grid.KINDS[kind] and set(record) <= {choice[1:] for choice in row["choices"]}
            assert kind not in text and [len(r.split()) for r in text.split("; ")] == [4, 4, 4]


def test_the_answers_of_pre_training_are_what_the_list_says():
    rng, seen = random.Random(0), set()
    for _ in range(100):
        pieces = grid.document(rng)
        for (question, _), (text, is_answer) in zip(pieces, pieces[1:]):
            if is_answer:
                name, kind = question.strip("\n:").split()
                assert text == " " + read(pieces[0][0], name, kind)
                seen.add((name, kind))
    assert len(seen) == 96


def test_the_command_writes_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["grid.py", "--tasks", str(tmp_path)])
    build.main(grid)
    assert len(list(tmp_path.iterdir())) == 96
    for task, splits in load_tasks(tmp_path, ["ann_colour", "leo_sport"]).items():
        rows = {split: [Row(r["task"], r["prompt"], r["choices"], r["gold_idx"]) for r in own]
                for split, own in grid.task_rows(task).items()}
        assert splits == rows and (len(rows["train"]), len(rows["eval"])) == (300, 100)


@pytest.mark.parametrize("name", grid.BASES)
def test_a_base_knows_the_skills_and_not_the_tasks(name):
    assert (grid.FOLDER / name / "model.safetensors").stat().st_size < 1_000_000
    base = load_base(str(grid.FOLDER / name))
    skills = list(grid.SKILLS)[::5]
    accuracy = build.accuracy(base, [row for skill in skills for row in build.questions(grid, skill, 25)])
    assert len(accuracy) == 20 and min(accuracy.values()) >= 0.95, accuracy
    rows = [Row(task, r["prompt"], r["choices"], r["gold_idx"]) for task in skills
            for r in grid.task_rows(task, 1, 20)["eval"]]
    assert sum(build.accuracy(base, rows).values()) / 20 <= 0.45  # refuses a prompt that is cut


def test_the_target_is_unlike_its_sources():
    *sources, target = [load_base(str(grid.FOLDER / name)) for name in (*grid.SOURCES, grid.TARGET)]
    assert len({base.groups["q"][2:] for base in (*sources, target)}) == 3
    assert len(sources[0].blocks) != len(sources[1].blocks)
    assert target.config.model_type.startswith("gemma3") and {b.config.model_type for b in sources} == {"qwen3"}
    prompt = "Words: ann red\nAnswer:"
    ids = target.tokenizer(prompt).input_ids
    assert ids[0] == target.tokenizer.bos_token_id and ids[1:] != sources[0].tokenizer(prompt).input_ids
