"""Evaluation: acc_norm and log_loss of every method on every base of a run, the table and the plots.

    python eval.py                     everything the run trained last holds; missing baselines are fitted first
    python eval.py --bases toy-gemma   only these bases

    score(choice) = log p(choice | prompt) / characters(choice)       the leading space counts
    acc_norm      = share of rows whose gold choice scores above every other (a tie is an error)
    log_loss      = NLL of the gold choices / their number of tokens
    recovered lift = (acc - acc_base) / (acc_LoRA - acc_base)         retention = acc / acc_LoRA
"""
import json, os, pathlib, platform, sys, time

import torch
from tqdm import tqdm

from cli import BadInput, append_jsonl, find_run, parse, read_json, run_main, write_whole
from data import collate, encode, load_tasks, micro_batches, sample
from portal import load_config, load_converter, load_portal

METHODS = ("base", "lora", "cross_lora", "copy", "random", "portal")


# ---------------------------------------------------------------------------------------------- the two numbers
@torch.no_grad()
def score(base, adapters, items, max_tokens):
    """For every item, in order: the log-probability (float) of each of its continuations. adapters None: bare base.

    A prompt is encoded once, its continuations behind it; rows of all tasks and lengths share micro-batches.
    """
    if adapters is not None:
        adapters = adapters.map(lambda a: a.detach())
    found = {}
    parts = list(micro_batches(items, max_tokens))
    for part in tqdm(parts, desc=f"scoring on {base.name}", unit="batch", delay=2, leave=False, disable=not sys.stderr.isatty()):
        batch = collate(part, base.device)
        logits = full_precision(base.logits(batch, adapters))                        # [N, vocabulary]
        log_p = logits[batch.source, batch.target] - logits.logsumexp(-1)[batch.source]  # [M]
        sums = torch.zeros(sum(len(item.continuations) for item in part), dtype=torch.float64, device=base.device)
        sums = iter(sums.index_add_(0, batch.owner, log_p.double()).tolist())
        found.update({id(item): [next(sums) for _ in item.continuations] for item in part})
    return [found[id(item)] for item in items]


def full_precision(logits):
    """Half-precision logits as float32: a softmax over a vocabulary needs the bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def evaluate(base, adapters, items, max_tokens):
    """{task index: {"acc_norm", "log_loss", "rows", "correct": [bool a row]}} of the tasks that `items` hold."""
    cells = {}
    for item, log_p in zip(items, score(base, adapters, items, max_tokens)):
        choices, gold = item.row.choices, item.row.gold
        per_character = [lp / len(choice) for lp, choice in zip(log_p, choices)]
        rivals = [s for k, s in enumerate(per_character) if k != gold]
        cell = cells.setdefault(item.task, {"correct": [], "nll": 0.0, "tokens": 0})
        cell["correct"].append(per_character[gold] > max(rivals))
        cell["nll"] -= log_p[gold]
        cell["tokens"] += len(item.continuations[gold])
    return {task: {"acc_norm": sum(c["correct"]) / len(c["correct"]), "log_loss": c["nll"] / c["tokens"],
                   "rows": len(c["correct"]), "correct": c["correct"]} for task, c in cells.items()}


def macro(cells):
    """The mean over tasks of tuples of numbers."""
    return tuple(sum(values) / len(cells) for values in zip(*cells))


def lift(acc, base, lora):
    """Recovered lift, or None where the LoRA gained nothing that could be recovered."""
    return (acc - base) / (lora - base) if lora > base else None


# ---------------------------------------------------------------------------------------------- everything in a run
def adapters_of(run, method, tag, base, final=False):
    """The Adapters of a method on a base as the run holds them: the selected epoch, or the last one."""
    from baselines.lora import load_adapters
    if method == "base":
        return None
    if method != "portal":
        path = run / "final" / "baselines" / method / f"{tag}.safetensors"
        return load_adapters(path if final and path.exists() else run / "baselines" / method / f"{tag}.safetensors", base.device)
    ported = read_json(run / "converters" / f"{tag}.json")["ported"]
    portal = load_portal(run, final=final and not ported)  # a port's core is the selected one, whatever its own epoch
    path = run / "final" / "converters" / f"{tag}.safetensors"
    converter = load_converter(portal.cfg, path) if final and path.exists() else portal.converters[tag]
    if converter.e.shape[0] != base.layers or any(
            (converter.P_in[m].shape[1], converter.P_out[m].shape[0]) != base.dims[m] for m in portal.cfg.modules):
        raise BadInput(f"{run}/converters/{tag}.safetensors does not fit base {base.name}: other layers or widths")
    portal.converters[tag] = converter
    return portal.to(base.device).adapters(tag).map(torch.detach)


def main(argv=None):
    from baselines import cross_lora, lora    # these train with train.fit, which scores its epochs with this file
    from bases import reload_base
    from train import preset
    args = parse(__doc__, "run bases data tasks epochs batch-size lr max-tokens eval-rows device dtype overwrite", argv,
                 epochs=dict(help="of the LoRA baseline"), batch_size=dict(help="of the LoRA baseline"),
                 lr=dict(help="of the LoRA baseline"),
                 overwrite=dict(help="fit the baselines again even if the run holds them"))
    run = find_run(args.run)
    saved, cfg = load_config(run)
    provenance = {p.stem: read_json(p) for p in sorted((run / "converters").glob("*.json"))}
    wanted = args.bases or sorted({p["base"] for p in provenance.values()})
    for name in wanted:
        if name not in {p["base"] for p in provenance.values()}:
            raise BadInput(f"base {name!r} is not in {run}; it holds {', '.join(sorted({p['base'] for p in provenance.values()}))}; "
                           "python port.py --to NAME adds one")
    data = load_tasks(args.data or pathlib.Path(saved["data"]), cfg.tasks)
    shown = [task for task in cfg.tasks if args.tasks is None or task in args.tasks]
    if not shown or args.tasks and not set(args.tasks) <= set(cfg.tasks):
        raise BadInput(f"--tasks {','.join(args.tasks)}: this run knows {', '.join(cfg.tasks)}")
    settings = {k: getattr(args, k) or v for k, v in preset(wanted)["lora"].items()}
    max_tokens = settings["max_tokens"]
    seen = [b["base"] for b in saved["bases"]]
    loaded = {}

    def base_of(name):
        if name not in loaded:
            loaded[name] = reload_base(provenance[name], args.device, args.dtype)
        return loaded[name]

    def ensure_lora(tag):
        """Fit the per-task LoRAs of a base on the rows its converter was fitted on, unless they are there."""
        p, path = provenance[tag], run / "baselines" / "lora" / f"{tag}.json"
        same = path.exists() and all(read_json(path)[key] == p[key] for key in ("n", "seed"))
        if not same or args.overwrite and tag not in fitted:
            rows = {task: sample(splits["train"], p["n"], p["seed"]) for task, splits in data.items()}
            lora.fit_lora(run, tag, base_of(p["base"]), rows, p["n"], p["seed"], settings)
        fitted.add(tag)

    fitted = set()
    for tag in sorted((t for t, p in provenance.items() if p["base"] in wanted), key=lambda t: (seen + [t]).index(t)):
        p = provenance[tag]
        base = base_of(p["base"])
        source = next((name for name in reversed(seen) if name != base.name), None)  # whose LoRA the transfers carry over
        ensure_lora(tag)
        transfers = ()
        if source:
            ensure_lora(source)
            transfers = cross_lora.transfer_all(run, tag, base, base_of(source), p["seed"])
        rows = [row for task in shown for row in sample_eval(data[task]["eval"], args.eval_rows)]
        items, cut = encode(base.tokenizer, rows, cfg.tasks)
        if cut:
            print(f"{base.name}: {cut} of {len(items)} prompts were cut from the left")
        for method in ("base", "lora", *transfers, "portal"):
            cells = None
            for select in ("best", "final"):
                folder = {"lora": "baselines/lora", "portal": "converters"}.get(method)
                again = folder and (run / "final" / folder / f"{tag}.safetensors").exists()
                start = time.time()
                if cells is None or again:                                           # where the last epoch was selected,
                    adapters = adapters_of(run, method, tag, base, select == "final")  # the two are the same
                    cells = evaluate(base, adapters, items, max_tokens)
                    seconds = round((time.time() - start) / len(cells), 3)
                for t, cell in cells.items():
                    append_jsonl(run / "results.jsonl", dict(
                        method=method, base=base.name, role="seen" if base.name in seen else "unseen", task=cfg.tasks[t],
                        seed=p["seed"], n=0 if method == "base" else p["n"], select=select, acc_norm=cell["acc_norm"],
                        log_loss=cell["log_loss"], rows=cell["rows"], seconds=seconds))
            print(f"{tag} {method}: acc_norm {sum(c['acc_norm'] for c in cells.values()) / len(cells):.3f}", flush=True)
    write_results(run, cfg.tasks)
    print((run / "results.md").read_text().split("\n## ")[0])
    print(f"table: {run / 'results.md'}, plots beside it")


def sample_eval(rows, n):
    return rows if n is None else sample(rows, n, 0)[0] + sample(rows, n, 0)[1]


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


def write_results(run, tasks):
    """results.md and one bar plot a base, drawn from results.jsonl alone."""
    found = read_results(run)
    saved = read_json(run / "portal.json")
    rows_each = sorted({row["rows"] for cells in found.values() for row in cells.values()})
    seeds = sorted({row["seed"] for cells in found.values() for row in cells.values()})
    lines = [f"# Results of {run.name}", "",
             f"{len(tasks)} tasks, {rows_each[0]}{f' to {rows_each[-1]}' if len(rows_each) > 1 else ''} evaluation rows each; "
             f"seed {', '.join(map(str, seeds))}; {hardware()}. Macro averages. `best`: the epoch selected on rows held out "
             "of train; `final`: the last epoch. Lift and retention are of the selected epoch, against the LoRA on the same rows.", "",
             "| base | role | n | method | acc_norm best | acc_norm final | log_loss best | recovered lift | retention |",
             "|---|---|---|---|---|---|---|---|---|"]
    seen = [b["base"] for b in saved["bases"]]
    bases = sorted({key[0] for key in found}, key=lambda b: ((seen + [b]).index(b), b))
    details = []
    for base in bases:
        for n in sorted({key[1] for key in found if key[0] == base} - {0}):
            cells = {m: {s: found.get((base, 0 if m == "base" else n, m, s)) for s in ("best", "final")} for m in METHODS}
            cells = {m: c for m, c in cells.items() if c["best"]}
            common = [t for t in tasks if all(t in c["best"] and t in c["final"] for c in cells.values())]
            def mean(m, s, key):
                return sum(cells[m][s][t][key] for t in common) / len(common)
            if not common or not {"base", "lora"} <= set(cells):
                continue
            low, high = mean("base", "best", "acc_norm"), mean("lora", "best", "acc_norm")
            for m in cells:
                acc = mean(m, "best", "acc_norm")
                share = lift(acc, low, high)
                lines.append(f"| {base} | {'seen' if base in seen else 'unseen'} | {n if m != 'base' else '-'} | {m} | {acc:.3f} | "
                             f"{mean(m, 'final', 'acc_norm'):.3f} | {mean(m, 'best', 'log_loss'):.3f} | "
                             f"{'-' if share is None or m == 'base' else f'{100 * share:.0f}%'} | {100 * acc / high:.0f}% |")
            details += ["", f"## {base}, n = {n}: acc_norm of the selected epoch", "", "| task | " + " | ".join(cells) + " |",
                        "|---" * (len(cells) + 1) + "|"]
            details += [f"| {t} | " + " | ".join(f"{c['best'][t]['acc_norm']:.3f}" for c in cells.values()) + " |" for t in common]
            plot(run / f"{base}-n{n}.png", f"{base}, n = {n} a task", common,
                 {m: [c["best"][t]["acc_norm"] for t in common] for m, c in cells.items() if m in ("base", "cross_lora", "lora", "portal")})
    write_whole(run / "results.md", lambda p: p.write_text("\n".join(lines + details) + "\n"))


def plot(path, title, tasks, bars):
    """Bars a task, one colour a method."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(2 + 0.8 * len(tasks), 3.6))
    for k, (method, values) in enumerate(bars.items()):
        axes.bar([t + (k - (len(bars) - 1) / 2) * 0.8 / len(bars) for t in range(len(tasks))], values, 0.8 / len(bars), label=method)
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
    axes.set_ylim(0, 1), axes.set_ylabel("acc_norm"), axes.set_title(title)
    axes.legend(ncols=len(bars), loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)
    figure.tight_layout()
    write_whole(path, lambda p: figure.savefig(p, format="png", dpi=110))
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
