"""Evaluation: acc_norm and log_loss of every method on every base of a run; the table and the plots.

    python eval.py                           everything in the run trained last; missing baselines are fitted first
    python eval.py --bases toy-gemma         only these bases
    python eval.py --methods base,portal     only these methods; nothing else is fitted
    python eval.py --against toy-qwen-m      the upgrade report: what a move from this base to the ported ones changes
    python eval.py --task rte --show 5       prints five rows with every score before and after PorTAL; writes nothing

The numbers are defined in score.py. Results are appended to results.jsonl; results.md and the plots are drawn from it.
"""
import pathlib, time

import torch

from baselines import cross_lora, hypernet, lora
from bases import encode, find_base, reload_base
from exports.hub import run_of
from presets import REAL, TOY, preset, resolve_settings
from reports import upgrade
from reports.results import fit_date, pack
from reports.table import METHODS, write_results
from runtime.distributed import RANK
from runtime.files import BadInput, read_json
from runtime.flags import parse, run_main
from runtime.resume import Journal, command_of, digests_of, forget, state_file
from runtime.run_folder import find_run, lock
from runtime.saved import load_adapters, load_config, load_converter, load_portal, provenances, saved_at
from score import decode, evaluate, per_character, score
from tasks.rows import load_run_tasks, named, sample

USUAL = [m for m in METHODS if m not in ("lora_iso", "hypernet")]                    # those two only with --methods
FITTED, TRANSFERS = ("lora", "lora_iso", "hypernet"), ("cross_lora", "copy", "random")


# ---------------------------------------------------------------------------------------------- a run's adapters
def adapters_of(run, method, tag, base, final=False):
    """Returns the Adapters of a method on a base as the run holds them, of the selected epoch or the last; None for
    the bare base. tag: the base's name, or <base>@<n> for the smaller samples of a sweep. Raises BadInput if they do
    not fit."""
    if method == "base":
        return None
    if method != "portal":
        adapters = load_adapters(saved_at(run, f"baselines/{method}/{tag}.safetensors", final), base.device)
        shapes = {g: (A.shape[1], A.shape[3], adapters.B[g].shape[2]) for g, A in adapters.A.items()}
        fits = shapes.items() <= {g: (len(layers), *dims) for g, (_, layers, *dims) in base.groups.items()}.items()
    else:
        ported = read_json(run / "converters" / f"{tag}.json")["ported"]          # a port was made on the selected core
        portal = load_portal(run, final=final and not ported)
        portal.converters[tag] = load_converter(portal.cfg, saved_at(run, f"converters/{tag}.safetensors", final))
        adapters = portal.to(base.device).adapters(tag).map(torch.detach)
        fits = portal.converters[tag].groups == base.groups_of(portal.cfg.modules)
    if not fits:
        raise BadInput(f"{run}: the {method} adapters of {tag} do not fit base {base.name}: other layers or widths")
    return adapters


def same_fit(before, now):
    """Whether a baseline with provenance `before` was fitted on the base and rows of a converter's provenance `now`.
    What an older provenance does not say, counts as the same."""
    same = before.get("quantize", now.get("quantize")) == now.get("quantize")
    for digest, keys in (("fingerprint", ("id", "revision")), ("rows", ("data",))):  # base and data may have moved
        keys = keys if None in (before.get(digest), now.get(digest)) else (digest,)
        same = same and all(before.get(key) == now[key] for key in (*keys, "n", "seed"))
    return same


class Evaluation:
    """One evaluation of a run: its bases, each loaded once; the baselines that are missing; the rows of results.jsonl.
    provenance {tag: provenance}; rows: evaluation rows; journal: the finished parts of this command."""

    def __init__(self, args, run, saved, cfg, provenance, rows, journal=None):
        self.args, self.run, self.saved, self.cfg, self.provenance = args, run, saved, cfg, provenance
        self.rows, self.journal, self.seen = rows, journal, [b["base"] for b in saved["bases"]]
        self.added = {task: how["folder"] for task, how in saved.get("added", {}).items()}
        self.loaded, self.fitted = {}, set()

    def base_of(self, tag):
        p, args = self.provenance[tag], self.args
        key = str([p.get(key) for key in ("base", "id", "revision", "quantize", "fingerprint")])
        if key not in self.loaded:
            self.loaded[key] = reload_base(p, args.device, args.dtype, args.recompute, args.device_map,
                                           args.quantize or p.get("quantize"), allow_changed=args.allow_changed_base)
        return self.loaded[key]

    def items(self, base):
        """The evaluation rows as base's tokens."""
        items, cut = encode(base.tokenizer, self.rows, self.cfg.tasks)
        if cut:
            print(f"{base.name}: {cut} of {len(items)} prompts were cut from the left")
        return items

    def max_tokens(self, base):
        return self.args.max_tokens or preset([base.name])["max_tokens"]

    def train_rows(self, tag):
        """Returns {task: (train rows, held-out rows)} that a base's converter was fitted on; as many of a task added
        since. They are in --data, or where they were then. Raises BadInput if the rows there are no longer these."""
        p, wrong = self.provenance[tag], None
        places = [self.args.data, pathlib.Path(p["data"])]
        if not p.get("rows") and places[1].is_dir():                                 # an older run cannot tell its rows
            del places[0]
        for folder in dict.fromkeys(filter(None, places)):
            try:
                tasks = load_run_tasks(self.saved, folder, ["train"])
                rows = {task: sample(splits["train"], p["n"], p["seed"]) for task, splits in tasks.items()}
                now, fitted = digests_of(rows), p.get("rows") or {}
                if changed := [task for task in rows if task in fitted and now[task] != fitted[task]]:
                    raise BadInput(f"{folder}: the training rows of {', '.join(changed)} are no longer those that the "
                                   f"converter of {tag} was fitted on, and a LoRA beside it needs the same; restore "
                                   "them, fit the converter again (--overwrite), or name their folder with --data")
                return rows
            except BadInput as error:
                wrong = wrong or error
        raise wrong

    def ensure(self, method, tag):
        """Fits a trained baseline of a base on its converter's rows, unless the run holds it."""
        what = f"{method} {tag}"
        if what in self.fitted:
            return
        self.fitted.add(what)
        base = self.base_of(tag)
        p = {"tag": tag, "added": self.added, **self.provenance[tag],
             **{key: base.provenance[key] for key in ("fingerprint", "quantize")}}
        path = self.run / "baselines" / method / f"{tag}.json"
        before = {"added": {}, **read_json(path)} if path.exists() else {}
        there = before and same_fit(before, p) and before["added"] == p["added"]
        if there and not (self.args.overwrite and what not in self.journal.done):
            forget(state_file(self.run, f"{method}-{tag}"))                          # if a kill left it behind
            return print(f"{what}: fitted before with {before['settings']}; --overwrite fits it again")
        rows, default = self.train_rows(tag), preset([p["base"]])
        p["rows"] = digests_of(rows)
        if method == "hypernet":                                                  # with the settings of source training
            own = {key: self.saved.get(key, default[key]) for key in ("epochs", "batch_size", "lr", "least")}
            if "gain" in self.saved["config"] and self.cfg.norm == "layer":       # its lr was not yet that of sums
                own["lr"] = default["lr"]
            hypernet.fit_hypernet(self.run, base, rows, p, {**own, "max_tokens": self.max_tokens(base)}, self.cfg)
        else:
            sizes = lora.iso_sizes(self.cfg, base, len(rows)) if method == "lora_iso" else {}
            settings = resolve_settings(self.args, default.get(method, default["lora"]))
            lora.fit_lora(self.run, base, rows, p, settings, method, **sizes)
        self.journal.add(what)

    def carry_over(self, tag, source):
        """Computes the transfers of the source base's LoRAs to a base, unless the run holds them."""
        self.ensure("lora", source)
        base, held = self.base_of(tag), self.train_rows(tag)
        held = [row for _, held_out in held.values() for row in held_out[:cross_lora.HELD]]
        cross_lora.transfer_all(self.run, tag, base, self.base_of(source), self.provenance[tag]["seed"],
                                encode(base.tokenizer, held, self.cfg.tasks)[0], self.max_tokens(base))

    def digests(self, base):
        """Returns {task: the digest of the evaluation rows and of the base's files}."""
        files = [base.provenance.get(key) for key in ("fingerprint", "quantize")]
        return digests_of({task: [files, [row for row in self.rows if row.task == task]] for task in self.cfg.tasks})

    def measured(self, tag):
        """Returns {task: PorTAL's row of results.jsonl} of what was measured on these rows and files."""
        base = self.base_of(tag)
        return upgrade.measured(self.run, base.name, self.provenance[tag]["n"], self.digests(base))

    def measure(self, method, tag, base, items):
        """Evaluates one method on one base, selected and last epoch; appends a row for each task to results.jsonl."""
        p, cells = self.provenance[tag], None
        tag, n = (base.name, 0) if method == "base" else (tag, p["n"])               # the bare base: once, whatever n
        row = dict(role="seen" if base.name in self.seen else "unseen", seed=p["seed"], n=n)
        dates = {task: fit_date(self.run, method, tag, task) for task in self.cfg.tasks}
        on = self.digests(base)
        folder = {"portal": "converters", "lora": "baselines/lora"}.get(method)
        differ = folder is not None and (self.run / "final" / folder / f"{tag}.safetensors").exists()
        for select in ("best", "final"):
            part = f"{tag} {method} {select}"
            if part in self.journal.done:                                            # before this command was killed
                continue
            if cells is None or differ:                                              # else the last epoch was selected
                start = time.time()
                adapters = adapters_of(self.run, method, tag, base, select == "final")
                cells = evaluate(base, adapters, items, self.max_tokens(base))
                seconds = round((time.time() - start) / len(cells), 3)
            self.journal.add(part, self.run / "results.jsonl", [dict(
                method=method, base=base.name, task=self.cfg.tasks[t], select=select, seconds=seconds, **row,
                fitted=dates[self.cfg.tasks[t]], measured_on=on[self.cfg.tasks[t]],
                **{**cell, "correct": pack(cell["correct"])}) for t, cell in cells.items()])
            if select == "best":
                mean = sum(cell["acc_norm"] for cell in cells.values()) / len(cells)
                print(f"{tag} {method}: acc_norm {mean:.3f}", flush=True)

    def evaluate(self, tag, methods):
        """Every method on one base: fits what is missing, then measures."""
        base = self.base_of(tag)
        items = self.items(base)
        for method in methods:
            if method in FITTED:
                self.ensure(method, tag)
        source = next((name for name in reversed(self.seen) if name != base.name and name in self.provenance), None)
        if carried := [m for m in methods if m in TRANSFERS]:                        # of the source's LoRAs
            if source:
                self.carry_over(tag, source)
            else:
                print(f"{tag}: without {', '.join(carried)}, as the core was trained on no other base")
        for method in methods:
            if source or method not in TRANSFERS:
                self.measure(method, tag, base, items)
        self.journal.add(tag)                                                        # the base need not be loaded again


def show(run, tag, base, items, max_tokens):
    """Prints every item with its choices' scores, or the decoded text, of the bare base and with PorTAL's adapters."""
    both = (None, adapters_of(run, "portal", tag, base))
    scores = list(zip(*(score(base, adapters, items, max_tokens) for adapters in both)))
    opened = [item for item in items if item.row.open]
    texts = zip(*(decode(base, adapters, opened, max_tokens) for adapters in both))
    for item, log_p in zip(items, scores):
        row = item.row
        print(f"\n{tag}, {row.task}:\n" + "\n".join("    " + line for line in row.prompt.split("\n")))
        if row.open:
            for what, text in zip(("gold", "before", "after"), (row.choices[0], *next(texts))):
                print(f"  {what:6} {text.strip()!r}")
            continue
        print("    before    after   (log-probability a character, the leading space counted; * gold)")
        for k, (choice, *pair) in enumerate(zip(row.choices, *(per_character(item, lp) for lp in log_p))):
            print(f"{'*' if k == row.gold else ' '} " + " ".join(f"{s:8.3f}" for s in pair) + f"  {choice!r}")


# ---------------------------------------------------------------------------------------------- the command
def checked(args, run, saved, cfg, provenance):
    """Returns the tags to evaluate and the methods. Raises BadInput for a base, method or task that the run does not
    know."""
    seen, known = [b["base"] for b in saved["bases"]], {p["base"]: p for p in provenance.values()}
    held = {name: provenance.get(name, known[name]) for name in [*seen, *sorted(known.keys() - seen)] if name in known}
    if not held:
        raise BadInput(f"{run} holds no converter; python port.py --to NAME adds one")
    wanted = dict.fromkeys(find_base(held, spec, run) for spec in args.bases or held)
    methods = args.methods or USUAL
    sources = seen if {*methods} - {"base", "portal"} else ()                        # whose LoRAs are carried over
    for p in (p for p in provenance.values() if p["base"] in {*wanted, *sources}):
        if None in (p["n"], p["seed"], p["data"]):
            raise BadInput(f"{run}: an artifact does not say which rows it was fitted on, and a LoRA beside it needs "
                           "them; python export.py --artifact with --n, --seed, --data and --overwrite reads it "
                           "again and records them")
    for method in methods:
        if method not in METHODS:
            raise BadInput(f"--methods: unknown method {method!r}; accepted are {', '.join(METHODS)}")
    for task in args.tasks or ():
        if not named(task, cfg.tasks):
            raise BadInput(f"--tasks: unknown task {task!r}; this run knows {', '.join(cfg.tasks)}")
    return [tag for name in wanted for tag, p in provenance.items() if p["base"] == name], methods


def main(argv=None):
    args = parse(__doc__, "run bases against data tasks methods epochs batch-size lr max-tokens recompute eval-rows "
                          "show device dtype device-map quantize allow-changed-base overwrite", argv,
                 (TOY["lora"], REAL["lora"]),
                 epochs=dict(help="of the LoRA baseline"), batch_size=dict(help="of the LoRA baseline"),
                 lr=dict(help="of the LoRA baseline"),
                 overwrite=dict(help="fit the baselines again even if the run holds them"))
    run = find_run(run_of(args.run))
    saved, cfg = load_config(run)
    provenance = provenances(run)
    if args.against:
        upgrade.set_flags(args, run, provenance)
    tags, methods = checked(args, run, saved, cfg, provenance)
    data = load_run_tasks(saved, args.data or pathlib.Path(saved["data"] or provenance[tags[0]]["data"]), ["eval"])
    n = args.show or args.eval_rows
    tasks = [named(task, cfg.tasks) for task in args.tasks or cfg.tasks]
    rows = [row for task in tasks for row in sum(sample(data[task]["eval"], n, 0), [])]
    if args.show:
        evaluation = Evaluation(args, run, saved, cfg, provenance, rows)
        for tag in tags:
            if "@" not in tag or provenance[tag]["base"] not in tags:                # not a sweep's smaller samples
                base = evaluation.base_of(tag)
                show(run, tag, base, evaluation.items(base), evaluation.max_tokens(base))
        return
    lock(run)
    journal = Journal(run / ".resume" / "eval.json", command_of(args, saved, provenance, rows))
    journal.place(run / "results.jsonl")
    evaluation = Evaluation(args, run, saved, cfg, provenance, rows, journal)
    if args.against:                                                             # without a sweep's smaller samples
        tags = [tag for tag in tags if tag == provenance[tag]["base"]]
    todo = [tag for tag in tags if tag not in journal.done
            and not (args.against and evaluation.measured(tag).keys() >= {row.task for row in rows})]
    for tag in todo:
        evaluation.evaluate(tag, methods)
    if RANK:
        return
    write_results(run, cfg.tasks)
    forget(journal.path)
    if args.against:
        return upgrade.write(run, {tag: evaluation.measured(tag) for tag in tags}, rows)
    print((run / "results.md").read_text(encoding="utf-8").split("\n## ")[0])
    print(f"table: {run / 'results.md'}, plots beside it")


if __name__ == "__main__":
    run_main(main)
