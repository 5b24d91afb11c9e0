"""Measures whether the presets' learning rates hold: on any base, from few rows to many.

    python -m experiments.presets --bases models/a,models/b --data DIR    # writes results/presets.md
    python -m experiments.presets --bases models/a --widths 64,2048       # also on random models of these widths

A cell is one fit: "source", of a generator with nothing frozen on one base (source training and joint hypernet),
"port", of a converter, or "latent", of one more task. It is fitted at the preset's rate and at a ninth, a third, three
and nine times that, for three epochs, and its log-loss is measured after each on HELD rows a task that no fit of this
table is trained on. A cell holds if, at the preset, no epoch after the first is above the bare base and the last is at
most .1 above the best of the five rates. Ports and latents start from a source fitted on the first of --bases with
SOURCE rows a task; latents, of one of the toy's tasks alone, from one of more tasks (MORE). What is in presets.jsonl is
not fitted again; the table is drawn from it.
"""
import copy, functools, itertools, pathlib, random, tempfile
from types import SimpleNamespace

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bases import load_base
from experiments.cells import markdown
from port import port
from portal import Config, Converter, Portal
from reports.results import commit, hardware
from runtime.files import ROOT, append_jsonl, read_jsonl, write_whole
from runtime.flags import commas, parse, positive, run_main
from runtime.job import Job
from presets import REAL, resolve_settings
from tasks.new_task import new_latent
from tasks.rows import load_tasks
from train import fit, portal_learner

TASKS = {"toy": ["largest", "second"], "real": ["cb", "wsc", "arc_easy"]}
MORE = ("first", "last", "third", "smallest", "animal", "fruit")
NEW = "second_last"                                                                  # the task that is added
ROWS, FACTORS, HELD, SOURCE, EPOCHS = (8, 16, 64, 120, 500), (1, 1 / 3, 3, 1 / 9, 9), 20, 120, 3


def rows_of(folder, tasks, n, held=HELD):
    """{task: (at most n training rows, `held` others)}; the held-out rows are the same for every n."""
    found = {}
    for task, splits in load_tasks(folder, tasks).items():
        rows = random.Random(task).sample(splits["train"], len(splits["train"]))
        found[task] = rows[held:held + n], rows[:held]
    return found


def fresh(base, tasks):
    """An untrained Portal at the default sizes with a converter for the base."""
    torch.manual_seed(0)
    portal = Portal(Config(tasks=list(tasks)))
    portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    return portal.to(base.device)


def measure(kind, base, source, rows, lr):
    """Fits one cell. Returns its Portal, the epochs' lines of its log and the bare base's held-out log-loss. source:
    the Portal that a port or a latent starts from."""
    settings = {**(REAL["port"] if kind == "port" else REAL), "lr": lr, "epochs": EPOCHS}
    portal = fresh(base, rows) if kind == "source" else copy.deepcopy(source)
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log.jsonl"
        job = Job(f"{kind}, {base.name}, lr {lr:.3g}", settings, 0, log)
        if kind == "port":
            port(job, portal, base, rows, settings)
        else:
            if kind == "latent":
                new_latent(portal, portal.z)
            fit(job, [base], portal.adapters, [portal_learner(portal, rows, settings)], rows)
        return portal, read_jsonl(log), job.bare


def random_base(width, tokenizer, folder):
    """Writes a Llama of four layers of this width with random weights to a folder, and returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
                         num_attention_heads=width // 32, num_key_value_heads=width // 64, tie_word_embeddings=True,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    folder = f"{folder}/random-{width}"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def preset_lr(kind, n):
    """The rate that the commands take for n rows a task."""
    few, preset = SimpleNamespace(lr=None, epochs=EPOCHS), REAL["port"] if kind == "port" else REAL
    return resolve_settings(few, preset, rows=None if kind == "latent" else {"": (range(n), [])})["lr"]


def table(cells):
    """The cells as a Markdown table, a line a cell; log-losses by epoch at the preset's rate."""
    lines = []
    for (kind, base, tasks, n), own in pd.DataFrame(cells).groupby(["kind", "base", "tasks", "n"], sort=False):
        own = own.drop_duplicates("lr", keep="last").sort_values("lr")
        preset, ends = own[own["lr"] == preset_lr(kind, n)], own["losses"].map(lambda losses: losses[-1])
        rates = ", ".join(f"{lr:.2g}: {end:.2f}" for lr, end in zip(own["lr"], ends))
        line = dict(zip(("fit", "base", "tasks", "n"), (kind, base, tasks, n))) | {
            "bare": f"{own['bare'].iloc[0]:.2f}", "preset": None, "by epoch": None, "all rates' last epoch": rates}
        if len(preset):
            losses, bare = preset["losses"].iloc[0], preset["bare"].iloc[0]
            gap = f"{ends.min() - losses[-1]:.2f}"
            line |= {"preset": f"{preset_lr(kind, n):g}", "by epoch": " ".join(f"{loss:.2f}" for loss in losses),
                     "BAx / Wx": f"{preset['ratios'].iloc[0][-1]:.2g}",
                     "never above bare": "yes" if max(losses[1:]) <= bare else "**no**",
                     "best - preset": None if len(own) < 5 else
                     gap if losses[-1] <= ends.min() + 0.1 else f"**{gap}**"}
        lines.append(line)
    commits, machines = (", ".join(dict.fromkeys(c[key] for c in cells)) for key in ("commit", "hardware"))
    return "\n".join([
        "# Whether the presets' learning rates hold", "",
        "Held-out log-loss after each of three epochs at the preset's rate, after the last at all rates, and |BAx| /",
        "|Wx| at the end (experiments/presets.py). \"-\": not measured.", "",
        f"`python -m experiments.presets`, one seed, {machines}, commit {commits}.", "",
        *markdown(lines), ""])


def line_of(kind, base, lr, fitted):
    """The line of presets.jsonl of a cell that `measure` fitted."""
    _, lines, bare = fitted
    return dict(kind=kind, base=base.name, lr=lr, bare=bare, losses=[line["held_log_loss"] for line in lines],
                accs=[line["held_acc_norm"] for line in lines], ratios=[line["delta_ratio"][0] for line in lines],
                hardware=hardware(), commit=commit())


def main(argv=None):
    args = parse(__doc__, "bases data out n device dtype widths", argv, data=dict(help="folder of the tasks in TASKS"),
                 out=dict(default=ROOT / "results"),
                 widths=dict(type=commas(positive(int)), default=(), metavar="N,N", help="multiples of 64"),
                 n=dict(type=commas(positive(int)), default=ROWS, metavar="N,N", help="training rows a task"))
    path, folders, first = args.out / "presets.jsonl", {"toy": ROOT / "toy/data", "real": args.data}, args.bases[0]
    done = {(c["kind"], c["base"], c["tasks"], c["n"], c["lr"]) for c in read_jsonl(path)}
    def rate(kind, n, factor):
        return float(f"{factor * preset_lr(kind, n):.3g}")
    loaded = functools.cache(lambda spec: load_base(spec, args.device, args.dtype))
    @functools.cache
    def fitted(kind, spec, tasks, n, factor, more=()):
        lr = rate(kind, n, factor)
        others = MORE if kind == "latent" else ()                                    # of the source
        source = None if kind == "source" else fitted("source", first, tasks, SOURCE, 1, others)[0]
        rows = rows_of(folders[tasks], [*([NEW] if kind == "latent" else TASKS[tasks]), *more], n)
        found = measure(kind, loaded(spec), source, rows, lr)
        if not more:
            append_jsonl(path, dict(line_of(kind, loaded(spec), lr, found), tasks=tasks, n=n))
            write_whole(args.out / "presets.md", lambda file: file.write_text(table(read_jsonl(path))))
        return found

    made = tempfile.TemporaryDirectory()
    specs = args.bases + [random_base(width, loaded(first).tokenizer, made.name) for width in args.widths]
    for factor, n, tasks, spec in itertools.product(FACTORS, args.n, TASKS, specs):  # the presets first
        for kind in ("source", *(["port"] if spec != first else ["latent"] if tasks == "toy" else [])):
            if folders[tasks] and (kind, loaded(spec).name, tasks, n, rate(kind, n, factor)) not in done:
                fitted(kind, spec, tasks, n, factor)


if __name__ == "__main__":
    run_main(main)
