"""Several processes on one run: `torchrun --nproc-per-node N -- train.py ...` starts N and tells each its RANK.

Every process holds everything, the bases, latents, core and converters, and draws the same rows from the same seeds. So
they need not talk about what to do. Each takes its share of a round's rows; losses and the gradients on A and B are then
summed over all processes; and what follows, the backward pass through the generator and the optimiser's step, each does
for itself on equal numbers. Parameters never travel. An evaluation is shared out in the same way.

Process 0 speaks for all: the others print nothing, draw no bars and write no files (cli.py). A process that is alone calls
nothing of torch.distributed.
"""
import datetime, json, os, sys

import torch
import torch.distributed

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
NO_BAR = True if RANK else None  # tqdm's `disable`; None: a terminal's bar
store = None                                                                         # a few numbers that all processes see


def start():
    """Meet the other processes: gloo for tensors on the CPU, NCCL for those on GPUs, where process k has GPU k."""
    global store
    if WORLD == 1:
        return
    from torch.distributed.rendezvous import rendezvous
    if RANK:
        sys.stdout = open(os.devnull, "w")
    gpus = torch.cuda.device_count()
    if LOCAL_RANK < gpus:                                                            # "cuda" now means this GPU
        torch.cuda.set_device(LOCAL_RANK)
    store, *_ = next(rendezvous("env://"))
    # A long timeout: process 0 may be busy for hours while the others wait, and torchrun ends them all when one dies.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=RANK, world_size=WORLD,
                                         timeout=datetime.timedelta(hours=12))


def stop():
    """All is done: nobody leaves before the last has come."""
    wait()
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def speaks():
    """Whether the last words on stderr are this process's to say: many see the same problem, and it is one line."""
    return store is None or store.add("failures", 1) == 1


def another_failed():
    return store is not None and store.add("failures", 0) > 0


# ---------------------------------------------------------------------------------------------- shares and sums
def total(tensor):
    """The sum over all processes. A loss that is not finite in one of them is so in all."""
    if WORLD > 1:
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor)
    return tensor


def wait():
    """Until every process is here: what the first has written before, all can read after."""
    total(torch.zeros(1))


def deal(items):
    """WORLD lists of items, of nearly equal numbers of tokens: the longest first, each to whom has least so far."""
    hands, loads = [[] for _ in range(WORLD)], [0] * WORLD
    for item in sorted(items, key=lambda item: item.length(), reverse=True):
        k = loads.index(min(loads))
        hands[k].append(item)
        loads[k] += item.length()
    return hands


def share(items):
    """This process's items. The order of a single process is left as it is."""
    return deal(items)[RANK] if WORLD > 1 else items


def shared(work, items):
    """work(items), a result for each; every process does its share and gets all the results. JSON carries them."""
    if WORLD == 1:
        return work(items)
    hands = deal(items)
    text = torch.tensor(list(json.dumps(work(hands[RANK])).encode()), dtype=torch.uint8)
    lengths = torch.zeros(WORLD, dtype=torch.int64)
    lengths[RANK] = len(text)
    lengths = total(lengths).tolist()
    texts = torch.zeros(WORLD, max(lengths), dtype=torch.uint8)                      # a row each; elsewhere zeros are added
    texts[RANK, :len(text)] = text
    results = [json.loads(bytes(row[:n].tolist())) for row, n in zip(total(texts), lengths)]
    found = {id(item): result for hand, own in zip(hands, results) for item, result in zip(hand, own)}
    return [found[id(item)] for item in items]
