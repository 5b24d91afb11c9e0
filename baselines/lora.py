"""Per-task LoRA, the reference for recovered lift: rank 16, alpha 32, all seven projections, one LoRA a task
(appendix A).

T independent LoRAs are trained at once: a batch mixes tasks, so they share every forward pass of the frozen base, and
nothing else. Each has its own optimiser, schedule, gradient clip and selected epoch, so each ends where it would have
ended alone; a task with fewer rows takes no step in the rounds that its own epoch no longer has.
"""
import torch
from torch import nn

from baselines import fit_baseline
from portal import MODULES, Adapters
from train import Learner, rounds_of

RANK, ALPHA = 16, 32


class TaskLoRAs:
    """A and B are the parameters, a tensor for each task, so that AdamW does not touch a task without a step."""

    def __init__(self, n_tasks, base, modules=MODULES, rank=RANK, alpha=ALPHA):
        L, tasks, self.scale, self.A, self.B = base.layers, range(n_tasks), alpha / rank, {}, {}
        for m in modules:
            d_in, d_out = base.dims[m]
            uniform = [(2 * torch.rand(L, rank, d_in) - 1) * d_in ** -0.5 for _ in tasks]  # as in nn.Linear and PEFT
            self.A[m] = [nn.Parameter(a.to(base.device)) for a in uniform]
            self.B[m] = [nn.Parameter(torch.zeros(L, d_out, rank, device=base.device)) for _ in tasks]

    def adapters(self, base=None):
        return Adapters({m: torch.stack(a) for m, a in self.A.items()},              # [T, L, r, d_in]
                        {m: torch.stack(b) for m, b in self.B.items()}, self.scale)  # [T, L, d_out, r]

    def of(self, t):
        """The parameters of task t, a list."""
        return [side[m][t] for side in (self.A, self.B) for m in side]


def lora_learners(loras, rows, settings):
    """A Learner a task for the TaskLoRAs of the tasks of `rows` {task: (train, held out)}."""
    return [Learner([{"params": loras.of(t), "lr": settings["lr"]}], [task],
                    rounds_of(train, settings["batch_size"], settings["least"]), settings["epochs"])
            for t, (task, (train, _)) in enumerate(rows.items())]


def fit_lora(run, base, rows, provenance, settings, method="lora", **sizes):
    """Fits the LoRAs of all tasks on `rows` {task: (train, held out)} and saves them as baselines/<method>/<tag>."""
    torch.manual_seed(provenance["seed"])
    loras = TaskLoRAs(len(rows), base, **sizes)
    learners = lora_learners(loras, rows, settings)
    fit_baseline(run, method, base, rows, provenance, settings, loras.adapters, learners)


def iso_sizes(cfg, base, n_tasks):
    """Returns modules, rank and alpha with which LoRAs of `n_tasks` tasks have about as many parameters as the base's
    converter. The write-up's LoRA has far more, and fewer parameters alone may need fewer rows."""
    width = sum(sum(base.dims[m]) for m in cfg.modules)                              # of one layer's A and B, at rank 1
    rank = max(1, round((cfg.d_c * width + base.layers * cfg.d_e) / (n_tasks * base.layers * width)))
    return dict(modules=cfg.modules, rank=rank, alpha=2 * rank)
