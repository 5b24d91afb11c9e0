"""A task learned after the port: how much of it arrives on a base that gives no data for it, and what that takes.

    python carry_over.py                                 three seeds; the same command goes on after a kill
    python carry_over.py --seeds 0 --out out/carry       one

For T of the 80 training tasks of toy/grid.py, whose 96 skills are made of 12 names and 8 kinds:

    train     T latents, the core and the converters of two sources                       as train.py does
    port      a converter for the target, a base of another architecture, on the T tasks     as port.py does
    add       the latents of the other 16 tasks, on the sources; all else is frozen          as train.py --add-task does

The target then decodes 16 tasks that neither the core nor its converter has ever met: `carried`. Beside it stand the same
latents fitted on the target itself (`target`), given to the wrong tasks (`shuffled`), the latent that they all started at
(`mean`), the bare base and a LoRA a task.

    carry-over = (acc_carried - acc_base) / (acc_LoRA - acc_base)

Each fit that is finished is a file in <out>/seed<s>/, and each measurement is lines of <out>/results.jsonl, from which
`python eval.py --table carry --results <out>` draws the table and the plot.
"""
import contextlib, functools, json, random, time

import torch
from torch import nn

from baselines.lora import TaskLoRAs
from bases import load_base
from cli import OUT, append_jsonl, commas, hold_to, lock, parse, run_main, seed, write_json
from data import Row, encode, sample
from eval import commit, evaluate, hardware, pack
from portal import Config, Converter, Portal, load_tensors, save_tensors
from resume import forget
from toy import grid
from train import TOY, Learner, fit, portal_learner, rounds_of

# A name has 8 skills and a kind 12. The i-th name and the i-th kind: each name is held out once or twice, each kind twice,
# so all of them occur in the other 80 tasks.
HELD_OUT = [f"{grid.NAMES[i % 12]}_{list(grid.KINDS)[i % 8]}" for i in range(16)]
REST = [task for task in grid.SKILLS if task not in HELD_OUT]

# `noise`: while the core learns and is ported, each latent is decoded at a random point around it, this far away in every
# dimension. `mix`: at a random point of the way to another task's latent, this far at most, as if there were tasks in
# between. `decay`: weight decay on the latents. "" is train.py as it is.
RECIPES = {"": {}, "noise .1": dict(noise=0.1), "noise .2": dict(noise=0.2), "decay 2": dict(decay=2.0),
           "interpolated .3": dict(mix=0.3)}
# RECIPE was fixed on `choice` (see `carry`), means over three seeds on the target: noise .1 at .61, noise .2 .58,
# interpolated .3 .55, "" .45, decay 2 .44.
RECIPE, CHOICE = "noise .1", 32
SWEEP = [(T, RECIPE) for T in (80, 64, 32, 16, 8)] + [(80, "")] + [(CHOICE, r) for r in RECIPES if r != RECIPE]

SETTINGS = dict(train=dict(n=160, epochs=5, batch_size=2, lr=1e-3), port=dict(n=160, epochs=6, batch_size=2, lr=3e-3),
                add=dict(n=200, epochs=5, batch_size=4, lr=5e-3), lora=dict(n=200, epochs=2, batch_size=8, lr=3e-3),
                sizes=TOY["sizes"], eval_rows=100)
MAX_TOKENS = 8192


# ---------------------------------------------------------------------------------------------- tasks and fits
def tasks_of(T, seed):
    """T training tasks; those of a smaller T are among them."""
    return random.Random(f"tasks {seed}").sample(REST, len(REST))[:T]


@functools.cache
def rows_of(task, split):
    return [Row(r["task"], r["prompt"], r["choices"], r["gold_idx"]) for r in grid.task_rows(task)[split]]


def train_rows(tasks, n, seed):
    return {task: sample(rows_of(task, "train"), n, seed) for task in tasks}


def eval_rows(tasks):
    return {task: rows_of(task, "eval")[:SETTINGS["eval_rows"]] for task in tasks}


def learn(path, what, bases, generate, learners, rows, seed, how, z=None, frozen=()):
    """Fit, and keep the selected parameters at `path`; what stands there already is read."""
    params = [p for learner in learners for p in learner.params]
    if path.exists():
        tensors = load_tensors(path)
        for k, p in enumerate(params):
            p.data.copy_(tensors[str(k)])
        return
    state = path.with_suffix(".state")
    fit(what, bases, generate, learners, rows, epochs=how["epochs"], batch_size=how["batch_size"], max_tokens=MAX_TOKENS,
        seed=seed, log=path.parent / "log.jsonl", z=z, state=state, frozen=frozen)
    for learner in learners:
        learner.load_best()
    save_tensors(path, {str(k): p for k, p in enumerate(params)})
    forget(state)


@contextlib.contextmanager
def latents(portal, z):
    """Inside, the portal decodes these latents."""
    before, portal.z = portal.z, z
    try:
        yield
    finally:
        portal.z = before


def around(portal, noise, mix):
    """`generate` for a fit, at points around the latents. Scoring, where nothing is learned, decodes the latents themselves."""
    def generate(base):
        z, T = portal.z, len(portal.z)
        if torch.is_grad_enabled():
            z = z.lerp(z[torch.randperm(T)], mix * torch.rand(T, 1))                 # [T, d_z]
            z = z + noise * torch.randn_like(z)
        with latents(portal, z):
            return portal.adapters(base)
    return generate


def named(seed, T, recipe):
    return f"seed {seed}, {T} tasks, {recipe or 'as train.py'}"


def carrier(out, bases, seed, T, recipe):
    """A core trained with T tasks on the sources, ported to the target -> a Portal that is frozen, and its folder."""
    folder = out / f"seed{seed}" / f"{T}-tasks-{recipe.replace(' ', '') or 'plain'}"
    noise, mix, decay = (RECIPES[recipe].get(key, 0.0) for key in ("noise", "mix", "decay"))
    (*sources, target), what, how = bases, named(seed, T, recipe), SETTINGS["train"]
    rows = train_rows(tasks_of(T, seed), how["n"], seed)
    torch.manual_seed(seed)
    portal = Portal(Config(tasks=list(rows), **SETTINGS["sizes"]))
    portal.converters = {base.name: Converter(portal.cfg, base.layers, base.dims) for base in sources}
    learner = portal_learner(portal, rows, how["epochs"], how["batch_size"], how["lr"])
    learner.optimizer.param_groups[1]["weight_decay"] = decay                        # the second group is z
    learn(folder / "train.safetensors", f"{what}: train", sources, around(portal, noise, mix), [learner], rows, seed, how,
          portal.z)

    trained, how = portal.converters, SETTINGS["port"]
    frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
    rows = train_rows(portal.cfg.tasks, how["n"], seed)
    torch.manual_seed(seed)
    portal.converters = {target.name: Converter(portal.cfg, target.layers, target.dims, like=trained[grid.SOURCES[-1]])}
    learner = portal_learner(portal, rows, how["epochs"], how["batch_size"], how["lr"])
    learn(folder / "port.safetensors", f"{what}: port", [target], around(portal, noise, mix), [learner], rows, seed, how,
          frozen=frozen)
    portal.converters = {**trained, **portal.converters}
    for converter in portal.converters.values():
        converter.requires_grad_(False)
    return portal, folder


def add(path, what, portal, tasks, bases, seed):
    """New latents [tasks, d_z] for a frozen portal, fitted on `bases`. All start at the mean of the trained ones."""
    how, z = SETTINGS["add"], nn.Parameter(portal.z.mean(0, keepdim=True).repeat(len(tasks), 1))
    rows = train_rows(tasks, how["n"], seed)
    frozen = [p for module in (portal.core, *portal.converters.values()) for p in module.parameters()]
    before = [p.clone() for p in frozen]
    learner = Learner([{"params": [z], "lr": how["lr"]}], tasks,
                      max(rounds_of(train, how["batch_size"]) for train, _ in rows.values()), how["epochs"])
    with latents(portal, z):
        learn(path, what, bases, portal.adapters, [learner], rows, seed, how, z, frozen)
    assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or converters changed"
    return z.detach()


# ---------------------------------------------------------------------------------------------- measurements
CELL = ("method", "variant", "recipe", "training_tasks", "seed")


def measured(out):
    """The cells that results.jsonl has."""
    path = out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {tuple(row[key] for key in (*CELL, "base")) for row in rows}


def measure(out, base, adapters, rows, cell):
    """One line a task of `rows` {task: rows}; `adapters`: a function, called if the cell is not there yet."""
    if (*(cell[key] for key in CELL), base.name) in measured(out):
        return
    start, tasks = time.time(), list(rows)
    items, _ = encode(base.tokenizer, [row for own in rows.values() for row in own], tasks)
    with torch.no_grad():
        cells = evaluate(base, adapters(), items, MAX_TOKENS)
    seconds, made = round((time.time() - start) / len(cells), 3), commit()
    append_jsonl(out / "results.jsonl", *(dict(
        experiment=cell["variant"] if cell["variant"] in ("trained", "choice") else "carry", **cell, base=base.name,
        role="unseen" if base.name == grid.TARGET else "seen", task=tasks[t], select="best", acc_norm=c["acc_norm"],
        log_loss=c["log_loss"], rows=c["rows"], seconds=seconds, correct=pack(c["correct"]), commit=made)
        for t, c in cells.items()))
    print(f"{base.name}, {cell['training_tasks']} tasks {cell['recipe']} {cell['variant'] or cell['method']}: acc_norm "
          f"{sum(c['acc_norm'] for c in cells.values()) / len(cells):.3f}", flush=True)


def yardsticks(out, bases, seed):
    """The bare bases and the LoRAs of the held-out tasks."""
    how, rows, cell = SETTINGS["lora"], eval_rows(HELD_OUT), dict(recipe="", training_tasks=0, seed=seed)
    for base in bases:
        measure(out, base, lambda: None, rows, dict(cell, method="base", variant="", n=0))
        own = train_rows(HELD_OUT, how["n"], seed)
        torch.manual_seed(seed)
        loras = TaskLoRAs(len(own), base)
        learners = [Learner([{"params": loras.of(t), "lr": how["lr"]}], [task], rounds_of(train, how["batch_size"]),
                            how["epochs"]) for t, (task, (train, _)) in enumerate(own.items())]
        learn(out / f"seed{seed}" / f"lora-{base.name}.safetensors", f"seed {seed}: LoRA {base.name}", [base],
              loras.adapters, learners, own, seed, how)
        measure(out, base, loras.adapters, rows, dict(cell, method="lora", variant="", n=how["n"]))


def carry(out, bases, seed, T, recipe):
    """Train, port, add; then the new tasks and every control on every base.

    Recipes are chosen by `choice`: 16 other tasks that a core of 32 has not met, on training rows that their latents were
    not fitted on. So the held-out tasks decide nothing."""
    what, n, trained = named(seed, T, recipe), SETTINGS["add"]["n"], tasks_of(T, seed)[:len(HELD_OUT)]
    portal, folder = carrier(out, bases, seed, T, recipe)
    carried = add(folder / "carried.safetensors", f"{what}: add", portal, HELD_OUT, bases[:-1], seed)
    target = add(folder / "target.safetensors", f"{what}: add on the target", portal, HELD_OUT, bases[-1:], seed)
    mean, rows = portal.z.mean(0, keepdim=True).repeat(len(HELD_OUT), 1), eval_rows(HELD_OUT)
    variants = {"trained": (portal.z[:len(trained)], eval_rows(trained), SETTINGS["train"]["n"]),
                "carried": (carried, rows, n), "target": (target, rows, n),
                "shuffled": (carried.roll(1, 0), rows, n), "mean": (mean, rows, n)}
    if T == CHOICE:
        others = tasks_of(T + 16, seed)[T:]
        z = add(folder / "choice.safetensors", f"{what}: choice", portal, others, bases[:-1], seed)
        variants["choice"] = z, {task: held for task, (_, held) in train_rows(others, n, seed).items()}, n
    for base in bases:
        for variant, (z, own, fitted_on) in variants.items():
            with latents(portal, z):
                measure(out, base, lambda: portal.adapters(base.name), own, dict(
                    method="portal", variant=variant, recipe=recipe, training_tasks=T, seed=seed, n=fitted_on))


# ---------------------------------------------------------------------------------------------- the command
def main(argv=None):
    args = parse(__doc__, "out seeds", argv, out=dict(default=OUT / "carry"),
                 seeds=dict(type=commas(seed), metavar="N[,N]", help="one sweep each (default: 0,1,2)"))
    seeds = args.seeds or [0, 1, 2]
    lock(args.out)
    hold_to(args.out / "settings.json", SETTINGS)
    write_json(args.out / "about.json", dict(
        title="Results: a task learned after the port", kind="toy", hardware=hardware(), commit=commit(), seen=grid.SOURCES,
        within=[], across=[grid.TARGET], commands={"carry": "python carry_over.py"},
        note="The world of `toy/grid.py`: 96 skills, 12 names by 8 kinds. 16 of them are learned when the core and the port "
             "stand, on the two sources alone; the core was trained with T of the others."))
    bases = [load_base(str(grid.FOLDER / name)) for name in (*grid.SOURCES, grid.TARGET)]
    for number in seeds:
        yardsticks(args.out, bases, number)
        for T, recipe in SWEEP:
            carry(args.out, bases, number, T, recipe)
    print(f"all is done; python eval.py --table carry --results {args.out}")


if __name__ == "__main__":
    run_main(main)
