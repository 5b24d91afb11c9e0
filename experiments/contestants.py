"""What experiments/peers.py measures, as each project does it. A contestant(work, base, tasks) returns a turn: a
function that does the work and returns (seconds, result). A package that is missing raises ImportError.

    training      train_ours, train_portallib
    evaluation    evaluate_ours, evaluate_harness (lm-evaluation-harness)
    exact match   exact_ours, exact_harness; portallib has no decoding
"""
import dataclasses, logging, pathlib, time
from functools import partial

import torch

from bases import MAX_LENGTH, decoding_limit, encode, load_base
from portal import Config, Converter, Portal
from presets import preset
from score import decode, evaluate, golds, per_character, reads_as, score
from tasks.rows import load_tasks, sample
from train import one_round, portal_learner

ROWS, ROUNDS = 4, 10_000          # rows of every task in a round; rounds of the learning rate's schedule, never reached
BATCHES = {"cpu": (4, 8), "cuda": (8, 32, 128)}  # rows in a peer's batch in evaluation: the fastest counts
TOGETHER = {"cpu": 16, "cuda": 64}               # prompts that lm-evaluation-harness decodes at once


@dataclasses.dataclass
class Work:
    """What the contestants of a line of the table share."""
    spec: str                     # the base
    data: pathlib.Path            # the folder of tasks
    device: str
    dtype: torch.dtype
    max_tokens: int               # of a micro-batch, in ours
    split: str = "train"
    rows: int = ROWS              # of every task
    repeat: int = 1               # how often a turn does the work: on a tiny base, once is too short to time

    def load(self):
        """Returns (Base, {task: its first `rows` rows in a seeded order})."""
        return load_base(self.spec, self.device, self.dtype), {
            task: sum(sample(own[self.split], self.rows, 0), []) for task, own in load_tasks(self.data).items()}

    def clock(self):
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def timed(self, step):
        """Returns the turn that runs `step` `repeat` times: (seconds of each, the last result)."""
        def turn():
            start = self.clock()
            for _ in range(self.repeat):
                result = step()
            return (self.clock() - start) / self.repeat, result
        return turn


# ---------------------------------------------------------------------------------------------- training
class EMA:
    """A `weigh` for one_round: divides each (base, task) loss by its running mean, 0.9 / 0.1, never by less than 1e-3
    (the write-up's section 4), as portallib does."""

    def __init__(self):
        self.means = {}                                                              # {base name: [T]}

    def __call__(self, base, losses, gradients):
        self.means[base] = 0.9 * self.means[base] + 0.1 * losses if base in self.means else losses.clone()
        weights = (1 / self.means[base].clamp(min=1e-3)).view(-1, 1, 1, 1)           # [T, 1, 1, 1]
        return [weights * g for g in gradients]


def config(base, tasks):
    """The sizes of the toy or the write-up's, and the write-up's trunk, the only one that portallib has."""
    return Config(tasks=list(tasks), norm="none", **preset([base.name])["sizes"])


def gold_items(tokenizer, tasks):
    return encode(tokenizer, sum(tasks.values(), []), list(tasks), choices="gold")[0]


def train_ours(work, base, tasks):
    items, portal, ema = {base.name: gold_items(base.tokenizer, tasks)}, Portal(config(base, tasks)), EMA()
    portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    learner = portal_learner(portal.to(work.device), {task: (rows, []) for task, rows in tasks.items()},
                             dict(epochs=ROUNDS, batch_size=ROWS, lr=1e-3, least=1))
    return work.timed(lambda: one_round([base], portal.adapters, [learner], items, work.max_tokens, ema))


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
        d_core=cfg.d_c, epochs=1, source_steps_per_epoch=rounds, batch_size=ROWS, max_prompt=MAX_LENGTH, **recipe))
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
        return (trainer.times[-1] - trainer.times[-2]) / work.repeat, None
    return turn


# ---------------------------------------------------------------------------------------------- evaluation
# A result is the scores of every row, lists of log p / characters of its choices. Tokenising is timed.
def evaluate_ours(work, base, tasks):
    def step():
        items = encode(base.tokenizer, sum(tasks.values(), []), list(tasks))[0]
        return [per_character(item, log_p) for item, log_p in zip(items, score(base, None, items, work.max_tokens))]
    return work.timed(step)


def harness(base, batch_size=1):
    """Returns lm-evaluation-harness's model. `base` cannot be used afterwards."""
    from lm_eval.models.huggingface import HFLM
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=base.unpatch(), tokenizer=base.tokenizer, batch_size=batch_size)


def requests(kind, every):
    """Returns lm-evaluation-harness's requests with the arguments `every`."""
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, arguments, k) for k, arguments in enumerate(every)]


def evaluate_harness(work, base, tasks):
    model, rows = harness(base), sum(tasks.values(), [])
    asked = requests("loglikelihood", [(row.prompt, choice) for row in rows for choice in row.choices])
    def step(batch_size):
        model.batch_size_per_gpu = batch_size
        log_p = iter(model.loglikelihood(asked, disable_tqdm=True))
        return [[next(log_p)[0] / len(choice) for choice in row.choices] for row in rows]
    turns = [work.timed(partial(step, n)) for n in BATCHES[torch.device(work.device).type]]
    return min(turns, key=lambda turn: turn()[0])


# ---------------------------------------------------------------------------------------------- exact match
# A result is [whether a row is an exact match]. Encoding the prompts is timed.
def completions(base, tasks):
    """Returns the items of the tasks of completions, and the function that makes a result of their texts. The harness
    decodes from the whole prompt, also where an item's ends before it."""
    rows = [row for own in tasks.values() for row in own if row.open]
    items = encode(base.tokenizer, rows, list(tasks))[0]
    return items, lambda texts, whole=False: [
        reads_as(text, [*golds(base.tokenizer, item), *(item.row.choices if whole else ())])
        for item, text in zip(items, texts, strict=True)]


def exact_ours(work, base, tasks, every=False):
    """As evaluation does it: it scores the completions, which it reports, too, and decodes what that does not settle.
    every: decodes all rows and scores none."""
    items, result = completions(base, tasks)
    def step():
        again = encode(base.tokenizer, [item.row for item in items], list(tasks))[0]
        if every:
            return result(decode(base, None, again, work.max_tokens))
        cells = evaluate(base, None, again, work.max_tokens)                         # items, too, are a task's in turn
        return [right for cell in cells.values() for right in cell["correct"]]
    return work.timed(step)


def exact_harness(work, base, tasks):
    """Until a new line, with as many tokens at the most as decoding the task's longest completion takes."""
    (items, result), limit = completions(base, tasks), {}
    for item in items:
        limit[item.task] = max(decoding_limit(item.continuations[0]), limit.get(item.task, 0))
    model = harness(base, TOGETHER[torch.device(work.device).type])
    asked = requests("generate_until", [
        (item.row.prompt, dict(until=["\n"], do_sample=False, max_gen_toks=limit[item.task])) for item in items])
    return work.timed(lambda: result(model.generate_until(asked, disable_tqdm=True), True))
