"""What experiments/peers.py measures: a round of training, of LoRAs, and an evaluation, as each project does it.

    training      train_ours, train_portallib; train_floor: the cost common to all methods, the frozen base alone
    LoRAs         loras_ours, loras_peft
    evaluation    evaluate_ours, evaluate_portallib, evaluate_harness (lm-evaluation-harness)
"""
import contextlib, dataclasses, io, itertools, logging, os
import pathlib, time
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from baselines.lora import ALPHA, RANK, TaskLoRAs
from bases import encode, load_base
from data import collate, micro_batches
from portal import MODULES, Config, Converter, Portal
from presets import preset
from score import full_precision, per_character, score
from tasks.rows import load_tasks, sample
from experiments.ablations import EMA
from train import Learner, one_round, portal_learner

MAX_PROMPT = 768                  # tokens; portallib cuts longer prompts, so rows with one are left out for all
ROWS, ROUNDS = 4, 10_000          # rows of every task in a round; rounds of the learning rate's schedule, never reached
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
    portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
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
