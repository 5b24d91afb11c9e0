"""Measures this project beside its peers: the same work, turn by turn, in one process.

    python -m experiments.peers --data data --base smollm2-135m            everything, CPU
    python -m experiments.peers --quick --data data --base smollm2-135m    the same lines of the table from fewer rows
    python -m experiments.peers --device cuda --data data                  bf16, on --gpu-base instead of --base

A training round, 4 rows of every task, is measured beside portallib's, a round of per-task LoRAs beside PEFT's, and
the log-probability of every choice on the bare base beside portallib's and lm-evaluation-harness's. A ratio is
peer / ours of one turn; the table has the median and, in brackets, the range. Where a peer (requirements-bench.txt),
the tasks or the base are missing, the table says "not measured" and why.
"""
import contextlib, dataclasses, importlib.metadata, importlib.util, io, itertools, json, logging, multiprocessing, os
import pathlib, re, shlex, statistics, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

from baselines.lora import ALPHA, RANK, TaskLoRAs
from bases import load_base
from data import collate, encode, load_tasks, micro_batches, sample
from portal import MODULES, Config, Converter, Portal
from runtime.files import ROOT, BadInput, first_line, today, write_whole
from runtime.flags import parse, run_main
from runtime.report import hardware
from score import full_precision, per_character, score
from train import EMA, REAL, TOY, Learner, one_round, portal_learner, preset

MAX_PROMPT = 768                  # tokens; portallib cuts longer prompts, so rows with one are left out for all
ROWS, ROUNDS = 4, 10_000          # rows of every task in a round; rounds of the learning rate's schedule, never reached
TURNS = 5
COLUMNS = "work", "ours, s", "peer", "peer, s", "peer / ours [min..max]", "target", "peak memory", "held equal"
BATCHES = {"cpu": (4, 8), "cuda": (8, 32, 128)}  # sequences in a peer's batch in evaluation


@dataclasses.dataclass
class Work:
    """What the contestants of a line of the table share. A contestant(work, base, tasks) returns a turn, a function
    that does the work and returns (seconds, result), or {batch size: turn}, of which the fastest is measured."""
    spec: str                     # the base
    data: pathlib.Path            # the folder of tasks
    device: str
    dtype: torch.dtype
    max_tokens: int               # of a micro-batch, in ours
    split: str = "train"
    rows: int = ROWS              # of every task
    repeat: int = 1               # how often a turn does the work: on a tiny base, once is too short to time

    def load(self):
        """Returns (Base, {task: its first `rows` rows, in a seeded order, whose prompt is within MAX_PROMPT})."""
        base, tasks = load_base(self.spec, self.device, self.dtype), {}
        for task, splits in load_tasks(self.data).items():
            shuffled = sum(sample(splits[self.split], None, 0), [])
            short = (row for row in shuffled if len(base.tokenizer(row.prompt).input_ids) <= MAX_PROMPT)
            tasks[task] = list(itertools.islice(short, self.rows))
        return base, tasks

    def clock(self):
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def timed(self, step):
        """The turn that runs `step` `repeat` times and has its last result."""
        def turn():
            start = self.clock()
            for _ in range(self.repeat):
                result = step()
            return self.clock() - start, result
        return turn


# ---------------------------------------------------------------------------------------------- training: PorTAL, LoRAs
def config(base, tasks):
    """The sizes of the toy or the write-up's, and the write-up's trunk, the only one that portallib has."""
    return Config(tasks=list(tasks), norm="none", **preset([base.name])["sizes"])


def gold_items(tokenizer, tasks):
    return encode(tokenizer, sum(tasks.values(), []), list(tasks), choices="gold")[0]


def train_ours(work, base, tasks, recompute=False):
    """With losses divided by their running means, as portallib's are."""
    if recompute:
        base.recompute_layers()
    items, portal, ema = {base.name: gold_items(base.tokenizer, tasks)}, Portal(config(base, tasks)), EMA()
    portal.converters[base.name] = Converter(portal.cfg, base.layers, base.dims)
    learner = portal_learner(portal.to(work.device), {task: (rows, []) for task, rows in tasks.items()},
                             dict(epochs=ROUNDS, batch_size=ROWS, lr=1e-3, least=1))
    return work.timed(lambda: one_round([base], portal.adapters, [learner], items, work.max_tokens, ema))


def train_floor(work, base, tasks):
    """The cost common to all methods: the frozen base's forward and backward pass over our micro-batches, without
    adapters."""
    items = gold_items(base.tokenizer, tasks)
    base.model.enable_input_require_grads()                                          # so that there is a backward pass
    def step():
        for part in micro_batches(items, work.max_tokens):
            batch = collate(part, base.device)
            F.cross_entropy(full_precision(base.logits(batch)), batch.target).backward()
    return work.timed(step)


def portallib_inputs(base, tasks):
    """Returns (PortalBase, the tasks' rows as a ChoiceDataset). `base` cannot be used afterwards."""
    import portallib
    rows = [portallib.ChoiceExample(r.task, r.prompt, tuple(r.choices), r.gold) for r in sum(tasks.values(), [])]
    return portallib.PortalBase(base.name, base.unpatch(), base.tokenizer), portallib.ChoiceDataset(rows, rows)


def portallib_trainer(base, dataset, cfg, clock, rounds=1, **recipe):
    """portallib's trainer. Its train() is its own but for what surrounds the rounds: the evaluations before the first
    and after the last only append the clock to `times`, and no state is copied or saved."""
    import portallib
    trainer = portallib.PortalCoreTrainer([base], dataset, config=portallib.PortalTrainingConfig(
        modules=tuple(cfg.modules), rank=cfg.rank, alpha=cfg.alpha, d_z=cfg.d_z, d_layer=cfg.d_e, hidden=cfg.hidden,
        d_core=cfg.d_c, epochs=1, source_steps_per_epoch=rounds, batch_size=ROWS, max_prompt=MAX_PROMPT, **recipe))
    def evaluate(epoch):
        trainer.times.append(clock())
        return portallib.EpochMetrics(epoch, {}, 0.0, 0.0)
    trainer.times, trainer._evaluate = [], evaluate
    trainer._snapshot, trainer._artifacts = lambda: None, lambda snapshot: {}
    return trainer


def train_portallib(work, base, tasks, **recipe):
    cfg = config(base, tasks)
    trainer = portallib_trainer(*portallib_inputs(base, tasks), cfg, work.clock, work.repeat, **recipe)
    def turn():
        trainer.train()
        return trainer.times[-1] - trainer.times[-2], None
    return turn


def loras_ours(work, base, tasks):
    items, loras = {base.name: gold_items(base.tokenizer, tasks)}, TaskLoRAs(len(tasks), base)
    learners = [Learner([{"params": loras.of(t), "lr": 1e-4}], [task], 1, ROUNDS) for t, task in enumerate(tasks)]
    return work.timed(lambda: one_round([base], loras.adapters, learners, items, work.max_tokens))


def loras_peft(work, base, tasks):
    """An adapter a task, one after another. Choosing the adapter is not timed: a run of its own does that once a task.
    The adapters have the base's dtype, as ours have in the forward pass."""
    import peft
    projections = [f"{m}_proj" for m in MODULES]
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=projections, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.unpatch(), lora, "0", autocast_adapter_dtype=False).train()
    def timed_step(task, items):
        ids = pad_sequence([torch.tensor(i.prompt + i.continuations[0]) for i in items], True, -100).to(work.device)
        lengths = torch.tensor([[len(item.prompt)] for item in items], device=work.device)               # [R, 1]
        prompt = torch.arange(ids.shape[1], device=work.device) < lengths                                # [R, S]
        batch = dict(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids.masked_fill(prompt, -100))
        active = [p for p in model.parameters() if p.requires_grad]                  # of the adapter that is set
        learner = Learner([{"params": active, "lr": 1e-4}], [task], 1, ROUNDS)
        def step():
            learner.optimizer.zero_grad()
            model(**batch, use_cache=False).loss.backward()
            learner.step()
        return work.timed(step)
    turns = []
    for t, (task, rows) in enumerate(tasks.items()):
        if t:
            model.add_adapter(str(t), lora, autocast_adapter_dtype=False)
        model.set_adapter(str(t))
        turns.append(timed_step(task, gold_items(base.tokenizer, {task: rows})))
    def turn():
        seconds = 0.0
        for t, own in enumerate(turns):
            model.set_adapter(str(t))
            seconds += own()[0]
        return seconds, None
    return turn


# ---------------------------------------------------------------------------------------------- evaluation
# A result is [(task, scores)] of every row; a score is log p / characters of a choice. Tokenising is timed.
def evaluate_ours(work, base, tasks):
    def step():
        items = encode(base.tokenizer, sum(tasks.values(), []), list(tasks))[0]
        log_p = score(base, None, items, work.max_tokens)
        return [(item.row.task, per_character(item, own)) for item, own in zip(items, log_p)]
    return work.timed(step)


def evaluate_portallib(work, base, tasks):
    import portallib
    base, dataset = portallib_inputs(base, tasks)
    def step(batch_size):
        evaluator, scored = portallib.PortalEvaluator(max_prompt=MAX_PROMPT, batch_size=batch_size), []
        score_rows = evaluator._score_rows
        evaluator._score_rows = lambda *args: scored.append((args[1], score_rows(*args))) or scored[-1][1]
        evaluator.evaluate(base, dataset)                                            # returns the accuracies alone
        return [(row.task, scores) for rows, found in scored for row, scores in zip(rows, found[0])]
    return {n: work.timed(partial(step, n)) for n in BATCHES[torch.device(work.device).type]}


def evaluate_harness(work, base, tasks):
    """lm-evaluation-harness on tasks of its own form over the same rows. Building the tasks and the bootstrap of its
    standard errors are left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets, lm_eval, lm_eval.api.task, lm_eval.models.huggingface, lm_eval.tasks
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    form = dict(test_split="test", output_type="multiple_choice", doc_to_text="prompt", doc_to_choice="choices",
                doc_to_target="gold", target_delimiter="",
                metric_list=[dict(metric="acc_norm", aggregation="mean", higher_is_better=True)])
    def harness_task(task, rows):
        splits = {"test": datasets.Dataset.from_list([row._asdict() for row in rows])}
        return lm_eval.api.task.ConfigurableTask(config=dict(form, task=task, custom_dataset=lambda **_: splits))
    built, manager = list(map(harness_task, tasks, tasks.values())), lm_eval.tasks.TaskManager(include_defaults=False)
    harness = lm_eval.models.huggingface.HFLM(pretrained=base.unpatch(), tokenizer=base.tokenizer)
    def step(batch_size):
        harness.batch_size_per_gpu = batch_size
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # bars, settings
            result = lm_eval.simple_evaluate(model=harness, tasks=built, task_manager=manager, bootstrap_iters=0)
        return [(task, [log_p / len(choice) for (log_p, _), choice in zip(one["filtered_resps"], row.choices)])
                for task, rows in tasks.items() for one, row in zip(result["samples"][task], rows, strict=True)]
    return {n: work.timed(partial(step, n)) for n in BATCHES[torch.device(work.device).type]}


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
