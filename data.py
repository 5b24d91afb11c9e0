"""Tasks: the JSONL format, tokens, and batches that mix the rows of all tasks.

A task is a folder, <data>/<task>/train.jsonl and eval.jsonl. Its rows are all choices or all open completions:

    {"task": "rte", "prompt": "...\\nAnswer:", "choices": [" True", " False"], "gold_idx": 0}
    {"task": "capital", "prompt": "France's capital is", "completion": " Paris"}

The white space after a prompt belongs to what follows: tokenizers join it to the next word (tokens.py).

    python data.py --out data/                        builds the write-up's 14 benchmarks from the hub, in this form
    python data.py --check data/ --bases qwen3-1.7b   lists what a folder holds and what is wrong with it
"""
import json, pathlib, random, runpy, unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from runtime.files import BadInput
from tokens import MAX_LENGTH, Item, encode


class Row(NamedTuple):
    """One line of a task's file. A completion is stored as the gold one of a single choice."""
    task: str
    prompt: str
    choices: list
    gold: int = 0
    weights = None  # no field: see SoftRow

    @property
    def open(self):
        return len(self.choices) == 1

    @property
    def kind(self):
        return "a completion" if self.open else "choices"


class SoftRow(NamedTuple):
    """A row that nobody has labelled: weights are a teacher's probabilities of the choices, gold its choice."""
    task: str
    prompt: str
    choices: list
    gold: int
    weights: tuple
    open = False


INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u061c\u200b\u200e\u200f\u2060\ufeff"))  # a joiner changes what one sees


def visible(text):
    return text.translate(INVISIBLE)


def as_read(text):
    """Return a text as a person reads it: visible, in NFC, its white space collapsed and stripped."""
    return " ".join(unicodedata.normalize("NFC", visible(text)).split())


def twins(choices, k):
    """Return the indices of the other choices that a person reads as the same text as choice k."""
    return [other for other, text in enumerate(choices) if other != k and as_read(text) == as_read(choices[k])]


def stop(problem):
    raise BadInput(problem)


def unique(pairs):
    """Return a JSON object, for json's object_pairs_hook. Raises BadInput for a key that stands twice."""
    for key, n in Counter(key for key, _ in pairs).items():
        if n > 1:
            raise BadInput(f"the key {key!r} stands {n} times in one object")
    return dict(pairs)


def not_a_number(name):
    raise BadInput(f"{name} is not JSON")


def read_line(line, task):
    """Return (Row, []) for one line (bytes) of a task's file, or (None, everything that is wrong with it)."""
    try:
        text = line.decode("utf-8-sig")                                              # with a byte-order mark or without
        row = json.loads(text, object_pairs_hook=unique, parse_constant=not_a_number)
        json.dumps(row, ensure_ascii=False).encode()                                 # half a surrogate pair is not text
    except BadInput as error:
        return None, [str(error)]
    except (ValueError, RecursionError):
        return None, ['not JSON in UTF-8; a line is an object such as {"prompt": "2 + 2 =", "completion": " 4"}']
    needed = {"prompt", "completion"}, {"prompt", "choices", "gold_idx"}
    if not isinstance(row, dict) or not any(row.keys() >= keys for keys in needed):
        return None, ["prompt, choices and gold_idx are needed, or prompt and completion"]
    def blank(text):
        return not isinstance(text, str) or not as_read(text)
    prompt, is_open = row["prompt"], "completion" in row
    choices, gold = ([row["completion"]], 0) if is_open else (row["choices"], row["gold_idx"])
    if not (is_open or isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)):
        choices = []
    name = "the completion" if is_open else "choice {}"
    checks = [
        (row.get("task", task) != task, f"task is {row.get('task')!r} in the folder of {task!r}"),
        (blank(prompt), "the prompt is empty"),
        (not blank(prompt) and visible(prompt)[-1].isspace(),
         "the prompt ends in white space; put it before what follows"),
        (is_open and row.keys() & {"choices", "gold_idx"}, "a row has choices and gold_idx or a completion, not both"),
        (not choices, "choices must be a list of two or more strings"),
        *((blank(choice), f"{name.format(k)} is empty or blank") for k, choice in enumerate(choices)),
        (choices and not (type(gold) is int and 0 <= gold < len(choices)),           # True is an int, too
         f"gold_idx is {gold!r}; 0 to {len(choices) - 1} is accepted")]
    wrong = [why for failed, why in checks if failed]
    wrong = wrong or [f"choice {k} reads the same as the gold choice" for k in twins(choices, gold)]
    return (None if wrong else Row(task, prompt, choices, gold)), wrong


def read_rows(path, task, report=stop):
    """Return the good rows of one JSONL file, and call report("file:line: why") for each problem: training stops at the
    first one, --check collects them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        report(f"{path}: not readable ({error})")
        return []
    if b"\0" in content[:4]:                                                         # { is two or four bytes there
        report(f"{path}: not in UTF-8 but in UTF-16 or UTF-32; save it as UTF-8")
        return []
    rows = []
    for number, line in enumerate(content.rstrip().splitlines(), 1):                 # bytes: at \n, \r and \r\n alone
        row, wrong = read_line(line, task)
        if row and rows and row.open != rows[0].open:
            wrong = [f"{row.kind} in a file that starts with {rows[0].kind}; a task is all one or all the other"]
        for why in wrong:
            report(f"{path}:{number}: {why}")
        if not wrong:
            rows.append(row)
    if not rows:
        report(f"{path}: task {task!r} has no {'training' if path.stem == 'train' else 'evaluation'} rows")
    return rows


def load_tasks(folder, tasks=None, report=stop):
    """Return {task: {"train": [Row], "eval": [Row]}} of a data folder: the tasks named, or all of them, sorted."""
    found = sorted({p.parent.name for p in folder.glob("*/*.jsonl") if p.stem in ("train", "eval")})
    if not found:
        raise BadInput(f"{folder}: no tasks here; a task is a folder <task>/ with train.jsonl and eval.jsonl")
    for task in tasks or ():
        if task not in found:
            raise BadInput(f"unknown task {task!r}; {folder} holds {', '.join(found)}")
    data = {}
    for task in tasks or found:
        data[task] = {split: read_rows(folder / task / f"{split}.jsonl", task, report) for split in ("train", "eval")}
        train, evaluation = data[task].values()
        if train and evaluation and train[0].open != evaluation[0].open:
            report(f"{folder / task}/eval.jsonl:1: {evaluation[0].kind} here, {train[0].kind} in train.jsonl")
    return data


def load_run_tasks(saved, folder):
    """Return the tasks of a run (`saved`: its portal.json) in its order: those trained together, from `folder`, then
    each task added later (train.py --add-task), from its own folder."""
    added = saved.get("added", {})
    data = load_tasks(folder, [task for task in saved["config"]["tasks"] if task not in added])
    for task, how in added.items():
        data |= load_tasks(pathlib.Path(how["folder"]).parent, [task])
    return data


def sample(rows, n, seed):
    """Return a seeded random sample of n rows as (rows to train on, rows held out to select the epoch).
    It is the first n of one permutation for each task and seed, so a smaller sample is part of a larger one. A tenth is
    held out, at least one row and at most 100; of a single row none, and the last epoch is then selected."""
    order = list(rows)
    random.Random(f"{seed}/{order[0].task}").shuffle(order)
    order = order[:n]
    held = min(100, max(len(order) // 10, len(order) > 1))
    return order[held:], order[:held]


class Batch(NamedTuple):
    """R rows of any tasks, padded on the right to S tokens. Logits are needed at N positions, for M answer tokens."""
    items: list
    task: torch.Tensor        # [R] the task of each row
    ids: torch.Tensor         # [R, S]
    positions: torch.Tensor   # [R, S] position ids: every continuation starts where the prompt ends
    segments: torch.Tensor    # [R, S] 0 prompt, 1, 2, ... continuations, -1 padding; None where no row has two of them
    at: tuple                 # (rows [N], columns [N]) of the positions whose logits are needed
    source: torch.Tensor      # [M] which of the N positions predicts an answer token
    target: torch.Tensor      # [M] that token
    owner: torch.Tensor       # [M] the continuation it belongs to, counted over the batch
    row: torch.Tensor         # [M] the row it belongs to


def collate(items, device="cpu"):
    """Return the Batch of `items`. A row is its prompt, once, then all of its continuations; a mask (Base.masks) keeps
    these apart. The prompt's last position predicts the first token of each, so its logits are computed once."""
    width = max(item.length() for item in items)
    inputs, at, source = [], [], []                                                  # [R][S] (token, position, segment)
    for r, item in enumerate(items):
        P, fork = len(item.prompt), len(at)
        own = [(token, p, 0) for p, token in enumerate(item.prompt)]
        at.append((r, P - 1))
        for k, tokens in enumerate(item.continuations, 1):
            n = len(tokens) - 1
            source += [fork, *range(len(at), len(at) + n)]
            at += [(r, column) for column in range(len(own), len(own) + n)]
            own += [(token, P + i, k) for i, token in enumerate(tokens[:-1])]
        inputs.append(own + [(0, 0, -1)] * (width - len(own)))
    ids, positions, segments = np.array(inputs).transpose(2, 0, 1)                   # [R, S] each
    answers = [tokens for item in items for tokens in item.continuations]
    rows, columns = np.array(at).T                                                   # [N] each
    single = all(item.single() for item in items)
    def tensor(values):                                                          # np.array converts nested lists faster
        return to_device(torch.from_numpy(np.ascontiguousarray(values)), device)
    return Batch(items, tensor([item.task for item in items]), tensor(ids), tensor(positions),
                 None if single else tensor(segments), (tensor(rows), tensor(columns)), tensor(source),
                 target=tensor([token for tokens in answers for token in tokens]),
                 owner=tensor([k for k, tokens in enumerate(answers) for _ in tokens]), row=tensor(rows[source]))


def to_device(tensor, device):
    """Return a copy on `device` without making the host wait for the GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


PASS = 64  # what one more forward and backward pass costs, in tokens


def micro_batches(items, max_tokens):
    """Return `items` of any tasks, sorted by length and cut into lists of at most max_tokens tokens, padding included.
    A longer item is a list of its own.

    Few lists need much padding, and no padding needs a pass for every length. The cheapest cut of the first j items
    ends in some list i..j, so best(j) = min over i of best(i) + (j - i) * length(i) + PASS."""
    items = sorted(items, key=Item.length, reverse=True)
    lengths = [item.length() for item in items]
    best = [(0, 0)]                                                                  # j: cost, start of the last list
    for j in range(1, len(items) + 1):
        first = max(0, j - max(1, max_tokens // lengths[j - 1]))
        best.append(min((best[i][0] + (j - i) * lengths[i] + PASS, i) for i in range(first, j)
                        if i == j - 1 or (j - i) * lengths[i] <= max_tokens))
    parts, j = [], len(items)
    while j:
        parts, j = [items[best[j][1]:j], *parts], best[j][1]
    return parts                                                         # longest first: a lack of memory shows at once


def print_fewer(data, n):
    """Prints which tasks of `data` (load_tasks) have fewer than n training rows, all of which are then taken."""
    fewer = [f"{task} ({len(splits['train'])})" for task, splits in data.items() if len(splits["train"]) < n]
    if fewer:
        print(f"n = {n}, but fewer rows in {', '.join(fewer)}: all of these are taken")


class Cycle:
    """Endless batches of one task: passes over its items, each in a new seeded order."""

    def __init__(self, items, size, seed):
        self.items, self.size, self.random, self.left = items, size, random.Random(seed), []

    def next(self):
        self.left = self.left or self.random.sample(self.items, len(self.items))
        batch, self.left = self.left[:self.size], self.left[self.size:]
        return batch


class Rounds:
    """The training batches of every task on every base, and the held-out rows.
    rows {task: (train rows, held-out rows)} -> cycles {(base name, task): Cycle} and held {base name: [Item]}, with all
    choices. A task's order of rows depends on seed, base and task alone. cut: how many training prompts were cut."""

    def __init__(self, bases, rows, batch_size, seed):
        self.tasks, self.cycles, self.held, self.cut = list(rows), {}, {}, 0
        held = [row for _, held_out in rows.values() for row in held_out]
        for base in bases:
            for task, (train, _) in rows.items():
                items, cut = encode(base.tokenizer, train, self.tasks, choices="gold")
                self.cycles[base.name, task] = Cycle(items, batch_size, f"{seed}/{base.name}/{task}")
                self.cut += cut
            self.held[base.name] = encode(base.tokenizer, held, self.tasks)[0]
        if self.cut:
            total = sum(len(cycle.items) for cycle in self.cycles.values())
            print(f"{self.cut} of {total} training prompts were cut from the left")

    def take(self, tasks):
        """Return {base name: [Item]}, the next `batch_size` items of each of `tasks`."""
        return {name: [item for task in tasks for item in self.cycles[name, task].next()] for name in self.held}

    def skip(self, task, count):
        """Take `count` batches of `task` on every base, so that a resumed fit goes on in the seed's order."""
        for _ in range(count):
            self.take([task])


if __name__ == "__main__":                        # the command is in benchmarks.py, which imports this file
    runpy.run_module("benchmarks", run_name="__main__")
