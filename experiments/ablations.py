"""What the write-up's experiments vary, as arguments of train.main and port.main; the gradients between tasks.

experiments/paper.py runs it: in ABLATIONS and PORT_ABLATIONS one part of the method is removed or replaced at a time,
COMPETITION is section 7's.
"""
import copy, functools
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from port import Change
from runtime.files import append_jsonl
from train import one_round, task_gradients


class EMA:
    """A `weigh` for one_round: divides each (base, task) loss by its running mean, 0.9 / 0.1, never by less than
    `floor` (section 4). Used in experiments/ alone: on the toy, dividing leaves some tasks under-fit
    (results/README.md, "Competition")."""

    def __init__(self, floor=1e-3):
        self.floor, self.means = floor, {}                                           # {base name: [T]}

    def __call__(self, base, losses, gradients):
        self.means[base] = 0.9 * self.means[base] + 0.1 * losses if base in self.means else losses.clone()
        weights = (1 / self.means[base].clamp(min=self.floor)).view(-1, 1, 1, 1)     # [T, 1, 1, 1]
        return [weights * g for g in gradients]


class Variant(NamedTuple):
    """What a run differs in from the method as shipped."""
    flags: list = []        # of train.py; in PORT_ABLATIONS of port.py
    weigh: Callable = None  # in source training and in the port, see train.one_round
    train: dict = {}        # more arguments of train.main
    port: dict = {}         # more fields of port.Change

    def arguments(self, command):
        """The further arguments of the main of "train", "port" or "eval"."""
        return dict(train=dict(weigh=self.weigh, **self.train), eval={},
                    port=dict(how=Change(weigh=self.weigh, **self.port)))[command]


def random_e(converter):
    converter.e.data.normal_()


def equal_norms(base, losses, gradients):
    """A `weigh` for train.one_round: rescales each task's gradient on its own adapters to the tasks' mean norm."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0).clamp(min=1e-12)  # [T]
    return [(norms.mean() / norms).view(-1, 1, 1, 1) * g for g in gradients]


DIVIDED = Variant(weigh=EMA())                                                       # as in the write-up (section 4)
ABLATIONS = {
    "": Variant(),                                                                   # as shipped
    "as printed: no LayerNorm, one rate for all": Variant(["--norm", "none", "--epochs", "4"]),
    "no FiLM, z in the input alone": Variant(                                        # it stays zero: gamma = beta = 0
        train=dict(change=lambda portal: portal.core.film.requires_grad_(False))),
    "bases' gradients on z not balanced": Variant(train=dict(step=functools.partial(one_round, combine=sum))),
    "losses divided by their EMA (write-up)": DIVIDED,
    "one source base": Variant(["--bases", "toy-qwen-m"]),
    "three source bases": Variant(["--bases", "toy-qwen-s,toy-qwen-m,toy-qwen-l"]),
    "all seven modules": Variant(["--modules", "all"]),
    "rank 4": Variant(["--rank", "4"]),
    "rank 16": Variant(["--rank", "16"]),
    "d_c 8": Variant(train=dict(sizes=dict(d_c=8))),
    "d_c 256": Variant(train=dict(sizes=dict(d_c=256))),
}
PORT_ABLATIONS = {                                                                   # ports of the core as shipped
    "port: P_in aligned": Variant(["--align"]),
    "port: e at random": Variant(port=dict(change=random_e)),
    "port: e at random, its rate 1": Variant(port=dict(change=random_e, rates={"e": 1.0})),
    "port: e by depth, its rate 1": Variant(port=dict(rates={"e": 1.0})),
    "port: 8 rows a task in a round, lr 1.5, a quarter of the rounds": Variant(
        ["--batch-size", "8", "--lr", "1.5"], port=dict(settings={"least": 112})),
    "port: features not whitened": Variant(port=dict(settings={"whiten": 0})),
    "port: P_out small random": Variant(
        port=dict(change=lambda converter: [p.data.normal_(std=0.02) for p in converter.P_out.values()])),
}

# Some tasks stay under-fit (section 7). Is the core too small, or is it the optimisation? With all rows, each line
# changes one of the two: the size (rank, latent, width), or the optimisation (more rounds, tasks at equal strength,
# LayerNorm); and the worst task is trained alone, on the core that was too small for it among fourteen. As printed: as
# in the write-up, without LayerNorm and with every loss divided by its running mean.
PRINTED = Variant(["--norm", "none", "--epochs", "4"], EMA())
COMPETITION = {
    "": Variant(),
    "as printed": PRINTED,
    "as printed, the worst task alone": PRINTED,
    "as printed, EMA never below .1": PRINTED._replace(weigh=EMA(floor=0.1)),
    "as printed, losses not divided": PRINTED._replace(weigh=None),
    "as printed, losses not divided, task gradients at equal norm": PRINTED._replace(weigh=equal_norms),
    "as printed, rank 16": PRINTED._replace(flags=[*PRINTED.flags, "--rank", "16"]),
    "as printed, d_z 256, hidden 512": PRINTED._replace(train=dict(sizes=dict(d_z=256, hidden=512))),
    "as printed, three times the epochs": PRINTED._replace(flags=[*PRINTED.flags, "--epochs", "12"]),
    "as shipped, losses divided by their EMA": DIVIDED,
}


def watched(path, every=25):
    """Returns a `step` for train.fit: one_round that before every `every`-th round appends a line a base to `path`: of
    each task's gradient on the core, as it will be added to the others', norm and cosine with the others' sum."""
    def step(bases, generate, learners, items, max_tokens, weigh=None):
        core = [p for p in generate.__self__.core.parameters() if p.requires_grad]
        number = learners[0].schedule.last_epoch                                     # of the round, also after a kill
        for base in bases if number % every == 0 else ():
            adapters = generate(base.name)
            losses, gradients = task_gradients(base, adapters, items[base.name], max_tokens)
            if weigh:                                                                # a copy: the round itself counts
                gradients = copy.deepcopy(weigh)(base.name, losses, gradients)       # these losses in its means
            own = []
            for t in range(len(losses)):
                alone = [F.one_hot(torch.tensor(t), len(g)).view(-1, 1, 1, 1).to(g) * g for g in gradients]
                parts = torch.autograd.grad(adapters.tensors(), core, alone, retain_graph=True)
                own.append(torch.cat([p.flatten() for p in parts]))
            own = torch.stack(own)                                                   # [T, parameters of the core]
            cosines = F.cosine_similarity(own, own.sum(0) - own)                     # [T]
            append_jsonl(path, dict(round=number, base=base.name, norms=own.norm(dim=1).tolist(),
                                    cosines=cosines.tolist(), losses=losses.tolist()))
        return one_round(bases, generate, learners, items, max_tokens, weigh)
    path.parent.mkdir(parents=True, exist_ok=True)
    return step
