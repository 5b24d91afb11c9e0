"""Measures this project beside its peers: the same work, turn by turn, in one process.

    python -m experiments.peers --data data --base smollm2-135m             rounds and scores; --quick: fewer rows
    python -m experiments.peers --device cuda --data data --base A          the same on a GPU, in bf16
    python -m experiments.peers --generate --bases A,B --data everyday    exact match

A training round, 4 rows of every task, is measured beside portallib's, and the log-probability of every choice on the
bare base beside lm-evaluation-harness's. With --generate, exact match on tasks of completions is measured beside
lm-evaluation-harness. A ratio is peer / ours of one turn; the tables have the median and, in brackets, the range. Where
a peer (requirements-bench.txt), the tasks or the base are missing, the table says "not measured" and why.
"""
import dataclasses, importlib.metadata, importlib.util, os, pathlib, shlex, statistics, sys
from functools import partial

import torch
from tqdm import trange

from bases import usual_dtype
from experiments.tables import markdown
from experiments.contestants import (ROWS, Work, evaluate_harness, evaluate_ours, exact_harness, exact_ours, train_ours,
                                     train_portallib)
from presets import REAL, TOY
from reports.results import commit, hardware
from runtime.files import ROOT, BadInput, first_line, today, write_whole
from runtime.flags import parse, run_main

TURNS, HARNESS = 5, "lm-evaluation-harness"
RATIO = "peer / ours [min..max]"


# ---------------------------------------------------------------------------------------------- measuring
def take_turns(label, turns):
    """Returns {name: its TURNS (seconds, result)}, taken in alternation. One more of each, before them, is for warming
    up, unless all take so long (5 s) that warming up makes no difference: then it counts."""
    def one_of_each():
        return {name: turn() for name, turn in turns.items()}
    first = one_of_each()
    warm = min(seconds for seconds, *_ in first.values()) > 5
    bar = trange(TURNS - warm, desc=label, unit="turn", leave=False, disable=None)
    taken = [first] * warm + [one_of_each() for _ in bar]
    return {name: [each[name] for each in taken] for name in turns}


def shown(values, form):
    """Returns median and range as text."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}..{max(values):{form}}]"


def beside(ours, name, peer):
    """Returns the timed part of a line of a table, from the turns of both."""
    ours_s, peer_s = ([seconds for seconds, _ in turns] for turns in (ours, peer))
    return {"ours, s": f"{statistics.median(ours_s):.3g}", "peer": name, "peer, s": f"{statistics.median(peer_s):.3g}",
            RATIO: shown([b / a for a, b in zip(ours_s, peer_s)], ".2f")}


def measure(label, work, ours, peers, note=""):
    """Returns lines of the table: `ours` beside each of `peers` {name: (contestant, target of the ratio)}, or why a
    peer is missing."""
    if work.repeat > 1:                                                              # on tiny tensors, threads wait for
        torch.set_num_threads(1)                                                     # each other more than they work
    turns, lines = {"ours": ours(work, *work.load())}, []
    for name, (contestant, _) in peers.items():
        try:
            turns[name] = contestant(work, *work.load())
        except ImportError as error:
            lines.append({"work": label, "peer": name, RATIO: f"not measured: {first_line(error)}"})
    taken = take_turns(label, turns) if len(turns) > 1 else {}
    own_turns = taken.pop("ours", None)
    for name, peer_turns in taken.items():
        same = note or same_choices(own_turns[-1][1], peer_turns[-1][1])
        lines.append({"work": label, **beside(own_turns, name, peer_turns), "target": f">= {peers[name][1]}",
                      "held equal": f"threads {torch.get_num_threads()}, {str(work.dtype)[6:]}, the same "
                      f"{work.rows} rows a task; {same} (ours: --max-tokens {work.max_tokens})"})
    return lines


def same_choices(ours, peer):
    """Returns what two evaluators' scores of the same rows have in common, as text."""
    rows = list(zip(ours, peer, strict=True))
    alike = sum(a.index(max(a)) == b.index(max(b)) for a, b in rows)
    furthest = max(abs(x - y) for a, b in rows for x, y in zip(a, b, strict=True))
    return f"same choice on {alike} of {len(rows)} rows; scores differ by at most {furthest:.1e}"


def plan(args):
    """Yields the lines of the table in order: (label, function that measures them)."""
    portal = "core without LayerNorm, sizes, gradient clip, AdamW; only portallib tokenises within a round"
    toy = Work("toy-qwen-m", ROOT / "toy" / "data", args.device, args.dtype, TOY["max_tokens"], repeat=3)
    real = Work(args.base, args.data, args.device, args.dtype, args.max_tokens, rows=ROWS // 2 if args.quick else ROWS)
    def line(what, work, *rest):
        label = f"{what}, {pathlib.Path(work.spec).name}"
        return label, partial(measure, label, work, *rest)
    plain = partial(train_portallib, gradient_checkpointing=False)                   # faster, and more memory
    yield line("training round", toy, train_ours, {"portallib": (train_portallib, 5.0),
                                                   "portallib, its checkpointing off": (plain, 5.0)}, portal)
    least = 1.5 if args.device == "cpu" else 4.0
    yield line("training round", real, train_ours, {"portallib": (train_portallib, least)}, portal)
    yield line("evaluation", dataclasses.replace(real, split="eval", rows=2 if args.quick else 50), evaluate_ours,
               {HARNESS: (evaluate_harness, 2.0)})


def completing(args):
    """Yields the lines for every base: (label, function that measures them)."""
    def lines(spec):
        work = Work(spec, args.data, args.device, args.dtype, args.max_tokens, "eval", args.eval_rows)
        own = {"exact match": exact_ours, "decoding every row": partial(exact_ours, every=True)}
        turns = {what: contestant(work, *work.load()) for what, contestant in own.items()}
        taken = take_turns(spec, {**turns, HARNESS: exact_harness(work, *work.load())})
        right = {what: own[-1][1] for what, own in taken.items()}
        return [{"work": f"{what}, {pathlib.Path(spec).name}", **beside(taken[what], HARNESS, taken[HARNESS]),
                 "rows": len(right[what]), "right": sum(right[what]), "peer's right": sum(right[HARNESS]),
                 "same verdict": sum(a == b for a, b in zip(right[what], right[HARNESS]))} for what in own]
    for spec in args.bases:
        yield spec, partial(lines, spec)


# ---------------------------------------------------------------------------------------------- the page
def about(module):
    """Returns lines that say how a page was made: `module` with this process's flags, hardware, commit, date."""
    names = [",".join(os.path.basename(part) or part for part in a.split(",")) for a in sys.argv[1:]]
    command = shlex.join(["python", "-m", module, *names])
    return [f"- command: {command}", f"- hardware: {hardware()}", f"- commit: {commit()}", f"- date: {today()}"]


def main(argv=None):
    args = parse(__doc__, "quick generate data base bases eval-rows device dtype max-tokens out", argv,
                 quick=dict(action="store_true", help="fewer rows on the real base"),
                 generate=dict(action="store_true", help="measure exact match instead"),
                 data=dict(default=ROOT / "data"), eval_rows=dict(default=32, help="--generate: rows a task"),
                 base=dict(default="smollm2-135m", metavar="A", help="the real base"),
                 bases=dict(default=["smollm2-135m"], help="--generate: the bases"),
                 max_tokens=dict(default=REAL["max_tokens"]),
                 out=dict(type=pathlib.Path, default=ROOT / "results", metavar="DIR", help="where the table goes"))
    args.dtype = args.dtype or usual_dtype(args.device)
    threads, lines, kind = torch.get_num_threads(), [], "generate" if args.generate else "bench"
    path = args.out / f"{kind}-{torch.device(args.device).type}.md"
    peers = [f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "portallib", "lm_eval")
             if importlib.util.find_spec(p)]
    head = [f"# {'Exact match' if args.generate else 'Benchmark'} on {args.device}", "", *about("experiments.peers"),
            f"- threads: {threads}", f"- peers: {', '.join(peers)}", "",
            f"Seconds: median of {TURNS} turns, taken in alternation. A ratio is that of two neighbouring turns."]
    if args.generate:
        head += ["The bare base. lm-evaluation-harness decodes each row until a new line; ours scores the completions "
                 "and decodes the rows that this does not settle. portallib has no decoding."]
    for label, measured in (completing if args.generate else plan)(args):
        print(f"{label} ...", flush=True)
        torch.set_num_threads(threads)
        try:
            found = measured()
        except (BadInput, OSError, ImportError) as error:                            # no tasks here, no such base
            found = [{"work": label, RATIO: f"not measured: {first_line(error)}"}]
        lines += found
        print(*markdown(found), sep="\n", flush=True)
        write_whole(path, lambda p: p.write_text("\n".join([*head, "", *markdown(lines), ""])))
    print(f"table: {path}")


if __name__ == "__main__":
    run_main(main)
