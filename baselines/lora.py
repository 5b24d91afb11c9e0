"""Per-task LoRA, the yardstick: rank 16, alpha 32, all seven projections, one LoRA a task (appendix A).

T independent LoRAs are trained in one go: they share every forward pass of the frozen base, since a batch may mix
tasks, and nothing else. Each has its own optimiser, schedule, gradient clip and selected epoch, so each ends where it
would have ended alone; a small task simply sits out the rounds that its own epoch no longer has.
"""
import torch
from torch import nn

from cli import remove, today, write_json
from dist import wait
from portal import MODULES, Adapters, save_adapters
from resume import forget
from train import Learner, fit, rounds_of, save_states

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


def fit_lora(run, tag, base, rows, provenance, settings):
    """Fit the LoRAs of all tasks on `rows` {task: (train, held out)} and save them as baselines/lora/<tag>; `provenance`
    is that of the base's converter, whose rows and seed these are, with the run's tasks that were `added` since."""
    torch.manual_seed(provenance["seed"])
    loras = TaskLoRAs(len(rows), base)
    learners = [Learner([{"params": loras.of(t), "lr": settings["lr"]}], [task],
                        rounds_of(train, settings["batch_size"]), settings["epochs"])
                for t, (task, (train, _)) in enumerate(rows.items())]
    state = run / ".resume" / f"LoRA-{tag}.safetensors"
    seconds = fit(f"LoRA {tag}", [base], loras.adapters, learners, rows, seed=provenance["seed"], log=run / "log.jsonl",
                  ema=False, state=state, **{k: settings[k] for k in ("epochs", "batch_size", "max_tokens")})
    path = run / "baselines" / "lora" / f"{tag}.json"                                # written last: without it the LoRA
    remove(path)                                                                     # counts as missing
    selected, last = (root / "baselines" / "lora" / f"{tag}.safetensors" for root in (run, run / "final"))
    remove(last)
    save_states(learners, settings["epochs"], lambda final: save_adapters(last if final else selected, loras.adapters()))
    write_json(path, dict(
        {key: provenance[key] for key in ("base", "id", "revision", "n", "seed", "data", "added")}, settings=settings,
        epoch_selected={task: learner.epoch for task, learner in zip(rows, learners)},
        seconds=round(seconds, 1), date=today()))
    forget(state)
    wait()                                                                           # evaluation reads it in every process
