"""experiments/methods.py: what a start changes and what it leaves, against plain loops and least squares."""
import copy

import numpy as np
import pytest
import torch
from conftest import tiny_base
from helpers import make_portal, random_adapters, small_rows

from baselines import cross_lora
from bases import encode, same_depths
from experiments import methods
from experiments.methods import World, loras, ports
from port import align
from score import score
from starts.align import keep_size, layer_inputs, shared_inputs
from tasks.rows import SoftRow

MODULES = ["q", "v"]


@pytest.fixture
def here():
    """A port from a tiny Qwen3 to a tiny Llama, of a core of random numbers."""
    source, base, rows = tiny_base(name="source"), tiny_base("llama", name="target"), small_rows()
    adapters = random_adapters(source, rank=16)
    return World([base], rows, make_portal(source), source, lambda: adapters)


@pytest.fixture
def at_home(here):
    """The same from the source to itself, with many texts."""
    own = World([here.source], here.rows, here.portal, here.source, here.loras)
    own.texts = [" ".join(f"w{(7 * i + j * j) % 50}" for j in range(9)) for i in range(50)]
    return own


def test_ridge_maps_solve_their_least_squares_and_carry_a_lora(here, at_home):
    """Against numpy on the same token ends; on the source itself a carried LoRA comes back."""
    here.texts = ["w1 w22 w3 w4", "w40 w4 w7"]
    M, R = here.maps["v", 1]
    s, = [s for (l, *_), (s, *_) in same_depths(here.base, here.source, "v") if l == 1]
    pairs = [shared_inputs(here.base, here.source, text, ["v"]) for text in here.texts]
    X, Y = (np.concatenate([pair[k]["v", l].double().numpy() for pair in pairs]) for k, l in ((0, 1), (1, s)))
    lam = 1e-2 * (X ** 2).sum(0).mean()
    want = np.linalg.lstsq(np.concatenate([X, lam ** 0.5 * np.eye(X.shape[1])]), np.concatenate([Y, np.zeros((X.shape[1], Y.shape[1]))]),
                           rcond=None)[0].T
    np.testing.assert_allclose(M, want, rtol=1e-3, atol=1e-5)
    assert R.shape == (here.base.groups["v"].d_out, here.source.groups["v"].d_out)
    at_home.maps = methods.ridge_maps(at_home, 1e-9)
    with torch.no_grad():
        carried, own = loras(at_home, carry="maps")[2](), here.loras()
    x = layer_inputs(here.source, at_home.texts[0], ["v"])[0]["v", 0]
    for t in range(3):
        got, want = (x @ a.A["v"][t, 0].T @ a.B["v"][t, 0].T for a in (carried, own))
        assert (got - want).norm() < 0.05 * want.norm()


def test_ports_leave_the_world_as_it_is_and_start_as_named(here):
    before = copy.deepcopy(here.portal)
    def of(**settings):
        torch.manual_seed(1)
        stages, rows, generate = ports(here, **settings)
        assert "labels" in settings or rows is here.rows
        return generate.__self__, generate("target"), stages
    plain, adapters, stages = of()
    assert all(not b.any() for b in adapters.B.values()) and len(stages) == 1
    _, (learner,) = stages[0](0.1, 7)
    assert learner.rounds == 7 and {id(p) for p in learner.params} == {id(p) for p in plain.converters["target"].parameters()}
    swapped, *_ = of(swapped=True)
    assert torch.equal(swapped.z[1], here.portal.z[0]) and torch.equal(plain.z, here.portal.z)
    untrained, *_ = of(untrained=True)
    for m in MODULES:
        new, old = untrained.core.head_B[m].weight, here.portal.core.head_B[m].weight
        assert not torch.equal(new, old) and abs(new.std() / old.std() - 1) < 0.2
    assert torch.equal(of(labels=0)[0].z, here.portal.z)
    taught, (own, held) = ports(here, labels=1)[1], here.rows["two"]
    assert taught["two"][1] is held and taught["two"][0][0] is own[0] and len(own) > 1
    assert all(isinstance(row, SoftRow) and row[:3] == was[:3] for row, was in zip(taught["two"][0][1:], own[1:], strict=True))
    assert all(isinstance(row, SoftRow) for row in ports(here, labels=0)[1]["two"][0])
    here.soft.pop(id(own[0]))                                                        # a row without an answer is left out
    assert len(ports(here, labels=0)[1]["two"][0]) == len(own) - 1 and ports(here, labels=1)[1]["two"][0][0] is own[0]
    converter = here.converter()
    align(converter, here.base, here.like, here.source, here.texts)
    keep_size(here.portal.core, here.portal.z, converter)
    assert torch.equal(of(aligned=True)[0].converters["target"].P_in["q"], converter.P_in["q"])
    assert torch.equal(plain.converters["target"].e, converter.e)
    unfrozen, _, (first, second) = of(unfreeze=True)
    (_, (a,)), (_, (b,)) = first(0.1, 9), second(0.1, 9)
    assert (a.rounds, b.rounds) == (6, 3) and {id(p) for p in b.params} > {id(p) for p in a.params}
    assert len(b.params) == len(a.params) + 1 + len([*unfrozen.core.parameters()]) and b.z is unfrozen.z
    assert torch.equal(before.z, here.portal.z) and here.portal.core.W1.weight.requires_grad
    assert all(torch.equal(p, q) for p, q in zip(before.core.parameters(), here.portal.core.parameters(), strict=True))


@torch.no_grad()
def test_a_carried_lora_starts_where_the_transfer_ends(here):
    carried = cross_lora.transfer(cross_lora.copy, here.loras(), here.source, here.base)
    items = encode(here.base.tokenizer, here.rows["one"][1], list(here.rows))[0]
    own, half = (score(here.base, adapters, items, 999) for adapters in (
        loras(here, carry="copy", factor=0.5)[2](), carried._replace(scale=carried.scale / 2)))
    torch.testing.assert_close(torch.tensor(own), torch.tensor(half))


def test_a_lora_after_a_port_starts_as_what_the_port_generates(here):
    """Its further ranks and modules are fresh, with B = 0; the rounds add up to those asked for."""
    (first, then), rows, result = loras(here, ported=dict(aligned=True, eps=0.1))
    generate, (port,) = first(0.1, 7)
    with torch.no_grad():
        for P in generate.__self__.converters["target"].P_out.values():
            P.normal_()
        wanted = generate("target")
    _, learners = then(0.1, 7)
    assert port.rounds == 3 and len(learners) == 3 and {learner.rounds for learner in learners} == {4}
    items = encode(here.base.tokenizer, here.rows["one"][1], list(rows))[0]
    with torch.no_grad():
        got, want = (score(here.base, adapters, items, 999) for adapters in (result("target"), wanted))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want))
    assert not result("target").B["up"].any() and result("target").A["up"].any()


def test_the_mean_of_the_others_is_the_mean_of_their_deltas(here):
    own = random_adapters(here.base)
    found = methods.others_mean(own)
    for g in own.A:
        deltas, got = (torch.einsum("tlor,tlri->tloi", adapters.B[g], adapters.A[g]) for adapters in (own, found))
        for t in range(3):
            torch.testing.assert_close(got[t], sum(deltas[u] for u in range(3) if u != t) / 2, rtol=1e-4, atol=1e-4)
    result = loras(here, mean=True)[2]("target")
    assert {a.shape[2] for a in result.A.values()} == {2 * 16} and found.scale == own.scale


def test_rows_in_the_prompt_are_those_of_train(here):
    stages, rows, result = methods.bare(here, shots=2)
    train, measured = here.rows["two"]
    assert stages == [] and result is None and rows["two"][0] is train
    want = "".join(f"{row.prompt}{row.choices[row.gold]}\n\n" for row in train[:2]) + measured[1].prompt
    assert rows["two"][1][1] == measured[1]._replace(prompt=want) and methods.bare(here)[1]["two"][1] == measured
