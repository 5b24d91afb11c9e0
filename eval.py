"""Evaluation: acc_norm and log_loss of every method on every base of a run, the table and the plots.

    python eval.py                     everything the run trained last holds; missing baselines are fitted first
    python eval.py --bases toy-gemma   only these bases
    python eval.py --task rte --show 5 five rows with every score before and after PorTAL; nothing is written
    python eval.py --log               the loss and the held-out scores of log.jsonl, as a plot
    python eval.py --table 6.1         a table of the paper, from results that are there: tables.py

    score(choice) = log p(choice | prompt) / characters(choice)       the leading space counts
    acc_norm      = share of rows whose gold choice scores above every other (a tie is an error)
    log_loss      = NLL of the gold choices / their number of tokens  (a completion's tokens include the EOS at its end)
    exact match    = share of open rows whose greedy decoding is the completion; it stands where acc_norm does
    recovered lift = (acc - acc_base) / (acc_LoRA - acc_base)         retention = acc / acc_LoRA
"""
import contextlib, json, os, pathlib, platform, subprocess, time

import torch
from tqdm import tqdm

from cli import ROOT, BadInput, find_run, lock, parse, read_json, run_main, write_whole
from data import collate, encode, load_run_tasks, micro_batches, sample
from dist import NO_BAR, RANK, shared
from portal import load_adapters, load_config, load_converter, load_portal, provenances, saved_at
from resume import Journal, command_of, forget

METHODS = ("base", "lora", "lora_iso", "cross_lora", "copy", "random", "hypernet", "portal")
USUAL = [m for m in METHODS if m not in ("lora_iso", "hypernet")]  # those two take --methods
TRANSFERS = {"cross_lora", "copy", "random"}


# ---------------------------------------------------------------------------------------------- the two numbers
@torch.no_grad()
def score(base, adapters, items, max_tokens):
    """For every item, in order: the log-probability (float) of each of its continuations. adapters None: bare base.

    A prompt is encoded once, its continuations behind it; rows of all tasks and lengths share micro-batches.
    """
    def log_p_of(items):
        found, parts = {}, micro_batches(items, max_tokens)
        for part in tqdm(parts, desc=f"scoring on {base.name}", unit="batch", delay=2, leave=False, disable=NO_BAR):
            batch = collate(part, base.device)
            logits = full_precision(base.logits(batch, adapters))                    # [N, vocabulary]
            log_p = logits[batch.source, batch.target] - logits.logsumexp(-1)[batch.source]  # [M]
            sums = torch.zeros(sum(len(item.continuations) for item in part), dtype=torch.float64, device=base.device)
            sums = iter(sums.index_add_(0, batch.owner, log_p.double()).tolist())
            found.update({id(item): [next(sums) for _ in item.continuations] for item in part})
        return [found[id(item)] for item in items]
    return shared(log_p_of, items)


def full_precision(logits):
    """Half-precision logits as float32: a softmax over a vocabulary needs the bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def decode(base, adapters, items, max_tokens):
    """For every item with a completion, in order: the greedily decoded text. Decoding stops at EOS or after twice as many
    tokens as the longest gold completion of `items` has, 16 at least. A bare base does not know that the answer is over
    and goes on in a new line: the text ends with its first line (or has as many lines as the gold completion)."""
    limit = max(16, 2 * max((len(item.continuations[0]) for item in items), default=0))
    def texts_of(items):
        found = {}
        for part in micro_batches(items, max_tokens):
            texts = base.generate([item.prompt for item in part], adapters, [item.task for item in part], limit)
            for item, text in zip(part, texts):
                lines = 1 + item.row.choices[0].rstrip().count("\n")
                found[id(item)] = "\n".join(text.split("\n")[:lines])
        return [found[id(item)] for item in items]
    return shared(texts_of, items)


def per_character(item, log_p):
    return [lp / len(choice) for lp, choice in zip(log_p, item.row.choices)]


def evaluate(base, adapters, items, max_tokens):
    """{task index: {"acc_norm", "log_loss", "rows", "correct": [bool a row]}} of the tasks that `items` hold; a task of
    completions has its exact match as "acc_norm", and "metric": "exact_match"."""
    cells, texts = {}, iter(decode(base, adapters, [item for item in items if item.row.open], max_tokens))
    for item, log_p in zip(items, score(base, adapters, items, max_tokens)):
        gold, scores = item.row.gold, per_character(item, log_p)
        cell = cells.setdefault(item.task, {"correct": [], "nll": 0.0, "tokens": 0, "open": item.row.open})
        cell["correct"].append(next(texts).strip() == item.row.choices[0].strip() if item.row.open
                               else scores[gold] > max(s for k, s in enumerate(scores) if k != gold))
        cell["nll"] -= log_p[gold]
        cell["tokens"] += len(item.continuations[gold])
    return {task: {"acc_norm": sum(c["correct"]) / len(c["correct"]), "log_loss": c["nll"] / c["tokens"],
                   "rows": len(c["correct"]), "correct": c["correct"], **({"metric": "exact_match"} if c["open"] else {})}
            for task, c in cells.items()}


def pack(correct):
    """A bool a row as hex, four rows a digit, the first one the highest bit; the last digit is filled up with zeros."""
    bits = "".join("01"[c] for c in correct) + "0" * (-len(correct) % 4)
    return "".join(f"{int(bits[i:i + 4], 2):x}" for i in range(0, len(bits), 4))


def unpack(text, rows):
    """What `pack` wrote of so many rows, as a list of bools again; ValueError if it did not write this."""
    correct = [bit == "1" for digit in text for bit in f"{int(digit, 16):04b}"][:rows]
    if pack(correct) != text or len(correct) < rows:
        raise ValueError(f"{text!r} is not {rows} rows")
    return correct


def macro(cells):
    """The mean over tasks of tuples of numbers."""
    return tuple(sum(values) / len(cells) for values in zip(*cells))


def lift(acc, base, lora):
    """Recovered lift, or None where the LoRA gained nothing that could be recovered."""
    return (acc - base) / (lora - base) if lora > base else None


# ---------------------------------------------------------------------------------------------- a run's adapters
def adapters_of(run, method, tag, base, final=False):
    """The Adapters of a method on a base as the run holds them: the selected epoch, or the last one. The bare base: None.
    `tag` names the files: the base, or <base>@<n> for the smaller samples of a sweep."""
    if method == "base":
        return None
    if method != "portal":
        adapters = load_adapters(saved_at(run, f"baselines/{method}/{tag}.safetensors", final), base.device)
    else:
        ported = read_json(run / "converters" / f"{tag}.json")["ported"]             # a port was made on the selected core
        portal = load_portal(run, final=final and not ported)
        portal.converters[tag] = load_converter(portal.cfg, saved_at(run, f"converters/{tag}.safetensors", final))
        adapters = portal.to(base.device).adapters(tag).map(torch.detach)
    for m in adapters.A:
        if (adapters.A[m].shape[1], adapters.A[m].shape[3], adapters.B[m].shape[2]) != (base.layers, *base.dims[m]):
            raise BadInput(f"{run}: the {method} adapters of {tag} do not fit base {base.name}: other layers or widths")
    return adapters


def measure(run, method, tag, base, items, tasks, max_tokens, journal, row):
    """Evaluate one method on one base, selected and last epoch, and append a row a task to results.jsonl."""
    folder = {"portal": "converters", "lora": "baselines/lora"}.get(method)
    differ = folder is not None and (run / "final" / folder / f"{tag}.safetensors").exists()
    cells = None
    for select in ("best", "final"):
        part = f"{tag} {method} {select}"
        if part in journal.done:                                                     # before this command was killed
            continue
        if cells is None or differ:                                                  # else the last epoch was selected
            start = time.time()
            cells = evaluate(base, adapters_of(run, method, tag, base, select == "final"), items, max_tokens)
            seconds = round((time.time() - start) / len(cells), 3)
        journal.add(part, run / "results.jsonl", [dict(
            method=method, base=base.name, task=tasks[t], select=select, seconds=seconds, **row,
            **{**cell, "correct": pack(cell["correct"])}) for t, cell in cells.items()])
    if cells:
        print(f"{tag} {method}: acc_norm {sum(c['acc_norm'] for c in cells.values()) / len(cells):.3f}", flush=True)


def show(run, base, items, max_tokens):
    """Print every item with its choices' scores, or the decoded text, of the bare base and with PorTAL's adapters."""
    both = (None, adapters_of(run, "portal", base.name, base))
    scores = list(zip(*(score(base, adapters, items, max_tokens) for adapters in both)))
    opened = [item for item in items if item.row.open]
    texts = zip(*(decode(base, adapters, opened, max_tokens) for adapters in both))
    for item, log_p in zip(items, scores):
        row = item.row
        print(f"\n{base.name}, {row.task}:\n" + "\n".join("    " + line for line in row.prompt.split("\n")))
        if row.open:
            for what, text in zip(("gold", "before", "after"), (row.choices[0], *next(texts))):
                print(f"  {what:6} {text.strip()!r}")
            continue
        print("    before    after   (log-probability a character; * gold)")
        for k, (choice, *pair) in enumerate(zip(row.choices, *(per_character(item, lp) for lp in log_p))):
            print(f"{'*' if k == row.gold else ' '} " + " ".join(f"{s:8.3f}" for s in pair) + f"  {choice!r}")


# ---------------------------------------------------------------------------------------------- the table and the plots
def read_results(run):
    """results.jsonl -> {(base, n, method, select): {task: row}}; a later line replaces an earlier one of its cell."""
    found = {}
    for number, line in enumerate((run / "results.jsonl").read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            found.setdefault((row["base"], row["n"], row["method"], row["select"]), {})[row["task"]] = row
        except (ValueError, KeyError):
            raise BadInput(f"{run / 'results.jsonl'}:{number}: not a result row")
    return found


def hardware():
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def commit():
    """The checkout that the code was run from, as git names it."""
    found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "not a git checkout"


def write_results(run, tasks):
    """results.md and one bar plot a base, drawn from results.jsonl alone."""
    found, saved = read_results(run), read_json(run / "portal.json")
    seen, added = [b["base"] for b in saved["bases"]], saved.get("added", {})
    rows, seeds = (sorted({row[key] for cells in found.values() for row in cells.values()}) for key in ("rows", "seed"))
    opened = sorted({row["task"] for cells in found.values() for row in cells.values() if "metric" in row})
    lines = [f"# Results of {run.resolve().name}", "",
             f"{len(tasks)} tasks, {' to '.join(map(str, sorted({rows[0], rows[-1]})))} evaluation rows each; "
             f"seed {', '.join(map(str, seeds))}; {hardware()}.", "",
             "Macro averages over the tasks. `best`: the epoch selected on rows held out of train; `final`: the last epoch. "
             "Lift and retention are of the selected epoch, against the LoRA fitted on the same rows."
             + (f" Exact match of the decoded text stands for acc_norm in {', '.join(opened)}." if opened else "")
             + "".join(f" {task} was learned later, on {', '.join(how['bases'])}, with the core frozen."
                       for task, how in added.items()), "",
             "| base | role | n | method | acc_norm best | acc_norm final | log_loss best | recovered lift | retention |",
             "|---" * 9 + "|"]
    details = []
    def order(key):                                                                  # seen bases first, as they were named
        return (seen.index(key[0]) if key[0] in seen else len(seen), *key)
    for base, n in sorted({key[:2] for key in found if key[1]}, key=order):
        cells = {m: {s: found.get((base, 0 if m == "base" else n, m, s), {}) for s in ("best", "final")} for m in METHODS}
        cells = {m: c for m, c in cells.items() if c["best"]}
        common = [t for t in tasks if len({c[s].get(t, {}).get("rows") for c in cells.values() for s in c}) == 1
                  and all(t in c["best"] for c in cells.values())]                   # measured on the same rows by all
        if not common or not {"base", "lora"} <= set(cells):
            continue
        def mean(m, select, key):
            return sum(cells[m][select][t][key] for t in common) / len(common)
        low, high = mean("base", "best", "acc_norm"), mean("lora", "best", "acc_norm")
        for m in cells:
            acc = mean(m, "best", "acc_norm")
            share = None if m == "base" else lift(acc, low, high)
            lines.append("| " + " | ".join([
                base, "seen" if base in seen else "unseen", "-" if m == "base" else str(n), m, f"{acc:.3f}",
                f"{mean(m, 'final', 'acc_norm'):.3f}", f"{mean(m, 'best', 'log_loss'):.3f}",
                "-" if share is None else f"{100 * share:.0f}%", f"{100 * acc / high:.0f}%" if high else "-"]) + " |")
        details += ["", f"## {base}, n = {n}: acc_norm of the selected epoch", "",
                    "| task | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
        details += ["| " + " | ".join([t, *(f"{c['best'][t]['acc_norm']:.3f}" for c in cells.values())]) + " |" for t in common]
        plotted = [m for m in ("base", "cross_lora", "lora", "portal") if m in cells]
        plot(run / f"{base}-n{n}.png", f"{base}, n = {n} a task", common,
             {m: [cells[m]["best"][t]["acc_norm"] for t in common] for m in plotted})
    write_whole(run / "results.md", lambda p: p.write_text("\n".join(lines + details) + "\n"))


@contextlib.contextmanager
def drawing(path, width, columns=1):
    """Yield axes (or `columns` of them) to draw on; they become the PNG at `path`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(ncols=columns, figsize=(width, 3.6))
    try:
        yield axes
        figure.tight_layout()
        write_whole(path, lambda p: figure.savefig(p, format="png", dpi=110))
    finally:
        plt.close(figure)


def plot(path, title, tasks, bars):
    """Bars a task, one colour a method."""
    with drawing(path, 2 + 0.8 * len(tasks)) as axes:
        for k, (method, values) in enumerate(bars.items()):
            places = [t + (k - (len(bars) - 1) / 2) * 0.8 / len(bars) for t in range(len(tasks))]
            axes.bar(places, values, 0.8 / len(bars), label=method)
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
        axes.set_ylim(0, 1), axes.set_ylabel("acc_norm"), axes.set_title(title)
        axes.legend(ncols=len(bars), loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)


def log_curves(path):
    """log.jsonl -> {fit: {epoch: (loss, held-out acc_norm or None)}}. A fit that was started again replaces what it had
    from that epoch on."""
    curves = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable ({error})")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["event"] == "epoch":
                curve = {k: v for k, v in curves.get(row["what"], {}).items() if k < row["epoch"]}
                curves[row["what"]] = {**curve, row["epoch"]: (row["loss"], row["held_acc_norm"])}
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path}:{number}: not a row of a training log")
    return curves


def plot_log(path):
    """Loss and held-out acc_norm against the epoch, a line a fit, as a PNG beside log.jsonl."""
    curves = log_curves(path)
    with drawing(path.with_suffix(".png"), 11, columns=2) as axes:
        for which, (side, label) in enumerate(zip(axes, ("loss", "held-out acc_norm"))):
            for what, curve in curves.items():
                points = [(epoch, pair[which]) for epoch, pair in curve.items() if pair[which] is not None]
                side.plot([x for x, _ in points], [y for _, y in points], marker="o", label=what)
            side.set_xlabel("epoch"), side.set_ylabel(label), side.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_yscale("log"), axes[1].set_ylim(0, 1.02)
        axes[0].legend(frameon=False, fontsize="small")
    print(f"drawn: {path.with_suffix('.png')}")


# ---------------------------------------------------------------------------------------------- the command
def main(argv=None):
    import tables                                     # these read or draw with this file,
    from baselines import cross_lora, hypernet, lora  # these train with train.fit, which scores its epochs with it
    from bases import reload_base, short_name
    from train import REAL, TOY, chosen, preset
    args = parse(__doc__, "run bases data tasks methods epochs batch-size lr max-tokens recompute eval-rows show log table "
                          "results device dtype device-map quantize overwrite", argv, (TOY["lora"], REAL["lora"]),
                 epochs=dict(help="of the LoRA baseline"), batch_size=dict(help="of the LoRA baseline"),
                 lr=dict(help="of the LoRA baseline"),
                 overwrite=dict(help="fit the baselines again even if the run holds them"))
    if args.table or args.results:
        return tables.main(args.table or "all", args.results)
    if args.log:
        return plot_log(find_run(args.run) / "log.jsonl" if args.log is True else args.log)
    run = find_run(args.run)
    saved, cfg = load_config(run)
    added = {task: how["folder"] for task, how in saved.get("added", {}).items()}
    seen = [b["base"] for b in saved["bases"]]
    provenance = provenances(run)
    held = [*seen, *sorted({p["base"] for p in provenance.values()} - set(seen))]
    wanted, methods = [short_name(name) for name in args.bases or held], args.methods or USUAL
    for name in wanted:
        if name not in held:
            raise BadInput(f"base {name!r} is not in {run}; it holds {', '.join(held)}; python port.py --to NAME adds one")
    for p in [saved, *(p for p in provenance.values() if p["base"] in {*wanted, *seen})]:
        if None in (p.get("n", 0), p["seed"], p["data"]):
            raise BadInput(f"{run}: an artifact does not say which rows it was fitted on, and a LoRA beside it needs them; "
                           "python interop.py with --n, --seed, --data and --overwrite reads it again and records them")
    for method in methods:
        if method not in METHODS:
            raise BadInput(f"--methods: unknown method {method!r}; accepted are {', '.join(METHODS)}")
    for task in args.tasks or ():
        if task not in cfg.tasks:
            raise BadInput(f"--tasks: unknown task {task!r}; this run knows {', '.join(cfg.tasks)}")
    data = load_run_tasks(saved, args.data or pathlib.Path(saved["data"]))
    n = args.show or args.eval_rows
    rows = [row for task in args.tasks or cfg.tasks for row in sum(sample(data[task]["eval"], n, 0), [])]
    loaded, fitted = {}, set()
    if not args.show:
        lock(run)
        journal = Journal(run / ".resume" / "eval.json", command_of(args, saved, provenance, rows))
        journal.place(run / "results.jsonl")

    def base_of(tag):
        p = provenance[tag]
        if p["base"] not in loaded:
            loaded[p["base"]] = reload_base(p, args.device, args.dtype, args.recompute, args.device_map,
                                            args.quantize or p.get("quantize"))
        return loaded[p["base"]]

    def train_rows_of(tag):
        """{task: (train rows, held-out rows)} that a base's converter was fitted on; of a task that was added since, as many."""
        p = provenance[tag]
        tasks = load_run_tasks(saved, pathlib.Path(p["data"]))
        return {task: sample(splits["train"], p["n"], p["seed"]) for task, splits in tasks.items()}

    def ensure(method, tag):
        """Fit a trained baseline of a base on the very rows its converter was fitted on, unless it is there."""
        what = f"{method} {tag}"
        if what in fitted:
            return
        fitted.add(what)
        p, path = {"added": added, **provenance[tag]}, run / "baselines" / method / f"{tag}.json"
        before = {"added": {}, **read_json(path)} if path.exists() else {}
        there = all(before.get(key) == p[key] for key in ("id", "revision", "n", "seed", "data", "added"))
        if there and not (args.overwrite and what not in journal.done):
            return print(f"{what}: fitted before with {before['settings']}; --overwrite fits it again")
        base, default, train_rows = base_of(tag), preset([p["base"]]), train_rows_of(tag)
        if method == "hypernet":                                                     # with the settings of source training
            own = {key: saved.get(key, default[key]) for key in ("epochs", "batch_size", "lr", "least")}
            hypernet.fit_hypernet(run, tag, base, train_rows, p,
                                  {**own, "max_tokens": args.max_tokens or default["max_tokens"]}, cfg)
        else:
            sizes = lora.iso_sizes(cfg, base, len(train_rows)) if method == "lora_iso" else {}
            lora.fit_lora(run, tag, base, train_rows, p, chosen(args, default.get(method, default["lora"])), method, **sizes)
        journal.add(what)

    for tag in [tag for name in wanted for tag, p in provenance.items() if p["base"] == name]:
        if not args.show and tag in journal.done:
            continue
        base, p = base_of(tag), provenance[tag]
        items, cut = encode(base.tokenizer, rows, cfg.tasks)
        if cut:
            print(f"{base.name}: {cut} of {len(items)} prompts were cut from the left")
        max_tokens = args.max_tokens or preset([base.name])["max_tokens"]
        if args.show:
            if tag == base.name:                                                     # not the smaller samples of a sweep
                show(run, base, items, max_tokens)
            continue
        for method in methods:
            if method in ("lora", "lora_iso", "hypernet"):
                ensure(method, tag)
        source = next((name for name in reversed(seen) if name != base.name), None)  # whose LoRAs are carried over
        if source and TRANSFERS & set(methods):
            ensure("lora", source)
            held_out = [row for _, held_out in train_rows_of(tag).values() for row in held_out[:cross_lora.HELD]]
            cross_lora.transfer_all(run, tag, base, base_of(source), p["seed"],
                                    encode(base.tokenizer, held_out, cfg.tasks)[0], max_tokens)
        for method in methods if source else [m for m in methods if m not in TRANSFERS]:
            part, n = (base.name, 0) if method == "base" else (tag, p["n"])          # the bare base: once, whatever n
            measure(run, method, part, base, items, cfg.tasks, max_tokens, journal, dict(
                role="seen" if base.name in seen else "unseen", seed=p["seed"], n=n))
        journal.add(tag)                                                             # and the base need not be loaded again
    if args.show or RANK:
        return
    write_results(run, cfg.tasks)
    forget(journal.path)
    print((run / "results.md").read_text().split("\n## ")[0])
    print(f"table: {run / 'results.md'}, plots beside it")


if __name__ == "__main__":
    run_main(main)
