"""The table of a run, results.md, and its plots, drawn from results.jsonl alone."""
from reports.results import draw, hardware, plot, read_results
from runtime.files import read_json, write_whole
from score import lift

METHODS = ("base", "lora", "lora_iso", "cross_lora", "copy", "random", "hypernet", "portal")  # in this order
ABOUT = ("Macro averages over the tasks. `best`: the epoch selected on rows held out of train; `final`: the last "
         "epoch. Lift and retention are of the selected epoch, against the LoRA fitted on the same rows; no lift where "
         "the LoRA gains nothing. acc_norm counts the space before a choice as a character, lm-evaluation-harness does "
         "not: its acc_norm is acc_norm_harness in results.jsonl.")


def write_results(run, tasks):
    """results.md and then one bar plot a base, drawn from results.jsonl alone. A plot that fails is a printed line."""
    found, saved = read_results(run), read_json(run / "portal.json")
    seen, added = [b["base"] for b in saved["bases"]], saved.get("added", {})
    rows, seeds = (sorted({row[key] for cells in found.values() for row in cells.values()}) for key in ("rows", "seed"))
    opened = sorted({row["task"] for cells in found.values() for row in cells.values() if "metric" in row})
    lines = [f"# Results of {run.resolve().name}", "",
             f"{len(tasks)} tasks, {' to '.join(map(str, sorted({rows[0], rows[-1]})))} evaluation rows each; "
             f"seed {', '.join(map(str, seeds))}; {hardware()}.", "",
             ABOUT
             + (f" Exact match of the decoded text is reported as acc_norm in {', '.join(opened)}." if opened else "")
             + "".join(f" {task} was learned later, on {', '.join(how['bases'])}, with the core frozen."
                       for task, how in added.items()), "",
             "| base | role | n | method | acc_norm best | acc_norm final | log_loss best | recovered lift "
             "| retention |", "|---" * 9 + "|"]
    notes, details, plots = [], [], []
    def order(key):                                                               # seen bases first, as they were named
        return (seen.index(key[0]) if key[0] in seen else len(seen), *key)
    fitted = {key[:2] for key in found if key[1]}
    bare = {key[:2] for key in found if not key[1] and key[0] not in {base for base, _ in fitted}}
    for base, n in sorted(fitted | bare, key=order):
        cells = {m: {select: found.get((base, 0 if m == "base" else n, m, select), {}) for select in ("best", "final")}
                 for m in METHODS}
        cells = {m: c for m, c in cells.items() if c["best"]}
        common = [t for t in tasks if comparable(cells, t)]
        notes += missing(run, base, n, cells, [t for t in tasks if t not in common])
        if not common:
            continue
        lines += table_rows(base, n, "seen" if base in seen else "unseen", cells, common)
        notes += new_wordings(base, n, cells, common)
        details += ["", f"## {base}, n = {n}: acc_norm of the selected epoch", "",
                    "| task | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
        details += ["| " + " | ".join([cell(t), *(f"{c['best'][t]['acc_norm']:.3f}" for c in cells.values())]) + " |"
                    for t in common]
        plotted = [m for m in ("base", "cross_lora", "lora", "portal") if m in cells] or [*cells]
        plots.append((run / f"{base}-n{n}.png", f"{base}, n = {n} a task", common,
                      {m: [cells[m]["best"][t]["acc_norm"] for t in common] for m in plotted}))
    text = "\n".join([*lines, *(text for note in notes for text in ("", note)), *details]) + "\n"
    write_whole(run / "results.md", lambda p: p.write_text(text, encoding="utf-8"))
    for each in plots:
        draw(plot, *each)


def cell(text):
    """Returns a text as a cell of a Markdown table, in which | separates cells."""
    return text.replace("|", "\\|")


def comparable(cells, task):
    """Whether all methods of `cells` {method: {select: {task: row}}} were measured on the same rows of a task, on the
    same base, and fitted with one seed. Older results say only on how many rows."""
    own = [c[select].get(task, {}) for c in cells.values() for select in c]
    numbers, digests = ({row.get(key) for row in own} - {None} for key in ("rows", "measured_on"))
    seeds = {c[select].get(task, {}).get("seed") for m, c in cells.items() if m != "base" for select in c}
    return all(own) and len(numbers) == 1 and len(digests) < 2 and len(seeds) < 2


def table_rows(base, n, role, cells, tasks):
    """Returns the lines of the table of one base and n: a line a method, means over `tasks`."""
    def mean(m, select, key):
        return sum(cells[m][select][t][key] for t in tasks) / len(tasks)
    low, high = (mean(m, "best", "acc_norm") if m in cells else None for m in ("base", "lora"))
    lines = []
    for m in cells:
        acc = mean(m, "best", "acc_norm")
        share = None if m == "base" or None in (low, high) else lift(acc, low, high)
        lines.append("| " + " | ".join([
            cell(base), role, "-" if m == "base" else str(n), m, f"{acc:.3f}", f"{mean(m, 'final', 'acc_norm'):.3f}",
            f"{mean(m, 'best', 'log_loss'):.3f}", "-" if share is None else f"{100 * share:.0f}%",
            f"{100 * acc / high:.0f}%" if high else "-"]) + " |")
    return lines


def new_wordings(base, n, cells, tasks):
    """Returns a note of each method's accuracy on the rows whose wording training rows lack; none without such rows."""
    own = {m: [c["best"][t]["held_out"]["acc_norm"] for t in tasks if "held_out" in c["best"][t]]
           for m, c in cells.items()}
    means = ", ".join(f"{m} {sum(found) / len(found):.3f}" for m, found in own.items() if found)
    return [f"{base}, n = {n}, on rows of held-out wordings alone: {means}."] if means else []


def missing(run, base, n, cells, tasks):
    """Returns notes on what the table of one base and n lacks: methods to compare with, `tasks` without a line."""
    def again(methods):
        return f"python eval.py --run {run} --bases {base} --methods {','.join(methods)}"
    notes, lacks = [], [m for m in ("base", "lora") if m not in cells]
    if lacks:
        share = "no lift and no retention" if "lora" in lacks else "no lift"
        notes.append(f"{base}, n = {n}: {share} without {' and '.join(lacks)}: `{again(lacks)}` measures what is "
                     "missing.")
    if tasks:
        notes.append(f"{base}, n = {n}: the table is without {', '.join(tasks)}, on which some of these methods were "
                     "not measured, or on other evaluation rows, files of the base or seeds: "
                     f"`{again(cells)}` measures all on the same.")
    return notes
