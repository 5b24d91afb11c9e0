"""Data parallel over a round's rows: `torchrun --nproc-per-node N -- train.py ...` starts N processes with a RANK each.

Every process holds all bases, latents, core and converters and draws the same rows from the same seeds. Each computes
its shard of a round's rows; losses and the gradients of A and B are summed over the processes; the backward pass
through the generator and the optimiser's step run in each on equal numbers, so parameters are never sent. Evaluation
rows are sharded in the same way. Only rank 0 prints and writes. A single process calls nothing of torch.distributed.
"""
import datetime, os, sys

import torch
import torch.distributed

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
NO_BAR = True if RANK else None  # tqdm's `disable`; None: a bar if stderr is a terminal
store = None                                                                         # counters that all processes share


def start():
    """Joins the process group: gloo for CPU tensors, NCCL for GPU tensors, where process k has GPU k."""
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
    # A long timeout: rank 0 may work alone for hours; when a process dies, torchrun ends the others.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=RANK,
                                         world_size=WORLD, timeout=datetime.timedelta(hours=12))


def stop():
    """Leaves the process group when every process has come here, and ends this one if there are several."""
    barrier()
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    leave(0)


def leave(code):
    """Ends this process at once with an exit code if there are several: torch's threads may outlive an interpreter that
    ends as usual, which then aborts ("terminate called ...")."""
    if WORLD > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def claim_failure():
    """Whether this process is the first to report a failure: all may meet the same one, and it is printed once."""
    return store is None or store.add("failures", 1) == 1


def another_failed():
    return store is not None and store.add("failures", 0) > 0


def all_sum(tensor):
    """The sum of `tensor` over all processes, on its device. A NaN in one process is a NaN in all."""
    if WORLD > 1:
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor)
    return tensor


def barrier():
    """Waits for every process: what rank 0 wrote before, all can read after."""
    all_sum(torch.zeros(1))


def split_evenly(items):
    """WORLD lists of items, about equal in tokens: longest first, each to the list with the fewest so far."""
    shards, loads = [[] for _ in range(WORLD)], [0] * WORLD
    for item in sorted(items, key=lambda item: item.length(), reverse=True):
        k = loads.index(min(loads))
        shards[k].append(item)
        loads[k] += item.length()
    return shards


def shard(items):
    """This process's items. A single process keeps them all, in their order."""
    return split_evenly(items)[RANK] if WORLD > 1 else items


def map_sharded(work, items):
    """work(items), a result for each item in order; each process computes its shard and receives all results."""
    if WORLD == 1:
        return work(items)
    shards, results = split_evenly(items), [None] * WORLD
    torch.distributed.all_gather_object(results, work(shards[RANK]))
    found = {id(item): result for own, own_results in zip(shards, results) for item, result in zip(own, own_results)}
    return [found[id(item)] for item in items]
