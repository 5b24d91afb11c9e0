"""Figures: curves with error bars for tables.py, and a training log as a plot.

    python -m experiments.plots              <run>/log.png of the run trained last: loss and held-out acc_norm
    python -m experiments.plots --run DIR    the same of this run
    python -m experiments.plots LOG          of any log.jsonl, also while it grows; the PNG is written beside it
"""
import argparse, pathlib

import numpy as np
import pandas as pd

from reports.results import drawing
from runtime.files import each_line
from runtime.flags import Parser, run_main
from runtime.run_folder import find_run


def error_curves(path, xlabel, panels, stars={}, title=""):
    """Draws two panels {ylabel: {label: [(x, y, low, high)]}} against a logarithmic x; stars: {label: x or None}."""
    with drawing(path, 11, columns=2) as both:
        for axes, (ylabel, lines) in zip(both, panels.items()):
            for label, points in lines.items():
                x, y, low, high = np.array(points, float).T
                bars = np.maximum([y - low, high - y], 0)            # a bootstrap interval may leave its point out
                line, *_ = axes.errorbar(x, y, bars, marker="o", capsize=3, label=label)
                if stars.get(label):
                    axes.plot(stars[label], y[x == stars[label]], "*", markersize=18, color=line.get_color())
            ticks = sorted({x for points in lines.values() for x, *_ in points})
            axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
            axes.set_xticks(ticks, ticks), axes.minorticks_off()
            if lines:
                axes.legend(frameon=False, fontsize="small")
        both[0].set_title(title)


def log_curves(path):
    """Returns {fit: {epoch: (loss, held-out acc_norm or None)}} of log.jsonl. A fit that was started again replaces
    what it had from that epoch on."""
    curves = {}
    def add(row):
        if row["event"] == "epoch":
            before = {epoch: pair for epoch, pair in curves.get(row["what"], {}).items() if epoch < row["epoch"]}
            curves[row["what"]] = {**before, row["epoch"]: (row["loss"], row["held_acc_norm"])}
    each_line(path, add, "a row of a training log")
    return curves


def plot_log(path):
    """Loss and held-out acc_norm against the epoch, a line a fit, as a PNG beside log.jsonl."""
    curves, image = log_curves(path), path.with_suffix(".png")
    with drawing(image, 11, columns=2) as both:
        for what, epochs in curves.items():
            values = pd.DataFrame(epochs, ["loss", "held-out acc_norm"], dtype=float).T  # [epoch, 2]
            for axes, label in zip(both, values):
                axes.plot(values[label].dropna(), marker="o", label=what)
                axes.set(xlabel="epoch", ylabel=label), axes.xaxis.get_major_locator().set_params(integer=True)
        both[0].set_yscale("log"), both[1].set_ylim(0, 1.02)
        both[0].legend(frameon=False, fontsize="small")
    print(f"drawn: {image}")


def main(argv=None):
    parser = Parser(prog="python -m experiments.plots", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("log", nargs="?", type=pathlib.Path, metavar="LOG", help="log.jsonl (default: the run's)")
    which.add_argument("--run", type=pathlib.Path, metavar="DIR", help="run folder (default: the run trained last)")
    args = parser.parse_args(argv)
    plot_log(args.log or find_run(args.run) / "log.jsonl")


if __name__ == "__main__":
    run_main(main)
