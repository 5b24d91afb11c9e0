"""The generator against a hand-written numpy evaluation of its equations, and a run's way to disk and back."""
import math

import numpy as np
import pytest
import torch
from conftest import SIZES, tiny_base

from cli import BadInput
from portal import MODULES, Config, Converter, Portal, load_config, load_portal, save_portal, save_tensors
from cli import write_json


def make_portal(base, norm="layer", modules=("q", "v"), tasks=("one", "two", "three"), random=True, **sizes):
    torch.manual_seed(1)
    portal = Portal(Config(tasks=list(tasks), modules=list(modules), norm=norm, **{**SIZES, **sizes}))
    portal.converters[base.name] = Converter(portal.cfg, base.layers, base.dims)
    if random:  # away from the zeros of the initialisation
        for p in [portal.z, *portal.core.parameters(), *portal.converters[base.name].parameters()]:
            torch.nn.init.normal_(p, std=0.3)
    return portal


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


def test_initialisations_are_the_write_ups():
    base = tiny_base()
    portal = make_portal(base, random=False, d_z=256, d_c=1024, d_e=32)
    converter = portal.converters["tiny"]
    assert portal.z.std().item() == pytest.approx(0.02, rel=0.1)
    assert converter.P_in["q"].std().item() == pytest.approx(0.02, rel=0.05)
    assert converter.P_out["v"].std().item() == pytest.approx(0.02, rel=0.05)
    assert converter.e.std().item() == pytest.approx(1, rel=0.3)
    assert not portal.core.film.weight.any() and not portal.core.film.bias.any()
    assert not any(head.weight.any() or head.bias.any() for head in portal.core.head_B.values())
    port = Converter(portal.cfg, 5, base.dims, like=converter)                           # from 3 layers to 5
    assert not any(p.any() for p in port.P_out.values()) and all(p.any() for p in port.P_in.values())
    assert torch.equal(port.e, converter.e[[0, 0, 1, 2, 2]]) and port.e.requires_grad     # by relative depth


def test_defaults_are_the_write_ups_sizes():
    cfg = Config(tasks=["a"])
    assert (cfg.d_z, cfg.d_e, cfg.hidden, cfg.d_c, cfg.rank, cfg.alpha, cfg.modules) == (256, 32, 512, 1024, 8, 16, ["q", "v"])


def test_a_saved_run_loads_back_equal(tmp_path):
    base = tiny_base(name="base-1.7b")  # a dot in the name must survive
    portal = make_portal(base, modules=MODULES)
    write_json(tmp_path / "portal.json", {"config": vars(portal.cfg), "bases": [], "seed": 0, "data": ""})
    save_portal(tmp_path, portal)
    loaded = load_portal(tmp_path, ["base-1.7b"])
    assert list(loaded.converters) == ["base-1.7b"] and vars(loaded.cfg) == vars(portal.cfg)
    def tensors(p):
        return [p.z, *p.core.state_dict().values(), *p.converters[base.name].state_dict().values()]
    assert all(torch.equal(got, want) for got, want in zip(tensors(loaded), tensors(portal), strict=True))
    for got, want in zip(loaded.adapters(base.name).tensors(), portal.adapters(base.name).tensors(), strict=True):
        torch.testing.assert_close(got, want)
    assert not list(tmp_path.rglob(".*"))  # nothing temporary stays behind


@pytest.mark.parametrize("name", ["core.safetensors", "latents.safetensors", "converters/tiny.safetensors"])
def test_a_truncated_or_foreign_file_is_named(tmp_path, name):
    portal = make_portal(tiny_base())
    write_json(tmp_path / "portal.json", {"config": vars(portal.cfg), "bases": [], "seed": 0, "data": ""})
    save_portal(tmp_path, portal)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=f"{path.name}.*not a whole safetensors"):
        load_portal(tmp_path, ["tiny"])
    save_tensors(path, {"something": torch.zeros(2)})
    with pytest.raises(BadInput, match=f"{path.name}.*do not fit"):
        load_portal(tmp_path, ["tiny"])


@pytest.mark.parametrize("change", [{"config": {"tasks": ["../../elsewhere"]}}, {"bases": [{"base": "a/../../b"}]}])
def test_names_in_portal_json_cannot_lead_out_of_the_run(tmp_path, change):
    saved = {"config": {"tasks": ["one"]}, "bases": [{"base": "tiny"}], "seed": 0, "data": "data"}
    write_json(tmp_path / "portal.json", saved)
    assert load_config(tmp_path)[1].tasks == ["one"]
    write_json(tmp_path / "portal.json", {**saved, **change})
    with pytest.raises(BadInput, match="is no name of a task or a base"):
        load_config(tmp_path)
