"""What is optimised: parameters with their optimiser, their schedule and the epoch that is selected for them."""
import torch

from score import macro


class Learner:
    """Parameters that are optimised together and whose epoch is chosen together, and the tasks they learn. PorTAL is
    one learner; T per-task LoRAs are T learners that share only their forward passes. groups: [{"params", "lr"}], as
    in torch; rounds: of an epoch; z: the parameter on which the bases' gradients are balanced, or None."""

    def __init__(self, groups, tasks, rounds, epochs, z=None):
        self.tasks, self.rounds, self.z, self.score, self.epoch, self.best = tasks, rounds, z, None, 0, None
        self.params = self.start = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        total = rounds * epochs
        warm = max(1, total // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(                           # 10% warm-up, then linear to zero
            self.optimizer, lambda k: min((k + 1) / warm, (total - k) / max(1, total - warm)))

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        self.schedule.step()

    def keep_best(self, epoch, scores):
        """Keeps this epoch's parameters if the mean over the learner's tasks of scores {(base name, task): (acc_norm,
        -log_loss)} is the best so far, or if nothing is held out."""
        own = [score for (_, task), score in scores.items() if task in self.tasks]
        mean = macro(own) if own else None
        # The score is assigned last: a fit that Ctrl-C stops before that repeats the comparison, with the same end.
        if self.score is None or mean is None or mean > self.score:
            self.best, self.epoch, self.score = [p.detach().clone() for p in self.params], epoch, mean

    @torch.no_grad()
    def load_best(self):
        for p, best in zip(self.params, self.best):
            p.copy_(best)

    def state(self):
        """Returns ({name: tensor}, JSON-able rest), from which `restore` makes an equal learner."""
        tensors = {f"{k}.parameter": p for k, p in enumerate(self.params)}
        tensors.update({f"{k}.best": p for k, p in enumerate(self.best or [])})
        for k, p in enumerate(self.params):  # exp_avg, exp_avg_sq and step; none of them before the first step
            own = self.optimizer.state.get(p, {})
            tensors.update({f"{k}.{name}": t for name, t in own.items()})
        return tensors, dict(score=self.score, epoch=self.epoch, steps=self.schedule.last_epoch,
                             rates=[group["lr"] for group in self.optimizer.param_groups])

    @torch.no_grad()
    def restore(self, tensors, rest):
        self.epoch, self.schedule.last_epoch = rest["epoch"], rest["steps"]
        self.score = rest["score"] and tuple(rest["score"])
        for group, rate in zip(self.optimizer.param_groups, rest["rates"]):
            group["lr"] = rate
        for k, p in enumerate(self.params):
            own = {name.removeprefix(f"{k}."): t.to(p.device)
                   for name, t in tensors.items() if name.startswith(f"{k}.")}
            p.copy_(own.pop("parameter"))
            best = own.pop("best", None)
            self.best = None if best is None else [*(self.best or []), best]
            if own:
                self.optimizer.state[p] = own


def save_states(learners, epochs, save):
    """Calls save(final=True) with the last epoch where another was selected for some learner, then save(final=False)
    with the selected one."""
    if any(learner.epoch < epochs for learner in learners):
        save(final=True)
    for learner in learners:
        learner.load_best()
    save(final=False)


def rounds_of(rows, batch_size, least=1):
    """The rounds of an epoch: a pass over a task's rows, at least `least`."""
    return max(least, -(-len(rows) // batch_size))


def most_rounds(rows, batch_size, least=1):
    """The rounds of an epoch over {task: (train, held out)}: those of the largest task."""
    return max(rounds_of(train, batch_size, least) for train, _ in rows.values())


def portal_learner(portal, rows, settings, rates={}):
    """One learner for everything that is not frozen, at the rates of Portal.rates. rates {name of a parameter of the
    converters: its own rate}, such as {"e": 3e-2}."""
    groups = portal.rates(settings["lr"])
    for name, rate in rates.items():
        own = [dict(converter.named_parameters())[name] for converter in portal.converters.values()]
        rest = [{**group, "params": [p for p in group["params"] if all(p is not q for q in own)]} for group in groups]
        groups = [*(group for group in rest if group["params"]), {"params": own, "lr": rate}]
    z = portal.z if portal.z.requires_grad else None
    rounds = most_rounds(rows, settings["batch_size"], settings["least"])
    return Learner(groups, list(rows), rounds, settings["epochs"], z)
