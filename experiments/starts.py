"""Where a fit on an unseen base may start: LoRAs that are fresh or carried over, and ports of several kinds.

A start is a function of a World and of its own settings. It returns generate(base name) -> Adapters, a list of stages,
functions (lr, rounds) -> learners of train.fit, and the rows {task: (train, measured)} to fit to. experiments/fair.py
compares them.
"""
import copy, dataclasses, functools
from typing import Callable

import torch

from baselines.cross_lora import site_by_site, transfer
from baselines.lora import TaskLoRAs
from bases import Base, same_depths
from portal import MODULES, Converter, Core, Portal, layers_of
from presets import preset
from starts.align import align, ridge, shared_inputs, texts_of
from starts.teacher import soft_rows
from starts.whiten import whiten
from train import Learner

UNFREEZE = 0.1  # the rate of a port's last rounds with the core unfrozen, of that of its converter


@dataclasses.dataclass(eq=False)
class World:
    """What the starts have in common: the unseen base, a Portal trained on other bases, one of these with its LoRAs,
    and the rows {task: (train, measured)}."""
    base: Base
    portal: Portal
    source: Base
    loras: Callable                                                                  # () -> Adapters
    rows: dict

    @functools.cached_property
    def like(self):
        return self.portal.converters[self.source.name]

    def converter(self):
        """A new Converter of the unseen base, at the start of a port."""
        return Converter(self.portal.cfg, self.base.groups_of(self.portal.cfg.modules), self.like, port=True)

    @functools.cached_property
    def texts(self):
        return texts_of(self.rows)

    @functools.cached_property
    def P_in(self):
        """{g: P_in} as port.align sets it."""
        converter = self.converter()
        align(converter, self.base, self.like, self.source, self.texts)
        return dict(converter.P_in)

    @functools.cached_property
    def soft(self):
        """{id of a row of train: it with the answers of the source, with its generated adapters, as its label}."""
        train = [row for rows, _ in self.rows.values() for row in rows]
        max_tokens = preset([self.source.name])["max_tokens"]
        return soft_rows(self.source, self.portal.adapters(self.source.name), train, list(self.rows), max_tokens)

    def taught(self, labels):
        """The rows; but for the first `labels` of a task, those of train have the source's answers as their labels."""
        return {task: (rows[:labels] + [self.soft[id(row)] for row in rows[labels:]], measured)
                for task, (rows, measured) in self.rows.items()}

    @functools.cached_property
    def P_out(self):
        """{g: P_out} by aligned_P_out."""
        return aligned_P_out(self)

    @functools.cached_property
    def maps(self):
        """Those of ridge_maps, of all module kinds."""
        return ridge_maps(self, MODULES)


def bare(world):
    """The base as it is."""
    return lambda name: None, [], world.rows


# ---------------------------------------------------------------------------------------------- LoRAs
def loras(world, rank=16, carry=None, factor=1):
    """LoRAs of all projections, alpha twice the rank. carry: computes where they start from the source's, a method of
    baselines/cross_lora.py or "maps", by_maps; the carried delta is multiplied by `factor`."""
    tasks = list(world.rows)
    own = TaskLoRAs(len(tasks), world.base, rank=rank, alpha=2 * rank)
    if carry:
        start = by_maps(world) if carry == "maps" else transfer(carry, world.loras(), world.source, world.base)
        for g in own.A:
            for t in range(len(tasks)):
                own.A[g][t].data.copy_(start.A[g][t])
                own.B[g][t].data.copy_(start.B[g][t] * factor * start.scale / own.scale)
    def learners(lr, rounds):
        return [Learner([{"params": own.of(t), "lr": lr}], [task], rounds, 1) for t, task in enumerate(tasks)]
    return own.adapters, [learners], world.rows


def by_maps(world):
    """The source's LoRAs carried over by activations: A' = A M, B' = R B with the maps of each site."""
    def carry(A, B, m, s, l):
        M, R = world.maps[m, l]
        return A @ M, R @ B
    return site_by_site(carry, world.loras(), world.source, world.base)


# ---------------------------------------------------------------------------------------------- ports
def ports(world, aligned=False, P_out=False, eps=None, untrained=False, swapped=False, unfreeze=False, labels=None):
    """A port. aligned: P_in starts as port.py --align has it; P_out: P_out as aligned_P_out has it; eps: of
    port.whiten; untrained: the core is a new one, its B-heads as large as the trained ones'; swapped: each task has
    another one's latent; unfreeze: the last third of the rounds trains latents and core, too; labels: so many rows
    a task keep their labels, the others have the source's answers in their place, as with port.py --teacher."""
    portal, converter = copy.deepcopy(world.portal), world.converter()
    if untrained:
        portal.core = untrained_core(portal.core)
    if swapped:
        portal.z.data = portal.z.data.roll(1, 0)
    portal.z.requires_grad_(False)
    portal.core.requires_grad_(False)
    for wanted, own, start in (aligned, converter.P_in, "P_in"), (P_out, converter.P_out, "P_out"):
        for g in own if wanted else ():
            own[g].data.copy_(getattr(world, start)[g])
    if eps:
        portal.core, _ = whiten(portal.core, portal.z, converter, eps)
    portal.converters = {world.base.name: converter}
    def learners(lr, rounds):
        return [Learner(portal.rates(lr), list(world.rows), rounds - unfreeze * (rounds // 3), 1)]
    def unfrozen(lr, rounds):
        portal.z.requires_grad_(True)
        portal.core.requires_grad_(True)
        return [Learner(portal.rates(lr * UNFREEZE), list(world.rows), rounds // 3, 1, portal.z)]
    rows = world.rows if labels is None else world.taught(labels)
    return portal.adapters, [learners, unfrozen] if unfreeze else [learners], rows


def untrained_core(core):
    """Returns a Core as before training, but for its B-heads, which are zero then: random ones with the trained ones'
    root mean squares."""
    new = Core(core.cfg)
    for m, head in core.head_B.items():
        for name, p in head.named_parameters():
            getattr(new.head_B[m], name).data.normal_(std=float(p.detach().square().mean().sqrt()))
    return new


@torch.no_grad()
def ridge_maps(world, modules, by=1e-2):
    """Returns {(m, layer): (M, R)} by ridge regression over shared token ends. M [d_in of the source, d_in]: from what
    the layer reads to what the source's layer of the same relative depth reads. R [d_out, d_out of the source]: from
    the output of the source's frozen projection to that of the base's, both without their means."""
    base, source, inputs, found = world.base, world.source, {}, {}
    for text in world.texts:
        x, source_x = shared_inputs(base, source, text, modules)
        for m in modules:
            for (l, *_), (s, *_) in same_depths(base, source, m):
                inputs.setdefault((m, l, s), []).append((x[m, l], source_x[m, s]))   # [S, d_in] each
    for (m, l, s), pairs in inputs.items():
        X, source_X = (torch.cat(side).double() for side in zip(*pairs))
        Y, source_Y = X @ base.weight(m, l).double().T, source_X @ source.weight(m, s).double().T
        Y, source_Y = Y - Y.mean(0), source_Y - source_Y.mean(0)
        M, R = ridge(X.T @ X, X.T @ source_X, by).T, ridge(source_Y.T @ source_Y, source_Y.T @ Y, by).T
        found[m, l] = M.float(), R.float()
    return found


@torch.no_grad()
def aligned_P_out(world, by=1e-2):
    """Returns {g: P_out} by least squares towards the source's B, carried over with the maps R_l of ridge_maps:
    min over P_out of  sum over tasks and layers |P_out B_hat - R_l B_source|^2 + lambda |P_out|^2."""
    portal, converter = world.portal, world.converter()
    modules, layers, sums = portal.cfg.modules, layers_of(converter.groups), {}
    maps = ridge_maps(world, modules, by)
    (_, B_hat), (_, B_source) = portal.core(portal.z, converter.e), world.like(portal.core, portal.z)
    for m in modules:
        for (l, g, _), (_, source_g, j) in same_depths(world.base, world.source, m):
            own = B_hat[m][:, layers.index(l)].double().transpose(0, 1).flatten(1)   # [d_c, T r]
            wanted = (maps[m, l][1] @ B_source[source_g][:, j]).double().transpose(0, 1).flatten(1)  # [d_out, T r]
            XX, XY = sums.get(g, (0, 0))
            sums[g] = XX + own @ own.T, XY + own @ wanted.T
    return {g: ridge(XX, XY, by).T.float() for g, (XX, XY) in sums.items()}
