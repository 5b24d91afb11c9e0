"""Benchmark: this project beside its peers, the same work turn by turn in one process.

    python bench.py --data data --base smollm2-135m            everything, CPU
    python bench.py --quick --data data --base smollm2-135m    the same rows of the table, fewer evaluation rows
    python bench.py --device cuda --data data                  bf16, on --gpu-base instead of --base

    training     one round of PorTAL: 4 rows of every task on one base     beside portallib 0.2.1
    LoRAs        one round of T per-task LoRAs, 4 rows each                beside PEFT
    evaluation   the log-probability of every choice on the bare base      beside portallib and lm-evaluation-harness

A contestant is a generator: the first next() loads its base, every other one does the work once and yields the seconds.
After one untimed turn each, they take turns; a ratio is peer / ours of one turn, and the table has the median of all.
Needs requirements-bench.txt; where a peer, the tasks or the base are missing, the table says "not measured" and why.
"""
import contextlib, importlib.metadata, io, itertools, json, logging, multiprocessing, os, pathlib, re, statistics, sys, time
import concurrent.futures
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.lora import ALPHA, RANK, TaskLoRAs
from bases import load_base, resolve
from cli import ROOT, BadInput, first_sentence, parse, run_main, today, write_whole
from data import encode, load_tasks, sample
from eval import hardware, score
from portal import MODULES, Config, Converter, Portal
from train import EMA, Learner, portal_learner, preset, task_gradients

MAX_PROMPT = 768                  # portallib cuts longer prompts; nobody gets one
ROWS = 4                          # rows of every task in a training round
TURNS = 5
LONG = 100_000                    # rounds of a schedule that never ends here


class Work(NamedTuple):
    """What all contestants of a line of the table share."""
    spec: str                     # the base
    data: pathlib.Path            # the folder of tasks
    device: str
    dtype: torch.dtype
    max_tokens: int               # ours: of a micro-batch
    rows: int = ROWS              # of every task
    repeat: int = 1               # how often the work is done in a turn (tiny bases: once is too short to time)

    def load(self):
        return load_base(self.spec, self.device, self.dtype)

    def load_plain(self):
        """The base as transformers loads it, for the peers: (model, tokenizer)."""
        _, where, revision, gguf = resolve(self.spec)
        options = {"revision": revision, **({"gguf_file": gguf} if gguf else {})}
        model = AutoModelForCausalLM.from_pretrained(where, dtype=self.dtype, **options)
        return model.to(self.device).eval(), AutoTokenizer.from_pretrained(where, **options)

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
def one_round(base, generate, learners, items, max_tokens, ema=None):
    """What train.fit does in a round on one base (on one base, balancing the gradients on z changes nothing)."""
    for learner in learners:
        learner.optimizer.zero_grad()
    adapters = generate(base.name)
    losses, gradients = task_gradients(base, adapters, items, max_tokens)
    if ema:
        weights = ema.weights(losses).view(-1, 1, 1, 1)                              # [T, 1, 1, 1]
        gradients = [weights * g for g in gradients]
    torch.autograd.backward(adapters.tensors(), gradients)
    for learner in learners:
        learner.step()
    return losses


def encode_gold(base, tasks):
    return encode(base.tokenizer, sum(tasks.values(), []), list(tasks), choices="gold")[0]


def train_ours(work):
    base = work.load()
    yield
    tasks = work.tasks(base.tokenizer, "train")
    items = encode_gold(base, tasks)
    portal = Portal(work.config(tasks))
    portal.converters[base.name] = Converter(portal.cfg, base.layers, base.dims)
    portal.to(work.device)
    learner, ema = portal_learner(portal, {t: (rows, []) for t, rows in tasks.items()}, LONG, ROWS, 1e-3), EMA()
    while True:
        start = work.clock()
        for _ in range(work.repeat):
            one_round(base, portal.adapters, [learner], items, work.max_tokens, ema)
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
    learners = [Learner([{"params": loras.of(t), "lr": 1e-4}], [task], 1, LONG) for t, task in enumerate(tasks)]
    while True:
        start = work.clock()
        for _ in range(work.repeat):
            one_round(base, loras.adapters, learners, items, work.max_tokens)
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
# These yield (seconds, scores): for every row log p / characters of each choice. Tokenising is timed.
def evaluate_ours(work):
    base = work.load()
    yield
    tasks = work.tasks(base.tokenizer, "eval")
    rows = sum(tasks.values(), [])
    while True:
        start = work.clock()
        log_p = score(base, None, encode(base.tokenizer, rows, list(tasks))[0], work.max_tokens)
        seconds = work.clock() - start
        yield seconds, [[lp / len(choice) for lp, choice in zip(lps, row.choices)] for lps, row in zip(log_p, rows)]


def evaluate_portallib(work, batch_size):
    import portallib

    class Evaluator(portallib.PortalEvaluator):                                      # which returns accuracies alone
        def _score_rows(self, base, rows):
            result = super()._score_rows(base, rows)
            self.scores += result[0]
            return result

    model, tokenizer = work.load_plain()
    yield
    base, evaluator = portallib.PortalBase(work.spec, model, tokenizer), Evaluator(max_prompt=MAX_PROMPT, batch_size=batch_size)
    examples = [portallib.ChoiceExample(row.task, row.prompt, tuple(row.choices), row.gold)
                for rows in work.tasks(tokenizer, "eval").values() for row in rows]
    while True:
        evaluator.scores, start = [], work.clock()
        evaluator.evaluate(base, portallib.ChoiceDataset(examples, examples))
        yield work.clock() - start, evaluator.scores


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
        yield seconds, [[log_p[0] / len(choice) for log_p, choice in zip(sample["filtered_resps"], row.choices)]
                        for task, rows in tasks.items()
                        for sample, row in zip(sorted(result["samples"][task], key=lambda s: s["doc_id"]), rows)]


@contextlib.contextmanager
def quiet():
    """The harness draws bars and logs settings."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
