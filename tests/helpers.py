"""Adapters, items and plain forward passes that several tests compare with."""
import contextlib

import numpy as np
import torch
from conftest import SIZES, lora_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from bases import Item
from portal import MODULES, Adapters, Config, Converter, Portal
from tasks.rows import Row


def random_adapters(base, tasks=3, rank=4, modules=MODULES, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    groups = base.groups_of(modules)
    A, B = ({name: 0.3 * torch.randn(tasks, len(layers), *shape, generator=g).to(dtype)
             for name, (_, layers, d_in, d_out) in groups.items() for shape in [(rank, d_in) if side == "A" else (d_out, rank)]}
            for side in "AB")
    return Adapters(A, B, 2.0)


def items(n_choices=1, seed=0):
    """Four items of three tasks: prompts of 3 to 11 tokens, n_choices continuations of 1 to 4."""
    g = np.random.default_rng(seed)
    def tokens(low, high):
        return g.integers(4, 56, g.integers(low, high)).tolist()
    return [Item(t, tokens(3, 12), [tokens(1, 5) for _ in range(n_choices)], Row("t", "", [], 0)) for t in (0, 2, 1, 2)]


def of_task(adapters, t):
    """Task t's ({m: A [L, r, d_in]}, {m: B [L, d_out, r]}, scale)."""
    return {m: a[t] for m, a in adapters.A.items()}, {m: b[t] for m, b in adapters.B.items()}, adapters.scale


@contextlib.contextmanager
def hooked(model, adapters, t):
    """The unpatched `model` with task t's adapters, or none, added by forward hooks (conftest.lora_hooks)."""
    handles = lora_hooks(model, *of_task(adapters, t)) if adapters else []
    yield model
    for handle in handles:
        handle.remove()


@torch.no_grad()
def plain_greedy(model, prompt, n):
    """n greedy tokens of one row alone, by a whole forward pass of an unpatched model for each."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


class NeverWaits(TorchDispatchMode):
    """Inside, operations that make the host wait for the device fail: reading a number, shapes that depend on data."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")
        assert not any(word in str(f) for word in waits), f
        return f(*args, **(kwargs or {}))


def make_portal(base, norm="layer", modules=("q", "v"), tasks=("one", "two", "three"), random=True, **sizes):
    torch.manual_seed(1)
    portal = Portal(Config(tasks=list(tasks), modules=list(modules), norm=norm, **{**SIZES, **sizes}))
    portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    if random:  # away from the zeros of the initialisation
        for p in [portal.z, *portal.core.parameters(), *portal.converters[base.name].parameters()]:
            torch.nn.init.normal_(p, std=0.3)
    return portal


def some_items(seed=0):
    g = torch.Generator().manual_seed(seed)
    def tokens(n):
        return torch.randint(4, 56, (n,), generator=g).tolist()
    return [Item(t, tokens(n), [tokens(k)], Row("t", "", [], 0)) for t, n, k in
            [(0, 5, 1), (2, 9, 3), (1, 3, 2), (2, 4, 1), (0, 12, 2), (1, 7, 4), (0, 2, 1)]]


def small_rows(n=6):
    rows = [Row(t, f"w{i} w{i + 1}", [" w1", f" w{i + 3}"], 1) for t in ("one", "two", "three") for i in range(n)]
    return {t: ([r for r in rows if r.task == t], [r for r in rows if r.task == t][:2]) for t in ("one", "two", "three")}
