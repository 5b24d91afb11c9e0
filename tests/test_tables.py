"""Tables and figures from made-up rows: every number against a plain loop; bad input; the README's results."""
import json, math, random, statistics

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_cli import command, fingerprint

import cli, eval as evaluation, tables
from eval import pack, unpack

TASKS = {"one": 40, "two": 30, "three": 50}                                          # evaluation rows of each


def row(experiment, method, base, task, seed, n, p, variant="", **more):
    """A made-up row: right with probability p, the same luck for all on an evaluation row but for a little of its own."""
    rng = random.Random(f"{experiment}{method}{variant}{base}{task}{seed}{n}{more}")
    luck = random.Random(task)
    correct = [0.8 * luck.random() + 0.2 * rng.random() < p for _ in range(TASKS[task])]
    return dict(experiment=experiment, method=method, variant=variant, base=base, role="seen" if base == "src" else "unseen",
                task=task, seed=seed, n=n, select="best", acc_norm=sum(correct) / len(correct), log_loss=2 - p,
                rows=len(correct), seconds=0.1, correct=pack(correct)) | more


def everything():
    """Rows of all experiments."""
    levels = dict(base=0.25, lora=0.9, portal=0.85, hypernet=0.8, cross_lora=0.3, copy=0.25, random=0.25)
    for task in TASKS:
        for base in ("src", "kin", "far"):
            for method, p in levels.items():
                for seed in (0,) if method == "base" else (0, 1, 2):
                    yield row("main", method, base, task, seed, 0 if method == "base" else 1000, p)
        for n in (50, 200, 1000):
            for method, variant, p in (("portal", "", 0.8), ("portal", "all modules", 0.85), ("lora", "", 0.5), ("lora", "iso", 0.4)):
                for seed in (0, 1):
                    yield row("sweep", method, "far", task, seed, n, p + n / 10000 + (n / 3000) * (method == "lora"), variant)
        for variant, p in (("", 0.85), ("no FiLM", 0.7)):
            for base in ("src", "kin", "far"):
                for seed in (0, 1):
                    yield row("ablation", "portal", base, task, seed, 1000, p, variant)
        for T in (2, 4, 8):
            more = dict(training_tasks=T, recipe="as shipped")
            for method, variant, p in (("base", "", 0.25), ("lora", "", 0.9), ("portal", "", 0.3 + T / 20),
                                       ("portal", "z fitted on target", 0.8), ("portal", "mean latent", 0.3), ("portal", "shuffled", 0.2)):
                for seed in (0, 1):
                    yield row("carry", method, "far", task, seed, 0 if method == "base" else 1000, p, variant, **more)


ABOUT = dict(seen=["src"], within=["kin"], across=["far"], n=1000, hardware="an abacus", commit="abc1234", kind="toy",
             commands={"6.1": "python experiments.py 6.1"}, parameters={"far": {"portal": 1200, "lora": 4000}},
             costs={"far": {"portal 50": {"tokens": 1000, "flops": 1e9}, "lora 1000": {"tokens": 40000, "flops": 5e10}}},
             searched={"lora": "lr 1e-4 to 1e-2"})


def save(folder, rows, about=ABOUT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "about.json").write_text(json.dumps(about))
    return folder
