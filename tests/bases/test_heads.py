"""Heads that scale and cap their logits, found by trying: the NLL, its gradient, and what goes the plain way."""
import pytest
import torch
from helpers import items, random_adapters
from test_sites import base_of

import bases.heads as heads
from data import collate
from kernels.cross_entropy import nll_of

HEADS = {"Qwen3ForCausalLM": ({}, 1, None), "CohereForCausalLM": (dict(logit_scale=0.3), 0.3, None),
         "GraniteForCausalLM": (dict(logits_scaling=13.0), 1 / 13, None),
         "Gemma2ForCausalLM": (dict(head_dim=8, final_logit_softcapping=0.7), 1, 0.7),
         "PhiForCausalLM": ({}, 1, None),                                            # has a bias
         "FalconH1ForCausalLM": (dict(lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                                      mamba_d_state=8, mamba_n_groups=1), 0.5, None)}


def compare(base):
    """Base.nll, its loss and the gradients on adapters, in float64, against the same from all logits."""
    base.model.double()
    batch, found = collate(items(3 if base.packs else 1)), []
    weight = torch.rand(batch.target.shape)
    for way in (base.nll, lambda b, a, w: nll_of(base.logits(b, a), b.source, b.target, w)):
        leaf = random_adapters(base, modules=base.kinds, dtype=torch.float64).map(lambda a: a.requires_grad_())
        loss, nll, none = way(batch, leaf, weight)
        assert none is None
        found.append([loss.detach(), nll, *torch.autograd.grad(loss, leaf.tensors())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        assert want.any()


@pytest.mark.parametrize("architecture", HEADS)
def test_scale_and_cap_are_found_and_exact(architecture):
    config, scale, cap = HEADS[architecture]
    base = base_of(architecture, **config)
    assert base.head.scale == pytest.approx(scale, rel=1e-6) and base.head.cap == (cap and pytest.approx(cap, rel=1e-6))
    assert architecture != "PhiForCausalLM" or base.head.linear.bias is not None
    compare(base)


@pytest.mark.parametrize("change", [
    lambda z: z + 0.1, lambda z: z.clamp(max=50), lambda z: z * torch.linspace(1, 2, z.shape[-1]), lambda z: z[..., :-2],
    lambda z: z.bfloat16(), lambda z: z - z.mean(-1, keepdim=True), lambda z: z * z.max(), lambda z: z.abs()])
def test_what_is_made_of_logits_in_another_way_goes_the_plain_way(change):
    base = base_of("Qwen3ForCausalLM")
    forward = base.model.forward
    def changed(**inputs):
        out = forward(**inputs)
        out.logits = change(out.logits)
        return out
    base.model.forward = changed
    assert base.head is None
    if change(torch.zeros(1, 64)).shape[-1] == 64:
        compare(base)


def test_a_head_of_another_kind_goes_the_plain_way():
    base = base_of("Qwen3ForCausalLM")
    head = base.model.lm_head
    head.forward = lambda x, f=head.forward: f(x) * 1.5                              # not what its weight says
    assert base.head is None
    compare(base)
    class Other(torch.nn.Linear):
        pass
    base.model.lm_head = Other(24, 64)
    assert heads.find(base) is None
