"""The benchmark's contestants do the same work: one round of training gives the same losses and the same gradients."""
import pytest
import torch

import bench
from bases import load_base
from portal import Config, Converter, Portal
from train import EMA, one_round, portal_learner


def test_a_training_round_of_ours_and_of_portallib_is_the_same():
    portallib = pytest.importorskip("portallib")
    work = bench.Work("toy-qwen-m", bench.ROOT / "toy" / "data", "cpu", torch.float32, 4096)
    model, tokenizer = work.load_plain()
    tasks = dict(list(work.tasks(tokenizer, "train").items())[:3])
    cfg = Config(tasks=list(tasks), norm="none", d_z=8, d_e=4, hidden=16, d_c=12, rank=4, alpha=8)
    trainer = bench.portallib_trainer(portallib.PortalBase("toy", model, tokenizer), tasks, cfg, lambda: 0.0)
    alignment = trainer.alignments["toy"]

    base = work.load()
    portal = Portal(cfg)
    portal.converters[base.name] = converter = Converter(cfg, base.layers, base.dims)
    pairs = [(portal.z, trainer.task_latents), (converter.e, alignment.layer_embeddings.weight)]
    pairs += [(converter.P_in[m], alignment.input[m]) for m in cfg.modules]
    pairs += [(converter.P_out[m], alignment.output[m]) for m in cfg.modules]
    modules = [("W1", "l1"), ("W2", "l2"), ("film", "film")]
    modules = [(getattr(portal.core, a), getattr(trainer.core, b)) for a, b in modules]
    modules += [(portal.core.head_A[m], trainer.core.A[m]) for m in cfg.modules]
    modules += [(portal.core.head_B[m], trainer.core.B[m]) for m in cfg.modules]
    pairs += [(getattr(a, name), getattr(b, name)) for a, b in modules for name in ("weight", "bias")]
    for ours, theirs in pairs:
        theirs.data.add_(0.3 * torch.randn_like(theirs))                             # no zeros: all of it matters
        ours.data.copy_(theirs)

    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    trainer.train()
    learner = portal_learner(portal, {t: (rows, []) for t, rows in tasks.items()}, bench.ROUNDS, bench.ROWS, 1e-3)
    found = one_round([base], portal.adapters, [learner], {base.name: bench.encode_gold(base, tasks)}, 64, {base.name: EMA()})
    torch.testing.assert_close(found[0], torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for ours, theirs in pairs:                                                       # after the clip, before the next round
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()))
