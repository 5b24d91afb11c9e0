"""Benchmark: this project beside its peers, the same work turn by turn in one process.

    python bench.py --data data --base smollm2-135m            everything, CPU
    python bench.py --quick --data data --base smollm2-135m    the same lines of the table from fewer rows
    python bench.py --device cuda --data data                  bf16, on --gpu-base instead of --base

    training     one round of PorTAL: 4 rows of every task on one base     beside portallib 0.2.1
    LoRAs        one round of T per-task LoRAs, 4 rows each                beside PEFT
    evaluation   the log-probability of every choice on the bare base      beside portallib and lm-evaluation-harness

A contestant is a generator: the first next() loads its base, every other one does the work once and yields the seconds.
They take turns (short ones: after a first that does not count). A ratio is peer / ours of one turn; the table has the
median of all and, in brackets, the range.
Needs requirements-bench.txt; where a peer, the tasks or the base are missing, the table says "not measured" and why.
"""
import concurrent.futures, contextlib, importlib.metadata, importlib.util, io, itertools, json, logging, multiprocessing, os
import pathlib, shlex, statistics, sys, time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.lora import ALPHA, RANK, TaskLoRAs
from bases import load_base, pretrained, resolve
from cli import ROOT, BadInput, first_sentence, parse, run_main, today, write_whole
from data import collate, encode, load_tasks, micro_batches, sample
from eval import full_precision, hardware, score
from portal import MODULES, Config, Converter, Portal
from train import EMA, Learner, one_round, portal_learner, preset

MAX_PROMPT = 768                  # portallib cuts longer prompts; nobody gets one
ROWS = 4                          # rows of every task in a training round
ROUNDS = 10_000                   # of the learning rate's schedule: it never ends here
TURNS = 5
EVAL_ROWS = {False: 50, True: 2}   # a task; with --quick
BATCHES = {"cpu": (4, 8), "cuda": (8, 32, 128)}  # sequences in a batch of an evaluation: a peer's fastest is taken


class Work(NamedTuple):
    """What all contestants of a line of the table share."""
    spec: str                     # the base
    data: pathlib.Path            # the folder of tasks
    device: str
    dtype: torch.dtype
    max_tokens: int               # ours: of a micro-batch
    rows: int = ROWS              # of every task
    repeat: int = 1               # how often the work is done in a turn (tiny bases: once is too short to time)

    def load(self, recompute=False):
        return load_base(self.spec, self.device, self.dtype, recompute)

    def load_plain(self):
        """The base as transformers loads it, for the peers: (model, tokenizer)."""
        *_, gguf = resolve(self.spec)
        model = pretrained(AutoModelForCausalLM, self.spec, dtype=self.dtype, use_safetensors=None if gguf else True)
        return model.to(self.device).eval(), pretrained(AutoTokenizer, self.spec)

    def tasks(self, tokenizer, split):
        """{task: its first `rows` rows, in a seeded order, whose prompt is within MAX_PROMPT}."""
        def fits(row):
            return len(tokenizer(row.prompt).input_ids) <= MAX_PROMPT
        return {task: list(itertools.islice(filter(fits, sum(sample(splits[split], None, 0), [])), self.rows))
                for task, splits in load_tasks(self.data).items()}

    def config(self, tasks):
        """The sizes of the toy or the write-up's, and the write-up's trunk, which is the one that portallib has."""
        return Config(tasks=list(tasks), norm="none", **preset([resolve(self.spec)[0]])["sizes"])

    def clock(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


# ---------------------------------------------------------------------------------------------- training: ours, portallib
def encode_gold(base, tasks):
    return encode(base.tokenizer, sum(tasks.values(), []), list(tasks), choices="gold")[0]


def train_ours(work, recompute=False):
    base = work.load(recompute)
    yield
    tasks = work.tasks(base.tokenizer, "train")
    items = encode_gold(base, tasks)
    portal = Portal(work.config(tasks))
    portal.converters[base.name] = Converter(portal.cfg, base.layers, base.dims)
    portal.to(work.device)
    learner, ema = portal_learner(portal, {t: (rows, []) for t, rows in tasks.items()}, ROUNDS, ROWS, 1e-3), EMA()
    while True:                                                                      # losses divided, as portallib's are
        start = work.clock()
        for _ in range(work.repeat):
            one_round([base], portal.adapters, [learner], {base.name: items}, work.max_tokens, {base.name: ema}, portal.z)
            learner.optimizer.zero_grad()
        yield work.clock() - start


def train_ours_recompute(work):
    """Ours with --recompute: less memory, more time."""
    return train_ours(work, recompute=True)


def train_floor(work):
    """What nobody gets around: the frozen base's forward and backward pass over the same micro-batches, nothing adapted."""
    base = work.load()
    yield
    items = encode_gold(base, work.tasks(base.tokenizer, "train"))
    embeddings = base.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, x: x.requires_grad_())     # so that there is a backward pass
    while True:
        start = work.clock()
        for part in micro_batches(items * work.repeat, work.max_tokens):
            batch = collate(part, base.device)
            F.cross_entropy(full_precision(base.logits(batch)), batch.target).backward()
        yield work.clock() - start


def portallib_trainer(base, tasks, cfg, clock, rounds=1, **recipe):
    """portallib's trainer for these rows. Its train() is its own code, but for what stands around a round: the
    evaluations before the first and after the last round only read the clock, and no state is copied or saved."""
    import portallib

    class Trainer(portallib.PortalCoreTrainer):
        def _evaluate(self, epoch):
            self.times = [*self.times, clock()] if epoch else [clock()]
            return portallib.EpochMetrics(epoch, {}, 0.0, 0.0)

        def _snapshot(self):
            return None

        def _artifacts(self, snapshot):
            return {}

    examples = [portallib.ChoiceExample(row.task, row.prompt, tuple(row.choices), row.gold)
                for rows in tasks.values() for row in rows]
    return Trainer([base], portallib.ChoiceDataset(examples, examples), config=portallib.PortalTrainingConfig(
        modules=tuple(cfg.modules), rank=cfg.rank, alpha=cfg.alpha, d_z=cfg.d_z, d_layer=cfg.d_e, hidden=cfg.hidden,
        d_core=cfg.d_c, epochs=1, source_steps_per_epoch=rounds, batch_size=ROWS, max_prompt=MAX_PROMPT, **recipe))


def train_portallib(work, **recipe):
    import portallib
    model, tokenizer = work.load_plain()
    yield
    tasks = work.tasks(tokenizer, "train")
    trainer = portallib_trainer(portallib.PortalBase(work.spec, model, tokenizer), tasks, work.config(tasks), work.clock,
                                work.repeat, **recipe)
    while True:
        trainer.train()
        yield trainer.times[1] - trainer.times[0]


def train_portallib_plain(work):
    """portallib again, with its gradient checkpointing (on by default) off: faster, and more memory."""
    return train_portallib(work, gradient_checkpointing=False)


# ---------------------------------------------------------------------------------------------- LoRAs: ours, PEFT
def loras_ours(work):
    base = work.load()
    yield
    tasks = work.tasks(base.tokenizer, "train")
    items, loras = encode_gold(base, tasks), TaskLoRAs(len(tasks), base)
    learners = [Learner([{"params": loras.of(t), "lr": 1e-4}], [task], 1, ROUNDS) for t, task in enumerate(tasks)]
    while True:
        start = work.clock()
        for _ in range(work.repeat):
            one_round([base], loras.adapters, learners, {base.name: items}, work.max_tokens)
            for learner in learners:
                learner.optimizer.zero_grad()
        yield work.clock() - start


def loras_peft(work):
    """An adapter a task, one after another. Choosing the adapter is not timed: in a run of its own a task does it once.
    The adapters have the base's dtype, as ours have in its forward pass."""
    import peft
    model, tokenizer = work.load_plain()
    yield
    tasks = work.tasks(tokenizer, "train")
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[f"{m}_proj" for m in MODULES], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.requires_grad_(False), lora, "0", autocast_adapter_dtype=False).train()
    for t in range(1, len(tasks)):
        model.add_adapter(str(t), lora, autocast_adapter_dtype=False)
    batches, optimizers = [], []
    for t, rows in enumerate(tasks.values()):
        items = encode(tokenizer, rows, list(tasks), choices="gold")[0]
        ids = [torch.tensor(item.prompt + item.continuations[0]) for item in items]
        labels = [torch.tensor([-100] * len(item.prompt) + item.continuations[0]) for item in items]
        batches.append({key: pad_sequence(rows, batch_first=True, padding_value=pad).to(work.device) for key, rows, pad in (
            ("input_ids", ids, 0), ("attention_mask", [torch.ones_like(i) for i in ids], 0), ("labels", labels, -100))})
        model.set_adapter(str(t))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers.append((parameters, torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)))
    while True:
        seconds = 0.0
        for t in list(range(len(tasks))) * work.repeat:
            model.set_adapter(str(t))
            start, (parameters, optimizer) = work.clock(), optimizers[t]
            optimizer.zero_grad()
            model(**batches[t], use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            seconds += work.clock() - start
        yield seconds


# ---------------------------------------------------------------------------------------------- evaluation: all three
# These yield (seconds, [(task, scores) of every row]); a score is log p / characters of a choice. Tokenising is timed.
def evaluate_ours(work):
    base = work.load()
    yield
    tasks = work.tasks(base.tokenizer, "eval")
    rows = sum(tasks.values(), [])
    while True:
        start = work.clock()
        log_p = score(base, None, encode(base.tokenizer, rows, list(tasks))[0], work.max_tokens)
        seconds = work.clock() - start
        yield seconds, [(row.task, [lp / len(c) for lp, c in zip(lps, row.choices)]) for lps, row in zip(log_p, rows)]


def evaluate_portallib(work, batch_size):
    import portallib

    class Evaluator(portallib.PortalEvaluator):                                      # which returns accuracies alone
        def _score_rows(self, base, rows):
            result = super()._score_rows(base, rows)
            self.scores += result[0]
            return result

    model, tokenizer = work.load_plain()
    yield
    base = portallib.PortalBase(work.spec, model, tokenizer)
    evaluator = Evaluator(max_prompt=MAX_PROMPT, batch_size=batch_size)
    examples = [portallib.ChoiceExample(row.task, row.prompt, tuple(row.choices), row.gold)
                for rows in work.tasks(tokenizer, "eval").values() for row in rows]
    while True:
        evaluator.scores, start = [], work.clock()
        evaluator.evaluate(base, portallib.ChoiceDataset(examples, examples))
        yield work.clock() - start, [(row.task, scores) for row, scores in zip(examples, evaluator.scores)]


def evaluate_harness(work, batch_size):
    """lm-evaluation-harness on tasks of its own form over the same rows. Building the tasks and the bootstrap of its
    standard errors are left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets, lm_eval, lm_eval.api.task, lm_eval.models.huggingface, lm_eval.tasks
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = work.load_plain()
    yield
    tasks = work.tasks(tokenizer, "eval")
    def harness_task(task, rows):
        split = datasets.Dataset.from_list([dict(prompt=r.prompt, choices=r.choices, gold=r.gold) for r in rows])
        return lm_eval.api.task.ConfigurableTask(config=dict(
            task=task, custom_dataset=lambda **_: {"test": split}, test_split="test", output_type="multiple_choice",
            doc_to_text=lambda doc: doc["prompt"], doc_to_choice=lambda doc: doc["choices"],
            doc_to_target=lambda doc: doc["gold"], target_delimiter="",
            metric_list=[dict(metric="acc_norm", aggregation="mean", higher_is_better=True)]))
    with quiet():
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        harness = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        built = [harness_task(task, rows) for task, rows in tasks.items()]
    while True:
        with quiet():
            start = work.clock()
            result = lm_eval.simple_evaluate(model=harness, tasks=built, task_manager=manager, bootstrap_iters=0)
            seconds = work.clock() - start
        yield seconds, [(task, [log_p[0] / len(c) for log_p, c in zip(answered["filtered_resps"], row.choices)])
                        for task, rows in tasks.items()
                        for answered, row in zip(sorted(result["samples"][task], key=lambda s: s["doc_id"]), rows)]


@contextlib.contextmanager
def quiet():
    """The harness draws bars and logs settings."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


# ---------------------------------------------------------------------------------------------- taking turns
def turn(contestant):
    """One turn -> (seconds, what it yielded beside them)."""
    result = next(contestant)
    return result if isinstance(result, tuple) else (result, None)


def take_turns(label, contestants):
    """{name: generator} -> TURNS times {name: turn}. A first round of turns is for warming up and does not count, but
    where each of them takes long enough (5 s) for that to make no difference."""
    taken, warm = [], False
    with tqdm(total=TURNS, desc=label, unit="turn", leave=False, disable=None) as bar:
        while len(taken) < TURNS:
            turns = {name: turn(contestant) for name, contestant in contestants.items()}
            if warm or min(seconds for seconds, _ in turns.values()) > 5:
                taken.append(turns)
                bar.update()
            warm = True
    return taken


def load(contestants):
    """-> ({name: generator, loaded}, {name: why it is missing})."""
    there, missing = {}, {}
    for name, contestant in contestants.items():
        try:
            next(contestant)
            there[name] = contestant
        except ImportError as error:
            missing[name] = first_sentence(error)
    return there, missing


def fastest(variants):
    """{setting: generator, loaded} -> (setting, generator) of the shortest turn: a peer is measured at its best."""
    seconds = {setting: turn(contestant)[0] for setting, contestant in variants.items()}
    best = min(seconds, key=seconds.get)
    return best, variants[best]


def choose_threads(peer):
    """On tiny tensors threads may wait for each other more than they work: all get the number that suits the peer best."""
    turn(peer)
    seconds = {}
    for n in (1, torch.get_num_threads()):
        torch.set_num_threads(n)
        seconds[n] = min(turn(peer)[0] for _ in range(2))
    torch.set_num_threads(min(seconds, key=seconds.get))


def memory(device):
    """Bytes now and at their peak, of this GPU or process. (Not ru_maxrss: a child's starts at its parent's peak.)"""
    if device != "cpu":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))


def peak_of(contestant, work, threads):
    """In a child: memory with the base loaded, and its peak over two turns (the second has the optimiser's state)."""
    torch.set_num_threads(threads)
    running = contestant(work)
    next(running)
    before = memory(work.device)[0]
    next(running), next(running)
    return before, memory(work.device)[1]


def peak(contestant, work):
    """peak_of in a process of its own, since a peak never goes down; None where the system does not tell."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peak_of, contestant, work, torch.get_num_threads()).result()
        except FileNotFoundError:                                                    # no /proc: not Linux
            return None


# ---------------------------------------------------------------------------------------------- the lines of the table
def compare(label, work, taken, peer, target, note, mine="ours"):
    """A line of the table: `peer` beside ours."""
    ratios = [turns[peer][0] / turns[mine][0] for turns in taken]
    ours, theirs = ([turns[name][0] / work.repeat for turns in taken] for name in (mine, peer))
    return dict(work=label + mine.removeprefix("ours"), peer=peer, ours_s=statistics.median(ours), peer_s=statistics.median(theirs), ours_turns=ours,
                peer_turns=theirs, ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
                target=None if peer == FLOOR else target, note=note, threads=torch.get_num_threads(), rows_a_task=work.rows, rounds_a_turn=work.repeat,
                base=pathlib.Path(work.spec).name, device=work.device, dtype=str(work.dtype).split(".")[1], max_tokens=work.max_tokens)


def training(label, work, ours, peers, target, note, with_memory=False):
    """Lines for `ours` beside `peers`, {name: contestant} each."""
    running, missing = load({name: contestant(work) for name, contestant in {**ours, **peers}.items()})
    if work.repeat > 1 and len(running) > len(ours):
        choose_threads(list(running.values())[-1])
    taken = take_turns(label, running) if len(running) > len(ours) else []
    names = list(running)
    running.clear()                                                                  # frees the bases
    peaks = {name: peak({**ours, **peers}[name], work) for name in names if with_memory and taken}
    for mine, name in itertools.product(ours, peers):
        if name in missing:
            yield dict(work=label, peer=name, target=target, not_measured=missing[name])
            continue
        line = compare(label, work, taken, name, target, note, mine)
        if peaks.get(mine) and peaks.get(name):
            line.update({f"{who}_{what}": value for who, two in (("ours", peaks[mine]), ("peer", peaks[name]))
                         for what, value in zip(("loaded_bytes", "peak_bytes"), two)})
        yield line


def evaluation(label, work):
    """Lines for evaluation, with the rows on which a peer would choose otherwise."""
    running, missing = load({"ours": evaluate_ours(work)})
    for name, contestant in (("portallib", evaluate_portallib), ("lm-evaluation-harness", evaluate_harness)):
        variants, why = load({batch: contestant(work, batch) for batch in BATCHES[torch.device(work.device).type]})
        if variants:
            batch, running[name] = fastest(variants)
            running[f"{name}, batch {batch}"] = running.pop(name)
        else:
            missing[name] = list(why.values())[0]
    taken = take_turns(label, running) if len(running) > 1 else []
    for name in list(running)[1:]:
        pairs = list(zip(taken[-1]["ours"][1], taken[-1][name][1], strict=True))
        differ = [dict(task=task, number=k, ours=a, peer=b) for k, ((task, a), (_, b)) in enumerate(pairs)
                  if a.index(max(a)) != b.index(max(b))]
        furthest = max(abs(x - y) for (_, a), (_, b) in pairs for x, y in zip(a, b))
        note = f"same choice on {len(pairs) - len(differ)} of {len(pairs)} rows; scores differ by at most {furthest:.1e}"
        yield dict(compare(label, work, taken, name, 2.5 if "portallib" in name else 2.0, note), differ=differ)
    for name, why in missing.items():
        yield dict(work=label, peer=name, target=None, not_measured=why)


FLOOR = "the frozen base alone"    # not a peer: what of our time is not ours
PORTAL = "core without LayerNorm, sizes, gradient clip, AdamW; portallib tokenises in every round, ours before the first"
PEFT = "rank 16, all seven projections, gradient clip, fused AdamW"


def plan(args):
    """The lines of the table in order: (label, generator of lines)."""
    cuda = args.device != "cpu"
    toy = Work("toy-qwen-m", ROOT / "toy" / "data", args.device, args.dtype, preset(["toy-qwen-m"])["max_tokens"], repeat=3)
    real = Work(args.gpu_base if cuda else args.base, args.data, args.device, args.dtype,
                args.max_tokens or preset([])["max_tokens"], rows=ROWS // 2 if args.quick and not cuda else ROWS)
    portallib, more = {"portallib": train_portallib}, {"portallib, its checkpointing off": train_portallib_plain}
    peft = {"PEFT": loras_peft}
    def line(what, work, lines, *rest):
        label = f"{what}, {pathlib.Path(work.spec).name}"
        return label, lines(label, work, *rest)
    yield line("training round", toy, training, {"ours": train_ours}, {**portallib, **more}, 5.0, PORTAL)
    yield line("training round", real, training, {"ours": train_ours, "ours, --recompute": train_ours_recompute},
               {**portallib, **({} if args.quick else more), FLOOR: train_floor}, 4.0 if cuda else 1.5, PORTAL, True)
    if not cuda:
        label = f"training round, {args.gpu_base}, bfloat16 on a GPU"
        yield label, iter([dict(work=label, peer="portallib", target=4.0, not_measured="this run is on a CPU")])
    yield line("LoRA round", toy, training, {"ours": loras_ours}, peft, 4.0, PEFT)
    yield line("LoRA round", real, training, {"ours": loras_ours}, peft, 4.0 if cuda else 1.3, PEFT, cuda)
    yield line("evaluation", real._replace(rows=EVAL_ROWS[args.quick]), evaluation)


# ---------------------------------------------------------------------------------------------- the report
def cells(line):
    """A line of the table as text."""
    target = f">= {line['target']}" if line["target"] else "-"
    if "not_measured" in line:
        return [line["work"], "-", line["peer"], "-", "not measured: " + line["not_measured"], target, "-", "-"]
    gib, used = 2 ** 30, "-"
    if "ours_peak_bytes" in line:
        ours, peer = (line[f"{who}_peak_bytes"] - line[f"{who}_loaded_bytes"] for who in ("ours", "peer"))
        used = (f"ours {ours / gib:.2f} GiB, peer {peer / gib:.2f} ({ours / peer:.2f}x) above the loaded base; in all "
                f"{line['ours_peak_bytes'] / gib:.2f}, {line['peer_peak_bytes'] / gib:.2f}")
    ratio = f"{line['ratio']:.2f} [{line['ratio_min']:.2f}..{line['ratio_max']:.2f}]"
    return [line["work"], f"{line['ours_s']:.3g}", line["peer"], f"{line['peer_s']:.3g}", ratio, target, used,
            f"threads {line['threads']}, {line['dtype']}, the same {line['rows_a_task']} rows a task and their tokens; "
            f"{line['note']} (ours: --max-tokens {line['max_tokens']})"]


def write_report(path, lines, args, threads):
    """<path>.jsonl, a line a comparison, and <path>.md, the table."""
    peers = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "portallib", "peft", "lm_eval") if
                      importlib.util.find_spec(p))
    head = dict(hardware=hardware(), threads=threads, peers=peers, date=today(),
                command=shlex.join(["python", "bench.py", *(os.path.basename(a) or a for a in sys.argv[1:])]))
    table = [["work", "ours, s", "peer", "peer, s", "peer / ours [min..max]", "target", "peak memory", "held equal"]]
    table += [["---"] * 8] + [cells(line) for line in lines]
    differ = [f"- {line['work']}, {line['peer']}: row {d['number']} ({d['task']}): ours {d['ours']}, peer {d['peer']}"
              for line in lines for d in line.get("differ", ())]
    text = [f"# Benchmark on {args.device}", "", *(f"- {key}: {value}" for key, value in head.items()), "",
            f"Seconds: median of {TURNS} turns, taken in alternation. A ratio is that of two neighbouring turns.", "",
            *("| " + " | ".join(row) + " |" for row in table), "", "Rows with another choice:", "", *(differ or ["none"])]
    write_whole(path.with_suffix(".md"), lambda p: p.write_text("\n".join(text) + "\n"))
    rows = "".join(json.dumps({**head, **line}) + "\n" for line in lines)
    write_whole(path.with_suffix(".jsonl"), lambda p: p.write_text(rows))


def main(argv=None):
    args = parse(__doc__, "quick data base gpu-base device dtype max-tokens out", argv,
                 quick=dict(action="store_true", help="on the real base half the rows of a round, few of evaluation, and "
                                                      "portallib as it comes only"),
                 data=dict(default=ROOT / "data"),
                 base=dict(default="smollm2-135m", metavar="A", help="the real base on a CPU"),
                 gpu_base=dict(default="qwen2.5-coder-0.5b", metavar="A", help="the real base on a GPU"),
                 out=dict(type=pathlib.Path, default=ROOT / "results", metavar="DIR", help="where the table goes"))
    threads, lines = torch.get_num_threads(), []
    path = args.out / f"bench-{torch.device(args.device).type}.md"
    for label, group in plan(args):
        print(f"{label} ...", flush=True)
        torch.set_num_threads(threads)
        before = len(lines)
        try:
            for line in group:
                lines.append(line)
        except (BadInput, OSError) as error:                                         # no tasks here, no such base
            lines.append(dict(work=label, peer="-", target=None, not_measured=first_sentence(error)))
        for line in lines[before:]:
            print("  " + " | ".join(cells(line)[1:]), flush=True)
        write_report(path, lines, args, threads)
    print(f"table: {path}")


if __name__ == "__main__":
    run_main(main)
