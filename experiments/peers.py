"""Measures this project beside its peers: the same work, turn by turn, in one process.

    python -m experiments.peers --data data --base smollm2-135m            everything, CPU
    python -m experiments.peers --quick --data data --base smollm2-135m    the same lines of the table from fewer rows
    python -m experiments.peers --device cuda --data data                  bf16, on --gpu-base instead of --base

A training round, 4 rows of every task, is measured beside portallib's, a round of per-task LoRAs beside PEFT's, and
the log-probability of every choice on the bare base beside portallib's and lm-evaluation-harness's. A ratio is
peer / ours of one turn; the table has the median and, in brackets, the range. Where a peer (requirements-bench.txt),
the tasks or the base are missing, the table says "not measured" and why.
"""
import contextlib, dataclasses, importlib.metadata, importlib.util, json, multiprocessing, os
import pathlib, re, shlex, statistics, sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from tqdm import trange

from experiments.contestants import (ROWS, Work, evaluate_harness, evaluate_ours, evaluate_portallib, loras_ours,
                                     loras_peft, train_floor, train_ours, train_portallib)
from reports.results import hardware
from runtime.files import ROOT, BadInput, first_line, today, write_whole
from runtime.flags import parse, run_main
from presets import REAL, TOY

TURNS = 5
COLUMNS = "work", "ours, s", "peer", "peer, s", "peer / ours [min..max]", "target", "peak memory", "held equal"


# ---------------------------------------------------------------------------------------------- measuring
def take_turns(label, turns):
    """Returns {name: its TURNS (seconds, result)}, taken in alternation. One more of each, before them, is for warming
    up, unless all take so long (5 s) that warming up makes no difference: then it counts."""
    def one_of_each():
        return {name: turn() for name, turn in turns.items()}
    first = one_of_each()
    warm = min(seconds for seconds, _ in first.values()) > 5
    bar = trange(TURNS - warm, desc=label, unit="turn", leave=False, disable=None)
    taken = [first] * warm + [one_of_each() for _ in bar]
    return {name: [each[name] for each in taken] for name in turns}


def choose_threads(turn):
    """Sets the number of threads with which `turn` is faster: on tiny tensors threads may wait for each other more than
    they work."""
    turn()
    seconds = {}
    for n in (1, torch.get_num_threads()):
        torch.set_num_threads(n)
        seconds[n] = min(turn()[0] for _ in range(2))
    torch.set_num_threads(min(seconds, key=seconds.get))


def peak_of(contestant, work, threads):
    """Returns bytes with the base loaded and at the peak of two turns (the second has the optimiser's state), or {}
    where the system does not tell. For a process of its own: a peak never goes down. Not ru_maxrss, which in a child
    starts at its parent's peak."""
    def memory():
        """Bytes (now, at the peak) of the GPU or this process."""
        if work.device != "cpu":
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        status = pathlib.Path("/proc/self/status")                                   # Linux
        sizes = dict(re.findall(r"(VmHWM|VmRSS):\s*(\d+)", status.read_text() if status.exists() else ""))
        return [1024 * int(sizes.get(key, 0)) for key in ("VmRSS", "VmHWM")]
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        importlib.import_module("portallib")                                         # code counts for no contestant
    base, tasks = work.load()
    loaded, turn = memory()[0], contestant(work, base, tasks)
    turn(), turn()
    return dict(loaded_bytes=loaded, peak_bytes=memory()[1]) if loaded else {}


def measure(label, work, ours, peers, note="", with_memory=False):
    """Returns lines of the table, dicts: each of `ours` {name: contestant} beside each of `peers` {name: (contestant,
    target of the ratio or None)}, or why a peer is missing."""
    turns, targets, missing = {name: contestant(work, *work.load()) for name, contestant in ours.items()}, {}, []
    for name, (contestant, target) in peers.items():
        try:
            turn = contestant(work, *work.load())
        except ImportError as error:
            missing.append(dict(work=label, peer=name, target=target, not_measured=first_line(error)))
            continue
        if isinstance(turn, dict):
            batch_size, turn = min(turn.items(), key=lambda variant: variant[1]()[0])
            name = f"{name}, batch {batch_size}"
        turns[name], targets[name] = turn, target
    if not targets:
        return missing
    if work.repeat > 1:
        choose_threads(turn)
    taken, peaks = take_turns(label, turns), {}
    del turn, turns                                                                  # frees the bases
    for name, contestant in (ours | {name: peers[name][0] for name in targets}).items() if with_memory else ():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(peak_of, contestant, work, torch.get_num_threads()).result()
    return [dict(work=label + mine.removeprefix("ours"), peer=name, target=target, note=note)
            | compare(work, taken[mine], taken[name])
            | {f"{who}_{what}": size for who, own in (("ours", mine), ("peer", name))
               for what, size in peaks.get(own, {}).items()}
            for mine in ours for name, target in targets.items()] + missing


def compare(work, ours, peer):
    """The measured part of a line, from the [(seconds, result)] of both sides' turns."""
    ours_s, peer_s = ([seconds / work.repeat for seconds, _ in turns] for turns in (ours, peer))
    ratios, found, expected = [b / a for a, b in zip(ours_s, peer_s)], ours[-1][1], peer[-1][1]
    line = dict(
        ours_s=statistics.median(ours_s), peer_s=statistics.median(peer_s), ours_turns=ours_s, peer_turns=peer_s,
        ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), threads=torch.get_num_threads(),
        rows_a_task=work.rows, rounds_a_turn=work.repeat, base=pathlib.Path(work.spec).name, device=work.device,
        dtype=str(work.dtype).split(".")[1], max_tokens=work.max_tokens)
    if expected:                                                                     # the scores of an evaluation
        rows = [(task, a, b) for (task, a), (_, b) in zip(found, expected, strict=True)]
        differ = [dict(task=task, number=k, ours=a, peer=b) for k, (task, a, b) in enumerate(rows)
                  if a.index(max(a)) != b.index(max(b))]
        furthest = max(abs(x - y) for _, a, b in rows for x, y in zip(a, b))
        line |= dict(differ=differ, note=f"same choice on {len(rows) - len(differ)} of {len(rows)} rows; scores differ "
                                         f"by at most {furthest:.1e}")
    return line


def plan(args):
    """Yields the lines of the table in order: (label, function that measures them)."""
    portal = "core without LayerNorm, sizes, gradient clip, AdamW; only portallib tokenises within a round"
    lora, cuda, quick = "rank 16, all seven projections, gradient clip, fused AdamW", args.device != "cpu", args.quick
    toy = Work("toy-qwen-m", ROOT / "toy" / "data", args.device, args.dtype, TOY["max_tokens"], repeat=3)
    real = Work(args.gpu_base if cuda else args.base, args.data, args.device, args.dtype,
                args.max_tokens or REAL["max_tokens"], rows=ROWS // 2 if quick and not cuda else ROWS)
    def line(what, work, *rest):
        label = f"{what}, {pathlib.Path(work.spec).name}"
        return label, partial(measure, label, work, *rest)
    def training(target):
        plain = partial(train_portallib, gradient_checkpointing=False)               # faster, and more memory
        return {"portallib": (train_portallib, target), "portallib, its checkpointing off": (plain, target)}

    yield line("training round", toy, {"ours": train_ours}, training(5.0), portal)
    peers = training(4.0 if cuda else 1.5) | {"the frozen base alone": (train_floor, None)}
    if quick:
        del peers["portallib, its checkpointing off"]
    yield line("training round", real, {"ours": train_ours, "ours, --recompute": partial(train_ours, recompute=True)},
               peers, portal, True)
    if not cuda:
        label = f"training round, {args.gpu_base}, bfloat16 on a GPU"
        yield label, lambda: [dict(work=label, peer="portallib", target=4.0, not_measured="this run is on a CPU")]
    yield line("LoRA round", toy, {"ours": loras_ours}, {"PEFT": (loras_peft, 4.0)}, lora)
    yield line("LoRA round", real, {"ours": loras_ours}, {"PEFT": (loras_peft, 4.0 if cuda else 1.3)}, lora, cuda)
    yield line("evaluation", dataclasses.replace(real, split="eval", rows=2 if quick else 50), {"ours": evaluate_ours},
               {"portallib": (evaluate_portallib, 2.5), "lm-evaluation-harness": (evaluate_harness, 2.0)})


# ---------------------------------------------------------------------------------------------- the report
def cells(line):
    """A line of the table as text."""
    target, used = f">= {line['target']}" if line["target"] else "-", "-"
    if "not_measured" in line:
        return [line["work"], "-", line["peer"], "-", "not measured: " + line["not_measured"], target, "-", "-"]
    if "ours_peak_bytes" in line:
        gib = {key: value / 2 ** 30 for key, value in line.items() if key.endswith("_bytes")}
        ours, peer = (gib[f"{who}_peak_bytes"] - gib[f"{who}_loaded_bytes"] for who in ("ours", "peer"))
        used = (f"ours {ours:.2f} GiB, peer {peer:.2f} ({ours / peer:.2f}x) above the loaded base; in all "
                f"{gib['ours_peak_bytes']:.2f}, {gib['peer_peak_bytes']:.2f}")
    return [line["work"], f"{line['ours_s']:.3g}", line["peer"], f"{line['peer_s']:.3g}",
            f"{line['ratio']:.2f} [{line['ratio_min']:.2f}..{line['ratio_max']:.2f}]", target, used,
            f"threads {line['threads']}, {line['dtype']}, the same {line['rows_a_task']} rows a task and their tokens; "
            f"{line['note']} (ours: --max-tokens {line['max_tokens']})"]


def write_report(path, lines, device, threads):
    """Writes <path>.jsonl, a line a comparison, and <path>.md, the table."""
    installed = [name for name in ("transformers", "portallib", "peft", "lm_eval") if importlib.util.find_spec(name)]
    peers = [f"{name} {importlib.metadata.version(name)}" for name in installed]
    command = shlex.join(["python", "-m", "experiments.peers", *(os.path.basename(a) or a for a in sys.argv[1:])])
    head = dict(hardware=hardware(), threads=threads, peers=", ".join(peers), date=today(), command=command)
    differ = [f"- {line['work']}, {line['peer']}: row {d['number']} ({d['task']}): ours {d['ours']}, peer {d['peer']}"
              for line in lines for d in line.get("differ", ())]
    text = [f"# Benchmark on {device}", "", *(f"- {key}: {value}" for key, value in head.items()), "",
            f"Seconds: median of {TURNS} turns, taken in alternation. A ratio is that of two neighbouring turns.", "",
            *(f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, lines))), "",
            "Rows with another choice:", "", *(differ or ["none"])]
    for suffix, rows in ((".md", text), (".jsonl", [json.dumps(head | line) for line in lines])):
        write_whole(path.with_suffix(suffix), lambda p: p.write_text("\n".join([*rows, ""])))


def main(argv=None):
    args = parse(__doc__, "quick data base gpu-base device dtype max-tokens out", argv,
                 quick=dict(action="store_true", help="fewer rows on the real base, portallib only as by default"),
                 data=dict(default=ROOT / "data"),
                 base=dict(default="smollm2-135m", metavar="A", help="the real base on a CPU"),
                 gpu_base=dict(default="qwen2.5-coder-0.5b", metavar="A", help="the real base on a GPU"),
                 out=dict(type=pathlib.Path, default=ROOT / "results", metavar="DIR", help="where the table goes"))
    args.dtype = args.dtype or (torch.float32 if args.device.startswith("cpu") else torch.bfloat16)
    threads, lines, path = torch.get_num_threads(), [], args.out / f"bench-{torch.device(args.device).type}.md"
    for label, measured in plan(args):
        print(f"{label} ...", flush=True)
        torch.set_num_threads(threads)
        try:
            found = measured()
        except (BadInput, OSError) as error:                                         # no tasks here, no such base
            found = [dict(work=label, peer="-", target=None, not_measured=first_line(error))]
        for line in found:
            print("  " + " | ".join(cells(line)[1:]), flush=True)
        lines += found
        write_report(path, lines, args.device, threads)
    print(f"table: {path}")


if __name__ == "__main__":
    run_main(main)
