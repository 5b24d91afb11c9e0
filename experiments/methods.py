"""METHODS: the ways to fit a base that experiments/study.py compares, a line each, and how they are made.

A start (bare, loras, ports, sources) is a function of a World and of settings. It returns
    stages    functions (lr, rounds) -> (generate(base name) -> Adapters, learners of train.fit), done in turn
    rows      {task: (rows to fit to, measured rows)}
    result    generate of what is measured; None: the bare base
"""
import copy, dataclasses, functools
from typing import Callable, NamedTuple

import torch

from baselines import cross_lora
from baselines.lora import TaskLoRAs
from bases import Base, same_depths
from portal import MODULES, Adapters, Config, Converter, Core, Portal
from runtime.files import BadInput
from starts.align import align, keep_size, ridge, shared_inputs, texts_of
from starts.teacher import soft_rows
from starts.whiten import whiten
from train import Learner


@dataclasses.dataclass(eq=False)
class World:
    """What the starts have in common."""
    bases: list               # to fit: one, but all of them for `sources`
    rows: dict                # {task: (train, measured)}
    portal: Portal = None     # trained on other bases
    source: Base = None       # one of those
    loras: Callable = None    # () -> Adapters of the source
    max_tokens: int = 4096

    base = property(lambda self: self.bases[0])
    like = property(lambda self: self.portal.converters[self.source.name])
    maps = functools.cached_property(lambda self: ridge_maps(self))
    texts = functools.cached_property(lambda self: texts_of(self.rows))

    def converter(self):
        """Returns a new Converter of the base, at the start of a port."""
        groups = self.base.groups_of(self.portal.cfg.modules)
        return Converter(self.portal.cfg, groups, self.like, port=True).to(self.base.device)

    @functools.cached_property
    def P_in(self):
        """{g: P_in} as align sets it."""
        converter = self.converter()
        align(converter, self.base, self.like, self.source, self.texts)
        return dict(converter.P_in)

    @functools.cached_property
    def soft(self):
        """{id of a row of train: it with the answers of the source, with its generated adapters, as its label}."""
        train = [row for rows, _ in self.rows.values() for row in rows]
        return soft_rows(self.source, self.portal.adapters(self.source.name), train, list(self.rows), self.max_tokens)


# ---------------------------------------------------------------------------------------------- the bare base, LoRAs
def bare(world, shots=0):
    """The base as it is. shots: so many rows of train, with their answers, stand before every measured prompt."""
    def prompted(row, examples):
        return row._replace(prompt="\n\n".join([*(e.prompt + e.choices[e.gold] for e in examples), row.prompt]))
    return [], {task: (train, [prompted(row, train[:shots]) for row in measured])
                for task, (train, measured) in world.rows.items()}, None


def loras(world, rank=16, carry=None, factor=1, ported=None, mean=False, shared=False):
    """LoRAs of all modules, alpha twice the rank. carry: they start as the source's, carried over by a
    method of baselines/cross_lora.py or by "maps" (ridge_maps), times `factor`; ported: they start after half of the
    rounds as what a port with these settings generates, fitted at the rate 0.9; mean: the mean of the other tasks'
    LoRAs is measured in the place of each; shared: one more LoRA is trained on all tasks and added to each."""
    own, base, source = TaskLoRAs(len(world.rows), world.base, None, rank, 2 * rank), world.base, world.source
    every = TaskLoRAs(1, base, None, rank, 2 * rank) if shared else None
    if mean and len(world.rows) == 1:
        raise BadInput("the mean of the other tasks' LoRAs needs two tasks")
    def both(name=None):
        mine, (A, B, _) = own.adapters(), every.adapters().map(lambda a: a.expand(len(world.rows), *a.shape[1:]))
        return Adapters({g: torch.cat([a, A[g]], 2) for g, a in mine.A.items()},
                        {g: torch.cat([b, B[g]], 3) for g, b in mine.B.items()}, mine.scale)
    adapters = both if shared else own.adapters
    def learners(lr, rounds):
        found = [(own.of(t), [task]) for t, task in enumerate(world.rows)]
        found += [(every.of(0), [])] if shared else []                               # it learns from the others' rows
        return adapters, [Learner([{"params": params, "lr": lr}], tasks, rounds, 1) for params, tasks in found]
    def moved(A, B, m, s, l):
        if carry == "maps":
            return A @ world.maps[m, l][0], world.maps[m, l][1] @ B
        return getattr(cross_lora, carry)(A, B, source.weight(m, s), base.weight(m, l))
    if carry:
        take_over(own, cross_lora.site_by_site(moved, world.loras(), source, base), factor)
    stages = [learners]
    if ported:
        (port,), _, generated = ports(world, **ported)
        def after_port(lr, rounds):
            take_over(own, generated(base.name))
            return learners(lr, rounds - rounds // 2)
        stages = [lambda lr, rounds: port(0.9, rounds // 2), after_port]
    return stages, world.rows, (lambda name: others_mean(own.adapters())) if mean else adapters


@torch.no_grad()
def take_over(own, start, factor=1):
    """Sets the first ranks of TaskLoRAs to those of Adapters, whose delta is multiplied by `factor`; further ranks and
    groups stay as they are."""
    for g, a in start.A.items():
        for t in range(len(a)):
            own.A[g][t][:, :a.shape[2]] = a[t]
            own.B[g][t][..., :a.shape[2]] = start.B[g][t] * factor * start.scale / own.scale


def others_mean(adapters):
    """Returns, in the place of each task's adapters, the mean of the other tasks' deltas, of rank (T - 1) r."""
    def of_others(side, dim):
        return torch.stack([torch.cat([*side[:t], *side[t + 1:]], dim) for t in range(len(side))])
    return Adapters({g: of_others(a, 1) for g, a in adapters.A.items()},             # [T, L, (T - 1) r, d_in]
                    {g: of_others(b, 2) / (len(b) - 1) for g, b in adapters.B.items()}, adapters.scale)


@torch.no_grad()
def ridge_maps(world, by=1e-2):
    """Returns {(m, layer): (M, R)} by ridge regression over shared token ends. M [d_in of the source, d_in]: from what
    the layer reads to what the source's layer of the same relative depth reads. R [d_out, d_out of the source]: from
    the output of the source's frozen projection to that of the base's, both without their means."""
    base, source, inputs, found = world.base, world.source, {}, {}
    for text in world.texts:
        x, source_x = shared_inputs(base, source, text, MODULES)
        for m in MODULES:
            for (l, *_), (s, *_) in same_depths(base, source, m):
                inputs.setdefault((m, l, s), []).append((x[m, l], source_x[m, s]))   # [S, d_in] each
    for (m, l, s), pairs in inputs.items():
        X, source_X = (torch.cat(side).double() for side in zip(*pairs))
        Y, source_Y = X @ base.weight(m, l).double().T, source_X @ source.weight(m, s).double().T
        Y, source_Y = Y - Y.mean(0), source_Y - source_Y.mean(0)
        M, R = ridge(X.T @ X, X.T @ source_X, by).T, ridge(source_Y.T @ source_Y, source_Y.T @ Y, by).T
        found[m, l] = M.float(), R.float()
    return found


# ---------------------------------------------------------------------------------------------- PorTAL
def sources(world, **config):
    """PorTAL trained on all of the world's bases at once; config: of its Config."""
    portal = Portal(Config(tasks=list(world.rows), **config))
    for base in world.bases:
        portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    portal.to(world.base.device)
    def learners(lr, rounds):
        return portal.adapters, [Learner(portal.rates(lr), list(world.rows), rounds, 1, portal.z)]
    return [learners], world.rows, portal.adapters


def ports(world, aligned=False, eps=None, untrained=False, swapped=False, unfreeze=False, labels=None):
    """A port. aligned: P_in starts as port.py --align has it; eps: of starts.whiten; untrained: the core is a new one,
    its B-heads as large as the trained ones'; swapped: each task has another one's latent; unfreeze: the last third of
    the rounds trains latents and core, too, at a tenth of the rate; labels: so many rows a task keep their labels, the
    others have the source's answers, as with port.py --teacher."""
    portal, converter, rows = copy.deepcopy(world.portal), world.converter(), world.rows
    if untrained:
        portal.core = untrained_core(portal.core)
    if swapped:
        if len(portal.z) == 1:
            raise BadInput("latents are swapped between two tasks")
        portal.z.data = portal.z.data.roll(1, 0)
    if labels is not None:
        rows = {task: (train[:labels] + [world.soft[id(row)] for row in train[labels:] if id(row) in world.soft], held)
                for task, (train, held) in rows.items()}
    def learners(lr, rounds, freeze=True):
        for p in (portal.z, *portal.core.parameters()):
            p.requires_grad_(not freeze)
        return portal.adapters, [Learner(portal.rates(lr), list(rows), rounds, 1, None if freeze else portal.z)]
    if aligned:
        for g, P_in in world.P_in.items():
            converter.P_in[g].data.copy_(P_in)
        keep_size(portal.core, portal.z, converter)
    if eps:
        portal.core, _ = whiten(portal.core, portal.z, converter, eps)
    portal.converters = {world.base.name: converter}
    stages = [learners]
    if unfreeze:
        stages = [lambda lr, rounds: learners(lr, rounds - rounds // 3),
                  lambda lr, rounds: learners(lr / 10, rounds // 3, freeze=False)]
    return stages, rows, portal.adapters


def untrained_core(core):
    """Returns a new Core; its B-heads, which are zero then, are random with the trained ones' root mean squares."""
    new = Core(core.cfg).to(core.W1.weight.device)
    for m, head in core.head_B.items():
        for name, p in head.named_parameters():
            getattr(new.head_B[m], name).data.normal_(std=float(p.detach().square().mean().sqrt()))
    return new


# ---------------------------------------------------------------------------------------------- the methods
class Method(NamedTuple):
    """A start and its settings; numbers of rounds on the toy (other bases: --rounds, but 0 stays 0); rows of a task in
    its rounds there (others: 4); what the Config of its core has of its own; {name: settings} of the knob that the
    search turns (others: the first)."""
    start: Callable
    rounds: tuple = (112,)
    batch: int = 8
    settings: dict = {}
    core: dict = {}
    knobs: dict = {"": {}}


RANKS, FACTORS = {"rank 16": dict(rank=16), "rank 4": dict(rank=4)}, {"": dict(factor=1), "half": dict(factor=0.5)}
LONG, SMALL, ALIGNED = (28, 56, 80, 112, 224), (112, 224, 336, 448), dict(aligned=True, eps=0.1)


def lora(rounds=(112,), batch=8, knobs=RANKS, core={}, **settings):
    return Method(loras, rounds, batch, settings, core, knobs)


def port(rounds=(448,), batch=2, core={}, **settings):
    return Method(ports, rounds, batch, settings, core, {"whitened": dict(eps=0.1), "": {}})


carried = functools.partial(lora, knobs=FACTORS)
wide = functools.partial(port, rounds=(112,), batch=8, core=dict(d_c=256))
METHODS = {
    "bare base": Method(bare, (0,)),
    "4 rows in the prompt": Method(bare, (0,), settings=dict(shots=4)),
    "source": Method(sources),
    "source of rank 16": Method(sources, core=dict(rank=16, alpha=32)),
    "source of all modules": Method(sources, core=dict(modules=MODULES)),
    "lora": lora(LONG),
    "lora of batch 2": lora(SMALL, 2),
    "lora and one for all tasks": lora((224,), 2, shared=True),
    "mean of the other loras": lora((224,), 2, mean=True),
    "lora from cross_lora": carried(carry="cross_lora"),
    "lora from copy": carried(carry="copy"),
    "lora from ridge maps": carried(carry="maps"),
    "lora carried by cross_lora without training": carried((0,), carry="cross_lora"),
    "lora carried by ridge maps without training": carried((0,), carry="maps"),
    "portal aligned then lora": lora((448,), 2, {"": {}}, ported=ALIGNED),
    "portal aligned of all modules then lora": lora((448,), 2, {"": {}}, dict(modules=MODULES), ported=ALIGNED),
    "portal": port(),
    "portal aligned": port(SMALL, aligned=True),
    "portal core untrained": port(untrained=True),
    "portal latents swapped": port(swapped=True),
    "portal aligned core untrained": port(aligned=True, untrained=True),
    "portal aligned latents swapped": port(aligned=True, swapped=True),
    "portal aligned to a teacher": port(aligned=True, labels=0),
    "portal aligned to a teacher and 8 labels": port(aligned=True, labels=8),
    "portal aligned of rank 16": port(aligned=True, core=dict(rank=16, alpha=32)),
    "portal aligned of all modules": port(aligned=True, core=dict(modules=MODULES)),
    "portal aligned of all modules core untrained": port(aligned=True, untrained=True, core=dict(modules=MODULES)),
    "portal aligned of all modules latents swapped": port(aligned=True, swapped=True, core=dict(modules=MODULES)),
    "portal of batch 8 aligned": port(LONG, 8, aligned=True),
    "portal of d_c 256": wide(),
    "portal of d_c 256 aligned": wide(rounds=LONG, aligned=True),
    "portal of d_c 256 aligned and of all modules": port((56, 112), 8, dict(d_c=256, modules=MODULES), aligned=True),
    "portal of d_c 256 core untrained": wide(untrained=True),
    "portal of d_c 256 latents swapped": wide(swapped=True),
    "portal of d_c 256 core unfrozen at the end": wide(unfreeze=True),
}
