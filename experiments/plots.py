"""Figures: a study's log-loss against FLOPs, for tables.py, and a training log as a plot.

    python -m experiments.plots              <run>/log.png of the run trained last: loss and held-out acc_norm
    python -m experiments.plots --run DIR    the same of this run, also while it trains
"""
import numpy as np
import pandas as pd

from reports.results import drawing
from runtime.files import each_line
from runtime.flags import parse, run_main
from runtime.run_folder import find_run


def curves(path, rows):
    """Draws log-loss against the FLOPs of the fit, a panel a number of rows, of the methods that were measured with
    several numbers of rounds; nothing without any. rows: what tables.results returns."""
    rows = rows[rows["flops"].notna()].groupby(["base", "n", "method"]).filter(lambda own: own["rounds"].nunique() > 1)
    if rows.empty:
        return
    panels = rows.groupby(["base", "n"])
    with drawing(path, 5 * len(panels), columns=len(panels)) as all_axes:
        for axes, ((base, n), own) in zip(np.atleast_1d(all_axes), panels):
            for method, of_it in own.groupby("method", sort=False):
                means = of_it.groupby(["rounds", "seed"])[["flops", "log_loss"]].mean().groupby("rounds")
                mean, sd = means.mean(), means.std()
                axes.errorbar(mean["flops"] / 1e9, mean["log_loss"], sd["log_loss"], marker="o", capsize=3,
                              label=method)
            axes.set(yscale="log", xlabel="GFLOPs of the fit", ylabel="log-loss", title=f"{base}, {n} rows a task")
            axes.legend(frameon=False, fontsize="small")


def main(argv=None):
    log, fits = find_run(parse(__doc__, "run", argv).run) / "log.jsonl", {}          # {fit: {epoch: (loss, acc_norm)}}
    image = log.with_suffix(".png")
    def add(row):                                                                    # a fit that was started again
        if row["event"] == "epoch":                                                  # replaces its later epochs
            before = {epoch: pair for epoch, pair in fits.get(row["what"], {}).items() if epoch < row["epoch"]}
            fits[row["what"]] = {**before, row["epoch"]: (row["loss"], row["held_acc_norm"])}
    each_line(log, add, "a row of a training log")
    with drawing(image, 11, columns=2) as both:
        for what, epochs in fits.items():
            values = pd.DataFrame(epochs, ["loss", "held-out acc_norm"], dtype=float).T  # [epoch, 2]
            for axes, label in zip(both, values):
                axes.plot(values[label].dropna(), marker="o", label=what)
                axes.set(xlabel="epoch", ylabel=label), axes.xaxis.get_major_locator().set_params(integer=True)
        both[0].set_yscale("log"), both[1].set_ylim(0, 1.02)
        both[0].legend(frameon=False, fontsize="small")
    print(f"drawn: {image}")


if __name__ == "__main__":
    run_main(main)
