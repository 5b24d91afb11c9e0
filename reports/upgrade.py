"""The upgrade report: what changes in each task where a team moves from one base of a run to another."""
from collections import Counter

import numpy as np

from bases import find_base
from reports.results import draw, drawing, read_results, unpack
from runtime.files import BadInput, write_json, write_whole

MARGIN, REPLICATES, SEED = 0.03, 2000, 0
VERDICTS = {"moved": "tab:green", "within noise": "tab:gray", "lost": "tab:red"}
SCORES, FLIPS = ("before", "after", "difference"), ("negative_flips", "positive_flips")
RULE = f"""\
Intervals: 95%, paired bootstrap over the evaluation rows ({REPLICATES} replicates, seed {SEED}). Before rows are drawn,
one that turns wrong and one that turns right are added: a few rows of which none flips are no proof.

- **lost**: the whole interval of the difference is below 0
- **moved**: not lost, and the whole interval is above -{MARGIN}
- **within noise**: neither; more evaluation rows would tell
"""


def set_flags(args, run, provenance):
    """Sets the flags that --against stands for: the old base first and, unless --bases names others, all ported ones.
    Raises BadInput."""
    held = {tag: p for tag, p in provenance.items() if tag == p["base"]}             # without a sweep's smaller samples
    old = find_base(held, args.against, run)
    if args.methods or args.show:
        raise BadInput("--against compares PorTAL's adapters; --methods and --show do not go with it")
    new = [find_base(held, spec, run) for spec in args.bases or [tag for tag, p in held.items() if p.get("ported")]]
    args.bases, args.methods = [old, *(tag for tag in new if tag != old)], ["portal"]
    if len(args.bases) < 2:
        raise BadInput(f"--against {old}: no base to move to among {', '.join(held)}; python port.py --to adds one")


def measured(run, base, n, on):
    """Returns {task: row of results.jsonl} of PorTAL on a base, fitted on n rows a task: of those measured on the rows
    and files with the digests `on` {task: digest}."""
    cells = read_results(run).get((base, n, "portal", "best"), {}) if (run / "results.jsonl").exists() else {}
    return {task: row for task, row in cells.items() if "correct" in row and row.get("measured_on") == on[task]}


def resampled(task, before, after):
    """Returns replicates [3, R] of the score before, the score after and their difference; see RULE."""
    pairs = np.array([[*before, True, False], [*after, False, True]], float)         # [2, n]
    n = pairs.shape[1]
    draws = np.random.default_rng([SEED, *task.encode()]).multinomial(n, np.full(n, 1 / n), REPLICATES)  # [R, n]
    before, after = pairs @ draws.T / n                                              # [R] each
    return np.stack([before, after, after - before])


def verdict(low, high):
    """Returns which of VERDICTS an interval of the difference means."""
    return "lost" if high < 0 else "moved" if low > -MARGIN else "within noise"


def summary(before, after, replicates):
    """Returns {what: {"value", "low", "high"}} of SCORES from the two scores and the replicates [3, R]."""
    bounds = np.quantile(replicates, [0.025, 0.975], axis=1).T.tolist()
    return {what: dict(value=float(value), low=low, high=high)
            for what, value, (low, high) in zip(SCORES, (before, after, after - before), bounds)}


def compare(old, new, before, after, rows):
    """Returns the report of a move from base `old` to base `new` as a JSON-able dict. before, after: {task: row of
    results.jsonl}; rows: the evaluation rows. Raises BadInput if the two were not measured on these rows."""
    tasks, replicates = {}, []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        if not all(task in cells and cells[task]["rows"] == len(own) for cells in (before, after)):
            raise BadInput(f"--against, task {task}: {old} and {new} were not measured on the same evaluation rows")
        was, now = (np.array(unpack(cells[task]["correct"], len(own))) for cells in (before, after))
        replicates.append(resampled(task, was, now))
        found = summary(was.mean(), now.mean(), replicates[-1])
        tasks[task] = dict(
            rows=len(own), metric=after[task].get("metric", "acc_norm"), **found,
            negative_flips=int((was & ~now).sum()), positive_flips=int((now & ~was).sum()),
            verdict=verdict(found["difference"]["low"], found["difference"]["high"]),
            now_wrong=[row.prompt for row, lost in zip(own, was & ~now) if lost])
    means = (np.mean([cell[when]["value"] for cell in tasks.values()]) for when in ("before", "after"))
    total = dict(rows=len(rows), **summary(*means, np.mean(replicates, axis=0)),
                 **{key: sum(cell[key] for cell in tasks.values()) for key in FLIPS},
                 verdicts=dict(Counter(cell["verdict"] for cell in tasks.values())))
    return dict(old=old, new=new, margin=MARGIN, replicates=REPLICATES, seed=SEED, tasks=tasks, total=total)


def table(report):
    """Returns the lines of the report's table, a line a task and one for all."""
    def line(name, cell, verdict):
        scores = ["{value:{s}.3f} [{low:{s}.3f}, {high:{s}.3f}]".format(s="+" * (what == "difference"), **cell[what])
                  for what in SCORES]
        flips = [f"{cell[key]} ({cell[key] / cell['rows']:.1%})" for key in FLIPS]
        return "| " + " | ".join([name.replace("|", r"\|"), str(cell["rows"]), *scores, *flips, verdict]) + " |"
    total = report["total"]
    verdicts = ", ".join(f"{total['verdicts'][name]} {name}" for name in VERDICTS if name in total["verdicts"])
    return ["| task | rows | before | after | difference | right, now wrong | wrong, now right | verdict |",
            "|---" * 8 + "|", *(line(task, cell, cell["verdict"]) for task, cell in report["tasks"].items()),
            line("*mean; sum of flips*", total, verdicts)]


def plot(path, report):
    """Draws the difference of every task with its interval, coloured by verdict."""
    tasks = report["tasks"]
    with drawing(path, 3 + 0.6 * len(tasks)) as axes:
        for name, colour in VERDICTS.items():
            own = [(k, cell["difference"]) for k, cell in enumerate(tasks.values()) if cell["verdict"] == name]
            for label, (k, of) in zip([name, *[None] * len(tasks)], own):            # a line of the legend
                axes.plot([k, k], [of["low"], of["high"]], color=colour)
                axes.plot(k, of["value"], "o", color=colour, label=label)
        for y, style in ((0, "-"), (-MARGIN, ":")):
            axes.axhline(y, color="black", linewidth=0.8, linestyle=style)
        axes.set_title(f"{report['old']} to {report['new']}", parse_math=False)      # a name may hold $
        axes.set_ylabel("difference")
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", parse_math=False)
        axes.legend(frameon=False)


def write(run, found, rows):
    """Writes upgrade-<old>-to-<new>.json, .md and .png into a run folder, for the first base of `found` {name: {task:
    row of results.jsonl}} and each other, and prints the Markdown. Raises BadInput: see compare."""
    (old, before), *others = found.items()
    for new, after in others:
        report, name = compare(old, new, before, after, rows), f"upgrade-{old}-to-{new}"
        exact = [task for task, cell in report["tasks"].items() if cell["metric"] == "exact_match"]
        text = (f"# From {old} to {new}\n\n" + "\n".join(table(report)) + f"\n\n![](<{name}.png>)\n\n"
                "Before and after: acc_norm of the base with PorTAL's adapters" + ", exact match for " * bool(exact)
                + f"{', '.join(exact)}. Prompts answered right and now wrong: `now_wrong` in {name}.json.\n\n{RULE}")
        write_json(run / f"{name}.json", report)
        write_whole(run / f"{name}.md", lambda p: p.write_text(text, encoding="utf-8"))
        draw(plot, run / f"{name}.png", report)
        print(text)
