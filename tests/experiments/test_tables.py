"""Tables and figures from made-up lines: every number against a plain loop; the results in the READMEs."""
import random, re
from statistics import fmean, stdev

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import tables
from reports.results import pack, unpack
from runtime.files import ROOT, BadInput, append_jsonl

TASKS = {"one": 23, "two": 30, "three": 18}                                          # evaluation rows of each


def line(method, n, rounds, seed, search, correct, loss, lr=0.1, knob="", **more):
    return dict(method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search, tokens=1, flops=2e9, seconds=3.4,
                hardware="an abacus", commit="c", task="one", acc_norm=sum(correct) / len(correct), log_loss=loss, base="toy-gemma",
                bases="", rows=len(correct), correct=pack(correct)) | more


def of(method, rounds, right, total=20, n=32, seeds=(0, 1), **more):
    """Lines of a method with so many right answers."""
    return [line(method, n, rounds, s, False, [True] * right + [False] * (total - right), 1.0, **more) for s in seeds]


def drawn(p, task, *own):
    """Which rows are right: with probability p, most of the luck an evaluation row's own, the same for all."""
    rows, rest = random.Random(task), random.Random(repr((task, *own)))
    return [0.7 * rows.random() + 0.3 * rest.random() < p for _ in range(TASKS[task])]


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    monkeypatch.setattr(tables, "REPLICATES", 150)


def cells(text, *start):
    """The cells of the one line of a Markdown table that starts so."""
    found, = [row for row in text if row.startswith("| " + " | ".join(start) + " |")]
    return found.strip("| ").split(" | ")


def test_pack():
    assert pack([True, False, False, True, True]) == "98" and pack([False] * 4 + [True]) == "08" and pack([]) == ""
    for rows in range(1, 40):
        correct = [random.Random(rows * k).random() < 0.3 for k in range(rows)]
        bits = "".join("01"[c] for c in correct).ljust(-(-rows // 4) * 4, "0")
        assert pack(correct) == hex(int(bits, 2))[2:].zfill(-(-rows // 4)) and unpack(pack(correct), rows) == correct
    for text, rows in (("98", 4), ("98", 9), ("98", 3), ("99", 5), ("9g", 5), ("9A", 8), (" 9", 8)):
        with pytest.raises(ValueError):
            unpack(text, rows)


def percentile(values, q):
    values, place = sorted(values), q / 100 * (len(values) - 1)
    low = int(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def test_accuracy_sd_lift_and_intervals_equal_plain_loops():
    levels = {"bare base": (0.3, 0), "lora": (0.85, 9), "portal": (0.75, 9)}
    lines = [line(m, 32, rounds, seed, False, own := drawn(p, task, m, seed), 2 - sum(own) / 30, task=task)
             for m, (p, rounds) in levels.items() for seed in ((0,) if not rounds else (0, 1, 2)) for task in TASKS]
    text = tables.markdown(tables.table(tables.results(lines)))
    right = {m: {task: [unpack(x["correct"], N) for x in lines if (x["method"], x["task"]) == (m, task)] for task, N in TASKS.items()}
             for m in levels}
    rng, replicates = np.random.default_rng(0), {m: [0] * 150 for m in levels}
    for task, N in TASKS.items():
        draws = rng.multinomial(N, [1 / N] * N, 150)
        for r in range(150):
            rows = [i for i in range(N) for _ in range(draws[r][i])]
            assert len(rows) == N
            for m in levels:
                replicates[m][r] += fmean(correct[i] for correct in right[m][task] for i in rows) / len(TASKS)
    def with_interval(of_what, form):
        low, high = (percentile([of_what({m: v[r] for m, v in replicates.items()}) for r in range(150)], q) for q in (2.5, 97.5))
        return f"{of_what(mean):{form}} [{low:{form}}, {high:{form}}]"
    mean = {m: fmean(fmean(correct) for task in TASKS for correct in right[m][task]) for m in levels}
    for m, (_, rounds) in levels.items():
        seeds = range(len(right[m]["one"]))
        losses = [fmean(x["log_loss"] for x in lines if (x["method"], x["seed"]) == (m, s)) for s in seeds]
        accs = [fmean(fmean(right[m][task][s]) for task in TASKS) for s in seeds]
        got = cells(text, m, str(rounds))
        assert got[5:7] == [f"{fmean(v):.3f}" + (f" ± {stdev(v):.3f}" if rounds else "") + star
                            for v, star in ((accs, " *" if m == "lora" else ""), (losses, ""))]
        assert got[7] == ("-" if m == "lora" else with_interval(lambda a: a[m] - a["lora"], "+.3f"))
        assert got[8] == with_interval(lambda a: 100 * (a[m] - a["bare base"]) / (a["lora"] - a["bare base"]), ".1f")
        assert got[9] == f"{min(fmean(fmean(c) for c in right[m][task]) for task in TASKS):.3f}" and got[10:] == ["2", "3"]


def test_the_bootstrap_is_paired_and_of_the_same_rows():
    half = [True] * 24 + [False] * 16
    lines = [*of("bare base", 0, 8, 40, seeds=[0]), line("lora", 32, 3, 0, False, half, 1), line("same", 32, 3, 0, False, half, 1),
             line("others", 32, 3, 0, False, half[::-1], 1)]
    found = tables.numbers(tables.results(lines))
    assert tables.interval(found["same, 3"] - found["lora, 3"]) == "+0.000 [+0.000, +0.000]"
    assert tables.lift(found, "same, 3", "lora, 3") == "100.0 [100.0, 100.0]"
    point, low, high = map(float, re.findall(r"[\d.-]+", tables.lift(found, "others, 3", "lora, 3")))
    assert point == 100 and low < 80 and high > 120                                  # as often right, on other rows
    for wrong in (of("lora", 3, 9, 10, seeds=[1]), of("lora", 3, 9, seeds=[0], task="two")):
        with pytest.raises(BadInput, match="not measured on the same evaluation rows"):
            tables.numbers(tables.results(lines + wrong))


def test_no_share_of_a_gain_that_may_be_nothing():
    def lift_of(bare, lora, portal):
        found = tables.numbers(tables.results([line(m, 32, r, 0, False, correct, 1) for m, r, correct in (
            ("bare base", 0, bare), ("lora", 3, lora), ("portal", 3, portal))]))
        return tables.lift(found, "portal, 3", "lora, 3")
    def first(k):
        return [True] * k + [False] * (40 - k)
    others = [k % 2 == 0 for k in range(38)] + [False] * 2                           # 19 of 40 instead of 17, on other rows
    assert lift_of(first(20), first(36), first(28)).startswith("50.0 [")
    assert lift_of(first(17), others, first(20)) == lift_of(others, others, others) == lift_of(first(36), first(20), first(20)) == "-"


def test_the_table_compares_with_the_best_lora_and_says_what_comes_near():
    lines = [*of("lora", 3, 10), *of("lora", 6, 16), *of("portal", 3, 15), *of("bare base", 0, 10, seeds=[0])]
    text = [row for row in tables.markdown(tables.table(tables.results(lines))) if row.startswith(("| lora |", "| portal |"))]
    text = [row.strip("| ").split(" | ") for row in text]
    assert [row[7].split(" [")[0] for row in text] == ["-0.300", "-", "-0.050"]
    assert [row[5].endswith(" *") for row in text] == [False, True, False]
    assert [row[8].split(" [")[0] for row in text] == ["0.0", "100.0", "83.3"]       # of 0.5 to 0.8
    many = [*of("lora", 9, 390, 400, flops=3e9), *of("lora", 6, 399, 400, 125, flops=2e9), *of("lora", 9, 400, 400, 125, flops=8e9),
            *of("portal", 3, 398, 400, flops=1e9), *of("portal", 9, 400, 400, flops=4e9), *of("portal", 9, 397, 400, 125, flops=1e9),
            *of("source", 9, 400, 400, 125, flops=None)]
    assert [[*map(str, row.values())] for row in tables.reach(tables.results(many))] == [
        ["portal", "32", "3", "1", "0.33"], ["lora", "32", "9", "3", "1.00"], ["lora", "125", "6", "2", "1.00"]]


def test_a_wider_search_replaces_what_was_measured():
    lines = [*of("lora", 3, 1, 2, lr=0.1), line("lora", 32, 3, 0, True, [True, True], 0.1, 0.05), *of("lora", 3, 1, 2, 125, [0], lr=0.1),
             *of("lora", 3, 2, 2, seeds=[0], lr=0.05)]
    rows = tables.results(lines)
    assert rows[["n", "lr", "seed", "acc_norm"]].values.tolist() == [[125, 0.1, 0, 0.5], [32, 0.05, 0, 1.0]]


def test_a_study_is_drawn_and_fills_a_page(tmp_path, monkeypatch):
    """The first series beside the others, for the numbers of rows that were measured; the curves' points."""
    lines = [x for n in (32, 125) for x in (*of("lora", 3, 10, n=n, flops=1e9), *of("lora", 6, 16, n=n), *of("portal", 3, 15, n=n))]
    old = [{k: v for k, v in x.items() if k not in ("base", "bases")} | dict(bases="a to b") for x in lines]
    (tmp_path / "real").mkdir()
    append_jsonl(tmp_path / "real" / "study.jsonl", *old)
    page = "# Q\n\n<!-- real 32: portal, 3; the best LoRA; portal, 9 -->\n| old |\n\nText.\n"
    text = tables.filled(page, tmp_path)
    assert tables.filled(text, tmp_path) == text and "old" not in text and text.endswith("\n\nText.\n")
    assert cells(text.splitlines(), "b", "32", "portal, 3")[3:6] == ["0.750 ± 0.000", "1.000 ± 0.000", "-"]
    assert cells(text.splitlines(), "b", "32", "lora, 6")[5].startswith("+0.050 [") and "| 125 |" not in text and "portal, 9 |" not in text
    with pytest.raises(BadInput, match="nothing of this was measured"):
        tables.filled(page.replace("real 32", "real 8"), tmp_path)
    drawings, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (drawings.append(figure), write(figure, *a, **kw)))
    tables.draw(tmp_path / "real", tables.read(tmp_path / "real"))
    axes, = [figure.axes for figure in drawings]
    assert [[c.get_label() for c in a.containers] for a in axes] == [["lora"]] * 2   # of several numbers of rounds
    assert axes[0].lines[0].get_xydata().tolist() == [[1, 1], [2, 1]] and (tmp_path / "real" / "study.png").exists()
    assert "From a to b; tasks: one." in (tmp_path / "real" / "study.md").read_text()


def test_the_pages_hold_what_was_measured(monkeypatch):
    """Every number in a generated table of the two READMEs is that of the lines under results/."""
    monkeypatch.setattr(tables, "REPLICATES", 2000)
    for page in (*(ROOT / "results" / name for name in ("README.md", "everyday-ports.md")), ROOT / "README.md"):
        text = page.read_text()
        assert tables.filled(text, ROOT / "results") == text
    found, = re.findall(f"{tables.MARKERS[0]}.*?{tables.MARKERS[1]}", text, re.S)
    assert found == tables.short(ROOT / "results") and len(found.splitlines()) <= 18
