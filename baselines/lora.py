"""Per-task LoRA, the reference for recovered lift: rank 16, alpha 32, all seven projections (or those of them that the
base has), one LoRA a task (appendix A).

T independent LoRAs are trained at once: a batch mixes tasks, so they share every forward pass of the frozen base, and
nothing else. Each has its own optimiser, schedule, gradient clip and selected epoch, so each ends where it would have
ended alone; a task with fewer rows takes no step in the rounds that its own epoch no longer has.
"""
import torch
from torch import nn

from baselines import fit_baseline
from data import rounds_of
from portal import Adapters, layers_of
from train import Learner

RANK, ALPHA = 16, 32


class TaskLoRAs:
    """A and B are the parameters, a tensor for each task, so that AdamW does not touch a task without a step."""

    def __init__(self, n_tasks, base, modules=None, rank=RANK, alpha=ALPHA):
        tasks, self.scale, self.A, self.B = range(n_tasks), alpha / rank, {}, {}
        for g, (_, layers, d_in, d_out) in base.groups_of(modules or base.kinds).items():
            L = len(layers)
            uniform = [(2 * torch.rand(L, rank, d_in) - 1) * d_in ** -0.5 for _ in tasks]  # as in nn.Linear and PEFT
            self.A[g] = [nn.Parameter(a.to(base.device)) for a in uniform]
            self.B[g] = [nn.Parameter(torch.zeros(L, d_out, rank, device=base.device)) for _ in tasks]

    def adapters(self, base=None):
        return Adapters({g: torch.stack(a) for g, a in self.A.items()},              # [T, L_g, r, d_in]
                        {g: torch.stack(b) for g, b in self.B.items()}, self.scale)  # [T, L_g, d_out, r]

    def of(self, t):
        """The parameters of task t, a list."""
        return [side[g][t] for side in (self.A, self.B) for g in side]


def lora_learners(loras, rows, settings):
    """A Learner a task for the TaskLoRAs of the tasks of `rows` {task: (train, held out)}."""
    return [Learner([{"params": loras.of(t), "lr": settings["lr"]}], [task],
                    rounds_of(train, settings["batch_size"], settings["least"]), settings["epochs"])
            for t, (task, (train, _)) in enumerate(rows.items())]


def fit_lora(run, base, rows, provenance, settings, method="lora", **sizes):
    """Fits the LoRAs of all tasks on `rows` {task: (train, held out)} and saves them as baselines/<method>/<tag>."""
    if base.lacks and "modules" not in sizes:
        print(f"{method} {provenance['tag']}: adapts {', '.join(base.kinds)}; the base has no {', '.join(base.lacks)}")
    torch.manual_seed(provenance["seed"])
    loras = TaskLoRAs(len(rows), base, **sizes)
    learners = lora_learners(loras, rows, settings)
    fit_baseline(run, method, base, rows, provenance, settings, loras.adapters, learners)


def iso_sizes(cfg, base, n_tasks):
    """Returns modules, rank and alpha with which LoRAs of `n_tasks` tasks have about as many parameters as the base's
    converter. The write-up's LoRA has far more, and fewer parameters alone may need fewer rows."""
    groups = base.groups_of(cfg.modules)
    converter = sum(cfg.d_c * (d_in + d_out) for _, _, d_in, d_out in groups.values())
    converter += cfg.d_e * len(layers_of(groups))
    lora = sum(len(layers) * (d_in + d_out) for _, layers, d_in, d_out in groups.values())    # of one task, at rank 1
    rank = max(1, round(converter / (n_tasks * lora)))
    return dict(modules=cfg.modules, rank=rank, alpha=2 * rank)
