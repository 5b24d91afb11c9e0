"""A task learned after the port: the recovered lift on a base without training rows for that task, by number of
training tasks.

    python -m experiments.carry_over                             three seeds; the same command continues after a kill
    python -m experiments.carry_over --seeds 0 --out out/carry   one seed

For T of the 80 training tasks of toy/grid.py: `train` learns T latents, the core and the converters of two sources;
`port` a converter for the target, a base of another architecture, on the T tasks; `add` the latents of the other 16
tasks, on the sources. The target then decodes 16 tasks on which neither the core nor its converter was trained:
`carried`. Controls: latents fitted on the target itself (`target`), the carried ones permuted over the tasks
(`shuffled`), the latent that all started at (`mean`), the bare base and a LoRA a task.

    carry-over = (acc_carried - acc_base) / (acc_LoRA - acc_base)

Fits are files in <out>/seed<s>/; `python -m experiments.tables carry --results <out>` draws what was measured.
"""
import copy, functools, itertools, random, time

import torch
from torch import nn

from baselines.lora import TaskLoRAs, lora_learners
from bases import encode, load_base
from portal import Config, Converter, Portal
from reports.results import commit, hardware, pack
from runtime.files import append_jsonl, read_jsonl, require_same, write_json
from runtime.flags import commas, parse, run_main, seed
from runtime.job import Job
from presets import TOY
from runtime.resume import forget
from runtime.run_folder import OUT, lock
from runtime.saved import load_tensors, save_tensors
from score import evaluate
from tasks.rows import Row, sample
from toy import grid
from train import fit, portal_learner

# A name has 8 skills and a kind 12. The i-th name and the i-th kind: each name is held out once or twice, each kind
# twice, so all of them occur in the other 80 tasks.
HELD_OUT = [f"{grid.NAMES[i % 12]}_{list(grid.KINDS)[i % 8]}" for i in range(16)]
REST = [task for task in grid.SKILLS if task not in HELD_OUT]

# While the core is trained and ported, a latent is decoded at a random point: `noise`: around it, with this standard
# deviation in every dimension; `mix`: on the line to another task's latent, at most this share of it, as if there were
# tasks in between. `decay`: weight decay on the latents. "": train.py as it is. RECIPE: the best by `choice` (`carry`).
RECIPES = {"": {}, "noise .1": dict(noise=0.1), "noise .2": dict(noise=0.2), "decay 2": dict(decay=2.0),
           "interpolated .3": dict(mix=0.3)}
RECIPE, CHOICE = "noise .1", 32
SWEEP = [(T, RECIPE) for T in (80, 64, 32, 16, 8)] + [(80, "")] + [(CHOICE, r) for r in RECIPES if r != RECIPE]

SETTINGS = dict(train=dict(n=160, epochs=5, batch_size=2, lr=0.3), port=dict(n=160, epochs=6, batch_size=2, lr=1.5),
                add=dict(n=200, epochs=5, batch_size=4, lr=0.08), lora=dict(n=200, epochs=2, batch_size=8, lr=3e-3),
                sizes={**TOY["sizes"], "d_c": 256}, eval_rows=100)
MAX_TOKENS = 8192


def tasks_of(T, seed):
    """T training tasks; those of a smaller T are among them."""
    return random.Random(f"tasks {seed}").sample(REST, len(REST))[:T]


@functools.cache
def rows_of(task, split):
    return [Row(r["task"], r["prompt"], r["choices"], r["gold_idx"]) for r in grid.task_rows(task)[split]]


def eval_rows(tasks):
    return {task: rows_of(task, "eval")[:SETTINGS["eval_rows"]] for task in tasks}


def with_latents(portal, z):
    portal = copy.copy(portal)
    portal.z = z
    return portal


def around(portal, noise, mix):
    """Returns `generate` for a fit, which decodes points around the latents; without gradients, the latents."""
    def generate(base):
        z, T = portal.z, len(portal.z)
        if torch.is_grad_enabled():
            z = z.lerp(z[torch.randperm(T)], mix * torch.rand(T, 1)) + noise * torch.randn_like(z)  # [T, d_z]
        return with_latents(portal, z).adapters(base)
    return generate


class CarryOver:
    """The fits and measurements of one seed in folder `out`. bases: the sources and, last, the target."""

    def __init__(self, out, bases, seed):
        self.out, self.folder, self.bases, self.seed = out, out / f"seed{seed}", bases, seed

    def stage(self, name, tasks):
        """Returns the settings of a stage and its rows {task: (train rows, held-out rows)}."""
        how = {"least": 1, "max_tokens": MAX_TOKENS, **SETTINGS[name]}
        return how, {task: sample(rows_of(task, "train"), how["n"], self.seed) for task in tasks}

    def learn(self, name, bases, generate, learners, rows, how, frozen=()):
        """Fits and saves the selected parameters as seed<s>/<name>.safetensors; reads them if they are there. how: a
        Job's settings; the rest as in train.fit."""
        path, params = self.folder / f"{name}.safetensors", [p for learner in learners for p in learner.params]
        if path.exists():
            for k, tensor in load_tensors(path).items():
                params[int(k)].data.copy_(tensor)
            return
        state, before = path.with_suffix(".state"), [p.clone() for p in frozen]
        job = Job(f"seed {self.seed}, {name}", how, self.seed, path.with_name("log.jsonl"), state, frozen)
        fit(job, bases, generate, learners, rows)
        assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "frozen parameters changed"
        for learner in learners:
            learner.load_best()
        save_tensors(path, {str(k): p for k, p in enumerate(params)})
        forget(state)

    def carrier(self, T, recipe):
        """Returns a frozen Portal whose core was trained with T tasks and ported to the target, and its folder."""
        (*sources, target), folder = self.bases, f"{T}-tasks-{recipe.replace(' ', '') or 'plain'}"
        noise, mix, decay = (RECIPES[recipe].get(key, 0.0) for key in ("noise", "mix", "decay"))
        def learn(stage, bases, decay=0.0, frozen=()):
            how, rows = self.stage(stage, portal.cfg.tasks)
            learner = portal_learner(portal, rows, how)
            learner.optimizer.param_groups[-1]["weight_decay"] = decay               # of z, the last group
            self.learn(f"{folder}/{stage}", bases, around(portal, noise, mix), [learner], rows, how, frozen)

        torch.manual_seed(self.seed)
        portal = Portal(Config(tasks=tasks_of(T, self.seed), **SETTINGS["sizes"]))
        trained = portal.converters = {base.name: Converter(portal.cfg, base.groups_of(portal.cfg.modules))
                                       for base in sources}
        learn("train", sources, decay)
        frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
        torch.manual_seed(self.seed)
        converter = Converter(portal.cfg, target.groups_of(portal.cfg.modules), trained[grid.SOURCES[-1]], port=True)
        portal.converters = {target.name: converter}
        learn("port", [target], frozen=frozen)
        portal.converters = {**trained, target.name: converter}
        for converter in portal.converters.values():
            converter.requires_grad_(False)
        return portal, folder

    def add(self, name, portal, tasks, bases):
        """Returns new latents [tasks, d_z] for a frozen portal, fitted on `bases` from the mean of the trained ones."""
        how, rows = self.stage("add", tasks)
        added = with_latents(portal, nn.Parameter(portal.z.mean(0, keepdim=True).repeat(len(tasks), 1)))
        frozen = [p for module in (portal.core, *portal.converters.values()) for p in module.parameters()]
        learner = portal_learner(added, rows, how)
        self.learn(name, bases, added.adapters, [learner], rows, how, frozen)
        return added.z.detach()

    def measure(self, base, adapters, rows, **cell):
        """Appends a line a task of `rows` {task: rows} to results.jsonl, unless it has them. adapters(): Adapters."""
        start, path, cell = time.time(), self.out / "results.jsonl", dict(cell, seed=self.seed, base=base.name)
        if any(cell.items() <= row.items() for row in read_jsonl(path)):
            return
        tasks, variant = list(rows), cell["variant"]
        items, _ = encode(base.tokenizer, sum(rows.values(), []), tasks)
        with torch.no_grad():
            cells = evaluate(base, adapters(), items, MAX_TOKENS)
        row = dict(experiment=variant if variant in ("trained", "choice") else "carry", **cell, select="best",
                   role="unseen" if base.name == grid.TARGET else "seen",
                   seconds=round((time.time() - start) / len(cells), 3), commit=commit())
        append_jsonl(path, *({**row, **c, "task": tasks[t], "correct": pack(c["correct"])} for t, c in cells.items()))
        print(f"{base.name}, {cell['training_tasks']} tasks {cell['recipe']} {variant or cell['method']}: "
              f"acc_norm {sum(c['acc_norm'] for c in cells.values()) / len(cells):.3f}", flush=True)

    def baselines(self):
        """Measures the bare bases and the LoRAs of the held-out tasks."""
        how, rows = self.stage("lora", HELD_OUT)
        measured, cell = eval_rows(HELD_OUT), dict(recipe="", training_tasks=0, variant="")
        for base in self.bases:
            self.measure(base, lambda: None, measured, method="base", n=0, **cell)
            torch.manual_seed(self.seed)
            loras = TaskLoRAs(len(rows), base)
            self.learn(f"lora-{base.name}", [base], loras.adapters, lora_learners(loras, rows, how), rows, how)
            self.measure(base, loras.adapters, measured, method="lora", n=how["n"], **cell)

    def carry(self, T, recipe):
        """Trains, ports and adds; then measures the new tasks and every control on every base. Recipes are chosen by
        `choice`: 16 other tasks that a core of 32 was not trained on, on training rows that their latents were not
        fitted on. So the held-out tasks decide nothing."""
        trained, rows = tasks_of(T, self.seed)[:len(HELD_OUT)], eval_rows(HELD_OUT)
        portal, folder = self.carrier(T, recipe)
        carried = self.add(f"{folder}/carried", portal, HELD_OUT, self.bases[:-1])
        target = self.add(f"{folder}/target", portal, HELD_OUT, self.bases[-1:])
        mean = portal.z.mean(0, keepdim=True).repeat(len(HELD_OUT), 1)
        variants = {"trained": (portal.z[:len(trained)], eval_rows(trained)), "carried": (carried, rows),
                    "target": (target, rows), "shuffled": (carried.roll(1, 0), rows), "mean": (mean, rows)}
        if T == CHOICE:
            others = tasks_of(T + 16, self.seed)[T:]
            z = self.add(f"{folder}/choice", portal, others, self.bases[:-1])
            variants["choice"] = z, {task: held for task, (_, held) in self.stage("add", others)[1].items()}
        for base, (variant, (z, own)) in itertools.product(self.bases, variants.items()):
            self.measure(base, lambda: with_latents(portal, z).adapters(base.name), own, method="portal", recipe=recipe,
                         variant=variant, training_tasks=T, n=SETTINGS["train" if variant == "trained" else "add"]["n"])


def main(argv=None):
    args = parse(__doc__, "out seeds", argv, out=dict(default=OUT / "carry"),
                 seeds=dict(type=commas(seed), metavar="N[,N]", help="one sweep each (default: 0,1,2)"))
    lock(args.out)
    require_same(args.out / "settings.json", SETTINGS)
    write_json(args.out / "about.json", dict(
        title="Results: a task learned after the port", kind="toy", hardware=hardware(), commit=commit(),
        seen=grid.SOURCES, within=[], across=[grid.TARGET], commands={"carry": "python -m experiments.carry_over"},
        note="The toy world of `toy/grid.py`: 96 skills, each a combination of one of 12 names and one of 8 kinds. The "
             "core is trained with T of 80 skills and ported; only then are the other 16 skills learned, on the two "
             "source bases alone. The tables measure these 16 on the target."))
    bases = [load_base(str(grid.FOLDER / name)) for name in (*grid.SOURCES, grid.TARGET)]
    for number in args.seeds or [0, 1, 2]:
        run = CarryOver(args.out, bases, number)
        run.baselines()
        for T, recipe in SWEEP:
            run.carry(T, recipe)
    print(f"all is done; python -m experiments.tables carry --results {args.out}")


if __name__ == "__main__":
    run_main(main)
