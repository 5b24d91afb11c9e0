"""The cells of results.jsonl, made comparable, and their two spreads: over training seeds and over evaluation rows.

    ± sd          over training seeds (sample sd; one seed has none)
    [low, high]   over samples of evaluation rows (95%, 2,000 bootstrap replicates)

The bootstrap is paired: a replicate draws its evaluation rows once, for all methods and seeds. A row that is hard for
one method is hard for most, so most of that noise cancels in the recovered lift, (acc - base) / (LoRA - base).

`rows` is the data frame that `read` returns, with a column `series`, the method and its variant; `cells` are comparable
rows, one for each (series, n, seed, task).
"""
from statistics import fmean, stdev

import numpy as np
import pandas as pd

from reports.results import unpack
from runtime.files import BadInput, each_line, read_json

REPLICATES = 2000
ABOUT = dict(seen=list, within=list, across=list, commands=dict, parameters=dict, costs=dict, searched=dict,
             gradients=dict, hardware=str, commit=str, title=str, note=str, kind=str)
CELL = dict(experiment=str, method=str, variant=str, base=str, role=str, task=str, seed=int, n=int, training_tasks=int,
            recipe=str)
ROW = dict(CELL, select=str, acc_norm=(int, float), log_loss=(int, float), rows=int, commit=str)
DEFAULTS = dict(experiment="main", variant="", training_tasks=0, recipe="", commit="")       # keys eval.py leaves out


def read(folder):
    """Returns results.jsonl as a data frame and the object in about.json; BadInput names the file and the line.

    The last line of a cell counts, and the selected epoch ("best") before the last one. `correct`: a list of bools.
    """
    about, cells = read_json(folder / "about.json"), {}
    if not isinstance(about, dict) or "seen" not in about or not all(
            isinstance(about.get(key, kind()), kind) for key, kind in ABOUT.items()):
        raise BadInput(f"{folder / 'about.json'}: accepted is an object with seen, a list, and perhaps more of "
                       + ", ".join(f"{key} ({kind.__name__})" for key, kind in ABOUT.items()))
    def add(line):
        row = {**DEFAULTS, **line}
        for key, kind in ROW.items():
            if not isinstance(row[key], kind) or key == "rows" and row[key] < 1:
                raise ValueError(f"{key}: {row[key]!r}")
        if "correct" in row:
            row["correct"] = unpack(row["correct"], row["rows"])
            if abs(sum(row["correct"]) / row["rows"] - row["acc_norm"]) > 1e-6:
                raise ValueError(f"acc_norm {row['acc_norm']}, but {sum(row['correct'])} rows are correct")
        cell = tuple(row[key] for key in CELL)
        if row["select"] == "best" or cells.get(cell, row)["select"] != "best":
            cells[cell] = row
    each_line(folder / "results.jsonl", add, "a result row")
    rows = pd.DataFrame(cells.values(), columns=[*ROW, "correct"])
    return rows.assign(series=(rows["method"] + " " + rows["variant"]).str.strip()), about


def of(rows, **want):
    """The rows with these values."""
    for key, value in want.items():
        rows = rows[rows[key] == value]
    return rows


def comparable(rows, notes, where):
    """The rows of the tasks that every series, n and seed has on as many evaluation rows; a note names the others."""
    cells = rows.drop_duplicates(["series", "n", "seed", "task"], keep="last")
    fits, tasks = cells.groupby(["series", "n", "seed"]).ngroups, cells.groupby("task", sort=False)["rows"]
    same = tasks.size().eq(fits) & tasks.nunique().eq(1)
    if not same.all():
        notes.append(f"{where}: without {', '.join(same.index[~same])}, not measured on the same rows by all.")
    return cells[cells["task"].isin(same.index[same])]


def macro(cells, key="acc_norm"):
    """[series, n, seed]: the mean over the tasks."""
    return cells.groupby(["series", "n", "seed"], sort=False)[key].agg(fmean)


def over_seeds(cells, aggregate=fmean, key="acc_norm"):
    """[series]: an aggregate of the seeds' macro averages."""
    return macro(cells, key).groupby("series", sort=False).agg(aggregate)


def numbers(cells):
    """A data frame with a column for each series, and "nothing", of accuracy 0: first the accuracy, mean over tasks
    and seeds, then R replicates of it, which are NaN if some of its rows lack `correct`."""
    draws = {series: np.zeros(REPLICATES) for series in [*cells["series"], "nothing"]}
    rng = np.random.default_rng(0)
    for _, on_task in cells.groupby("task", sort=False):
        N = on_task["rows"].iloc[0]
        drawn = rng.multinomial(N, np.full(N, 1 / N), REPLICATES).astype(float)      # [R, N]: how often a row is drawn
        for series, own in on_task.groupby("series"):
            right = np.array([np.broadcast_to(correct, N) for correct in own["correct"]], float)     # [seeds, N]
            draws[series] += drawn @ right.sum(0) / right.size / cells["task"].nunique()
    accs = {**over_seeds(cells), "nothing": 0}
    return pd.DataFrame({series: np.r_[acc, draws[series]] for series, acc in accs.items()})


def share(measured, method, whole="lora", zero="base"):
    """(method - zero) / (whole - zero), by default the recovered lift: (value, low, high), NaN if not replicated.

    None if whole - zero is smaller than the half-width of its interval, since it may then be nothing.
    """
    if not {method, whole, zero} <= set(measured):
        return None
    gain = measured[whole] - measured[zero]
    low, high = gain[1:].quantile([0.025, 0.975])
    if gain[0] < np.fmax((high - low) / 2, 1e-12):
        return None
    lift = (measured[method] - measured[zero]) / gain
    return lift[0], *lift[1:].quantile([0.025, 0.975])


def task_lifts(rows, cells):
    """{(base, task, series): lift}, the bare base and the LoRA being those of "main", or else of any experiment."""
    lifts = {}
    rows = rows.sort_values("experiment", key=lambda names: names == "main", kind="stable")    # the last one stays
    for (base, task), own in cells.groupby(["base", "task"], sort=False):
        beside = of(rows, base=base, task=task)
        measured = numbers(comparable(pd.concat([
            own[~own["series"].isin(["base", "lora"])], of(beside, series="base"),
            of(beside, series="lora", n=own["n"].max())]), [], ""))
        lifts |= {(base, task, series): share(measured, series) for series in own["series"].unique()}
    return lifts


def spread(values, form=".3f"):
    """Mean ± sd."""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def percent(value):
    """What `share` returned, as text."""
    point, low, high = (f"{round(100 * v, 1) + 0:.1f}" for v in value or [0] * 3)    # + 0: no -0.0
    return f"{point}%" + f" [{low}, {high}]" * (low != "nan") if value else "-"


def markdown(lines, title=""):
    """The lines of a Markdown table from a data frame or from dicts, "-" where a value is missing, under its title."""
    frame = pd.DataFrame(lines, dtype=object)
    frame = frame.map(lambda x: "-" if pd.isna(x) else f"{x:.3f}" if isinstance(x, float) else str(x))
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (frame.columns, *frame.values))
    return [*(["", title, ""] if title else []), head, "|---" * len(frame.columns) + "|", *body]


class Page:
    """What a table is drawn from, and what it has so far: lines, notes and the cells it used."""

    def __init__(self, name, folder, rows, about):
        self.name, self.folder, self.rows, self.about, self.file = name, folder, rows, about, f"table-{name}.md"
        self.command = f"`{about.get('commands', {}).get(name, 'command not recorded')}`"
        self.main, self.details, self.short, self.notes, self.used = [], [], [], [], rows[:0]

    def find(self, **want):
        """The rows with these values; BadInput if there are none."""
        found = of(self.rows, **want)
        if found.empty:
            raise BadInput(f"no rows of {want}; there are {', '.join(sorted(set(self.rows['experiment']))) or 'none'}")
        return found

    def comparable(self, rows, where):
        """The comparable cells of `rows`, counted as used."""
        cells = comparable(rows, self.notes, where)
        self.used = pd.concat([self.used, cells])
        return cells

    def foot(self):
        """The command, hardware, commits, seeds, epochs and evaluation rows of the table, as a line."""
        used, about = self.used, self.about
        commits = ", ".join(used["commit"].replace("", about.get("commit", "not recorded"))).split(", ")
        epochs = sorted(set(used[used["n"] > 0]["select"].replace({"best": "selected", "final": "last"})))
        seeds, rows = sorted(set(used["seed"])), sorted({used["rows"].min(), used["rows"].max()})
        return (f"{self.command}; {about.get('hardware', 'hardware not recorded')}; "
                f"commit {', '.join(dict.fromkeys(commits))}; seeds {', '.join(map(str, seeds))}; "
                f"{' or '.join(epochs)} epoch; {' to '.join(map(str, rows))} evaluation rows a task.")
