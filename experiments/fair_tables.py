"""The tables and the figure of what experiments/fair.py measured, from its lines alone."""
import numpy as np
import pandas as pd

from experiments.cells import markdown, numbers, over_seeds, percent, share, spread
from experiments.tables import TOLERANCE
from reports.results import drawing, unpack
from runtime.files import write_whole
from score import macro

LORAS = ("lora", "lora of batch 2")                                                  # what all others are compared with
TOY_ROUNDS = ('Rows of a task in a round: 8 for LoRAs without "batch 2" and for ports with "d_c 256" or "batch 8" in '
              "their names,\n2 for the others. Core: d_c 32 unless named")


def tried(lines, method, n, rounds):
    """The search's [(acc_norm, -log_loss, lr, knob)], means over the tasks, in the order of the settings."""
    found = {}
    for line in lines:
        if line["search"] and (line["method"], line["n"], line["rounds"]) == (method, n, rounds):
            found.setdefault((line["lr"], line["knob"]), []).append((line["acc_norm"], -line["log_loss"]))
    return [(*macro(own), *setting) for setting, own in found.items()]


def results(lines):
    """The measured lines as the data frame that cells.py takes: a series is a method with its number of rounds. Only
    those of the settings measured last: a search that was widened may have chosen others."""
    rows = pd.DataFrame([line for line in lines if not line["search"]])
    last = rows.groupby(["method", "n", "rounds"])[["lr", "knob"]].transform("last")
    rows = rows[(rows[["lr", "knob"]] == last).all(axis=1)]
    return rows.assign(series=rows["method"] + ", " + rows["rounds"].astype(str),
                       correct=[unpack(text, n) for text, n in zip(rows["correct"], rows["rows"])])


def table(stand, lines, rows):
    """The measurements and the search, as Markdown. rows: results(lines)."""
    page = []
    for n, own in rows.groupby("n"):
        measured = numbers(own)
        loras = own[own["method"].isin(LORAS)]
        best = max(loras["series"].unique(), key=measured.iloc[0].get) if len(loras) else None
        near = {s for s in own["series"] if best and measured[s][0] >= measured[best][0] - TOLERANCE}
        text, accs, losses = [], over_seeds(own, spread), over_seeds(own, spread, "log_loss")
        for series, of_it in own.groupby("series", sort=False):
            first, by_seed = of_it.iloc[0], of_it.groupby("seed")[["flops", "seconds"]].first().mean()
            text.append({"method": first["method"], "rounds": first["rounds"], "lr": f"{first['lr']:g}",
                         "knob": first["knob"] or "-", "seeds": of_it["seed"].nunique(),
                         "acc_norm": accs[series] + (" *" if series in near else ""), "log-loss": losses[series],
                         "acc_norm - the LoRA's best": difference(measured, series, best),
                         "of its lift": percent(share(measured, series, best, "bare base, 0")),
                         "worst task": f"{of_it.groupby('task')['acc_norm'].mean().min():.3f}",
                         "GFLOPs": f"{by_seed['flops'] / 1e9:,.0f}", "seconds": f"{by_seed['seconds']:.0f}"})
        page += markdown(text, f"## {n} rows a task")
    searched = []
    for fits in dict.fromkeys((line["method"], line["n"], line["rounds"]) for line in lines if line["search"]):
        text = "; ".join(f"{lr:g}{f' {knob}' * bool(knob)}: {acc:.3f} / {-loss:.3f}"
                         for acc, loss, lr, knob in tried(lines, *fits))
        searched.append({**dict(zip(("method", "n", "rounds"), fits)), "tried: held-out acc_norm / log-loss": text})
    commits, machines = (", ".join(dict.fromkeys(line[key] for line in lines)) for key in ("commit", "hardware"))
    start, batches = ("Toy, from", TOY_ROUNDS) if stand.toy else ("From", f"Rows of a task in a round: {stand.batch}")
    return "\n".join([
        "# LoRAs and ports with settings that were searched alike", "",
        f"{start} {stand.bases}; tasks: {', '.join(stand.tasks or ['all'])}.", f"{batches}.",
        "Settings searched for each method, n and number of rounds on rows held out of train (below), then measured on",
        "the evaluation rows with every seed. Knob: a LoRA's rank, or half of the delta that it starts from; a port's",
        "features whitened or not. Means over the tasks,",
        "± sd over seeds; [low, high]: 95% interval over evaluation rows, paired bootstrap. Of its lift: (acc - bare)",
        "/ (best LoRA - bare), - where that gain is smaller than the half-width of its interval. FLOPs: the count of",
        "experiments/paper.py, and what aligns a port, a forward pass of at most 1,000 prompts on two bases; without a",
        "teacher's answers and the gradient of an unfrozen core. Seconds: of the rounds alone, beside other work.",
        f"*: within {TOLERANCE} of the best acc_norm of a LoRA on as many rows.", "",
        f"`python -m experiments.fair`, {machines}, commit {commits}.", *reach(rows), *page,
        *markdown(searched, "## What was searched"), ""])


def reach(rows):
    """What each method takes to come within TOLERANCE of the best mean of a LoRA, on any number of rows and on as many,
    as lines."""
    means = rows.groupby(["n", "method", "rounds"], sort=False)[["acc_norm", "flops"]].mean().reset_index()
    def least(own):
        """Its title's number and lines, the cheapest number of rounds of each method and n that comes near."""
        best = own[own["method"].isin(LORAS)]["acc_norm"].max()
        near = own[own["acc_norm"] >= best - TOLERANCE].sort_values("flops").drop_duplicates(["method", "n"])
        cheapest = near[near["method"].isin(LORAS)]["flops"].min()
        return best, [{"method": m, "n": n, "rounds": rounds, "GFLOPs": f"{flops / 1e9:,.0f}",
                       "of the LoRA's least": f"{flops / cheapest:.2f}"}
                      for n, m, rounds, _, flops in near.sort_values(["n", "flops"]).itertuples(index=False)]
    best, lines = least(means)
    several = means["n"].nunique() > 1                                               # else both tables are the same
    page = markdown(lines, f"## Within {TOLERANCE} of the LoRA's plateau, {best:.3f}") if lines and several else []
    own = sum((least(of_n)[1] for _, of_n in means.groupby("n")), [])
    return page + (markdown(own, f"## Within {TOLERANCE} of the best LoRA on as many rows") if own else [])


def difference(measured, series, other):
    """A series' acc_norm less another's, with its interval."""
    if other in (None, series):
        return "-"
    value = measured[series] - measured[other]
    low, high = value[1:].quantile([0.025, 0.975])
    return f"{value[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(folder, stand, lines):
    """Writes fair.md and, for the methods with several numbers of rounds, fair.png."""
    rows = results(lines)
    write_whole(folder / "fair.md", lambda file: file.write_text(table(stand, lines, rows)))
    curves = rows.groupby(["n", "method"]).filter(lambda own: own["rounds"].nunique() > 1)
    if curves.empty:
        return
    of_n = curves.groupby("n")
    with drawing(folder / "fair.png", 5 * len(of_n), columns=len(of_n)) as all_axes:
        for axes, (n, of_it) in zip(np.atleast_1d(all_axes), of_n):
            for method, own in of_it.groupby("method", sort=False):
                by_rounds = own.groupby(["rounds", "seed"])[["flops", "log_loss"]].mean().groupby("rounds")
                mean, sd = by_rounds.mean(), by_rounds.std()
                axes.errorbar(mean["flops"] / 1e9, mean["log_loss"], sd["log_loss"], marker="o", capsize=3,
                              label=method)
            axes.set(yscale="log", xlabel="GFLOPs of the fit", ylabel="log-loss", title=f"{n} rows a task")
            axes.legend(frameon=False, fontsize="small")
