"""Compares LoRAs and ports, each with settings that were searched on the same budget.

    python -m experiments.fair                          everything on the toy: six hours on two cores
    python -m experiments.fair --methods lora,portal --n 32 --seeds 0
    python -m experiments.fair --bases A --to B --data DIR --tasks cb,wsc --methods lora,portal --n 32 --out DIR

First the search: for every method, number of rows and number of rounds, three rates (LoRAs in rounds of 2 rows: four)
times two values of one knob of its own, seed 0, measured on rows that neither the fit nor the core behind it was
trained on; the higher (acc_norm, -log_loss) is chosen. A fit that sees more than SEARCHED rows of a task takes the
settings searched at SEARCHED. Then the chosen settings, with each seed, on rows drawn as port.py draws them, measured
on the evaluation rows. A fit is one pass of a learning-rate schedule, and nothing is selected in it. Both are kept in
<out>/fair.jsonl, a line a fit and task, and not done again; fair.md and fair.png are drawn from it. On bases of one's
own (--bases) a fit has --rounds rounds, and the search has four rates and the knob's first value.
"""
import functools, itertools, tempfile
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from baselines.cross_lora import copy, cross_lora
from bases import MAX_LENGTH, TOY_SEEN, encode, load_base, short_name
from data import most_rounds
from experiments import presets
from experiments.fair_tables import draw, tried
from experiments.paper import dims_of, flops, generator_flops
from experiments.starts import World, bare, loras, ports
from portal import MODULES, Config, Converter, Portal
from reports.results import commit, hardware, pack
from runtime.files import ROOT, BadInput, append_jsonl, read_jsonl
from runtime.flags import commas, parse, positive, run_main, seed as seed_of, some_of
from runtime.job import Job
from presets import REAL, TOY
from score import evaluate
from tasks.rows import load_tasks, sample
from train import Learner, fit

ROWS, SEARCHED, REAL_ROUNDS = (32, 125, 1000), 896, 24
ROUNDS, SMALL_ROUNDS = (28, 56, 80, 112, 224), (112, 224, 336, 448)                     # of 8 and of 2 rows a task
REAL_ROWS = dict(rows=32, held=40, measured=100, batch=4)                            # of Stand, on other bases
RATES = {loras: (3e-3, 1e-2, 2e-2), ports: (0.75, 1.5, 3.0)}                         # half of them for rounds of 2 rows
REAL_RATES = {loras: (1e-4, 3e-4, 1e-3, 3e-3), ports: (0.1, 0.3, 0.9, 2.7)}
WIDE = (("d_c", 256),)                                                               # the toy's preset is 32


class Stand(NamedTuple):
    """Where methods are compared: bases, tasks, and numbers of rows a task."""
    toy: bool
    sources: tuple
    target: str
    data: Path
    tasks: tuple | None      # all
    rows: int                # of source training
    held: int                # measured in the search
    measured: int | None     # evaluation rows at most
    batch: int               # of a round, where the method does not say
    lengths: tuple | None    # numbers of rounds; None: each method's own

    @property
    def bases(self):
        return f"{' and '.join(map(short_name, self.sources))} to {short_name(self.target)}"

    @property
    def preset(self):
        return TOY if self.toy else REAL

    @property
    def methods(self):
        """METHODS; on other bases than the toy's those of the presets alone, at the stand's batch."""
        if self.toy:
            return METHODS
        return {name: how._replace(batch=None) for name, how in METHODS.items()
                if not how.core and "of batch" not in name}

    def batch_of(self, how):
        return how.batch or self.batch

    def rounds(self, how):
        return self.lengths if self.lengths and any(how.rounds) else how.rounds

    def settings(self, how):
        """[(rate, value of the knob)] to search."""
        rates = (RATES if self.toy else REAL_RATES)[how.start] if any(how.rounds) else [0.0]
        if how.batch == 2:
            rates = [lr / 2 for lr in rates] + [5e-4] * (how.start is loras)         # that is best with 32 rows
        return list(itertools.product(rates, how.knobs if self.toy else [*how.knobs][:1]))


TOY_STAND = Stand(True, TOY_SEEN, "toy-gemma", ROOT / "toy/data", None, 1000, 60, None, 8, None)


class Method(NamedTuple):
    """A way to fit an unseen base: a function of starts.py, {value of its knob: its settings}, numbers of rounds; what
    the Config of its core has of its own; rows of a task in a round, if not the stand's."""
    start: Callable
    knobs: dict
    rounds: tuple
    core: tuple = ()
    batch: int | None = None


def of_ports(*rounds, core=(), batch=None, **settings):
    """Ports with these settings, the features whitened and as they are."""
    knobs = {"whitened": dict(settings, eps=TOY["port"]["whiten"]), "": settings}
    return Method(ports, knobs, rounds, core, batch)


def of_carried(carry, rounds):
    """LoRAs that start from the source's, carried over; the knob is the factor on their delta."""
    return Method(loras, {name: dict(carry=carry, factor=f) for name, f in {"": 1, "half": 0.5}.items()}, (rounds,))


RANKS = {"rank 16": dict(rank=16), "rank 4": dict(rank=4)}
METHODS = {
    "bare base": Method(bare, {"": {}}, (0,)),
    "lora": Method(loras, RANKS, ROUNDS),
    "lora of batch 2": Method(loras, RANKS, SMALL_ROUNDS, batch=2),
    "portal": of_ports(448, batch=2),
    "portal aligned": of_ports(*SMALL_ROUNDS, batch=2, aligned=True),
    "portal core untrained": of_ports(448, batch=2, untrained=True),
    "portal latents swapped": of_ports(448, batch=2, swapped=True),
    "portal aligned core untrained": of_ports(448, batch=2, aligned=True, untrained=True),
    "portal aligned latents swapped": of_ports(448, batch=2, aligned=True, swapped=True),
    "portal aligned to a teacher": of_ports(448, batch=2, aligned=True, labels=0),
    "portal aligned to a teacher and 8 labels": of_ports(448, batch=2, aligned=True, labels=8),
    "portal of batch 8": of_ports(112),
    "portal of batch 8 aligned": of_ports(*ROUNDS, aligned=True),
    "portal of batch 8 core untrained": of_ports(112, untrained=True),
    "portal of d_c 256": of_ports(112, core=WIDE),
    "portal of d_c 256 aligned": of_ports(*ROUNDS, core=WIDE, aligned=True),
    "portal of d_c 256 aligned and of all modules": of_ports(56, 112, core=(*WIDE, ("modules", MODULES)), aligned=True),
    "portal of d_c 256 aligned with P_out": of_ports(112, core=WIDE, aligned=True, P_out=True),
    "portal of d_c 256 carried without training": Method(ports, {"": dict(aligned=True, P_out=True)}, (0,), WIDE),
    "portal of d_c 256 core untrained": of_ports(112, core=WIDE, untrained=True),
    "portal of d_c 256 latents swapped": of_ports(112, core=WIDE, swapped=True),
    "portal of d_c 256 core untrained and latents swapped": of_ports(112, core=WIDE, untrained=True, swapped=True),
    "portal of d_c 256 aligned to a teacher": of_ports(112, core=WIDE, aligned=True, labels=0),
    "portal of d_c 256 core unfrozen at the end": of_ports(112, core=WIDE, unfreeze=True),
    "lora from cross_lora": of_carried(cross_lora, 112),
    "lora from copy": of_carried(copy, 112),
    "lora from ridge maps": of_carried("maps", 112),
    "lora carried by cross_lora without training": of_carried(cross_lora, 0),
    "lora carried by ridge maps without training": of_carried("maps", 0),
}


loaded = functools.cache(load_base)


# ---------------------------------------------------------------------------------------------- one fit
def run(bases, generate, learners, rows, seed, settings):
    """Runs train.fit for one epoch of settings' batch_size, with nothing held out; returns its line of log.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        job = Job("fit", {**settings, "epochs": 1}, seed, log)
        fit(job, bases, generate, learners, {task: (train, []) for task, (train, _) in rows.items()})
        return read_jsonl(log)[-1]


def rows_of(stand, n, seed, search):
    """{task: (n training rows, measured rows)}. Search: rows of train are measured and the fit has others."""
    if search:
        return presets.rows_of(stand.data, stand.tasks, n, stand.held)
    found = {}
    for task, splits in load_tasks(stand.data, stand.tasks).items():
        train = [row for part in sample(splits["train"], n, seed) for row in part]
        found[task] = train, splits["eval"][:stand.measured]
    return found


@functools.cache
def trained(stand, seed, search, core):
    """Returns a Portal trained on the source bases at the preset; core: what its Config has of its own."""
    preset, bases, rows = stand.preset, [loaded(s) for s in stand.sources], rows_of(stand, stand.rows, seed, search)
    torch.manual_seed(seed)
    portal = Portal(Config(tasks=list(rows), **{**preset["sizes"], **dict(core)}))
    for base in bases:
        portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    rounds = most_rounds(rows, preset["batch_size"]) * preset["epochs"]
    learner = Learner(portal.rates(preset["lr"]), list(rows), rounds, 1, portal.z)
    run(bases, portal.adapters, [learner], rows, seed, preset)
    return portal


@functools.cache
def source_loras(stand, seed, search):
    """Returns LoRAs of the last of the source bases, fitted at the preset."""
    source, rows, preset = loaded(stand.sources[-1]), rows_of(stand, stand.rows, seed, search), stand.preset["lora"]
    torch.manual_seed(seed)
    generate, (learners,), _ = loras(World(source, None, source, None, rows))
    rounds = most_rounds(rows, preset["batch_size"]) * preset["epochs"]
    run([source], generate, learners(preset["lr"], rounds), rows, seed, preset)
    return generate()


@functools.cache
def world(stand, n, seed, search, core):
    """The World of a fit; core: see trained, None for LoRAs, which need no Portal."""
    return World(loaded(stand.target), None if core is None else trained(stand, seed, search, core),
                 loaded(stand.sources[-1]), functools.partial(source_loras, stand, seed, search),
                 rows_of(stand, n, seed, search))


def frozen_dims(base):
    """The frozen projections of a base as paper.flops takes them."""
    return {g: (len(layers), 1, d_in, d_out) for g, (_, layers, d_in, d_out) in base.groups.items()}


def reading(here, aligned=False, P_out=False, carry=None, **_):
    """FLOPs of the prompts that a start has both bases read, forward passes alone."""
    passes = aligned + P_out + (carry == "maps")
    return passes and passes * one_reading(here)


@functools.cache
def one_reading(here):
    """FLOPs of a forward pass of both bases over the prompts, each cut at MAX_LENGTH as port.align does: half of what
    paper.flops counts, since that has the backward pass, too."""
    return sum(flops(min(len(base.tokenizer(text).input_ids), MAX_LENGTH), 0, frozen_dims(base), {})
               for base in (here.base, here.source) for text in here.texts) // 2


def cell(stand, method, knob, lr, n, rounds, seed, search):
    """Fits and measures once. Returns a line for each task."""
    how, max_tokens = stand.methods[method], stand.preset["max_tokens"]
    here = world(stand, n, seed, search, how.core if how.start is ports else None)
    base, rows = here.base, here.rows
    torch.manual_seed(seed)
    generate, stages, train_rows = how.start(here, **how.knobs[knob])
    settings = dict(batch_size=stand.batch_of(how), max_tokens=max_tokens)
    logs = [run([base], generate, stage(lr, rounds), train_rows, seed, settings) for stage in stages if rounds]
    with torch.no_grad():
        adapters = generate(base.name)
        items = encode(base.tokenizer, [row for _, measured in rows.values() for row in measured], list(rows))[0]
        cells = evaluate(base, adapters, items, max_tokens)
    tokens, own = sum(log["tokens"] for log in logs), dims_of(adapters) if adapters else {}
    generator = generator_flops(here.portal.cfg, len(base.blocks), own) if how.start is ports else 0
    fixed = dict(method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search, tokens=tokens,
                 flops=flops(tokens, rounds, frozen_dims(base), own, generator) + reading(here, **how.knobs[knob]),
                 seconds=sum(log["seconds"] for log in logs), hardware=hardware(), commit=commit())
    return [dict(fixed, task=task, **{**cells[t], "correct": pack(cells[t]["correct"])}) for t, task in enumerate(rows)]


# ---------------------------------------------------------------------------------------------- the command
def stand_of(args):
    """The Stand that the flags describe. Raises BadInput."""
    if not args.bases:
        for flag in ("to", "data", "tasks", "rounds"):
            if getattr(args, flag):
                raise BadInput(f"--{flag} goes with --bases; without it the toy is measured")
        return TOY_STAND
    for flag in ("to", "data", "out"):
        if getattr(args, flag) is None:
            raise BadInput(f"--{flag} is needed with --bases")
    if len(args.to) > 1:
        raise BadInput(f"--to: one base is accepted here, not {', '.join(args.to)}")
    return Stand(False, tuple(args.bases), args.to[0], args.data, args.tasks and tuple(args.tasks), **REAL_ROWS,
                 lengths=tuple(args.rounds or [REAL_ROUNDS]))


def main(argv=None):
    args = parse(__doc__, "bases to data tasks methods n rounds seeds out", argv,
                 n=dict(type=commas(positive(int)), default=ROWS, metavar="N,N"),
                 rounds=dict(type=commas(positive(int)), metavar="N,N",
                             help=f"of a fit, with --bases (default: {REAL_ROUNDS})"),
                 methods=dict(type=some_of(METHODS), default=None, help="some of METHODS"),
                 seeds=dict(type=commas(seed_of), default=(0, 1, 2), metavar="N,N", help="of what is measured"))
    stand, out = stand_of(args), args.out or ROOT / "results"
    methods = args.methods or list(stand.methods)
    if others := [name for name in methods if name not in stand.methods]:
        raise BadInput(f"--methods: {others[0]!r} is of the toy alone; with --bases accepted are "
                       f"{', '.join(stand.methods)}")
    out.mkdir(parents=True, exist_ok=True)
    path, bases = out / "fair.jsonl", "" if stand.toy else stand.bases
    lines = read_jsonl(path)
    if others := {line.get("bases", "") for line in lines} - {bases}:
        raise BadInput(f"{path} is of other bases ({min(others) or 'the toy'}); --out names another folder")
    def add(method, knob, lr, n, rounds, seed, search):
        wanted = dict(method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search)
        if not any(wanted.items() <= line.items() for line in lines):
            new = [dict(line, bases=bases) for line in cell(stand, **wanted)]
            append_jsonl(path, *new)
            lines.extend(new)
    for method, n in itertools.product(methods, args.n):
        how = stand.methods[method]
        for rounds in stand.rounds(how):
            searched, settings = min(rounds, SEARCHED // stand.batch_of(how)), stand.settings(how)
            if len(settings) > 1:
                for lr, knob in settings:
                    add(method, knob, lr, n, searched, 0, True)
            *_, lr, knob = max(tried(lines, method, n, searched), default=settings[0])
            for seed in args.seeds:
                add(method, knob, lr, n, rounds, seed, False)
    draw(out, stand, lines)


if __name__ == "__main__":
    run_main(main)
