"""The benchmark's contestants do the same work: one round of training gives the same losses and the same gradients."""
import pytest
import torch

from experiments import contestants
from experiments.contestants import EMA
from portal import Config, Converter, Portal
from runtime.files import ROOT
from train import one_round, portal_learner


def test_a_training_round_of_ours_and_of_portallib_is_the_same():
    portallib = pytest.importorskip("portallib")
    work = contestants.Work("toy-qwen-m", ROOT / "toy" / "data", "cpu", torch.float32, 4096)
    loaded, tasks = work.load()
    plain, dataset = contestants.portallib_inputs(loaded, tasks)
    tasks = dict(list(tasks.items())[:3])
    rows = [row for task in tasks for row in dataset.rows("train", task)]
    cfg = Config(tasks=list(tasks), norm="none", d_z=8, d_e=4, hidden=16, d_c=12, rank=4, alpha=8)
    trainer = contestants.portallib_trainer(plain, portallib.ChoiceDataset(rows, rows), cfg, lambda: 0.0)
    alignment = trainer.alignments[plain.model_id]

    base, _ = work.load()
    portal = Portal(cfg)
    portal.converters[base.name] = converter = Converter(cfg, base.groups_of(cfg.modules))
    pairs = [(portal.z, trainer.task_latents), (converter.e, alignment.layer_embeddings.weight)]
    pairs += [(converter.P_in[m], alignment.input[m]) for m in cfg.modules]
    pairs += [(converter.P_out[m], alignment.output[m]) for m in cfg.modules]
    core, their_core = portal.core, trainer.core
    modules = [(core.W1, their_core.l1), (core.W2, their_core.l2), (core.film, their_core.film)]
    modules += [(core.head_A[m], their_core.A[m]) for m in cfg.modules]
    modules += [(core.head_B[m], their_core.B[m]) for m in cfg.modules]
    pairs += [(getattr(a, name), getattr(b, name)) for a, b in modules for name in ("weight", "bias")]
    for ours, theirs in pairs:
        theirs.data.add_(0.3 * torch.randn_like(theirs))                             # no zeros: all of it matters
        ours.data.copy_(theirs)

    losses = []
    plain.model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    trainer.train()
    settings = dict(epochs=contestants.ROUNDS, batch_size=contestants.ROWS, lr=1e-3, least=1)
    learner = portal_learner(portal, {task: (own, []) for task, own in tasks.items()}, settings)
    items = {base.name: contestants.gold_items(base.tokenizer, tasks)}
    found = one_round([base], portal.adapters, [learner], items, 64, EMA())
    torch.testing.assert_close(found[0], torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for ours, theirs in pairs:                                                       # after the clip and the step
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()))
