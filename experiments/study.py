"""Compares ways to fit a base (METHODS in experiments/methods.py), each with settings searched on the same budget.

    python -m experiments.study                          everything on the toy: six hours on two cores
    python -m experiments.study --methods lora,portal --n 32 --seeds 0
    python -m experiments.study --bases A,B --to C --data DIR --out DIR --methods "bare base,lora,portal aligned"
    python -m experiments.study --bases A,B --data DIR --out DIR      PorTAL trained on A and B, LoRAs beside it on each

First the search: for every method, number of rows and number of rounds, three rates (LoRAs in rounds of 2 rows: four)
times two values of one knob, seed 0, measured on rows that neither the fit nor the core behind it was trained on; the
higher (acc_norm, -log_loss) is chosen. A fit that sees more than SEARCHED rows of a task takes the settings searched at
SEARCHED. Then the chosen settings, with each seed, on rows drawn as port.py draws them, measured on the evaluation
rows. A fit is one pass of a learning-rate schedule; nothing is selected in it. Both are kept in <out>/study.jsonl, a
line a fit, base and task, and not done again; study.md and study.png are drawn from it. With --bases a fit has --rounds
rounds of 4 rows a task, the search three rates and the knob's first value; a core is trained at the preset on
--source-n rows a task; a port is aligned with the last of --bases.
"""
import functools, hashlib, itertools, json, random, tempfile
from pathlib import Path
from typing import NamedTuple

import filelock
import torch

from bases import TOY_SEEN, encode, load_base, most_tokens, short_name, usual_dtype
from data import most_rounds
from experiments.methods import METHODS, World, loras, ports, sources
from experiments.tables import draw, read, tried
from portal import Portal
from presets import REAL, preset
from reports.results import NO_COMMIT, commit, hardware, pack
from runtime.files import ROOT, BadInput, append_jsonl, read_jsonl, write_json
from runtime.flags import commas, parse, positive, run_main, seed as seed_of, some_of
from runtime.job import Job
from runtime.run_folder import OUT, new_folder
from runtime.saved import load_portal, save_portal
from score import evaluate
from tasks.rows import load_tasks, sample
from train import fit

SEARCHED = 896
CODE = commit()                                                                      # of what is imported here
RATES = {  # on the toy's bases (half of them for rounds of 2 rows), on others
    loras: ((3e-3, 1e-2, 2e-2), (1e-4, 3e-4, 1e-3)),
    ports: ((0.75, 1.5, 3.0), (0.1, 0.3, 0.9)),
    sources: ((0.1, 0.3, 1.0), (0.01, 0.03, 0.09)),
}
loaded = functools.cache(load_base)


class Stand(NamedTuple):
    """Where methods are compared."""
    sources: tuple = tuple(TOY_SEEN)
    target: str | None = "toy-gemma"        # None: each of the sources
    data: Path = ROOT / "toy" / "data"
    tasks: tuple | None = None              # all
    source_n: int = 1000                    # rows a task of source training
    held: int = 60                          # measured in the search
    measured: int | None = None             # evaluation rows at most
    lengths: tuple | None = None            # numbers of rounds, of 4 rows a task; None: the toy as METHODS has it
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    preset = property(lambda self: preset([short_name(base) for base in self.sources]))

    def facts(self):
        """What all lines of a study have in common."""
        to = [" to " + short_name(self.target)] if self.target else []
        return dict(bases="".join([" and ".join(map(short_name, self.sources)), *to]), source_n=self.source_n,
                    eval_rows=self.measured, dtype=str(self.dtype)[6:]) if self.lengths else dict(bases="")

    def can(self, name):
        """Whether a method can be measured here: a port needs a target, source training has none."""
        how = METHODS[name]
        carries = how.start is ports or how.settings.keys() & {"carry", "ported"}
        return (how.start is not sources if self.target else not carries) and not (self.lengths and "batch" in name)

    def plan(self, how):
        """Returns (the lists of bases, numbers of rounds, [(rate, value of the knob)] to search, rows in a round)."""
        each = [[base] for base in ([self.target] if self.target else self.sources)]
        bases = [self.sources] if how.start is sources else each
        rates = RATES[how.start][self.preset is REAL] if any(how.rounds) else [0.0]
        if self.lengths:
            return bases, any(how.rounds) and self.lengths or (0,), [(lr, [*how.knobs][0]) for lr in rates], 4
        if how.batch == 2:
            rates = [lr / 2 for lr in rates] + [5e-4] * (how.start is loras)         # that is best with 32 rows
        return bases, how.rounds, list(itertools.product(rates, how.knobs)), how.batch


# ---------------------------------------------------------------------------------------------- one fit
def run(bases, stage, rows, seed, settings):
    """Runs train.fit for an epoch with nothing held out; returns its line of log.jsonl. stage: (generate, learners)."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job("fit", {**settings, "epochs": 1}, seed, Path(folder) / "log.jsonl")
        fit(job, bases, *stage, {task: (train, []) for task, (train, _) in rows.items()})
        return read_jsonl(job.log)[-1]


def rows_of(stand, n, seed, search):
    """{task: (n training rows, measured rows)}. Search: rows of train are measured, the same for every n, and the fit
    has others. Raises BadInput where there are none."""
    found = {}
    for task, splits in load_tasks(stand.data, stand.tasks).items():
        found[task] = sum(sample(splits["train"], n, seed), []), splits["eval"][:stand.measured]
        if search:
            rows = random.Random(task).sample(splits["train"], len(splits["train"]))
            found[task] = rows[stand.held:stand.held + n], rows[:stand.held]
            if len(rows) <= stand.held:
                raise BadInput(f"task {task} has {len(rows)} training rows; the search measures {stand.held} and fits "
                               "to others")
    return found


@functools.cache
def before(stand, start, seed, search, core=()):
    """Returns what a start makes of the sources, fitted at the preset: a Portal trained on all, core being what its
    Config has of its own, or the LoRAs of the last one. A Portal on a user's bases is kept in out/sources, for a study
    that goes on or has another target; not one of code that is not committed."""
    bases = [loaded(base, stand.device, stand.dtype) for base in stand.sources]
    bases, settings = (bases[-1:], stand.preset["lora"]) if start is loras else (bases, stand.preset)
    world = World(bases, rows_of(stand, stand.source_n, seed, search))
    torch.manual_seed(seed)
    stages, _, result = loras(world) if start is loras else sources(world, **{**settings["sizes"], **dict(core)})
    rounds = most_rounds(world.rows, settings["batch_size"]) * settings["epochs"]
    portal = None if start is loras else result.__self__
    def train():
        run(bases, stages[0](settings["lr"], rounds), world.rows, seed, settings)
    if not (portal and stand.lengths) or CODE == NO_COMMIT or "dirty" in CODE:
        train()
        return portal or result()
    key = json.dumps([CODE, [(base.name, base.provenance) for base in bases], [own for own, _ in world.rows.values()],
                      settings, seed, core, stand.device, str(stand.dtype)], default=str)
    kept = OUT / "sources" / hashlib.sha256(key.encode()).hexdigest()[:16]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{kept}.lock"):                                          # else two would train it
        if kept.exists():
            return load_portal(kept, list(portal.converters)).to(stand.device)
        train()
        with new_folder(kept) as folder:                                             # what load_portal needs of a run
            save_portal(folder, portal)
            write_json(folder / "portal.json", dict(config=vars(portal.cfg), bases=[], seed=seed, data=str(stand.data)))
    return portal


@functools.cache
def world(stand, bases, n, seed, search, core):
    """The World of a fit on `bases`; core: see before, None for what needs no trained Portal."""
    portal = None if core is None else before(stand, sources, seed, search, core)
    own, source = ([loaded(base, stand.device, stand.dtype) for base in some] for some in (bases, stand.sources[-1:]))
    return World(own, rows_of(stand, n, seed, search), portal, *source,
                 functools.partial(before, stand, loras, seed, search), stand.preset["max_tokens"])


def flops(base, adapters, tokens, rounds=0, cfg=None):
    """FLOPs of a fit: tokens (4 N + 6 a) + rounds * generator, 2 for a multiply and an add. Each of the N weights of
    the frozen projections has a product in the forward pass and one in the backward pass, each of the a numbers of a
    token's adapter one more, its gradient's. The generator of a port (cfg: its Config) makes the adapters of T tasks:
    the core forward and backward, the aligner with its gradient. Attention, norms and the LM head, the same for all
    methods, are left out."""
    frozen = sum(len(layers) * d_in * d_out for _, layers, d_in, d_out in base.groups.values())
    sizes = [(a.shape[1] * a.shape[2], a.shape[3] + adapters.B[g].shape[2]) for g, a in adapters.A.items()]
    generator, own = 0, sum(n * d for n, d in sizes)                                 # n: L_g r; d: d_in + d_out
    if cfg:
        core = cfg.hidden * (cfg.d_z + cfg.d_e + cfg.hidden) + len(cfg.modules) * 2 * cfg.hidden * cfg.rank * cfg.d_c
        generator = len(cfg.tasks) * (4 * len(base.blocks) * core + 6 * cfg.d_c * own)
    return tokens * (4 * frozen + 6 * own) + rounds * generator


def reading(here, aligned=False, carry=None, ported={}, **_):
    """FLOPs of the forward passes in which a start has both bases read prompts, each cut as in align."""
    read = (here.base, here.source) if aligned or carry == "maps" or ported.get("aligned") else ()
    return sum(2 * min(len(base.tokenizer(text).input_ids), most_tokens(base.tokenizer)) * len(layers) * d_in * d_out
               for base in read for text in here.texts for _, layers, d_in, d_out in base.groups.values())


def cell(stand, method, knob, lr, n, rounds, seed, search, bases):
    """Fits and measures once. Returns a line for each base and task."""
    how, core, logs = METHODS[method], tuple(METHODS[method].core.items()), []
    portal = how.start is ports or "ported" in how.settings
    here = world(stand, tuple(bases), n, seed, search, core if portal else None)
    torch.manual_seed(seed)
    of_core = {**stand.preset["sizes"], **how.core} if how.start is sources else {}
    stages, rows, result = how.start(here, **how.settings, **how.knobs[knob], **of_core)
    settings, cost = dict(batch_size=stand.plan(how)[-1], max_tokens=here.max_tokens), reading(here, **how.settings)
    for generate, learners in (stage(lr, rounds) for stage in stages if rounds):
        if not learners[0].rounds:
            continue
        logs.append(run(here.bases, (generate, learners), rows, seed, settings))
        owner = getattr(generate, "__self__", None)
        with torch.no_grad():
            cost += flops(here.base, generate(here.base.name), logs[-1]["tokens"], learners[0].rounds,
                          owner.cfg if isinstance(owner, Portal) else None)
    fixed = dict(stand.facts(), method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search,
                 tokens=sum(log["tokens"] for log in logs), seconds=sum(log["seconds"] for log in logs),
                 flops=None if how.start is sources else cost, hardware=hardware(), commit=CODE)
    measured, lines = sum((own for _, own in rows.values()), []), []
    for base in here.bases:
        with torch.no_grad():
            adapters = result and result(base.name)
            cells = evaluate(base, adapters, encode(base.tokenizer, measured, list(rows))[0], here.max_tokens)
        lines += [dict(fixed, base=base.name, task=task, **{**cells[t], "correct": pack(cells[t]["correct"])})
                  for t, task in enumerate(rows)]
    return lines


# ---------------------------------------------------------------------------------------------- the command
def stand_of(args):
    """The Stand that the flags describe. Raises BadInput."""
    given = [flag for flag in ("to", "data", "tasks", "rounds", "source_n", "eval_rows") if getattr(args, flag)]
    if given and not args.bases:
        raise BadInput(f"--{given[0].replace('_', '-')} goes with --bases; without it the toy is measured")
    if not args.bases:
        return Stand(device=args.device)
    if not (args.data and args.out) or len(args.to or ()) > 1:
        raise BadInput("with --bases, --data and --out are needed, and one base at most as --to")
    dtype = args.dtype or usual_dtype(args.device)
    return Stand(tuple(args.bases), args.to and args.to[0], args.data, args.tasks and tuple(args.tasks),
                 args.source_n or 32, 40, args.eval_rows or 100, tuple(args.rounds or [24]), args.device, dtype)


def main(argv=None):
    some = dict(type=commas(positive(int)), metavar="N,N")
    args = parse(__doc__, "bases to data tasks methods n rounds source-n eval-rows seeds device dtype out", argv,
                 n=dict(some, help="training rows a task (default: 32,125,1000 on the toy, else 32)"),
                 rounds=dict(some, help="of a fit, with --bases (default: 24)"),
                 source_n=dict(type=positive(int), metavar="N", help="rows a task of source training (default: 32)"),
                 eval_rows=dict(help="evaluation rows a task, the first (default: 100)"),
                 methods=dict(type=some_of(METHODS), help="some of METHODS (default: all on the toy, else the bare "
                                                          "base, LoRA and PorTAL)"),
                 seeds=dict(type=commas(seed_of), default=(0, 1, 2), metavar="N,N", help="of what is measured"))
    stand, out = stand_of(args), args.out or ROOT / "results" / "toy"
    simple = ("bare base", "lora", "source", "portal", "portal aligned") if stand.lengths else METHODS
    methods = args.methods or [*filter(stand.can, simple)]
    if others := [name for name in methods if not stand.can(name)]:
        raise BadInput(f"--methods: {others[0]!r} cannot be measured here; accepted are "
                       f"{', '.join(filter(stand.can, METHODS))}")
    out.mkdir(parents=True, exist_ok=True)
    lines, tasks = read(out), set(load_tasks(stand.data, stand.tasks))
    wanted = dict(stand.facts(), tasks=sorted(tasks))
    for line in lines[:1]:
        held = {key: line.get(key, sorted({line["task"] for line in lines})) for key in wanted}
        if held != wanted:
            raise BadInput(f"{out} holds another study, {held}, here {wanted}; --out names another folder")
    def add(bases, **wanted):
        cells = set(itertools.product(map(short_name, bases), tasks))
        if cells - {(line["base"], line["task"]) for line in lines if wanted.items() <= line.items()}:
            new = cell(stand, bases=bases, **wanted)
            append_jsonl(out / "study.jsonl", *new)
            lines.extend(new)
    for method, n in itertools.product(methods, args.n or ((32,) if stand.lengths else (32, 125, 1000))):
        bases_of_fits, lengths, settings, batch = stand.plan(METHODS[method])
        for rounds, bases in itertools.product(lengths, bases_of_fits):
            fixed, searched = dict(bases=bases, method=method, n=n), min(rounds, SEARCHED // batch)
            for lr, knob in settings if len(settings) > 1 else ():
                add(**fixed, knob=knob, lr=lr, rounds=searched, seed=0, search=True)
            found = tried(lines, method, n, searched, {short_name(base) for base in bases})
            *_, lr, knob = max(found, default=settings[0])
            for seed in args.seeds:
                add(**fixed, knob=knob, lr=lr, rounds=rounds, seed=seed, search=False)
    draw(out, lines)


if __name__ == "__main__":
    run_main(main)
