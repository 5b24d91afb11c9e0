"""The write-up's experiments, measured so that others can repeat them.

    python -m experiments.paper                          all of them on the toy: hours on two cores, with progress
    python -m experiments.paper main --seeds 0           one of them, one seed
    python -m experiments.paper main sweep --bases A,B --to C,D --data DIR --out out/real       on other bases

main: sections 6.1 to 6.3, every method; sweep: 6.4, the rows that a port needs; ablation: parts of the method removed
or replaced; competition: section 7, what leaves a task under-fit; aside: tasks learned after the port.

An experiment is a list of steps, a step a list of this project's commands on one run folder under <out>/runs. A
finished command is not run again and an interrupted one continues, so the same command line may be given until all is
done. <out>/results.jsonl and about.json, all that tables.py reads, are gathered after every command.
"""
import argparse, json, pathlib, re, shlex, shutil

import pandas as pd
import torch

import eval, port, train
from bases import TOY_SEEN, TOY_UNSEEN, load_config as config_of, short_name
from experiments.ablations import ABLATIONS, COMPETITION, PORT_ABLATIONS, Variant, watched
from portal import MODULES
from reports.results import commit, hardware
from runtime.files import ROOT, BadInput, read_json, read_jsonl, require_same, write_json, write_whole
from runtime.flags import Parser, commas, positive, run_main, seed
from runtime.run_folder import LOCKS, OUT, lock, new_folder
from runtime.saved import load_adapters, load_config, load_converter, load_tensors, provenances, save_tensors

EXPERIMENTS = dict(main=("6.1", "6.2", "6.3", "tasks"), sweep=("6.4",), aside=("carry",), ablation=("ablations",),
                   competition=("competition",))                                     # {experiment: its tables}
SWEEP = (8, 16, 32, 64, 125, 250, 500, 1000)                                         # all that a task of the toy has
ASIDE = [ROOT / "toy" / "data_aside" / task for task in ("fourth", "after_animal")]  # in no training of the toy


def dims_of(adapters):
    """{group: (layers, rank, d_in, d_out)} of saved adapters."""
    return {g: (*a.shape[1:], adapters.B[g].shape[2]) for g, a in adapters.A.items()}


def flops(tokens, rounds, dims, own, generator=0):
    """FLOPs of a fit: tokens (4 N + 6 a) + rounds * generator. A multiply and an add are 2 FLOPs. For every token and
    each of the N weights of the frozen projections: one pair in the forward pass and one in the backward pass, which
    needs the input's gradient alone; for each of the a numbers of the token's own adapter the weight's gradient, too.
    Attention scores, norms and the LM head at the answers are left out; they are the same for all methods."""
    frozen = sum(layers * d_in * d_out for layers, _, d_in, d_out in dims.values())
    adapter = sum(layers * rank * (d_in + d_out) for layers, rank, d_in, d_out in own.values())
    return tokens * (4 * frozen + 6 * adapter) + rounds * generator


def generator_flops(cfg, layers, own):
    """FLOPs of the generator in a round of a port: T * layers adapters forward and backward; the frozen core (trunk and
    heads) without weight gradients, the aligner with them."""
    core = cfg.hidden * (cfg.d_z + cfg.d_e) + cfg.hidden ** 2 + len(cfg.modules) * 2 * cfg.hidden * cfg.rank * cfg.d_c
    aligner = sum(own_layers * cfg.rank * cfg.d_c * (d_in + d_out) for own_layers, _, d_in, d_out in own.values())
    return len(cfg.tasks) * (4 * layers * core + 6 * aligner)


def last_fit(log, what):
    """The epochs of the last fit of this name; the log also has those that it replaced (--overwrite)."""
    lines = [line for line in log if line["what"] == what]
    return lines[max((k for k, line in enumerate(lines) if line["epoch"] == 1), default=0):]


def count(run, variant, parameters, costs, every):
    """Adds trained parameters, tokens and FLOPs of every fit of a run on an unseen base to `parameters` and `costs`.
    every {base: dims_of all its modules}: known from a LoRA of this run or of an earlier one."""
    cfg, log = load_config(run)[1], read_jsonl(run / "log.jsonl")
    for tag, p in provenances(run).items():
        if not p["ported"]:
            continue
        made = load_converter(cfg, run / "converters" / f"{tag}.safetensors")
        own = {g: (len(layers), cfg.rank, d_in, d_out) for g, (_, layers, d_in, d_out) in made.groups.items()}
        fits = {f"portal {variant}".strip(): ("port", own, made.parameters(), generator_flops(cfg, len(made.e), own))}
        for method in ("lora", "lora_iso"):
            if (saved := run / "baselines" / method / f"{tag}.safetensors").exists():
                adapters = load_adapters(saved)
                fits[method.replace("_", " ")] = method, dims_of(adapters), adapters.tensors(), 0
        if "lora" in fits:
            every.setdefault(p["base"], fits["lora"][1])
        for label, (what, own, tensors, generator) in fits.items():
            parameters.setdefault(p["base"], {})[label] = sum(t.numel() for t in tensors)
            lines, dims = last_fit(log, f"{what} {tag}"), own if len(own) == len(MODULES) else every.get(p["base"])
            if lines and dims:
                tokens, rounds = (sum(line[key] for line in lines) for key in ("tokens", "rounds"))
                costs.setdefault(p["base"], {})[f"{label} {p['n']}"] = dict(
                    tokens=tokens, rounds=rounds, flops=flops(tokens, rounds, dims, own, generator))


def slug(variant):
    return "-".join(re.findall("[a-z0-9]+", variant.lower())) or "shipped"


class Steps:
    """The steps of one command line, parsed as `args`. steps.json holds what has finished. A command is a tuple: train,
    port or eval, then its flags."""

    def __init__(self, args):
        self.args, self.out, self.toy, self.targets = args, args.out, args.bases is None, args.to or TOY_UNSEEN
        self.data, self.path = ["--data", str(args.data)] if args.data else [], self.out / "steps.json"
        self.done = read_json(self.path) if self.path.exists() else {}               # {run: experiment, variant, ...}
        def text(value):
            return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")
        self.given = {key: text(getattr(args, key)) for key in
                      ("bases", "to", "data", "aside", "sweep", "train", "add", "port", "eval")}
        require_same(self.out / "flags.json", self.given)

    def run(self, name):
        return self.out / "runs" / name

    def run_step(self, experiment, variant, name, *commands, how=Variant()):
        """Runs those of `commands` on run folder `name` that have not finished yet, and gathers the rows after each."""
        step = self.done.setdefault(name, dict(experiment=experiment, variant=variant, commands=[], commits=[]))
        for module, *flags in commands:
            flags += shlex.split(getattr(self.args, "add" if "--add-task" in flags else module.__name__))
            line = " ".join([f"python {module.__name__}.py", *flags])
            if line in step["commands"]:
                continue
            print(f"\n== {experiment}, {name}: {line}", flush=True)
            with LOCKS:
                module.main(["--run", str(self.run(name)), *flags], **how.arguments(module.__name__))
            step["commands"].append(line)
            step["commits"].append(commit())
            write_json(self.path, self.done)
            self.gather()

    def source(self, seed, *flags):
        bases = ["--bases", ",".join(self.args.bases)] if self.args.bases else []
        return train, "--seed", str(seed), "--overwrite", *bases, *self.data, *flags

    def ports(self, targets, *flags):
        return port, "--overwrite", "--to", ",".join(targets), *flags

    def fork(self, source, name, ported=(), change=None):
        """Makes run `name` with latents, core and source converters of another run and its converters of the bases
        `ported`, and returns the name. change: a function of its latents [T, d_z] that returns other ones."""
        run, old = self.run(name), self.run(source)
        if (run / "portal.json").exists():
            return name
        bases = [*(base["base"] for base in read_json(old / "portal.json")["bases"]), *map(short_name, ported)]
        kept = {"portal.json", "core.safetensors", "latents.safetensors", "converters"}
        kept |= {f"{base}.{end}" for base in bases for end in ("json", "safetensors")}
        with new_folder(run) as folder:
            shutil.copytree(old, folder, ignore=lambda _, names: {*names} - kept, dirs_exist_ok=True)
            if change:
                z = load_tensors(folder / "latents.safetensors")["z"]
                save_tensors(folder / "latents.safetensors", {"z": change(z)})
        return name

    # ------------------------------------------------------------------------------------------ the experiments
    def main(self, seed):
        self.run_step("main", "", f"seed{seed}", self.source(seed), self.ports(self.targets, *self.data),
                      (eval, "--methods", ",".join(m for m in eval.METHODS if m != "lora_iso")))

    def sweep(self, seed):
        """On the last of the targets, the one of another family: the port as shipped, and with P_in aligned."""
        source, target = f"seed{seed}", self.targets[-1]
        ports = self.ports([target], "--n", ",".join(map(str, self.args.sweep)), *self.data)
        self.run_step("main", "", source, self.source(seed))
        self.run_step("sweep", "", self.fork(source, f"sweep-{source}"), ports,
                      (eval, "--methods", "base,lora,portal", "--bases", target))
        self.run_step("sweep", "aligned", self.fork(source, f"sweep-aligned-{source}"), (*ports, "--align"),
                      (eval, "--methods", "portal", "--bases", target))

    def aside(self, seed):
        """Tasks that are in no training, learned on the sources after the ports were made (`carried`). The controls are
        runs of their own: another task's latents, the mean of those that the core was trained with, and latents that
        were fitted on the target itself."""
        source, folders = f"seed{seed}", self.args.aside or ASIDE
        tasks, new = ["--tasks", ",".join(folder.name for folder in folders)], len(folders)
        learn = [(train, "--overwrite", "--add-task", str(folder)) for folder in folders]
        self.run_step("main", "", source, self.source(seed))
        self.run_step("carry", "", source, self.ports(self.targets, *self.data))
        carried = self.fork(source, f"aside-seed{seed}", self.targets)
        self.run_step("carry", "carried", carried, *learn,
                      (eval, "--methods", "base,lora,portal", *tasks))
        controls = {"shuffled": lambda z: z.roll(1, 0),
                    "mean": lambda z: torch.cat([z[:-new], z[:-new].mean(0, keepdim=True).expand(new, -1)])}
        for control, change in controls.items():
            self.run_step("carry", control, self.fork(carried, f"aside-{control}-seed{seed}", self.targets, change),
                          (eval, "--methods", "portal", *tasks, "--bases", ",".join(self.targets)))
        for target in self.targets:
            self.run_step("carry", "target", self.fork(source, f"aside-on-{short_name(target)}-seed{seed}", [target]),
                          *((*command, "--bases", target) for command in learn),
                          (eval, "--methods", "portal", *tasks, "--bases", target))

    def ablation(self, seed):
        """On the toy: a quarter of its rows and of the rounds of training, a sixteenth of the rows for the port, which
        leaves the methods room to differ; and the port that is hardest."""
        few, measured = ["--n", "250"], (eval, "--methods", "portal")
        ports = self.ports(["toy-gemma"], "--n", "64")
        for variant, how in ABLATIONS.items():
            self.run_step("ablation", variant, f"ablation-{slug(variant)}-seed{seed}",
                          self.source(seed, *few, *how.flags), ports, measured, how=how)
        for variant, how in PORT_ABLATIONS.items():
            name = self.fork(f"ablation-shipped-seed{seed}", f"ablation-{slug(variant)}-seed{seed}")
            self.run_step("ablation", variant, name, (*ports, *how.flags), (*measured, "--bases", "toy-gemma"), how=how)

    def competition(self, seed):
        """On the toy: what leaves a task under-fit, and what corrects it. The worst task is that of "as printed"."""
        for variant, how in COMPETITION.items():
            name = f"competition-{slug(variant)}-seed{seed}"
            alone = ["--tasks", self.worst(seed)] if variant.endswith("alone") else []
            how = how._replace(train={**how.train, "step": watched(self.run(f"{name}.gradients.jsonl"))})
            self.run_step("alone" if alone else "competition", variant, name, self.source(seed, *how.flags, *alone),
                          self.ports(["toy-gemma"]), (eval, "--methods", "portal"), how=how)

    def worst(self, seed):
        """The task on which the core as printed is worst over its two source bases."""
        rows = pd.DataFrame(read_jsonl(self.run(f"competition-as-printed-seed{seed}") / "results.jsonl"))
        rows = rows.query("method == 'portal' and role == 'seen' and select == 'best'")
        return rows.groupby("task", sort=False)["acc_norm"].sum().idxmin()

    # ------------------------------------------------------------------------------------------ what is written
    def gather(self):
        """Writes <out>/results.jsonl and about.json, from all run folders."""
        write_whole(self.out / "results.jsonl", lambda path: path.write_text(self.rows()))
        parameters, costs, every, kind = {}, {}, {}, "toy" if self.toy else "real"
        for experiment in ("main", "sweep"):                                         # Table 6.4 shows the sweep's costs
            for run, step in self.trained().items():
                if step["experiment"] == experiment:
                    count(run, step["variant"], parameters, costs, every)
        sources = self.args.bases or TOY_SEEN
        seen = [short_name(spec) for spec in sources]
        types = {short_name(spec): config_of(spec).model_type for spec in (*sources, *self.targets)}
        within = [name for name in types if name not in seen and types[name] in {types[s] for s in seen}]
        flags = "".join(f" --{k} {shlex.quote(value)}" for k, value in self.given.items() if k != "sweep" and value)
        write_json(self.out / "about.json", dict(
            title=f"Results: {'the toy' if self.toy else ', '.join(types)}", kind=kind, hardware=hardware(), seen=seen,
            searched=read_json(ROOT / "results" / "searched.json")[kind],            # before the settings were fixed
            commit=", ".join(dict.fromkeys(made for step in self.done.values() for made in step["commits"])),
            within=within, across=[name for name in types if name not in (*seen, *within)],
            commands={table: f"python -m experiments.paper {experiment}{flags}"
                      for experiment, tables in EXPERIMENTS.items() for table in tables},
            parameters=parameters, costs=costs, gradients=self.gradients()))

    def trained(self):
        """{run folder: its step} of the runs that hold a core."""
        return {self.run(name): step for name, step in self.done.items() if (self.run(name) / "portal.json").exists()}

    def rows(self):
        """Returns the rows of all runs as JSON lines; where the last epoch was the selected one, its rows once."""
        lines, trained = {}, self.trained()
        for name, step in self.done.items():
            labels, more = dict(experiment=step["experiment"], variant=step["variant"],
                                commit=", ".join(dict.fromkeys(step["commits"]))), {}
            if step["experiment"] == "carry" and self.run(name) in trained:
                saved = read_json(self.run(name) / "portal.json")
                more = dict(training_tasks=len(saved["config"]["tasks"]) - len(saved.get("added", {})),
                            recipe="16 skills" if self.toy else "")
            for row in read_jsonl(self.run(name) / "results.jsonl"):
                row = {**labels, **row, **more}
                if row["method"] != "portal":
                    row["variant"] = "iso" if row["method"] == "lora_iso" else ""    # the changes concern PorTAL alone
                    row["method"] = row["method"].removesuffix("_iso")
                lines.setdefault(json.dumps({**row, "select": "", "seconds": 0}), json.dumps(row))
        return "".join(f"{line}\n" for line in lines.values())

    def gradients(self):
        """Returns {variant: {task: {"norm": of its gradient, divided by the tasks' mean norm, "cosine": with the sum of
        the others'}}}, means over what `watched` wrote in the second half of source training."""
        cells = []
        for run, step in self.trained().items():
            if records := read_jsonl(run.with_name(f"{run.name}.gradients.jsonl")):
                tasks = load_config(run)[1].tasks
                records = pd.DataFrame(records).drop_duplicates(["round", "base"], keep="last")      # after a kill
                for record in records[records["round"] > records["round"].max() / 2].itertuples():
                    norms = torch.tensor(record.norms)
                    cells += zip([step["variant"]] * len(tasks), tasks, (norms / norms.mean()).tolist(), record.cosines)
        cells = pd.DataFrame(cells, columns=["variant", "task", "norm", "cosine"])
        means = cells.groupby(["variant", "task"], sort=False).mean()
        return {variant: means.loc[variant].to_dict("index") for variant in cells["variant"].unique()}


def main(argv=None):
    parser = Parser(prog="python -m experiments.paper", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    def flag(name, kind=str, metavar="FLAGS", **more):
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, **more)
    parser.add_argument("experiments", nargs="*", metavar="NAME",
                        help=f"some of {', '.join(EXPERIMENTS)} (default: all)")
    flag("seeds", commas(seed), "N,N", default=[0, 1, 2], help="(default: 0,1,2)")
    flag("bases", commas(), "A,B", help="sources (default: the toy's)")
    flag("to", commas(), "A,B", help="targets (default: the toy's)")
    flag("data", pathlib.Path, "DIR", help="folder of tasks (default: the toy's)")
    flag("aside", commas(pathlib.Path), "DIR,DIR", help="folders of the tasks of `aside` (default: the toy's two)")
    flag("sweep", commas(positive(int)), "N,N", default=SWEEP, help="rows a task of `sweep`")
    for name, command in dict(train="train.py", add="train.py --add-task", port="port.py", eval="eval.py").items():
        flag(name, default="", help=f"more flags for {command}, in quotes")
    flag("out", pathlib.Path, "DIR", default=OUT / "experiments", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    names = args.experiments or list(EXPERIMENTS)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise BadInput(f"unknown experiment {unknown[0]!r}; accepted are {', '.join(EXPERIMENTS)}")
    if args.bases and not {"main", "sweep", "aside"} >= set(names):
        raise BadInput("--bases: name some of main, sweep and aside; the other experiments are the toy's")
    if args.bases and not args.aside and "aside" in names:
        raise BadInput("--aside is needed with --bases: the folders of the tasks to learn after the port")
    if args.bases and not args.to:
        raise BadInput("--to is needed with --bases: the bases to port to")
    lock(args.out)
    with LOCKS.pop_all():                                                            # each step has locks of its own
        steps = Steps(args)
        for number in args.seeds:
            for name in names:
                getattr(steps, name)(number)
        steps.gather()
    print(f"\nall is done; python -m experiments.tables all --results {args.out}")


if __name__ == "__main__":
    run_main(main)
