"""The generator against a hand-written numpy evaluation of its equations; initialisations and default sizes."""
import math

import numpy as np
import pytest
import torch
from conftest import SIZES, tiny_base
from helpers import make_portal

from portal import Config, Converter


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, weight, bias):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_factors_equal_the_equations_in_numpy(norm):
    base = tiny_base()
    portal = make_portal(base, norm, modules=("q", "down"))
    portal.core.double(), portal.converters["tiny"].double()
    portal.z.data = portal.z.data.double()
    adapters = portal.adapters("tiny")
    p = {k: v.detach().numpy() for k, v in portal.core.state_dict().items()}
    c = {k: v.detach().numpy() for k, v in portal.converters["tiny"].state_dict().items()}
    r, d_c, hidden = SIZES["rank"], SIZES["d_c"], SIZES["hidden"]
    for t, z in enumerate(portal.z.detach().numpy()):
        film = p["film.weight"] @ z + p["film.bias"]
        gamma, beta = film[:hidden], film[hidden:]
        for l, e in enumerate(c["e"]):
            h = p["W1.weight"] @ np.concatenate([z, e]) + p["W1.bias"]
            h = gelu(layer_norm(h, p["norm1.weight"], p["norm1.bias"]) if norm == "layer" else h)
            h = p["W2.weight"] @ ((1 + gamma) * h + beta) + p["W2.bias"]
            h = gelu(layer_norm(h, p["norm2.weight"], p["norm2.bias"]) if norm == "layer" else h)
            for m in ("q", "down"):
                A_hat = (p[f"head_A.{m}.weight"] @ h + p[f"head_A.{m}.bias"]).reshape(r, d_c)
                B_hat = (p[f"head_B.{m}.weight"] @ h + p[f"head_B.{m}.bias"]).reshape(d_c, r)
                np.testing.assert_allclose(adapters.A[m][t, l].detach().numpy(), A_hat @ c[f"P_in.{m}"], rtol=1e-10)
                np.testing.assert_allclose(adapters.B[m][t, l].detach().numpy(), c[f"P_out.{m}"] @ B_hat, rtol=1e-10)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_initialisations(norm):
    """With norm "none" the write-up's; else P_in x, P_out x (at most) and A x have the size of x."""
    base = tiny_base()
    portal = make_portal(base, norm, random=False, d_z=256, d_c=1024, d_e=32, hidden=256)
    converter, x = portal.converters["tiny"], torch.randn(base.groups["q"].d_in, 999)
    assert portal.z.std().item() == pytest.approx(0.02 if norm == "none" else (32 / 256) ** 0.5, rel=0.1)
    if norm == "none":
        assert converter.P_in["q"].std().item() == pytest.approx(0.02, rel=0.05)
        assert converter.P_out["v"].std().item() == pytest.approx(0.02, rel=0.05)
    else:
        assert (converter.P_in["q"] @ x).std().item() == pytest.approx(1, rel=0.1)
        assert torch.linalg.matrix_norm(converter.P_out["v"], 2).item() < 2
        A = portal.adapters("tiny").A["q"].flatten(0, 2)
        assert 0.3 < (A @ x).std().item() < 1
    assert converter.e.std().item() == pytest.approx(1, rel=0.3)
    assert not portal.core.film.weight.any() and not portal.core.film.bias.any()
    assert not any(head.weight.any() or head.bias.any() for head in portal.core.head_B.values())
    port = Converter(portal.cfg, {g: group._replace(layers=tuple(range(5))) for g, group in base.groups_of("qv").items()},
                     like=converter, port=True)                           # from 3 layers to 5
    assert not any(p.any() for p in port.P_out.values()) and all(p.any() for p in port.P_in.values())
    assert torch.equal(port.e, converter.e[[0, 0, 1, 2, 2]]) and port.e.requires_grad     # by relative depth


def test_defaults_are_the_write_ups_sizes():
    cfg = Config(tasks=["a"])
    assert (cfg.d_z, cfg.d_e, cfg.hidden, cfg.d_c, cfg.rank, cfg.alpha, cfg.modules) == (256, 32, 512, 1024, 8, 16, ["q", "v"])
