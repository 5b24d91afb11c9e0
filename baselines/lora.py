"""Per-task LoRA, the yardstick: rank 16, alpha 32, all seven projections, one LoRA a task (appendix A).

T independent LoRAs are trained in one go: they share every forward pass of the frozen base, since a batch may mix
tasks, and nothing else. Each has its own optimiser, schedule, gradient clip and selected epoch, so each ends where it
would have ended alone; a small task simply sits out the rounds that its own epoch no longer has.
"""
import torch
from torch import nn

from baselines import fit_baseline
from portal import MODULES, Adapters
from train import Learner, rounds_of

RANK, ALPHA = 16, 32


class TaskLoRAs:
    """A and B themselves are the parameters, a tensor a task, so that a task that sits out is left alone by AdamW."""

    def __init__(self, n_tasks, base, modules=MODULES, rank=RANK, alpha=ALPHA):
        L, self.scale = base.layers, alpha / rank
        def parameter(values):
            return nn.Parameter(values.to(base.device))
        self.A, self.B = {}, {}
        for m in modules:                                                            # A as nn.Linear and PEFT have it
            d_in, d_out = base.dims[m]
            self.A[m] = [parameter((2 * torch.rand(L, rank, d_in) - 1) * d_in ** -0.5) for _ in range(n_tasks)]
            self.B[m] = [parameter(torch.zeros(L, d_out, rank)) for _ in range(n_tasks)]

    def adapters(self, base=None):
        return Adapters({m: torch.stack(a) for m, a in self.A.items()},              # [T, L, r, d_in]
                        {m: torch.stack(b) for m, b in self.B.items()}, self.scale)  # [T, L, d_out, r]

    def of(self, t):
        """The parameters of task t."""
        return [side[m][t] for side in (self.A, self.B) for m in side]


def fit_lora(run, tag, base, rows, provenance, settings, method="lora", **sizes):
    """Fit the LoRAs of all tasks on `rows` {task: (train, held out)} and save them as baselines/<method>/<tag>."""
    torch.manual_seed(provenance["seed"])
    loras = TaskLoRAs(len(rows), base, **sizes)
    learners = [Learner([{"params": loras.of(t), "lr": settings["lr"]}], [task],
                        rounds_of(train, settings["batch_size"], settings["least"]), settings["epochs"])
                for t, (task, (train, _)) in enumerate(rows.items())]
    fit_baseline(run, method, tag, base, rows, provenance, settings, loras.adapters, learners)


def iso_sizes(cfg, base, n_tasks):
    """Modules and rank with which LoRAs of `n_tasks` tasks have as many parameters as the base's converter, or nearly: the
    write-up's LoRA has far more, and a method that fits fewer parameters needs fewer rows for that reason alone."""
    width = sum(sum(base.dims[m]) for m in cfg.modules)                              # of one layer's A and B, at rank 1
    rank = max(1, round((cfg.d_c * width + base.layers * cfg.d_e) / (n_tasks * base.layers * width)))
    return dict(modules=cfg.modules, rank=rank, alpha=2 * rank)
