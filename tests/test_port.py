"""Where a port starts: P_in by regression on a source base, against least squares in numpy over plain forward passes.
The coordinates it is learned in: whitened features, against numpy."""
import copy

import numpy as np
import pytest
import torch
from conftest import tiny_base, tiny_model, tiny_tokenizer
from helpers import make_portal, small_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import port
import train
from bases import Base
from bases.tokens import Limits
from portal import Converter
from runtime.files import BadInput
from runtime.job import Job
from starts import align
from starts.align import layer_inputs

TEXTS = ["w1 w22 w3 Answer :", "w40 w4", "w7 w8 w9 w10 w11 w7"]


def letters():
    """A tokenizer that cuts every text into single characters."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate("_w0123456789 Answer:")}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_", eos_token="_")


def inputs(model, ids, kind):
    """[L][S, d_in] what `kind`'s projection reads in every layer of an unpatched model."""
    found = []
    hooks = [module.register_forward_hook(lambda _, args, y: found.append(args[0][0].double().numpy()))
             for name, module in model.named_modules() if name.endswith(f"{kind}_proj")]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def test_alignment_is_ridge_regression_over_tokens_that_end_together():
    base, source = tiny_base("gemma3", 1, torch.float64), Base(tiny_model("qwen3", 2, torch.float64), letters(), "source")
    portal = make_portal(source, modules=("q", "down"))
    like = portal.converters["source"]
    made = Converter(portal.cfg, base.groups_of(portal.cfg.modules), like, port=True)
    before = {name: p.clone() for name, p in made.state_dict().items()}
    port.align(made, base, like, source, TEXTS)

    plain, plain_source = tiny_model("gemma3", 1, torch.float64), tiny_model("qwen3", 2, torch.float64)
    for m in ("q", "down"):
        X, Y = [], []
        for text in TEXTS:
            words = text.split()
            ends = [len(" ".join(words[:k + 1])) - 1 for k in range(len(words))]      # of each word, its last character
            x, y = inputs(plain, tiny_tokenizer()(text).input_ids, m), inputs(plain_source, letters()(text).input_ids, m)
            X += x                                                                   # three layers each: twins are equals
            Y += [layer[ends] @ like.P_in[m].detach().double().numpy().T for layer in y]
        X, Y = np.concatenate(X), np.concatenate(Y)
        ridge = np.sqrt(1e-2 * (X ** 2).sum(0).mean()) * np.eye(X.shape[1])
        want = np.linalg.lstsq(np.concatenate([X, ridge]), np.concatenate([Y, np.zeros((len(ridge), Y.shape[1]))]), rcond=None)[0].T
        np.testing.assert_allclose(made.P_in[m].detach().numpy(), want, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in made.state_dict().items() if not name.startswith("P_in"))


def test_a_base_aligned_with_itself_reads_as_it_does():
    base = tiny_base()
    portal = make_portal(base)
    like = portal.converters["tiny"]
    made = Converter(portal.cfg, base.groups_of(portal.cfg.modules), like, port=True)
    texts = [" ".join(f"w{(7 * i + k) % 50}" for k in range(9)) for i in range(40)]
    port.align(made, base, like, tiny_base(), texts)
    x = torch.cat([x for text in texts[:5] for (m, _), x in layer_inputs(base, text, ["q"])[0].items()])
    want = x @ like.P_in["q"].T
    assert (x @ made.P_in["q"].T - want).norm() < 0.1 * want.norm()


def test_alignment_keeps_to_the_models_positions_passes_by_zeros_and_needs_the_ends_of_tokens(monkeypatch):
    base, source = tiny_base(), tiny_base(name="source")
    portal = make_portal(source)
    made = Converter(portal.cfg, base.groups_of(portal.cfg.modules), portal.converters["source"], port=True)
    before, read = made.P_in["q"].clone(), []
    base.tokenizer.limits = source.tokenizer.limits = Limits(length=7)
    def zeros(*args, f=align.shared_inputs):
        found = [{key: x * (key[0] != "q") for key, x in side.items()} for side in f(*args)]
        read.extend(len(x) for side in found for x in side.values())
        return found
    monkeypatch.setattr(align, "shared_inputs", zeros)
    port.align(made, base, portal.converters["source"], source, ["w1 w2 w3 " * 9])
    assert set(read) == {7} and torch.equal(made.P_in["q"], before) and torch.isfinite(made.P_in["v"]).all()
    monkeypatch.setattr(type(source.tokenizer), "is_fast", False)
    with pytest.raises(BadInput, match="--align: the tokenizer of tiny does not tell where in a text its tokens end"):
        port.align(made, base, portal.converters["source"], source, ["w1"])


def test_an_aligned_port_reads_at_the_size_of_a_random_one(monkeypatch, tmp_path):
    """Whatever size regression gives a group's P_in, rows of A are as long as those of A_hat: a group learns at B's rate
    times that. A group that regression makes zero stays zero."""
    base, source = tiny_base("gemma3", 1, name="target"), tiny_base(name="source")
    portal, started = make_portal(source, modules=("q", "v", "down")), []
    def aligned(converter, *args, f=port.align):
        f(converter, *args)
        converter.P_in["q"].data.mul_(100), converter.P_in["down"].data.mul_(0.01), converter.P_in["v"].data.zero_()
        started.append({g: P.clone() for g, P in converter.P_in.items()})
    monkeypatch.setattr(port, "align", aligned)
    made = []
    def stop(job, bases, generate, learners, rows, step):
        (A, _, _), (A_hat, _) = generate("target"), portal.core(portal.z, portal.converters["target"].e)
        for g, d_c in (("q", A_hat["q"]), ("down", A_hat["down"])):
            lengths = [sum(float(np.linalg.norm(row)) for row in a.detach().numpy().reshape(-1, a.shape[-1])) for a in (A[g], d_c)]
            assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
        assert not A["v"].any() and torch.isfinite(A["v"]).all()
        P, old = portal.converters["target"].P_in["q"], started[0]["q"]
        torch.testing.assert_close(P / P.norm(), old / old.norm())                   # scaled, and nothing else
        made.append(True)
    monkeypatch.setattr(port, "fit", stop)
    rows = small_rows()
    port.port(Job("port", dict(epochs=1, batch_size=2, max_tokens=99), 0, tmp_path / "log.jsonl"), portal, base, rows,
              dict(whiten=0, batch_size=2, least=1, lr=0.1, epochs=1), lambda name: source)
    assert made


# ---------------------------------------------------------------------------------------------- whitened features
def trained_portal(base):
    """A Portal on tiny bases whose B-heads and FiLM are no longer zero, and a converter of `base` at a port's start."""
    portal = make_portal(tiny_base(name="source"), modules=("q", "down"))
    for p in portal.core.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return portal, Converter(portal.cfg, base.groups_of(portal.cfg.modules), portal.converters["source"], port=True)


def test_whitened_features_are_uncorrelated_and_the_adapters_stay():
    base = tiny_base("llama", name="target")
    portal, converter = trained_portal(base)
    for P in converter.P_out.values():
        torch.nn.init.normal_(P)
    start = {name: p.clone() for name, p in converter.state_dict().items()}
    with torch.no_grad():
        before, features = converter(portal.core, portal.z), portal.core(portal.z, converter.e)
        core, back = port.whiten(portal.core, portal.z, converter, 1e-3)
        after, white = converter(core, portal.z), core(portal.z, converter.e)
        for old, new in zip(before, after, strict=True):
            for g in old:
                torch.testing.assert_close(old[g], new[g], rtol=1e-3, atol=1e-4)
        for old, new in zip(features, white):
            for m in old:
                X, Y = ((a if a.shape[-1] == portal.cfg.d_c else a.mT).flatten(0, -2).double().numpy() for a in (old[m], new[m]))
                values = np.linalg.eigvalsh(X.T @ X / len(X))                        # of each feature's direction
                c = values.mean()
                want = np.sort(values / (values + 1e-3 * c))                         # as large as before on the whole
                np.testing.assert_allclose(np.linalg.eigvalsh(Y.T @ Y / len(Y)), want * c / want.mean(), rtol=1e-3, atol=1e-5 * c)
                assert values[-1] > 2 * c
        for P, turn in back.items():
            P.copy_(turn(P))
    assert len(back) == 4
    for name, p in converter.state_dict().items():
        torch.testing.assert_close(p, start[name], rtol=1e-3, atol=1e-4)


def test_a_port_ends_with_the_converter_of_the_core_as_it_was(tmp_path):
    """Its adapters are those that the last step left, and its scores those of the epoch that was selected."""
    base, rows = tiny_base("llama", name="target"), small_rows()
    portal, _ = trained_portal(base)
    core, last = copy.deepcopy(portal.core.state_dict()), []
    def step(bases, generate, *rest):
        losses = train.one_round(bases, generate, *rest)
        last.append(generate("target").map(torch.clone))
        return losses
    settings = dict(train.TOY["port"], epochs=2, batch_size=2, least=3)
    job = Job("port", settings, 0, tmp_path / "log.jsonl")
    learner, _ = port.port(job, portal, base, rows, settings, step=step)
    assert all(torch.equal(p, core[name]) for name, p in portal.core.state_dict().items())
    for got, want in zip(portal.adapters("target").tensors(), last[-1].tensors(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        assert want.abs().max() > 1e-3
    learner.load_best()
    for got, want in zip(portal.adapters("target").tensors(), last[3 * learner.epoch - 1].tensors(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_whitening_changes_the_fit(tmp_path):
    ends = []
    for eps in (0, 0.1):
        base, rows = tiny_base("llama", name="target"), small_rows()
        torch.manual_seed(1)
        portal, _ = trained_portal(base)
        settings = dict(train.TOY["port"], epochs=1, batch_size=2, least=3, whiten=eps)
        port.port(Job("port", settings, 0, tmp_path / "log.jsonl"), portal, base, rows, settings)
        ends.append(portal.converters["target"].P_in["q"])
    assert not torch.allclose(*ends)


def test_a_killed_port_goes_on_where_whitening_rounds_otherwise_and_not_with_another_eps(tmp_path, monkeypatch, capsys):
    def started(round_, eps=0.1):
        def step(*args):
            if step.done == round_:
                raise KeyboardInterrupt
            step.done += 1
            return train.one_round(*args)
        step.done = 0
        base, rows = tiny_base("llama", name="target"), small_rows()
        torch.manual_seed(1)
        portal, _ = trained_portal(base)
        settings = dict(train.TOY["port"], epochs=1, batch_size=2, least=6, whiten=eps)
        port.port(Job("port", settings, 0, tmp_path / "log.jsonl", tmp_path / "state"), portal, base, rows, settings,
                  step=step)
    def noisy(*args, plain=port.whiten):
        core, back = plain(*args)
        for p in back:
            p.data.mul_(1 + 1e-7)
        return core, back
    with pytest.raises(KeyboardInterrupt):
        started(2)
    monkeypatch.setattr(port, "whiten", noisy)                                       # as on another device
    with pytest.raises(KeyboardInterrupt):
        started(1)
    assert "continuing port after round 2" in capsys.readouterr().out
    started(9, eps=0.2)
    assert "another configuration" in capsys.readouterr().out
