"""Tables and figures from made-up rows: every number against a plain loop; bad input; the results in the READMEs."""
import json, random, re
from statistics import fmean, stdev

import numpy as np
import pandas as pd
import pytest
from conftest import command, fingerprint
from matplotlib.figure import Figure

from experiments import tables
from experiments.cells import comparable, numbers, share
from experiments.tables import MARKERS, NOTE, TABLES, reached
from reports.results import pack, unpack

TASKS = {"one": 23, "two": 30, "three": 18}                                          # evaluation rows of each
ABOUT = dict(seen=["src"], within=["kin"], across=["far"], hardware="an abacus", commit="abc1234",
             commands={"6.1": "python -m experiments.paper main"}, searched={"lora": "five rates", "unheard": "of"})


def row(method, base, task, seed, correct, n=100, **more):
    return dict(experiment="main", method=method, variant="", base=base, role="seen" if base == "src" else "unseen",
                task=task, seed=seed, n=0 if method == "base" else n, select="best", acc_norm=sum(correct) / len(correct),
                log_loss=2 - sum(correct) / 30, rows=len(correct), seconds=0.1, correct=pack(correct)) | more


def drawn(p, task, *own):
    """Which rows are right: with probability p, most of the luck an evaluation row's own, the same for all."""
    rows, rest = random.Random(task), random.Random(repr((task, *own)))
    return [0.7 * rows.random() + 0.3 * rest.random() < p for _ in range(TASKS[task])]


def share_right(p, rows=20):
    return [k < round(p * rows) for k in range(rows)]


def main_rows():
    levels = dict(base=0.3, lora=0.85, portal=0.75, hypernet=0.7, cross_lora=0.35, copy=0.3, random=0.3)
    return [row(method, base, task, seed, drawn(p, task, method, base, seed), **(
                dict(commit="123abcd, abc1234") if (method, base) == ("portal", "kin") else {})) for base in ("src", "kin", "far")
            for method, p in levels.items() for seed in ((0,) if method == "base" else (0, 1, 2)) for task in TASKS]


def save(folder, rows, about=ABOUT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "about.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    monkeypatch.setattr("experiments.cells.REPLICATES", 150)


def made(name, folder):
    assert command(tables, name, "--results", folder) == 0
    return (folder / f"table-{name}.md").read_text()


def cells(text, *start):
    """The cells of the one line of a Markdown table that starts so."""
    found, = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return found.strip("| ").split(" | ")


@pytest.fixture
def drawings(monkeypatch):
    """-> the figures that are saved from here on"""
    seen, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (seen.append(figure), write(figure, *a, **kw)))
    return seen


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


def test_accuracy_sd_lift_and_intervals_equal_plain_loops(tmp_path):
    rows = main_rows()
    text = made("6.3", save(tmp_path, rows))
    found = {(r["method"], r["seed"], r["task"]): r for r in rows if r["base"] == "far"}
    seeds = {m: sorted({s for method, s, _ in found if method == m}) for m, _, _ in found}
    rng, replicates = np.random.default_rng(0), {m: [0] * 150 for m in seeds}
    for task, N in TASKS.items():
        right = {m: [unpack(found[m, s, task]["correct"], N) for s in seeds[m]] for m in seeds}
        draws = rng.multinomial(N, [1 / N] * N, 150)
        for r in range(150):
            rows_drawn = [i for i in range(N) for _ in range(draws[r][i])]
            assert len(rows_drawn) == N
            for m in seeds:
                hits = [correct[i] for correct in right[m] for i in rows_drawn]
                replicates[m][r] += sum(hits) / len(hits) / len(TASKS)
    def interval(of_what):
        return "[{:.1f}, {:.1f}]".format(*(percentile([100 * of_what({m: v[r] for m, v in replicates.items()})
                                                       for r in range(150)], q) for q in (2.5, 97.5)))
    mean = {}
    for m in seeds:
        macro = [fmean(found[m, s, task]["acc_norm"] for task in TASKS) for s in seeds[m]]
        loss = [fmean(found[m, s, task]["log_loss"] for task in TASKS) for s in seeds[m]]
        mean[m] = fmean(macro)
        lift = (mean[m] - mean["base"]) / (mean["lora"] - mean["base"]) if "lora" in mean else None
        assert cells(text, "far", m)[2:] == [
            str(len(macro)), *(f"{fmean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "") for v in (macro, loss)),
            "-" if m == "base" else
            f"{100 * lift:.1f}% " + interval(lambda a: (a[m] - a["base"]) / (a["lora"] - a["base"])),
            "{:.1f}% ".format(100 * mean[m] / fmean(fmean(found["lora", s, t]["acc_norm"] for t in TASKS) for s in (0, 1, 2)))
            + interval(lambda a: a[m] / a["lora"])]
    methods = ["base", "lora", "cross_lora", "copy", "random", "hypernet", "portal"]
    assert cells(text, "task") == ["task", *methods]
    for task in TASKS:
        assert cells(text, task)[1:] == [f"{fmean(found[m, s, task]['acc_norm'] for s in seeds[m]):.3f}" for m in methods]
    assert "`command not recorded`; an abacus; commit abc1234; seeds 0, 1, 2; selected epoch; 18 to 30 evaluation rows" in text
    assert "Searched for lora, on rows held out of train: five rates" in text and not re.search("unheard|src|kin", text)
    sources = made("6.1", tmp_path)
    assert len(cells(sources, "src", "portal")) == 7 and "`python -m experiments.paper main`; an abacus" in sources
    within = made("6.2", tmp_path)                                                   # rows that say their own commit
    assert "| kin | portal |" in within and "; commit abc1234, 123abcd; seeds 0, 1, 2;" in within
    longer = [row("portal", "far", task, 0, [True] * N, variant="8 epochs") for task, N in TASKS.items()]
    assert cells(made("6.3", save(tmp_path, rows + longer)), "far", "portal 8 epochs")[2:4] == ["1", "1.000"]  # a line of its own
    assert cells(made("6.3", tmp_path), "far", "portal") == cells(text, "far", "portal")


def measured(**methods):
    """Of {method: [which rows are right, for each seed]} on one task."""
    rows = [row(m, "far", "one", seed, correct) | {"correct": correct, "series": m}
            for m, each in methods.items() for seed, correct in enumerate(each)]
    return numbers(comparable(pd.DataFrame(rows), [], ""))


def test_the_bootstrap_is_paired():
    base, lora = share_right(0.2, 40), share_right(0.6, 40)
    found = measured(base=[base], lora=[lora, lora[::-1]], same=[lora, lora[::-1]], others=[lora[::-1], lora[::-1]])
    assert share(found, "lora") == share(found, "same") == (1, 1, 1) and share(found, "base") == (0, 0, 0)
    value, low, high = share(found, "others")
    assert value == pytest.approx(1) and low < 0.8 and high > 1.2                    # as often right, on other rows
    assert share(found, "same", zero="nothing") == (1, 1, 1)


def test_no_share_of_a_gain_that_may_be_nothing(tmp_path):
    half = measured(base=[share_right(0.5, 40)], lora=[share_right(0.9, 40)], m=[share_right(0.7, 40)])
    assert share(half, "m")[0] == pytest.approx(0.5)
    others = [k % 2 == 0 for k in range(38)] + [False] * 2                           # 19 of 40 instead of 17, on other rows
    noise = measured(base=[share_right(0.425, 40)], lora=[others], m=[share_right(0.5, 40)])
    assert share(noise, "m") is None and share(noise, "m", zero="nothing")[0] == pytest.approx(20 / 19)
    assert share(measured(base=[others], lora=[others], m=[others]), "m") is None
    assert share(measured(base=[share_right(0.9, 40)], lora=[share_right(0.5, 40)]), "lora") is None
    rows = [row(m, "src", "one", 0, [(k + shift) % 2 == 0 for k in range(20)])
            for shift, m in enumerate(("base", "lora", "portal"))]
    text = made("6.1", save(tmp_path, rows))
    assert cells(text, "src", "portal")[-2] == "-" and "\"-\": not measured, or a share of a gain that is smaller" in text
    rows += [row(m, "src", "two", 0, share_right(p)) for m, p in (("base", 0.1), ("lora", 0.9), ("portal", 0.5))]
    text = made("6.1", save(tmp_path, rows))
    assert cells(text, "src", "portal")[-2] != "-" and "src: on one the LoRA gains less than the half-width" in text


def test_rows_that_do_not_say_what_was_right(tmp_path):
    rows = [{k: v for k, v in r.items() if k not in ("correct", "experiment", "variant")} for r in main_rows()]
    text = made("6.2", save(tmp_path, rows))
    assert "[9" not in text.split(NOTE)[0] and re.fullmatch(r"\d+\.\d%", cells(text, "kin", "portal")[5])
    assert "paired bootstrap, where results.jsonl says which rows were right" in text
    for some in (r for r in rows if r["task"] == "two" and r["method"] == "portal"):  # on other rows: no comparison
        some["rows"] = 29
    text = made("6.2", save(tmp_path, rows))
    assert "kin: without two, not measured on the same rows by all." in text and "| two |" not in text


def test_the_last_line_of_a_cell_wins_and_the_selected_epoch(tmp_path):
    rows = [row(m, "src", "one", 0, share_right(p)) for m, p in (("base", 0.2), ("lora", 0.8), ("portal", 0.1))]
    rows.append(row("portal", "src", "one", 0, share_right(0.5), seconds=9.0))
    rows.append(row("portal", "src", "one", 0, share_right(0.9), select="final"))
    rows.insert(0, row("lora", "src", "one", 0, share_right(0.1), select="final"))
    rows.append(row("lora", "src", "one", 0, share_right(1.0), n=50))                # not of this table
    text = made("6.1", save(tmp_path, rows))
    assert cells(text, "src", "portal")[3] == "0.500" and cells(text, "src", "lora")[3] == "0.800"


def test_reached():
    assert reached({50: 0.1, 200: 0.9, 100: 0.895, 1000: 0.9}, 0.9) == 200
    assert reached({50: 0.1, 200: 0.9, 100: 0.895}, 0.9 - 0.005) == 100
    assert reached({50: 0.1}, 0.2) is None and reached({}, 0) is None


def test_sweep(tmp_path, drawings):
    accs = {("lora", ""): {10: (0.2, 0.3), 100: (0.5, 0.7), 1000: (0.8, 0.8)}, ("lora", "iso"): {10: (0.2, 0.2), 100: (0.3, 0.3)},
            ("portal", ""): {10: (0.79, 0.80), 100: (0.9, 0.9)}, ("portal", "all modules"): {10: (0.5, 0.5), 100: (0.8, 0.8)}}
    rows = [row(m, "far", "one", seed, share_right(acc, 100), n, experiment="sweep", variant=v, select="best",
                log_loss=n / 100 + (m == "lora"))
            for (m, v), by_n in accs.items() for n, pair in by_n.items() for seed, acc in enumerate(pair)]
    rows += [row("base", "far", "one", 0, share_right(0.2, 100), experiment="sweep"),
             row("portal", "far", "one", 0, share_right(1.0, 100), 10, experiment="sweep", select="final")]  # not shown
    costs = {"portal 10": {"tokens": 5_000, "flops": 2e9}, "lora 1000": {"tokens": 2_000_000}, "portal all modules 100": {}}
    about = {**ABOUT, "costs": {"far": costs}, "parameters": {"far": {"portal": 123, "portal all modules": 456}}}
    text = made("6.4", save(tmp_path, rows, about))
    first, second = text.split("far, log_loss:")
    assert cells(first, "portal")[1:] == ["0.795 ± 0.007", "0.900 ± 0.000", "-"]
    assert cells(first, "lora")[1:] == ["0.250 ± 0.071", "0.600 ± 0.141", "0.800 ± 0.000"]
    second, reach = second.split("mean acc_norm, is 0.800.")
    assert cells(second, "lora iso")[1:] == ["1.100 ± 0.000", "2.000 ± 0.000", "-"]
    assert cells(reach, "portal") == ["portal", "123", "100", "10 (100x)", "100, 10", "5,000 (400x)", "2e+09", "2 of 2 n"]
    assert cells(reach, "portal all modules")[1:] == ["456", "100", "100 (10x)", "100, 100", "-", "-", "2 of 2 n"]
    assert cells(reach, "lora")[1:] == ["-", "1000", "1000", "1000, 1000", "2,000,000", "-", "-"]
    assert cells(reach, "lora iso")[2:] == [*["not reached"] * 2, "-, -", *["not reached"] * 2, "0 of 2 n"]
    assert "; selected epoch;" in text
    assert "| one | 100 | 0.900 ± 0.000 | 0.800 ± 0.000 | 0.600 ± 0.141 | 0.300 ± 0.000 |" in reach  # a task
    assert "| one | 1000 | - | - | 0.800 ± 0.000 | - |" in reach
    axes, = [figure.axes for figure in drawings]
    for side, ys in zip(axes, ((0.795, 0.8, 0.8), (0.1, 1, 11))):
        stars = [tuple(line.get_xydata()[0]) for line in side.lines if line.get_marker() == "*"]
        assert np.array(stars) == pytest.approx(np.array([*zip((10, 100, 1000), ys)])) and side.get_xscale() == "log"
    bar = axes[0].containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([0.795 - 0.00707, 0.795 + 0.00707], abs=1e-4)
    assert "![far: acc_norm and log-loss against n](table-6.4-far.png)" in text
    assert (tmp_path / "table-6.4-far.png").read_bytes().startswith(b"\x89PNG")


def test_ablations(tmp_path):
    rows = [row("portal", base, task, seed, share_right(acc + 0.1 * seed), experiment="ablation", variant=variant)
            for variant, accs in (("", (0.8, 0.7, 0.6)), ("no FiLM", (0.5, 0.6, 0.3)))
            for base, acc in zip(("src", "kin", "far"), accs) for task in ("one", "two") for seed in (0, 1)]
    rows += [row("portal", base, task, 0, share_right(0.4), experiment="ablation", variant="half done")
             for base in ("src", "kin") for task in ("one", "two")]
    rows += [row(m, "kin", task, 0, share_right(p), experiment=experiment) for experiment, m, task, p in (
        ("main", "base", "one", 0.1), ("main", "lora", "one", 1.0), ("sweep", "lora", "one", 0.7),
        ("sweep", "lora", "two", 1.0), ("ablation", "base", "two", 0.3))]
    text = made("ablations", save(tmp_path, rows))
    def spread(*values, form=".3f"):
        return f"{fmean(values):{form}} ± {stdev(values):.3f}"
    assert cells(text, "as shipped") == ["as shipped", "2", spread(0.8, 0.9), spread(0.65, 0.75),
                                         spread(2 - 16 / 30, 2 - 18 / 30), spread(2 - 13 / 30, 2 - 15 / 30),
                                         *["+0.000 ± 0.000"] * 2, cells(text, "as shipped")[-1]]
    film, half = cells(text, "no FiLM"), cells(text, "half done")
    assert film[6] == spread(-0.3, -0.3, form="+.3f") and film[7] == spread(-0.2, -0.2, form="+.3f")
    assert film[-1].startswith("lift 42.9% [") and film[-1].endswith("(two, kin, seed 0)")  # (.6 - .3) / (1 - .3)
    assert "| base |" not in text and "lora" not in text
    only_one = save(tmp_path, [r for r in rows if (r["method"], r["task"]) != ("lora", "two")])
    assert cells(made("ablations", only_one), "no FiLM")[-1].startswith("lift 55.6% [")  # (.6 - .1) / (1 - .1): main's LoRA
    sources = save(tmp_path, rows + [row(m, "src", "one", 0, share_right(p)) for m, p in (("base", 0.3), ("lora", 1.0))])
    film = cells(made("ablations", sources), "no FiLM")[-1]
    assert film.startswith("lift 28.6% [") and film.endswith("(one, src, seed 0)")   # (.5 - .3) / (1 - .3)
    loss = f"{2 - 8 / 30:.3f}"
    assert half[1:8] == ["1", "0.400", "0.400", loss, loss, "-0.400", "-0.300"]      # of the ported bases on kin alone
    save(tmp_path, [r for r in rows if r["method"] != "lora"])
    assert cells(made("ablations", tmp_path), "no FiLM")[-1] == "acc 0.300 (one, far, seed 0)"


def test_tasks(tmp_path):
    accs = {"one": (0.2, 0.8, 0.8), "two": (0.2, 0.7, 0.6), "three": (0.5, 0.5, 0.1)}
    rows = [row(m, base, task, seed, share_right(p + (m == "portal") * (0.1 * seed - 0.05 * (base == "far")), 100))
            for task, ps in accs.items() for base in ("src", "far") for m, p in zip(("base", "lora", "portal"), ps)
            for seed in (0, 1)]
    rows += [row("lora", "src", "one", 5, share_right(0.0, 100), experiment="carry")]  # another experiment's
    text = made("tasks", save(tmp_path, rows))
    assert [cell.split(" [")[0] for name in ("one", "two", "three") for cell in cells(text, name)[1:]] == [
        "108.3%", "100.0%", "90.0%", "80.0%", "-", "-"]                              # two, far: (.6 - .2) / (.7 - .2)
    worst = r"two on far: 80\.0% \[[\d., ]+\]\."
    assert re.search(rf"The worst of 4 lifts, one a task and base: {worst} Below 90%: {worst}\n", text)


def test_carry(tmp_path, drawings):
    levels = {"carried": 0.2, "target": 0.6, "mean": 0.25, "shuffled": 0.15}
    rows = [row("portal", "far", "one", seed, share_right(p + gain * (v == "carried"), 100), 50, experiment="carry", variant=v,
                training_tasks=T, recipe="wide")
            for T, gain in ((2, 0.1), (8, 0.3)) for v, p in levels.items() for seed in (0, 1)]
    rows += [row(m, "far", "one", 0, share_right(p, 100), 50, experiment="carry") for m, p in (("base", 0.2), ("lora", 0.8))]
    rows.append(row("lora", "far", "one", 7, share_right(0.1, 100), 50, experiment="carry"))  # a seed in which nothing was carried
    rows += [row("portal", "far", "two", 0, share_right(p), experiment="choice", variant="choice", recipe=recipe)
             for recipe, p in (("", 0.5), ("wide", 0.6))]
    text = made("carry", save(tmp_path, rows))
    assert "on, none 0.500, wide 0.600." in text
    assert "far, wide, n = 50:" in text
    found = cells(text, "8")
    assert found[:8] == ["8", "2", "0.200", "0.800", "0.500 ± 0.000", "0.600 ± 0.000", "0.250 ± 0.000", "0.150 ± 0.000"]
    assert found[8].startswith("50.0% [") and found[9].startswith("75.0% [")
    (left, right), = [figure.axes for figure in drawings]
    assert left.lines[0].get_xydata() == pytest.approx(np.array([(2, 100 / 6), (8, 50)])) and left.get_xscale() == "log"
    assert right.lines[0].get_xydata() == pytest.approx(np.array([(2, 25), (8, 75)]))


def refused(capsys, *argv):
    """-> the one line that a bad command ends with"""
    capsys.readouterr()
    assert command(tables, *argv) == 2
    said, = capsys.readouterr().err.splitlines()
    return said


def test_a_carried_latent_needs_its_number_of_training_tasks(tmp_path, capsys):
    save(tmp_path, [row("portal", "far", "one", 0, share_right(0.5), experiment="carry", variant="carried")])
    assert "no rows that can be compared" in refused(capsys, "carry", "--results", tmp_path)


def test_bad_input_is_one_line(tmp_path, capsys):
    good = main_rows()
    folder = save(tmp_path / "r", good)
    before = fingerprint(folder)
    assert "6.4" in refused(capsys, "7", "--results", folder)
    assert "r: table carry: no rows of {'experiment': 'carry'}; there are main" in refused(capsys, "carry", "--results", folder)
    assert "nowhere/about.json: not readable" in refused(capsys, "6.1", "--results", tmp_path / "nowhere")
    wrong = dict(seed="0"), dict(rows=0), dict(correct="fff"), dict(acc_norm=0.123), dict(correct=5), dict(recipe=["no text"])
    for bad in ("{", "[]", "5", "{}", json.dumps(good[0])[:-2], *(json.dumps(good[0] | more) for more in wrong)):
        (folder / "results.jsonl").write_text(json.dumps(good[0]) + "\n" + bad + "\n")
        assert "results.jsonl:2: not a result row (" in refused(capsys, "6.1", "--results", folder)
    save(folder, [{key: value for key, value in good[0].items() if key != "rows"}])
    assert "'rows'" in refused(capsys, "6.1", "--results", folder)
    (folder / "results.jsonl").unlink()
    assert "results.jsonl: not readable" in refused(capsys, "all", "--results", folder)
    save(folder, [])
    said = refused(capsys, "all", "--results", folder)
    assert all(f"table {name}: no rows of" in said and "there are none" in said for name in TABLES)
    for bad in ([], {}, {"seen": "src"}, {**ABOUT, "commands": ["x"]}, {**ABOUT, "hardware": 3}):
        save(folder, good, bad)
        assert "about.json: accepted is an object with seen" in refused(capsys, "6.1", "--results", folder)
    save(folder, good, {"seen": ["src"]})
    assert "about.json names no base under within" in refused(capsys, "6.2", "--results", folder)
    assert fingerprint(save(folder, good)) == before                                 # no table, no half of one
    assert command(tables, "--results", folder) == 0                                 # all of them
    out = capsys.readouterr().out
    assert "left out: table carry: no rows" in out
    assert {p.name for p in folder.glob("table-*")} == {f"table-{name}.md" for name in ("6.1", "6.2", "6.3", "tasks")}


def test_the_command_accepts_what_there_is(tmp_path, monkeypatch, capsys):
    accepted = "6.1 6.2 6.3 6.4 ablations competition tasks carry all readme".split()
    assert accepted == [*TABLES, "all", "readme"]
    assert re.findall(r"[\w.]+", refused(capsys, "seven").split("choose from")[1]) == accepted
    assert "--results: not accepted with readme" in refused(capsys, "readme", "--results", tmp_path)
    called = []
    monkeypatch.setattr(tables, "readme", lambda: called.append("readme"))
    monkeypatch.setattr(tables, "write", lambda names, folder: called.append((list(names), folder)))
    for argv in ((), ("readme",), ("6.2",), ("all", "--results", tmp_path), ("--results", tmp_path)):
        assert command(tables, *argv) == 0
    toy = tables.ROOT / "results" / "toy"
    assert called == ["readme", "readme", (["6.2"], toy), *[([*TABLES], tmp_path)] * 2]


def test_the_readme_keeps_the_rest_byte_for_byte(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    path, all_of_it, sweep = tmp_path / "README.md", tmp_path / "results" / "README.md", dict(experiment="sweep")
    old = "# ü\r\n\nbefore  \n{}\nold\n{}\r\n\nafter, no new line at the end".format(*MARKERS).encode()
    path.write_bytes(old)
    assert "no folder in it has an about.json" in refused(capsys, "readme")
    lora = [row("lora", "far", "one", 0, share_right(p), n, **sweep) for n, p in ((10, 0.5), (100, 0.8))]
    about = {**ABOUT, "title": "Results: as real as it gets", "note": "A note.", "commands": {"6.3": "python real.py"}}
    save(tmp_path / "results" / "real", main_rows() + lora, about)
    save(tmp_path / "results" / "toy", main_rows(), {**ABOUT, "kind": "toy"})         # stands first
    (tmp_path / "results" / "reading.md").write_text("# How to read\n\nWith care.\n")
    for _ in range(2):                                                               # the second time changes nothing
        assert command(tables, "readme") == 0
        new, whole = path.read_bytes(), all_of_it.read_text()
        start, end = (new.index(marker.encode()) for marker in MARKERS)
        assert new[:start] == old[:old.index(MARKERS[0].encode())] and new[end:] == old[old.index(MARKERS[1].encode()):]
    searched = "".join(f"- Searched for {m}, on rows held out of train: {text}\n" for m, text in ABOUT["searched"].items())
    toy, real = whole.split(f"\n## Results: as real as it gets\n\nA note.\n\n{searched}\n### Table 6.1: ")
    assert re.match(r"<!-- .* -->\n\n# How to read\n\nWith care.\n", toy)
    assert f"\n## toy\n\n{searched}\n### Table 6.1: " in toy
    for link, part in (("real/table-6.4-far.png", real), ("real/table-6.4.md", real), ("toy/table-tasks.md", toy)):
        assert f"]({link})" in part and (tmp_path / "results" / link).exists()
    assert "The worst of 9 lifts" in whole and "| task |" not in whole and cells(real, "kin", "copy")
    text = new[start:end].decode()                                                   # the short table
    assert len(text.splitlines()) <= 16 and "old" not in text
    assert "\n- toy: `command not recorded`\n- real: `python real.py`\n" in text
    for folder, part in (("toy", toy), ("real", real)):
        for name, base in (("6.2", "kin"), ("6.3", "far")):
            *shown, lift = cells(text, folder, f"[{base}](results/{folder}/table-{name}.md)")[2:]
            assert shown[:3] == ["one, two, three", "100", "3"] and lift == cells(part, base, "portal")[5]
            assert shown[3:] == [cells(part, base, m)[3] for m in ("base", "lora", "cross_lora", "portal")]
    assert "src" not in text and (tmp_path / "results" / "toy" / "table-6.2.md").exists()
    for wrong in (b"no markers", new + MARKERS[0].encode(), "{1}\n{0}\n".format(*MARKERS).encode()):
        path.write_bytes(wrong)
        assert "accepted are one line <!-- results" in refused(capsys, "readme") and path.read_bytes() == wrong
    path.unlink()
    refused(capsys, "readme")


def test_the_short_table_leaves_out_what_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("\n".join(MARKERS))
    many = [row(m, "far", f"task {k}", 0, share_right(p)) for m, p in (("base", 0.1), ("lora", 0.9), ("portal", 0.7))
            for k in range(4)]                                                       # no Cross-LoRA, nothing on "kin"
    save(tmp_path / "results" / "real", many)
    carried = row("portal", "far", "one", 0, [True], experiment="carry", variant="carried", training_tasks=2)
    save(tmp_path / "results" / "carried", [carried])
    assert command(tables) == 0
    _, found = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")]  # below its head
    assert found.startswith("| real | [far](results/real/table-6.3.md) | 4 | 100 | 1 |")
    assert " | 0.100 | 0.900 | - | 0.700 | 75.0% [" in found


def test_competition(tmp_path):
    def rows(variant, accs):
        return [row("portal", base, task, 0, share_right(acc), variant=variant, experiment="competition")
                for base in ("src", "far") for task, acc in accs.items()]
    alone = row("portal", "src", "two", 0, share_right(0.9), variant="as printed, the worst task alone", experiment="alone")
    cell = lambda norm, cosine: dict(norm=norm, cosine=cosine)
    about = {**ABOUT, "gradients": {"as printed": dict(one=cell(1.5, -0.25), two=cell(0.5, 0.125))}}
    text = made("competition", save(tmp_path, [*rows("", dict(one=1, two=0.8)), *rows("as printed", dict(one=0.9, two=0.4)),
                                               alone], about))
    printed = cells(text, "as printed")
    assert printed[2] == "0.650" and printed[6] == "-0.250"
    assert "trained alone and among all" in text and cells(text, "two", "src") == ["two", "src", "0.900", "0.400"]
    lines = text.splitlines()
    worst_first = [line for line in lines if re.match(r"\| (one|two) \| \d", line)]
    assert worst_first == ["| two | 0.400 | 0.500 | 0.125 |", "| one | 0.900 | 1.500 | -0.250 |"]
