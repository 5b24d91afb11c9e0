"""Batches that mix the rows of all tasks. Rows and their files are described in tasks/rows.py.

    python data.py --out data/                        builds the write-up's 14 benchmarks from the hub, in this form
    python data.py --check data/ --bases qwen3-1.7b   lists what a folder holds and what is wrong with it
"""
import pathlib, random
from typing import NamedTuple

import numpy as np
import torch

from bases import Item, encode
from runtime.files import BadInput
from runtime.flags import data_folder, parse, run_main
from tasks.benchmarks import BENCHMARKS, build
from tasks.check import check


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


def rounds_of(rows, batch_size, least=1):
    """The rounds of an epoch: a pass over a task's rows, at least `least`."""
    return max(least, -(-len(rows) // batch_size))


def most_rounds(rows, batch_size, least=1):
    """The rounds of an epoch over {task: (train, held out)}: those of the largest task."""
    return max(rounds_of(train, batch_size, least) for train, _ in rows.values())


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


# ---------------------------------------------------------------------------------------------- the command
def main(argv=None):
    args = parse(__doc__, "out check bases tasks", argv,
                 out=dict(default=pathlib.Path("data"), help="build the benchmarks in this folder"),
                 check=dict(type=data_folder, metavar="DIR", help="check this folder (exit code 2: problems)"),
                 bases=dict(help="--check: the bases whose tokens are counted"))
    if args.check:
        return check(args.check, args.tasks, args.bases or ())
    for task in args.tasks or ():
        if task not in BENCHMARKS:
            raise BadInput(f"unknown task {task!r}; accepted are {', '.join(BENCHMARKS)}")
    build(args.out, args.tasks or BENCHMARKS)


if __name__ == "__main__":
    run_main(main)
