"""What the ablations hand in: to one round, to the port's fresh converter, and the record of the gradients between tasks."""
import json

import pytest
import torch
from conftest import SIZES, tiny_base
from helpers import make_portal, small_rows, some_items

from experiments.ablations import ABLATIONS, COMPETITION, DIVIDED, PORT_ABLATIONS, Variant, equal_norms, watched
from port import Change
from portal import Config, Converter, Portal
from experiments.ablations import EMA
from train import one_round, portal_learner, task_gradients

SETTINGS = dict(epochs=1, batch_size=1, lr=1e-2, least=1)


def fit_once(change=lambda portal: None, step=one_round):
    """A round of training -> (the core, its parameters before)."""
    base = tiny_base()
    torch.manual_seed(0)
    made = Portal(Config(tasks=["one", "two", "three"], **SIZES))
    made.converters[base.name] = Converter(made.cfg, base.groups_of(made.cfg.modules))
    torch.nn.init.normal_(made.core.head_B["q"].weight)                              # else the trunk has no gradient yet
    change(made)
    before = {name: p.clone() for name, p in made.core.named_parameters()}
    learner = portal_learner(made, small_rows(), SETTINGS)
    step([base], made.adapters, [learner], {"tiny": some_items()}, 40, EMA())
    return made.core, before


def test_without_film_the_rest_learns():
    core, before = fit_once(**ABLATIONS["no FiLM, z in the input alone"].train)
    changed = {name for name, p in core.named_parameters() if not torch.equal(p, before[name])}
    assert not core.film.weight.any() and changed >= {"W1.weight", "W2.weight", "head_B.q.weight"}
    core, before = fit_once(**ABLATIONS["bases' gradients on z not balanced"].train)  # and otherwise it learns
    assert core.film.weight.any()


def test_unbalanced_gradients_on_z_are_added():
    """With lr 0, so that a second round starts where the first did; the clip at norm 1 changes the length alone."""
    bases = [tiny_base(seed=k, name=name) for k, name in enumerate(("tiny", "other"))]
    made = make_portal(bases[0])
    made.converters["other"] = Converter(made.cfg, bases[1].groups_of(made.cfg.modules))
    torch.nn.init.normal_(made.converters["other"].P_out["q"])
    def gradient(bases, step):
        learner = portal_learner(made, small_rows(), dict(SETTINGS, lr=0.0))
        step(bases, made.adapters, [learner], dict.fromkeys(("tiny", "other"), some_items()), 40)
        return made.z.grad / made.z.grad.norm()
    parts = []
    for base in bases:
        adapters = made.adapters(base.name)
        _, gradients = task_gradients(base, adapters, some_items(), 40)
        parts += torch.autograd.grad(adapters.tensors(), made.z, gradients)
    plain = sum(parts) / sum(parts).norm()
    torch.testing.assert_close(gradient(bases, ABLATIONS["bases' gradients on z not balanced"].train["step"]), plain)
    assert (gradient(bases, one_round) - plain).norm() > 1e-2


def test_tasks_at_equal_norm_and_the_ema():
    base = tiny_base()
    made = make_portal(base)
    losses, plain = task_gradients(base, made.adapters("tiny"), some_items(), 40)
    kept = losses.clone()
    equal = equal_norms("tiny", losses, plain)
    assert torch.equal(losses, kept)
    norms = [torch.cat([g[t].flatten() for g in equal]).norm() for t in range(3)]
    before = [torch.cat([g[t].flatten() for g in plain]).norm() for t in range(3)]
    torch.testing.assert_close(torch.stack(norms), torch.stack(before).mean().expand(3))
    trained, ported = map(DIVIDED.arguments, ("train", "port"))
    assert isinstance(trained["weigh"], EMA) and isinstance(ported["how"].weigh, EMA)  # in both fits
    assert [Variant().arguments(name) for name in ("train", "port", "eval")] == [dict(weigh=None), dict(how=Change()), {}]
    assert COMPETITION["as printed, EMA never below .1"].weigh.floor == 0.1
    ema, ones = EMA(floor=0.25), [torch.ones(2, 1, 1, 1)]
    assert ema("tiny", torch.tensor([2.0, 0.125]), ones)[0].flatten().tolist() == [0.5, 4]
    torch.testing.assert_close(ema("tiny", torch.tensor([1.0, 10.0]), ones)[0].flatten(),
                               torch.tensor([1 / 1.9, 1 / 1.1125]))


def test_what_is_handed_to_the_port():
    base = tiny_base()
    made = make_portal(base)
    like = made.converters["tiny"]
    def changed(name=None):
        converter = Converter(made.cfg, base.groups_of(made.cfg.modules), like, port=True)
        how = Change(**(PORT_ABLATIONS[name].port if name else {}))
        how.change(converter)
        return converter, how.rates
    (plain, _), (random_e, _), (random_P, _) = map(changed, (None, "port: e at random", "port: P_out small random"))
    assert torch.equal(plain.e, like.e) and not any(p.any() for p in plain.P_out.values())
    assert not torch.isclose(random_e.e, like.e).any() and random_e.e.std() > 0.5
    assert not any(p.any() for p in random_e.P_out.values())
    assert torch.equal(random_P.e, like.e)
    assert all(0.01 < p.std() < 0.03 for p in random_P.P_out.values())
    for p in (made.z, *made.core.parameters()):
        p.requires_grad_(False)                                                      # as in a port
    rates = changed("port: e by depth, its rate 1")[1]
    groups = portal_learner(made, small_rows(), SETTINGS, rates).optimizer.param_groups
    assert groups[-1]["params"] == [like.e] and groups[-1]["initial_lr"] == 1.0
    assert sum(len(group["params"]) for group in groups) == 5


class Counted(EMA):
    """An EMA that lists who was called."""
    calls = []

    def __call__(self, *args):
        self.calls.append(id(self))
        return super().__call__(*args)


@pytest.mark.parametrize("ema", [False, True])
def test_gradients_between_tasks_add_up_to_the_rounds(tmp_path, ema):
    """The norms and cosines that are written, against one backward pass a task through the generator."""
    base = tiny_base()
    made = make_portal(base)
    learner, weigh = portal_learner(made, small_rows(), dict(SETTINGS, lr=0.0)), Counted() if ema else None
    watched(tmp_path / "g.jsonl")([base], made.adapters, [learner], {"tiny": some_items()}, 40, weigh)
    assert not ema or weigh.calls.count(id(weigh)) == 1 and len(weigh.calls) == 2     # a copy for what is written
    record, = map(json.loads, (tmp_path / "g.jsonl").read_text().splitlines())
    own = []
    for t in range(3):
        for p in made.core.parameters():
            p.grad = None
        adapters = made.adapters("tiny")
        losses, gradients = task_gradients(base, adapters, some_items(), 40)
        for g in gradients:
            g[[s for s in range(3) if s != t]] = 0
        torch.autograd.backward(adapters.tensors(), [g / losses[t] if ema else g for g in gradients])
        own.append(torch.cat([p.grad.flatten() for p in made.core.parameters()]))
    for t in range(3):
        others = sum(own) - own[t]
        assert record["norms"][t] == pytest.approx(own[t].norm().item(), rel=1e-4)
        assert record["cosines"][t] == pytest.approx((own[t] @ others / own[t].norm() / others.norm()).item(), abs=1e-4)
