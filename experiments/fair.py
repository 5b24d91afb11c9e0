"""Compares LoRAs and ports on the toy at equal numbers of rounds, each with settings searched on the same budget.

    python -m experiments.fair                          everything: two to three hours on two cores
    python -m experiments.fair --methods lora,portal --n 32 --seeds 0

First the search: for every method, number of rows and number of rounds, three rates times two values of one knob of
its own, seed 0, measured on HELD rows a task that neither the fit nor the core behind it was trained on; the higher
(acc_norm, -log-loss) is chosen. More than SEARCHED rounds take the settings of so many. Then the chosen settings, with
each seed, on rows drawn as port.py draws them, measured on the evaluation rows. A fit is one pass of a learning-rate
schedule, and nothing is selected in it. Both are kept in results/fair.jsonl, a line a fit and task, and not done again;
results/fair.md and fair.png are drawn from it.
"""
import functools, itertools, tempfile
from pathlib import Path

import pandas as pd
import torch

from baselines.cross_lora import copy, cross_lora
from bases import TOY_SEEN, load_base
from data import encode, load_tasks, sample
from experiments import presets
from experiments.cells import markdown, numbers, over_seeds, spread
from experiments.paper import dims_of, flops, generator_flops
from experiments.starts import World, loras, ports
from experiments.tables import TOLERANCE
from learner import Learner, most_rounds
from portal import MODULES, Config, Converter, Portal
from runtime.files import ROOT, append_jsonl, read_jsonl, write_whole
from runtime.flags import commas, parse, positive, run_main, some_of
from runtime.flags import seed as seed_of
from runtime.job import Job
from runtime.report import commit, drawing, hardware, pack, unpack
from score import evaluate, macro
from train import TOY, fit

DATA, TARGET, HELD = ROOT / "toy/data", "toy-gemma", 60
ROWS, ROUNDS, SEARCHED = (32, 125, 1000), (28, 56, 80, 112, 224), 112
LORA, PORT = (3e-3, 1e-2, 2e-2), (0.75, 1.5, 3.0)                                    # three rates for each


def of_ports(*rounds, **settings):
    """A line of METHODS: ports with these settings, the features as they are and whitened."""
    return ports, PORT, {"": settings, "whitened": dict(settings, eps=TOY["port"]["whiten"])}, rounds


def of_carried(carry, rates, rounds):
    """A line of METHODS: LoRAs that start from the source's, carried over; the knob is the factor on their delta."""
    return loras, rates, {name: dict(carry=carry, factor=f) for name, f in {"": 1, "half": 0.5}.items()}, (rounds,)


ALL, NARROW = "portal aligned and of all modules", "portal of d_c 32"
ALIGNED, UNTRAINED = f"{NARROW} aligned", f"{NARROW} core untrained"
CORES = {ALL: (("modules", MODULES),), **dict.fromkeys((NARROW, ALIGNED, UNTRAINED), (("d_c", 32),))}
METHODS = {  # name: (start, rates, {knob: settings}, numbers of rounds)
    "lora": (loras, LORA, {"rank 16": dict(rank=16), "rank 4": dict(rank=4)}, ROUNDS),
    "portal": of_ports(112),
    "portal aligned": of_ports(*ROUNDS, aligned=True),
    ALL: of_ports(56, 112, aligned=True),
    "portal aligned with P_out": of_ports(112, aligned=True, P_out=True),
    "portal carried without training": (ports, (), {"": dict(aligned=True, P_out=True)}, (0,)),
    "portal core untrained": of_ports(112, untrained=True),
    NARROW: of_ports(112),
    ALIGNED: of_ports(*ROUNDS, aligned=True),
    UNTRAINED: of_ports(112, untrained=True),
    "portal latents swapped": of_ports(112, swapped=True),
    "portal core untrained and latents swapped": of_ports(112, untrained=True, swapped=True),
    "portal aligned to a teacher": of_ports(112, aligned=True, teacher=True),
    "portal core unfrozen at the end": of_ports(112, unfreeze=True),
    "lora from cross_lora": of_carried(cross_lora, LORA, 112),
    "lora from copy": of_carried(copy, LORA, 112),
    "lora from ridge maps": of_carried("maps", LORA, 112),
    "lora carried by cross_lora without training": of_carried(cross_lora, (0.0,), 0),
    "lora carried by ridge maps without training": of_carried("maps", (0.0,), 0),
}


loaded = functools.cache(load_base)


# ---------------------------------------------------------------------------------------------- one fit
def run(bases, generate, learners, rows, seed):
    """Runs train.fit for one epoch, with nothing held out; returns its line of log.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        job = Job("fit", dict(epochs=1, batch_size=TOY["batch_size"], max_tokens=TOY["max_tokens"]), seed, log)
        fit(job, bases, generate, learners, {task: (train, []) for task, (train, _) in rows.items()})
        return read_jsonl(log)[-1]


def rows_of(n, seed, search):
    """{task: (n training rows, measured rows)}. Search: HELD rows of train are measured and the fit has others."""
    if search:
        return presets.rows_of(DATA, None, n, HELD)
    found = {}
    for task, splits in load_tasks(DATA).items():
        found[task] = [row for part in sample(splits["train"], n, seed) for row in part], splits["eval"]
    return found


@functools.cache
def trained(seed, search, core):
    """Returns a Portal trained on the toy's source bases at the preset; core: what its Config has of its own."""
    bases, rows = [loaded(name) for name in TOY_SEEN], rows_of(1000, seed, search)
    torch.manual_seed(seed)
    portal = Portal(Config(tasks=list(rows), **{**TOY["sizes"], **dict(core)}))
    for base in bases:
        portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    rounds = most_rounds(rows, TOY["batch_size"]) * TOY["epochs"]
    learner = Learner(portal.rates(TOY["lr"]), list(rows), rounds, 1, portal.z)
    run(bases, portal.adapters, [learner], rows, seed)
    return portal


@functools.cache
def source_loras(seed, search):
    """Returns LoRAs of the last of the source bases, fitted at the preset."""
    source, rows = loaded(TOY_SEEN[-1]), rows_of(1000, seed, search)
    torch.manual_seed(seed)
    generate, (learners,), _ = loras(World(source, None, source, None, rows))
    run([source], generate, learners(TOY["lora"]["lr"], most_rounds(rows, TOY["batch_size"])), rows, seed)
    return generate()


@functools.cache
def world(n, seed, search, core):
    """The World of a fit; core: see trained, None for LoRAs, which need no Portal."""
    return World(loaded(TARGET), None if core is None else trained(seed, search, core), loaded(TOY_SEEN[-1]),
                 functools.partial(source_loras, seed, search), rows_of(n, seed, search))


def cell(method, knob, lr, n, rounds, seed, search):
    """Fits and measures once. Returns a line for each task."""
    start, _, knobs, _ = METHODS[method]
    here = world(n, seed, search, None if start is loras else CORES.get(method, ()))
    base, rows = here.base, here.rows
    torch.manual_seed(seed)
    generate, stages, train_rows = start(here, **knobs[knob])
    logs = [run([base], generate, stage(lr, rounds), train_rows, seed) for stage in stages if rounds]
    with torch.no_grad():
        adapters = generate(base.name)
        items = encode(base.tokenizer, [row for _, measured in rows.values() for row in measured], list(rows))[0]
        cells = evaluate(base, adapters, items, TOY["max_tokens"])
    tokens, own = sum(log["tokens"] for log in logs), dims_of(adapters)
    every = {g: (len(layers), 1, d_in, d_out) for g, (_, layers, d_in, d_out) in base.groups.items()}
    generator = 0 if start is loras else generator_flops(here.portal.cfg, len(base.blocks), own)
    fixed = dict(method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search, tokens=tokens,
                 flops=flops(tokens, rounds, every, own, generator), seconds=sum(log["seconds"] for log in logs),
                 hardware=hardware(), commit=commit())
    return [dict(fixed, task=task, **{**cells[t], "correct": pack(cells[t]["correct"])}) for t, task in enumerate(rows)]


# ---------------------------------------------------------------------------------------------- search, then measure
def tried(lines, method, n, rounds):
    """The search's [(acc_norm, -log_loss, lr, knob)], means over the tasks, in the order of the settings."""
    found = {}
    for line in lines:
        if line["search"] and (line["method"], line["n"], line["rounds"]) == (method, n, rounds):
            found.setdefault((line["lr"], line["knob"]), []).append((line["acc_norm"], -line["log_loss"]))
    return [(*macro(own), *setting) for setting, own in found.items()]


# ---------------------------------------------------------------------------------------------- the tables
def results(lines):
    """The measured lines as the data frame that cells.py takes: a series is a method with its number of rounds."""
    rows = pd.DataFrame([line for line in lines if not line["search"]])
    return rows.assign(series=rows["method"] + ", " + rows["rounds"].astype(str),
                       correct=[unpack(text, n) for text, n in zip(rows["correct"], rows["rows"])])


def table(lines):
    """The measurements and the search, as Markdown."""
    page, rows = [], results(lines)
    for n, own in rows.groupby("n"):
        measured = numbers(own)
        loras = own[own["method"] == "lora"]
        best = max(loras["series"].unique(), key=measured.iloc[0].get) if len(loras) else None
        near = {s for s in own["series"] if best and measured[s][0] >= measured[best][0] - TOLERANCE}
        text = []
        for series, of_it in own.groupby("series", sort=False):
            first = of_it.iloc[0]
            text.append({"method": first["method"], "rounds": first["rounds"], "lr": f"{first['lr']:g}",
                         "knob": first["knob"] or "-", "seeds": of_it["seed"].nunique(),
                         "acc_norm": over_seeds(of_it, spread)[series],
                         "log-loss": over_seeds(of_it, spread, "log_loss")[series],
                         "acc_norm - the LoRA's best": difference(measured, series, best),
                         "worst task": f"{of_it.groupby('task')['acc_norm'].mean().min():.3f}",
                         "GFLOPs": f"{of_it.groupby('seed')['flops'].first().mean() / 1e9:,.0f}"
                         + (" *" if series in near else ""),
                         "seconds": f"{of_it.groupby('seed')['seconds'].first().mean():.0f}"})
        page += markdown(text, f"## {n} rows a task")
    searched = []
    for fits in dict.fromkeys((line["method"], line["n"], line["rounds"]) for line in lines if line["search"]):
        text = "; ".join(f"{lr:g}{f' {knob}' * bool(knob)}: {acc:.3f} / {-loss:.3f}"
                         for acc, loss, lr, knob in tried(lines, *fits))
        searched.append({**dict(zip(("method", "n", "rounds"), fits)), "tried: held-out acc_norm / log-loss": text})
    commits, machines = (", ".join(dict.fromkeys(line[key] for line in lines)) for key in ("commit", "hardware"))
    return "\n".join([
        "# LoRAs and ports at equal numbers of rounds", "",
        f"Toy, from {' and '.join(TOY_SEEN)} to {TARGET}. Settings searched for each method, n and number of rounds on",
        "rows held out of train (below), then measured on the evaluation rows with every seed. Means over the tasks,",
        "± sd over seeds; [low, high]: 95% interval over evaluation rows, paired bootstrap. FLOPs: the count of",
        "experiments/paper.py; what aligns a port, a forward pass of 1,000 prompts on two bases, is not in them,",
        "nor is the gradient of an unfrozen core. Seconds: of the rounds alone, beside other work.",
        f"*: within {TOLERANCE} of the best acc_norm of a LoRA on as many rows.", "",
        f"`python -m experiments.fair`, {machines}, commit {commits}.", *reach(rows), *page,
        *markdown(searched, "## What was searched"), ""])


def reach(rows):
    """What each method and n takes to come within TOLERANCE of the LoRA's plateau, the best mean of any n, as lines."""
    means = rows.groupby(["method", "n", "rounds"], sort=False)[["acc_norm", "flops"]].mean().reset_index()
    plateau = means[means["method"] == "lora"]["acc_norm"].max()
    near = means[means["acc_norm"] >= plateau - TOLERANCE].sort_values("flops").drop_duplicates(["method", "n"])
    cheapest = near[near["method"] == "lora"]["flops"].min()
    lines = [{"method": m, "n": n, "rounds": rounds, "GFLOPs": f"{flops / 1e9:,.0f}",
              "of the LoRA's least": f"{flops / cheapest:.2f}"}
             for m, n, rounds, _, flops in near.sort_values(["n", "flops"]).itertuples(index=False)]
    return markdown(lines, f"## Within {TOLERANCE} of the LoRA's plateau, {plateau:.3f}") if lines else []


def difference(measured, series, other):
    """A series' acc_norm less another's, with its interval."""
    if other in (None, series):
        return "-"
    value = measured[series] - measured[other]
    low, high = value[1:].quantile([0.025, 0.975])
    return f"{value[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(folder, lines):
    """Writes fair.md and, for the methods with several numbers of rounds, fair.png."""
    write_whole(folder / "fair.md", lambda file: file.write_text(table(lines)))
    rows = results(lines)
    with drawing(folder / "fair.png", 15, columns=len(ROWS)) as all_axes:
        for axes, n in zip(all_axes, ROWS):
            for method, own in rows[rows["n"] == n].groupby("method", sort=False):
                if own["rounds"].nunique() > 1:
                    by_seed = own.groupby(["rounds", "seed"])[["flops", "log_loss"]].mean()
                    mean, sd = (f(by_seed.groupby("rounds")) for f in (lambda g: g.mean(), lambda g: g.std()))
                    axes.errorbar(mean["flops"] / 1e9, mean["log_loss"], sd["log_loss"], marker="o", capsize=3,
                                  label=method)
            axes.set(yscale="log", xlabel="GFLOPs of the fit", ylabel="log-loss", title=f"{n} rows a task")
            if axes.lines:
                axes.legend(frameon=False, fontsize="small")


def main(argv=None):
    args = parse(__doc__, "methods n seeds out", argv, n=dict(type=commas(positive(int)), default=ROWS, metavar="N,N"),
                 methods=dict(type=some_of(METHODS), default=METHODS, help="some of METHODS"),
                 out=dict(default=ROOT / "results"),
                 seeds=dict(type=commas(seed_of), default=(0, 1, 2), metavar="N,N", help="of what is measured"))
    path = args.out / "fair.jsonl"
    lines = read_jsonl(path)
    def add(method, knob, lr, n, rounds, seed, search):
        wanted = dict(method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search)
        if not any(wanted.items() <= line.items() for line in lines):
            new = cell(**wanted)
            append_jsonl(path, *new)
            lines.extend(new)
    for method, n in itertools.product(args.methods, args.n):
        _, rates, knobs, budgets = METHODS[method]
        for rounds in budgets:
            searched = min(rounds, SEARCHED)
            for lr, knob in itertools.product(rates, knobs):
                add(method, knob, lr, n, searched, 0, True)
            *_, lr, knob = max(tried(lines, method, n, searched), default=(0, ""))
            for seed in args.seeds:
                add(method, knob, lr, n, rounds, seed, False)
    draw(args.out, lines)


if __name__ == "__main__":
    run_main(main)
