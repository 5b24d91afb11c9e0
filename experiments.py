"""The experiments: what the write-up claims in its tables and its figure, measured so that others can repeat it.

    python experiments.py                          all of them on the toy: hours on two cores, and it shows progress
    python experiments.py main --seeds 0           one of them, one seed
    python experiments.py main sweep --bases A,B --to C,D --data DIR --out out/real       on other bases
    python eval.py --table all --results out/experiments                                  the tables and plots of it

    main        sections 6.1 to 6.3: every method on the source bases and on the unseen ones
    sweep       section 6.4: the rows a port needs, beside those that a LoRA needs
    ablation    one piece of the method at a time taken away or replaced, on a quarter of the toy's rows and rounds
    competition the write-up's open problem (section 7): what leaves a task under-fit, and what mends it
    aside       tasks learned after the port, on the sources alone, and the controls (on the toy: two skills beside its 14;
                a world of a hundred skills is carry_over.py's)

An experiment is a list of steps, and a step is the commands of this project, one after the other, on run folders under
<out>/runs. What was finished is not done again, and what was interrupted goes on inside its command (resume.py), so the
same command line may be given until all is there. <out>/results.jsonl and about.json are gathered from the run folders
after every step: tables.py draws from these two files alone.
"""
import argparse, collections, contextlib, copy, json, pathlib, re, shlex, shutil
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AutoConfig

import eval, port, portal, train
from bases import pretrained, short_name
from cli import (LOCKS, OUT, ROOT, TOY_SEEN, TOY_UNSEEN, BadInput, Parser, append_jsonl, commas, hold_to, lock, new_folder,
                 positive, read_json, run_main, seed, write_json, write_whole)
from eval import METHODS, commit, hardware
from portal import MODULES, load_adapters, load_config, load_converter, load_tensors, provenances, save_tensors

SWEEP = (8, 16, 32, 64, 125, 250, 500, 1000)                                         # all that a task of the toy has
ASIDE = [ROOT / "toy" / "data_aside" / task for task in ("fourth", "after_animal")]   # in no training of the toy
QUARTER = 250                                                                        # rows a task of an ablation


# ---------------------------------------------------------------------------------------------- ablations
# What is taken away or replaced, as (flags, patches, whether only the port is concerned: else the flags are train.py's).
# The patches reach into the method where a reader would, so that no option of the commands is needed for it.
def without_film(init=portal.Core.__init__):
    def replaced(core, cfg):
        init(core, cfg)
        core.film.requires_grad_(False)                                              # zero it is and stays: gamma = beta = 0
    return mock.patch.object(portal.Core, "__init__", replaced)


def sizes(**changes):
    return mock.patch.dict(train.TOY["sizes"], changes)


def ported_from(change, converter=portal.Converter):
    """The port's fresh converter, changed."""
    def replaced(*args):
        made = converter(*args)
        with torch.no_grad():
            change(made)
        return made
    return mock.patch.object(port, "Converter", replaced)


def lr_of_e(lr, learner=train.portal_learner):
    """The port's layer embeddings at a learning rate of their own."""
    def replaced(portal, rows, epochs, batch_size, rate, least):
        rounds = learner(portal, rows, epochs, batch_size, rate, least).rounds
        converter, = portal.converters.values()
        aligner = [p for name, p in converter.named_parameters() if name != "e"]
        groups = [{"params": aligner, "lr": rate}, {"params": [converter.e], "lr": lr}]
        return train.Learner(groups, list(rows), rounds, epochs)
    return mock.patch.object(port, "portal_learner", replaced)


def equal_tasks(gradients_of=train.task_gradients):
    """Every task's gradient on its own adapters rescaled to the tasks' mean norm."""
    def replaced(*args):
        losses, gradients = gradients_of(*args)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0).clamp(min=1e-12)  # [T]
        return losses, [(norms.mean() / norms).view(-1, 1, 1, 1) * g for g in gradients]
    return mock.patch.object(train, "task_gradients", replaced)


def ema_floor(floor, weights=train.EMA.weights):
    """No task's running mean counts as less than `floor`: what is solved pulls less than what is not."""
    return mock.patch.object(train.EMA, "weights", lambda ema, losses: weights(ema, losses).clamp(max=1 / floor))


with_ema = lambda: mock.patch.dict(train.fit.__kwdefaults__, ema=True)
no_balance = lambda: mock.patch.object(train, "balance", sum)
ABLATIONS = {
    "": ([], [], False),                                                             # as shipped
    "trunk as printed (no LayerNorm)": (["--norm", "none"], [], False),
    "no FiLM, z in the input alone": ([], [without_film], False),
    "bases' gradients on z not balanced": ([], [no_balance], False),
    "losses divided by their EMA (write-up)": ([], [with_ema], False),
    "one source base": (["--bases", "toy-qwen-m"], [], False),
    "three source bases": (["--bases", "toy-qwen-s,toy-qwen-m,toy-qwen-l"], [], False),
    "all seven modules": (["--modules", "all"], [], False),
    "rank 4": (["--rank", "4"], [], False),
    "rank 16": (["--rank", "16"], [], False),
    "d_c 64": ([], [lambda: sizes(d_c=64)], False),
    "d_c 1024": ([], [lambda: sizes(d_c=1024)], False),
    "gain .1": ([], [lambda: sizes(gain=0.1)], False),
    "d_c 1024, gain .1": ([], [lambda: sizes(d_c=1024, gain=0.1)], False),
    "port: P_in aligned": (["--align"], [], True),
    "port: e at random, lr 1e-3 (write-up)": (["--lr", "1e-3"], [lambda: ported_from(lambda c: c.e.normal_())], True),
    "port: e at random": ([], [lambda: ported_from(lambda c: c.e.normal_())], True),
    "port: e by depth, lr 1e-3": (["--lr", "1e-3"], [], True),
    "port: e at random, its lr 3e-2": ([], [lambda: ported_from(lambda c: c.e.normal_()), lambda: lr_of_e(3e-2)], True),
    "port: e by depth, its lr 3e-2": ([], [lambda: lr_of_e(3e-2)], True),
    "port: P_out small random": ([], [lambda: ported_from(lambda c: [p.normal_(std=0.02) for p in c.P_out.values()])], True),
}


# Some tasks stay under-fit (section 7). Is the core too small, or is it the way there? With all rows, each line changes one
# of the two: more room (rank, latent, width), or another way (more rounds, tasks at equal strength, LayerNorm); and the
# worst task is trained alone, on the core that was too small for it among fourteen. As printed: as the write-up has it,
# without LayerNorm, and every loss divided by its running mean.
PRINTED = ["--norm", "none"]
COMPETITION = {
    "": ([], []),
    "as printed": (PRINTED, [with_ema]),
    "as printed, the worst task alone": (PRINTED, [with_ema]),
    "as printed, EMA never below .1": (PRINTED, [with_ema, lambda: ema_floor(0.1)]),
    "as printed, losses not divided": (PRINTED, []),
    "as printed, losses not divided, task gradients at equal norm": (PRINTED, [equal_tasks]),
    "as printed, rank 16": ([*PRINTED, "--rank", "16"], [with_ema]),
    "as printed, d_z 256, hidden 512": (PRINTED, [with_ema, lambda: sizes(d_z=256, hidden=512)]),
    "as printed, three times the epochs": ([*PRINTED, "--epochs", "12"], [with_ema]),
    "as shipped, losses divided by their EMA": ([], [with_ema]),
}


def watched(path, every=25):
    """train.one_round that also appends, every so many rounds, what the tasks do to each other to `path`: of each task's
    gradient on the core, as the optimiser will add it to the others', its norm and its cosine with the sum of the others'.
    """
    one_round = train.one_round
    def replaced(bases, generate, learners, items, max_tokens, running=None, z=None):
        core = [p for p in generate.__self__.core.parameters() if p.requires_grad]   # none in a port
        if core and (number := learners[0].schedule.last_epoch) % every == 0:        # resumed with the fit
            for base in bases:
                adapters = generate(base.name)
                losses, gradients = train.task_gradients(base, adapters, items[base.name], max_tokens)
                # A copy of the mean: the round itself takes these losses in below.
                weights = copy.copy(running[base.name]).weights(losses) if running else torch.ones_like(losses)
                own = []
                for t, weight in enumerate(weights):
                    alone = [weight * F.one_hot(torch.tensor(t), len(g)).view(-1, 1, 1, 1) * g for g in gradients]
                    parts = torch.autograd.grad(adapters.tensors(), core, alone, retain_graph=True)
                    own.append(torch.cat([p.flatten() for p in parts]))
                own = torch.stack(own)                                               # [T, parameters of the core]
                cosines = F.cosine_similarity(own, own.sum(0) - own)                 # [T]
                append_jsonl(path, dict(round=number, base=base.name, norms=own.norm(dim=1).tolist(),
                                        cosines=cosines.tolist(), losses=losses.tolist()))
        return one_round(bases, generate, learners, items, max_tokens, running, z)
    return mock.patch.object(train, "one_round", replaced)


# ---------------------------------------------------------------------------------------------- counting
def dims_of(adapters):
    """{m: (layers, rank, d_in, d_out)} of saved adapters."""
    return {m: (*a.shape[1:], adapters.B[m].shape[2]) for m, a in adapters.A.items()}


def flops(tokens, rounds, dims, own, generator=0):
    """FLOPs of a fit: tokens (4 N + 6 a) + rounds * generator.

    A multiply and an add are 2 FLOPs. For every token and each of the N weights of the frozen projections: one pair in the
    forward pass and one in the backward pass, which asks for the input's gradient alone. For each of the a numbers of the
    token's own adapter: the weight's gradient, too. Attention scores, norms and the LM head at the answers are left out;
    they are the same for all methods.
    """
    frozen = sum(layers * d_in * d_out for layers, _, d_in, d_out in dims.values())
    adapter = sum(layers * rank * (d_in + d_out) for layers, rank, d_in, d_out in own.values())
    return tokens * (4 * frozen + 6 * adapter) + rounds * generator


def generator_flops(cfg, layers, own):
    """Of a round of a port: T * layers adapters forward and backward; the frozen core (trunk and heads) without weight
    gradients, the aligner with them."""
    core = cfg.hidden * (cfg.d_z + cfg.d_e) + cfg.hidden ** 2 + len(cfg.modules) * 2 * cfg.hidden * cfg.rank * cfg.d_c
    aligner = sum(cfg.rank * cfg.d_c * (d_in + d_out) for _, _, d_in, d_out in own.values())
    return len(cfg.tasks) * layers * (4 * core + 6 * aligner)


def last_fit(log, what):
    """The epochs of the last fit of this name; the log keeps those that it replaced (--overwrite), too."""
    lines = [line for line in log if line["what"] == what]
    return lines[max((k for k, line in enumerate(lines) if line["epoch"] == 1), default=0):]


def count(run, variant, parameters, costs, every):
    """Trained parameters of every fit on an unseen base of a run, and its tokens and FLOPs, from the files it left. `every`:
    {base: dims_of all its modules}, as far as a LoRA of this run or of one before says them."""
    cfg = load_config(run)[1]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] if (run / "log.jsonl").exists() else []
    for tag, p in provenances(run).items():
        fits = {"portal": f"port {tag}", "lora": f"lora {tag}", "lora iso": f"lora_iso {tag}"}
        for method, what in fits.items() if p["ported"] else ():
            lines = last_fit(log, what)
            label = f"{method} {variant}".strip() if method == "portal" else method
            if method == "portal":
                made = load_converter(cfg, run / "converters" / f"{tag}.safetensors")
                own = {m: (len(made.e), cfg.rank, made.P_in[m].shape[1], made.P_out[m].shape[0]) for m in cfg.modules}
                number, generator = sum(q.numel() for q in made.parameters()), generator_flops(cfg, len(made.e), own)
            else:
                saved = run / "baselines" / method.replace(" ", "_") / f"{tag}.safetensors"
                if not saved.exists():
                    continue
                adapters = load_adapters(saved)
                own, number, generator = dims_of(adapters), sum(t.numel() for t in adapters.tensors()), 0
            parameters.setdefault(p["base"], {})[label] = number
            lora = run / "baselines" / "lora" / f"{tag}.safetensors"
            if lora.exists() and p["base"] not in every:
                every[p["base"]] = dims_of(load_adapters(lora))
            dims = own if len(own) == len(MODULES) else every.get(p["base"])
            if lines and dims:
                tokens, rounds = (sum(line[key] for line in lines) for key in ("tokens", "rounds"))
                costs.setdefault(p["base"], {})[f"{label} {p['n']}"] = dict(
                    tokens=tokens, rounds=rounds, flops=flops(tokens, rounds, dims, own, generator))


# ---------------------------------------------------------------------------------------------- steps
class Steps:
    """The steps of one command line. `out`: its folder; `chosen`: the flags, as given."""

    def __init__(self, chosen):
        self.chosen, self.out, self.toy = chosen, chosen.out, chosen.bases is None
        self.data, self.targets = ["--data", str(chosen.data)] if chosen.data else [], chosen.to or TOY_UNSEEN
        self.tasks_aside = chosen.aside or ASIDE
        self.path = self.out / "steps.json"                                          # {run: its experiment, variant, ...}
        self.done = read_json(self.path) if self.path.exists() else {}
        text = lambda value: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")
        self.given = {key: text(getattr(chosen, key)) for key in
                      ("bases", "to", "data", "aside", "sweep", "train", "add", "port", "eval")}
        hold_to(self.out / "flags.json", self.given)

    def run(self, name):
        return self.out / "runs" / name

    def do(self, experiment, variant, name, commands, patches=()):
        """Run `commands`, [(module, flags)], on run folder `name`, as far as they have not been run, and gather the rows."""
        step = self.done.setdefault(name, dict(experiment=experiment, variant=variant, commands=[], commits=[]))
        finished = step["commands"]
        for module, flags in commands:
            more = shlex.split(getattr(self.chosen, "add" if "--add-task" in flags else module.__name__))
            line = " ".join([f"python {module.__name__}.py", *flags, *more])
            if line in finished:
                continue
            print(f"\n== {experiment}, {name}: {line}", flush=True)
            with contextlib.ExitStack() as stack:
                stack.enter_context(LOCKS)
                for patch in patches:
                    stack.enter_context(patch())
                module.main(["--run", str(self.run(name)), *flags, *more])
            finished.append(line)
            step["commits"].append(commit())
            write_json(self.path, self.done)
            self.gather()

    def source(self, seed, *flags):
        bases = ["--bases", ",".join(self.chosen.bases)] if self.chosen.bases and "--bases" not in flags else []
        return (train, ["--seed", str(seed), "--overwrite", *bases, *self.data, *flags])

    def ports(self):
        return (port, ["--overwrite", "--to", ",".join(self.targets), *self.data])

    def fork(self, source, name, ported=(), change=None):
        """A run with the latents, core and source converters of another one, for ports of its own, or with its ports.
        `change`: a function of its latents [T, d_z] that gives others."""
        run, files = self.run(name), ["portal.json", "core.safetensors", "latents.safetensors"]
        if (run / "portal.json").exists():
            return
        for base in (*(b["base"] for b in read_json(self.run(source) / "portal.json")["bases"]), *map(short_name, ported)):
            files += [f"converters/{base}.{end}" for end in ("json", "safetensors")]
        with new_folder(run) as folder:
            (folder / "converters").mkdir()
            for file in files:
                shutil.copy(self.run(source) / file, folder / file)
            if change:
                z = load_tensors(folder / "latents.safetensors")["z"]
                save_tensors(folder / "latents.safetensors", {"z": change(z)})

    # ------------------------------------------------------------------------------------------ the experiments
    def main(self, seed):
        self.do("main", "", f"seed{seed}", [
            self.source(seed), self.ports(), (eval, ["--methods", ",".join(m for m in METHODS if m != "lora_iso")])])

    def sweep(self, seed):
        """On the last of the targets, the one of another family. The port as shipped, then with P_in aligned, with losses
        divided (write-up), and of all modules."""
        self.do("main", "", f"seed{seed}", [self.source(seed)])
        target, counts = self.targets[-1], ",".join(map(str, self.chosen.sweep))
        ports = (port, ["--overwrite", "--to", target, "--n", counts, *self.data])
        self.fork(f"seed{seed}", f"sweep-seed{seed}")
        self.do("sweep", "", f"sweep-seed{seed}", [
            ports, (eval, ["--bases", target, "--methods", "base,lora,lora_iso,portal"])])
        measure = (eval, ["--bases", target, "--methods", "portal"])
        self.fork(f"seed{seed}", f"sweep-aligned-seed{seed}")
        self.do("sweep", "aligned", f"sweep-aligned-seed{seed}", [(port, [*ports[1], "--align"]), measure])
        self.do("sweep", "losses divided", f"sweep-divided-seed{seed}", [self.source(seed), ports, measure], [with_ema])
        self.do("sweep", "all modules", f"sweep-all-seed{seed}", [
            self.source(seed, "--modules", "all"), ports, measure])

    def aside(self, seed):
        """Tasks that are in no training, learned on the sources after the ports were made (`carried`). The controls are
        runs of their own: another task's latents, the mean of those that the core was trained with, and latents that were
        fitted on the target itself."""
        source, name, names = f"seed{seed}", f"aside-seed{seed}", ",".join(folder.name for folder in self.tasks_aside)
        self.do("main", "", source, [self.source(seed), self.ports()])
        def learn(*flags):
            return [(train, ["--overwrite", "--add-task", str(folder), *flags]) for folder in self.tasks_aside]
        def measure(bases, methods="portal"):
            return eval, ["--tasks", names, "--methods", methods, *(["--bases", ",".join(bases)] if bases else [])]

        self.fork(source, name, self.targets)
        self.do("carry", "carried", name, [*learn(), measure((), "base,lora,portal")])
        new = len(self.tasks_aside)
        controls = {"shuffled": lambda z: z.roll(1, 0),
                    "mean": lambda z: torch.cat([z[:-new], z[:-new].mean(0, keepdim=True).expand(new, -1)])}
        for control, change in controls.items():
            self.fork(name, f"aside-{control}-seed{seed}", self.targets, change)
            self.do("carry", control, f"aside-{control}-seed{seed}", [measure(self.targets)])
        for target in self.targets:
            own = f"aside-on-{short_name(target)}-seed{seed}"
            self.fork(source, own, [target])
            self.do("carry", "target", own, [*learn("--bases", target), measure([target])])

    def ablation(self, seed):
        """On the toy: a quarter of its rows and of the rounds of training, a sixth of those of the port, which leaves the
        methods room to differ; and the port that is hardest."""
        few = ["--n", str(QUARTER)]
        for variant, (flags, patches, port_alone) in ABLATIONS.items():
            name = f"ablation-{slug(variant)}-seed{seed}"
            commands = [(port, ["--overwrite", "--to", "toy-gemma", "--epochs", "1", *few]), (eval, ["--methods", "portal"])]
            if port_alone:
                self.fork(f"ablation-shipped-seed{seed}", name)
                commands[0][1].extend(flags)
                commands[1][1].extend(["--bases", "toy-gemma"])
            else:
                commands.insert(0, self.source(seed, *few, *flags))
            self.do("ablation", variant, name, commands, patches)

    def competition(self, seed):
        """On the toy: what leaves a task under-fit, and what mends it. The worst task is looked up where all are trained."""
        for variant, (flags, patches) in COMPETITION.items():
            name = f"competition-{slug(variant)}-seed{seed}"
            self.run(name).parent.mkdir(parents=True, exist_ok=True)
            alone = ["--tasks", self.worst(seed)] if variant.endswith("alone") else []
            self.do("alone" if alone else "competition", variant, name, [
                self.source(seed, *flags, *alone), (port, ["--overwrite", "--to", "toy-gemma"]),
                (eval, ["--methods", "portal"])],
                [*patches, lambda: watched(self.out / "runs" / f"{name}.gradients.jsonl")])

    def worst(self, seed):
        """The task on which the core as printed is worst over its two source bases."""
        path, total = self.run(f"competition-as-printed-seed{seed}") / "results.jsonl", collections.Counter()
        for row in map(json.loads, path.read_text().splitlines()):
            if (row["method"], row["role"], row["select"]) == ("portal", "seen", "best"):
                total[row["task"]] += row["acc_norm"]
        return min(total, key=total.get)

    # ------------------------------------------------------------------------------------------ what is written
    def gather(self):
        """<out>/results.jsonl and about.json, from all run folders. Where the last epoch was the selected one, once."""
        lines, parameters, costs, every = {}, {}, {}, {}
        for name, step in self.done.items():
            run = self.run(name)
            saved = read_json(run / "portal.json") if (run / "portal.json").exists() else None
            trained = saved and len(saved["config"]["tasks"]) - len(saved.get("added", {}))
            for line in (run / "results.jsonl").read_text().splitlines() if (run / "results.jsonl").exists() else ():
                row = {"experiment": step["experiment"], "variant": step["variant"],
                       "commit": ", ".join(dict.fromkeys(step["commits"])), **json.loads(line)}
                if step["experiment"] == "carry":
                    row.update(training_tasks=trained, recipe="16 skills" if self.toy else "")
                if row["method"] != "portal":
                    row["variant"] = ""                                              # what was changed concerns PorTAL alone
                if row["method"] == "lora_iso":
                    row.update(method="lora", variant="iso")
                lines.setdefault(json.dumps({**row, "select": "", "seconds": 0}), json.dumps(row))
            if step["experiment"] in ("main", "sweep") and saved:
                count(run, step["variant"], parameters, costs, every)
        text = "".join(line + "\n" for line in lines.values())
        write_whole(self.out / "results.jsonl", lambda path: path.write_text(text))
        sources = self.chosen.bases or TOY_SEEN
        seen = [short_name(spec) for spec in sources]
        kinds = {short_name(spec): kind_of(spec) for spec in (*sources, *self.targets)}
        within = [name for name, kind in kinds.items() if name not in seen and kind in {kinds[s] for s in seen}]
        given = "".join(f" --{key} {shlex.quote(value)}" for key, value in self.given.items() if key != "sweep" and value)
        commands = {table: f"python experiments.py {name}{given}" for table, name in MADE_BY.items()}
        write_json(self.out / "about.json", dict(
            title=f"Results: {'the toy' if self.toy else ', '.join(kinds)}", searched=SEARCHED if self.toy else FACTORS,
            kind="toy" if self.toy else "real", hardware=hardware(), seen=seen,
            commit=", ".join(dict.fromkeys(made for step in self.done.values() for made in step["commits"])), within=within,
            across=[name for name in kinds if name not in (*seen, *within)], commands=commands, parameters=parameters,
            costs=costs, gradients=self.gradients()))

    def gradients(self):
        """{variant: {task: its gradient's norm, of the tasks' mean, and its cosine with the others' sum}}, means over what
        `watched` wrote in the second half of source training."""
        found = {}
        for name, step in self.done.items():
            path = self.out / "runs" / f"{name}.gradients.jsonl"
            if not path.exists() or not (self.run(name) / "portal.json").exists():
                continue
            records = map(json.loads, path.read_text().splitlines())
            records = {(r["round"], r["base"]): r for r in records}                  # after a kill some come twice
            half = max(number for number, _ in records) / 2
            last = [r for r in records.values() if r["round"] > half]
            norms, cosines = (torch.tensor([r[key] for r in last]) for key in ("norms", "cosines"))  # [records, T]
            norms = norms / norms.mean(1, keepdim=True)
            for task, norm, cosine in zip(load_config(self.run(name))[1].tasks, norms.T, cosines.T):
                cell = found.setdefault(step["variant"], {}).setdefault(task, dict(norm=[], cosine=[]))
                cell["norm"] += norm.tolist()
                cell["cosine"] += cosine.tolist()
        return {variant: {task: {key: sum(values) / len(values) for key, values in cell.items()}
                          for task, cell in tasks.items()} for variant, tasks in found.items()}


def slug(variant):
    return "-".join(re.findall("[a-z0-9]+", variant.lower())) or "shipped"


def kind_of(spec):
    """The architecture of a base, as its config.json names it."""
    return pretrained(AutoConfig, spec).model_type


# What was tried for each method before its settings were fixed, always on rows held out of train: on any bases, by eval.py;
# and on the toy (train.TOY).
FACTORS = dict.fromkeys(("cross_lora", "copy", "random"), "a factor of .5, 1, 2 or 4 on the delta, for every base and seed.")
SEARCHED = {
    "portal": "ports to toy-gemma, seeds 0 and 2, n = 32, 125, 250 and 1,000: e at random or by depth, lr 1e-3, 3e-3 and 1e-2, "
              "e's own lr 3e-2, P_out zero or small random, 56 to 904 rounds, losses divided or not; aligned, seed 0, n = 125: P_in "
              "frozen or its lr 1e-3, weight decay .1; seeds 0 and 2, n = 64 and 125: noise .1 on z in source training and port; "
              "source training: n = 1,000, norm, gain and losses divided or not.",
    "lora": "toy-gemma, seeds 0 and 2: lr 1e-3 and 3e-3 and 56 to 224 rounds at n = 32; 112 to 336 rounds at n = 125; 112 to "
            "672 at n = 250.",
    "lora iso": "toy-gemma, seed 2: 224 and 672 rounds at n = 250; else as the LoRA.",
    "hypernet": "nothing of its own; it has the settings of source training, 452 rounds at n = 1,000 where a port has 678.",
    **FACTORS}
EXPERIMENTS = ("main", "sweep", "aside", "ablation", "competition")
MADE_BY = {"6.1": "main", "6.2": "main", "6.3": "main", "tasks": "main", "6.4": "sweep", "carry": "aside",
           "ablations": "ablation", "competition": "competition"}                    # {table: experiment}


def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"some of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--seeds", type=commas(seed), default=[0, 1, 2], metavar="N,N", help="(default: 0,1,2)")
    parser.add_argument("--bases", type=commas(), metavar="A,B", help="sources (default: the toy's)")
    parser.add_argument("--to", type=commas(), metavar="A,B", help="targets (default: the toy's)")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of tasks (default: the toy's)")
    parser.add_argument("--aside", type=commas(pathlib.Path), metavar="DIR,DIR",
                        help="folders of the tasks of `aside` (default: the toy's two)")
    parser.add_argument("--sweep", type=commas(positive(int)), default=SWEEP, metavar="N,N", help="rows a task of `sweep`")
    for name, command in dict(train="train.py", add="train.py --add-task", port="port.py", eval="eval.py").items():
        parser.add_argument(f"--{name}", default="", metavar="FLAGS", help=f"more flags for {command}, in quotes")
    parser.add_argument("--out", type=pathlib.Path, default=OUT / "experiments", metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for name in args.experiments:
        if name not in EXPERIMENTS:
            raise BadInput(f"unknown experiment {name!r}; accepted are {', '.join(EXPERIMENTS)}")
    if args.bases and not {"main", "sweep", "aside"} >= set(args.experiments or EXPERIMENTS):
        raise BadInput("--bases: name some of main, sweep and aside; the other experiments are the toy's")
    if args.bases and not args.aside and "aside" in args.experiments:
        raise BadInput("--aside is needed with --bases: the folders of the tasks to learn after the port")
    if args.bases and not args.to:
        raise BadInput("--to is needed with --bases: the bases to port to")
    lock(args.out)
    with LOCKS.pop_all():                                                            # each step has locks of its own
        steps = Steps(args)
        for number in args.seeds:
            for name in args.experiments or EXPERIMENTS:
                getattr(steps, name)(number)
        steps.gather()
    print(f"\nall is done; python eval.py --table all --results {args.out}")


if __name__ == "__main__":
    run_main(main)
