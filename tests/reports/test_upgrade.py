"""The upgrade report: numbers beside a plain loop, verdicts at their boundaries, refusals, and a move from end to end."""
import random

import numpy as np
import pytest
from conftest import command, edit, one_line

import eval as evaluation, port
from reports import upgrade
from reports.results import pack, unpack
from runtime.files import BadInput, read_json, read_jsonl
from tasks.rows import Row

TASKS = {"a_$x$|y": ([1, 1, 1, 0, 0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0, 0, 1, 0]), "b": ([0, 1] * 40, [1, 1] * 40)}


def constructed(tasks=TASKS):
    """Evaluation rows, and the rows of results.jsonl before and after."""
    rows = [Row(task, f"{task} {k}", [" a", " b"]) for task, (was, _) in tasks.items() for k in range(len(was))]
    cells = [{task: dict(rows=len(own[side]), correct=pack(own[side])) for task, own in tasks.items()} for side in (0, 1)]
    return rows, *cells


def test_numbers_are_those_of_a_plain_loop(tmp_path, capsys):
    rows, before, after = constructed()
    report = upgrade.compare("old", "new", before, after, rows)
    rng, means = random.Random(1), []
    for task, (was, now) in TASKS.items():
        cell, n = report["tasks"][task], len(was)
        assert cell["before"]["value"] == sum(was) / n and cell["after"]["value"] == sum(now) / n and cell["rows"] == n
        assert cell["difference"]["value"] == pytest.approx((sum(now) - sum(was)) / n)
        assert cell["negative_flips"] == sum(w > v for w, v in zip(was, now)) == len(cell["now_wrong"])
        assert cell["positive_flips"] == sum(w < v for w, v in zip(was, now))
        assert cell["now_wrong"] == [f"{task} {k}" for k in range(n) if was[k] > now[k]]
        pairs = [*zip(was, now), (1, 0), (0, 1)]
        drawn = [[rng.choice(pairs) for _ in pairs] for _ in range(4000)]
        means.append([[sum(own) / len(pairs) for own in zip(*((w, v, v - w) for w, v in one))] for one in drawn])
        for what, values in zip(upgrade.SCORES, np.array(means[-1]).T):              # two bootstraps: a row or so apart
            assert (cell[what]["low"], cell[what]["high"]) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1.2 / len(pairs))
    total = report["total"]
    assert total["difference"]["value"] == pytest.approx((-0.2 + 0.5) / 2) and total["rows"] == 90
    assert (total["negative_flips"], total["positive_flips"]) == (3, 41)
    assert (total["difference"]["low"], total["difference"]["high"]) == pytest.approx(
        np.quantile(np.mean(means, axis=0)[:, 2], [0.025, 0.975]), abs=0.02)
    assert report == upgrade.compare("old", "new", before, after, rows)              # seeded

    upgrade.write(tmp_path, {"old": before, "new": after}, rows)
    text = (tmp_path / "upgrade-old-to-new.md").read_text()
    assert text in capsys.readouterr().out and read_json(tmp_path / "upgrade-old-to-new.json") == report
    assert r"| a_$x$\|y | 10 | 0.700 [" in text and "| 3 (30.0%) | 1 (10.0%) | within noise |" in text
    assert "| +0.500 [+0." in text and "| 1 moved, 1 within noise |" in text and "above -0.03" in text
    assert (tmp_path / "upgrade-old-to-new.png").stat().st_size > 1000


def test_verdicts_at_their_boundaries():
    assert upgrade.verdict(-0.2, -0.001) == upgrade.verdict(-0.02, -0.001) == "lost"     # also of a loss within the margin
    assert upgrade.verdict(-0.2, 0.0) == upgrade.verdict(-0.03, 0.1) == "within noise"
    assert upgrade.verdict(-0.0299, 0.0) == upgrade.verdict(0.01, 0.2) == "moved"
    def of(was, now):
        rows, *cells = constructed({"t": (was, now)})
        return upgrade.compare("o", "n", *cells, rows)["tasks"]["t"]["verdict"]
    assert of([1] * 300, [1] * 300) == "moved" and of([1] * 9, [1] * 9) == "within noise"  # nine rows prove nothing
    assert of([1] * 100, [0] * 20 + [1] * 80) == "lost"


def test_other_rows_are_refused():
    rows, before, after = constructed()
    for changed in ({**after, "b": dict(rows=79, correct=pack([1] * 79))}, {"b": after["b"]}):
        with pytest.raises(BadInput, match="old and new were not measured on the same evaluation rows"):
            upgrade.compare("old", "new", before, changed, rows)


def test_a_move_from_end_to_end(trained, capsys):
    """What is missing, or was measured on other rows, is measured; the rest is not measured again."""
    assert command(evaluation, "--against", "base-a") == 2
    one_line(capsys, ["--against base-a", "no base to move to", "port.py"])
    assert command(port, "--to", "./base-c", "--n", "4,8", "--epochs", "1") == 0
    for _ in range(2):
        assert command(evaluation, "--against", "base-a") == 0
        lines = read_jsonl(trained / "results.jsonl")
        assert {(row["base"], row["method"], row["n"]) for row in lines} == {("base-a", "portal", 8), ("base-c", "portal", 8)}
        assert len(lines) == 2 * 2 * 3                                               # selected and last epoch, three tasks
    report = read_json(trained / "upgrade-base-a-to-base-c.json")
    for task, cell in report["tasks"].items():
        was, now = (unpack(row["correct"], 6) for base in ("base-a", "base-c") for row in lines
                    if (row["base"], row["task"], row["select"]) == (base, task, "best"))
        assert (cell["before"]["value"], cell["after"]["value"]) == (sum(was) / 6, sum(now) / 6)
    assert len(report["tasks"]) == 3 and not (trained / "upgrade-base-a-to-base-b.json").exists()
    edit(trained.parents[1] / "data" / "two" / "eval.jsonl", 1, {"prompt": "w1 w2 w3 w4"})
    assert command(evaluation, "--against", "base-a", "--bases", "base-b", "--tasks", "two") == 0
    assert len(read_jsonl(trained / "results.jsonl")) == 12 + 2 * 2 and set(read_json(trained / "upgrade-base-a-to-base-b.json")["tasks"]) == {"two"}
    for flags, words in ((["--against", "base-z"], ["base-z", "base-a, base-b, base-c"]), (["--against", "base-a", "--show", 1], ["--show"])):
        capsys.readouterr()
        assert command(evaluation, *flags) == 2
        one_line(capsys, words)
