"""A row of a task and the JSONL format.

A task is a folder, <data>/<task>/train.jsonl and eval.jsonl. Its rows are all choices or all open completions:

    {"task": "rte", "prompt": "...\\nAnswer:", "choices": [" True", " False"], "gold_idx": 0}
    {"task": "capital", "prompt": "France's capital is", "completion": " Paris"}

The white space after a prompt belongs to what follows: tokenizers join it to the next word (bases/tokens.py).
"""
import json, pathlib, random, unicodedata
from collections import Counter
from typing import NamedTuple

from runtime.files import PLAIN, BadInput, as_nfc, plain, unreadable
from runtime.resume import digests_of


class Row(NamedTuple):
    """One line of a task's file. A completion is stored as the gold one of a single choice."""
    task: str
    prompt: str
    choices: list
    gold: int = 0
    weights = None    # no field: see SoftRow
    held_out = False  # no field: see NewWording

    @property
    def open(self):
        return len(self.choices) == 1

    @property
    def kind(self):
        return "a completion" if self.open else "choices"


class NewWording(Row):
    """An evaluation row that says "held_out": true, because the training rows have no such wording."""
    held_out = True


class SoftRow(NamedTuple):
    """A row that nobody has labelled: weights are a teacher's probabilities of the choices, gold its choice."""
    task: str
    prompt: str
    choices: list
    gold: int
    weights: tuple
    open = held_out = False


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
    prompt, is_open, own = row["prompt"], "completion" in row, row.get("task", task)
    choices, gold = ([row["completion"]], 0) if is_open else (row["choices"], row["gold_idx"])
    if not (is_open or isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)):
        choices = []
    name = "the completion" if is_open else "choice {}"
    checks = [
        (not (isinstance(own, str) and named(own, [task])), f"task is {own!r} in the folder of {task!r}"),
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
    kind = NewWording if row.get("held_out") is True else Row
    return (None if wrong else kind(task, prompt, choices, gold)), wrong


def read_rows(path, task, report=stop):
    """Return the good rows of one JSONL file, and call report("file:line: why") for each problem: training stops at the
    first one, --check collects them."""
    if why := unreadable(path):
        report(f"{path}: not readable: {why}")
        return []
    content = path.read_bytes()
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


def named(task, names):
    """Return the one of `names` that is `task` in any of Unicode's normal forms, or None."""
    return task if task in names else next((name for name in names if as_nfc(name) == as_nfc(task)), None)


def load_tasks(folder, tasks=None, report=stop, splits=("train", "eval")):
    """Return {task: {"train": [Row], "eval": [Row]}} of a data folder, or of one of the splits: the tasks named, or all
    of them, sorted. A task has its folder's name, in Unicode's normal form C unless it is named in another."""
    found = sorted({p.parent.name for p in folder.glob("*/*.jsonl") if p.stem in ("train", "eval")})
    if not found:
        raise BadInput(f"{folder}: no tasks here{'' if folder.is_dir() else ', as there is no such folder'}; a task is "
                       "a folder <task>/ with train.jsonl and eval.jsonl; --data DIR names the folder that holds it")
    for task in tasks or ():
        if not named(task, found):
            raise BadInput(f"unknown task {task!r}; {folder} holds {', '.join(found)}")
    data = {}
    for task in tasks or map(as_nfc, found):
        own = folder / named(task, found)
        if not plain(task) or task in data:
            report(f"{own}: its name names files; rename it: accepted is {PLAIN}, each once")
        data[task] = {split: read_rows(own / f"{split}.jsonl", task, report) for split in splits}
        kinds = {rows[0].kind: split for split, rows in data[task].items() if rows}
        if len(kinds) > 1:
            report(f"{own}/eval.jsonl:1: {' here, '.join(reversed(kinds))} in train.jsonl")
    return data


def load_run_tasks(saved, folder, splits=("train", "eval")):
    """Return the tasks of a run (`saved`: its portal.json) in its order: those trained together, from `folder`, then
    each task added later (train.py --add-task), from its own folder, or, if that is no longer there, from `folder`.
    Raises BadInput, also if its training rows there are not those that it was learned from."""
    added = saved.get("added", {})
    data = load_tasks(folder, [task for task in saved["config"]["tasks"] if task not in added], splits=splits)
    for task, how in added.items():
        own = pathlib.Path(how["folder"])
        data |= load_tasks(own.parent if own.is_dir() else folder, [task], splits=splits)
        if not own.is_dir() and "train" in splits and how.get("rows") != digests_of(
                {task: sample(data[task]["train"], how["n"], how["seed"])})[task]:
            raise BadInput(f"{folder / task}: not the rows that {task} was learned from, in {own}, which is no longer "
                           "there; restore them, or learn it again (--add-task DIR --overwrite)")
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


def print_fewer(data, n):
    """Prints which tasks of `data` (load_tasks) have fewer than n training rows, all of which are then taken."""
    fewer = [f"{task} ({len(splits['train'])})" for task, splits in data.items() if len(splits["train"]) < n]
    if fewer:
        print(f"n = {n}, but fewer rows in {', '.join(fewer)}: all of these are taken")
