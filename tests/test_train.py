"""The mixed-task round against the one-task-at-a-time loop, and the pieces of the optimiser against worked examples."""
import json

import pytest
import torch
from conftest import exact_norms, lora_hooks, plain_loss, tiny_base, tiny_model
from helpers import NeverWaits, make_portal, of_task, small_rows, some_items

from runtime.files import BadInput
from runtime.job import Job
from data import Cycle, encode, micro_batches
from portal import Converter
from train import EMA, Learner, balance, fit, one_round, portal_learner, task_gradients


SETTINGS = dict(epochs=1, batch_size=1, lr=1e-3, least=1)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_mixed_round_equals_one_task_at_a_time(architecture, max_tokens):
    """Loss and every gradient, float64: padding, micro-batches and mixing change no mathematics. The reference runs
    each task's rows alone through an unpatched model with Hugging Face's own padded-batch loss, one graph to the end."""
    base = tiny_base(architecture, dtype=torch.float64)
    exact_norms(base.model)
    portal = make_portal(base, modules=("q", "v", "down"))
    portal.core.double(), portal.converters["tiny"].double()
    portal.z.data = portal.z.data.double()
    parameters = [portal.z, *portal.core.parameters(), *portal.converters["tiny"].parameters()]
    items = some_items()

    weights = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)                    # as the EMA would weigh the tasks
    adapters = portal.adapters("tiny")
    losses, gradients = task_gradients(base, adapters, items, max_tokens)
    torch.autograd.backward(adapters.tensors(), [weights.view(-1, 1, 1, 1) * g for g in gradients])
    got = [p.grad for p in parameters]

    model, want_losses = exact_norms(tiny_model(architecture, dtype=torch.float64)), []
    for p in parameters:
        p.grad = None
    for t in range(3):
        rows = [item for item in items if item.task == t]
        texts = [i.prompt + i.continuations[0] for i in rows]
        missing = [max(map(len, texts)) - len(text) for text in texts]
        ids = torch.tensor([text + [0] * m for text, m in zip(texts, missing)])
        mask = torch.tensor([[1] * len(text) + [0] * m for text, m in zip(texts, missing)])
        labels = torch.tensor([[-100] * len(i.prompt) + i.continuations[0] + [-100] * m for i, m in zip(rows, missing)])
        adapters = portal.adapters("tiny")
        handles = lora_hooks(model, *of_task(adapters, t))
        logits = model(input_ids=ids, attention_mask=mask).logits
        for h in handles:
            h.remove()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        want_losses.append(loss.detach())
        (weights[t] * loss).backward()
    torch.testing.assert_close(losses.double(), torch.stack(want_losses), rtol=1e-5, atol=1e-6)
    for g, p in zip(got, parameters, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-8, atol=1e-10)
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("ema", [False, True])
def test_the_loss_curve_is_that_of_the_plain_loop(tmp_path, ema):
    """Nine rounds of fit on two bases in float64 against a loop that knows none of its devices: one task after another
    through an unpatched model with hooks, adapters generated for each, whole graphs, EMA and balance written out."""
    rows, names, seed = small_rows(), ("a", "b"), 7
    def fresh():
        bases = [tiny_base(architecture, dtype=torch.float64, name=name) for architecture, name in zip(("qwen3", "llama"), names)]
        torch.manual_seed(1)
        portal = make_portal(bases[0])                                               # not at zero: z has a gradient from the start
        portal.converters = {base.name: Converter(portal.cfg, base.groups_of(portal.cfg.modules)).double() for base in bases}
        portal.core.double()
        portal.z.data = portal.z.data.double()
        for base in bases:
            exact_norms(base.model)
        return portal, bases

    portal, bases = fresh()
    settings = dict(epochs=3, batch_size=2, lr=1e-2, least=1, max_tokens=20)
    learner = portal_learner(portal, rows, settings)
    fit(Job("test", settings, seed, tmp_path / "log.jsonl"), bases, portal.adapters, [learner], rows, EMA() if ema else None)
    got = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    ends = [portal.z, *portal.core.parameters(), *portal.converters["b"].parameters()]

    portal, bases = fresh()
    models = [exact_norms(tiny_model(architecture, dtype=torch.float64)) for architecture in ("qwen3", "llama")]
    shared = [p for m in (portal.core, *portal.converters.values()) for p in m.parameters()]
    optimizer = torch.optim.AdamW([{"params": shared, "lr": 1e-2}, {"params": [portal.z], "lr": 2e-2}], weight_decay=0.0)
    cycles = {(b, t): Cycle(encode(base.tokenizer, rows[t][0], list(rows), "gold")[0], 2, f"{seed}/{b}/{t}")
              for b, base in zip(names, bases) for t in rows}
    running, want = {}, []
    for k in range(9):
        for group, lr in zip(optimizer.param_groups, (1e-2, 2e-2)):
            group["lr"] = lr * min(1.0, (9 - k) / 8)                                 # one round of warm-up, at full rate
        pulls, total = [], 0.0
        for b, model in zip(names, models):
            portal.z.grad = None
            for t, task in enumerate(rows):
                loss = plain_loss(model, of_task(portal.adapters(b), t), cycles[b, task].next())
                running[b, t] = 0.9 * running[b, t] + 0.1 * loss.item() if (b, t) in running else loss.item()
                (loss / max(running[b, t], 1e-3) if ema else loss).backward()
                total += loss.item() / 6
            pulls.append(portal.z.grad)
        mean = (pulls[0].norm() + pulls[1].norm()) / 2
        portal.z.grad = pulls[0] * mean / pulls[0].norm() + pulls[1] * mean / pulls[1].norm()
        torch.nn.utils.clip_grad_norm_([*shared, portal.z], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        want.append(total)
    assert got == pytest.approx([sum(want[i:i + 3]) / 3 for i in (0, 3, 6)], rel=1e-6) and got[2] < got[0]
    for p, q in zip(ends, [portal.z, *portal.core.parameters(), *portal.converters["b"].parameters()], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "llama", "mistral"])
def test_a_round_never_waits_for_the_device(architecture):
    """Reading a number on the host makes a GPU run dry: a round may not do it, nor ask for data-dependent shapes."""
    base = tiny_base(architecture)
    portal = make_portal(base)
    learner = portal_learner(portal, small_rows(), SETTINGS)
    assert base.packs                                                                # asked once, before the first round
    with NeverWaits():
        one_round([base], portal.adapters, [learner], {"tiny": some_items()}, 40, EMA())


@pytest.mark.gpu
def test_a_round_on_a_gpu_gives_the_cpus_numbers_and_never_waits():
    found = []
    for device in ("cpu", "cuda"):
        base = tiny_base("gemma3")
        base.model.to(device)
        portal = make_portal(base).to(device)
        learner = portal_learner(portal, small_rows(), SETTINGS)
        def one(weigh=None):
            return one_round([base], portal.adapters, [learner], {"tiny": some_items()}, 40, weigh)
        one()                                                                        # kernels are compiled, pools are filled
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses = one(EMA())
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found.append([losses.cpu(), portal.z.detach().cpu()])
    for cpu, cuda in zip(*found):
        torch.testing.assert_close(cpu, cuda, rtol=1e-3, atol=1e-4)


def test_recomputed_layers_give_the_same_gradients():
    """Each micro-batch's layers run again in its backward pass, with the adapters and tasks they had."""
    found = []
    for recompute in (False, True):
        base, calls = tiny_base("gemma3"), []
        assert base.packs
        base.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        if recompute:
            base.recompute_layers()
        found.append(task_gradients(base, make_portal(base).adapters("tiny"), some_items(), 25))
        assert not base.active.factors and len(calls) == (1 + recompute) * len(micro_batches(some_items(), 25)) > 2
    assert torch.equal(found[0][0], found[1][0]) and all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_an_absent_task_gets_no_gradient():
    base = tiny_base()
    losses, gradients = task_gradients(base, make_portal(base).adapters("tiny"), [i for i in some_items() if i.task != 1], 100)
    assert losses[1] == 0 and all(not g[1].any() and g[0].any() for g in gradients)


def test_balance_follows_a_worked_example():
    small, large = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 15.0]])          # norms 5 and 15, mean 10
    torch.testing.assert_close(balance([small, large]), torch.tensor([[6.0, 8.0 + 10.0]]))
    torch.testing.assert_close(balance([small]), small)
    assert torch.isfinite(balance([torch.zeros(1, 2), large])).all()


def test_ema_follows_a_worked_example():
    ema, gradients = EMA(), [torch.ones(2, 1, 2, 3), torch.ones(2, 1, 3, 2)]
    def weights(*losses):
        weighed = ema("tiny", torch.tensor(losses), gradients)
        assert all(torch.equal(w, w[:, :1, :1, :1].expand_as(g)) for w, g in zip(weighed, gradients))
        return weighed[0][:, 0, 0, 0]
    torch.testing.assert_close(weights(2.0, 1e-6), torch.tensor([0.5, 1000.0]))       # first value; floor
    torch.testing.assert_close(weights(1.0, 1.0), torch.tensor([1 / 1.9, 1 / (0.9e-6 + 0.1)]))
    assert ema("other", torch.tensor([4.0, 1.0]), gradients)[0][0, 0, 0, 0] == 0.25   # a base has means of its own


def test_schedule_clip_and_rates():
    p = torch.nn.Parameter(torch.zeros(4))
    learner = Learner([{"params": [p], "lr": 1.0}], ["t"], rounds=10, epochs=2)
    rates = []
    for _ in range(20):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        p.grad = torch.full((4,), 100.0)
        learner.step()
        assert p.grad.norm() == pytest.approx(1.0, rel=1e-4)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0]) and rates[-1] == pytest.approx(1 / 18)
    portal = make_portal(tiny_base())
    groups = portal_learner(portal, {"one": ([1] * 9, []), "two": ([1], [])}, dict(SETTINGS, batch_size=4)).optimizer.param_groups
    assert [g["initial_lr"] for g in groups] == [1e-3, 2e-3] and groups[1]["params"][0] is portal.z


def test_select_keeps_the_best_epoch():
    p = torch.nn.Parameter(torch.zeros(1))
    learner = Learner([{"params": [p], "lr": 1.0}], ["t"], 1, 4)
    for epoch, score in enumerate([(0.5, -1.0), (0.7, -1.0), (0.7, -0.9), (0.6, -0.1)], 1):
        p.data.fill_(epoch)
        learner.keep_best(epoch, {("base", "t"): score, ("base", "other"): (1.0, 0.0)})
    learner.load_best()
    assert learner.epoch == 3 and p.item() == 3


def run_fit(tmp_path, base, portal, **changes):
    rows = small_rows()
    settings = dict(epochs=3, batch_size=2, lr=1e-2, least=1, max_tokens=100) | changes
    learner = portal_learner(portal, rows, settings)
    fit(Job("test", settings, 0, tmp_path / "log.jsonl"), [base], portal.adapters, [learner], rows)
    return learner


def test_training_learns_repeats_and_leaves_the_base_alone(tmp_path):
    ends = []
    for _ in range(2):
        base = tiny_base()
        before = [p.clone() for p in base.model.parameters()]
        portal = make_portal(base, random=False)
        run_fit(tmp_path, base, portal)
        assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters()))
        ends.append([p.detach().clone() for p in (portal.z, *portal.core.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends))                             # same seed, same numbers
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and log[2]["loss"] < log[0]["loss"] and log[0]["loss"] == log[3]["loss"]
    assert {"epoch", "loss", "seconds", "tokens_per_s", "peak_memory", "held_acc_norm"} <= set(log[0])


def test_a_loss_that_is_not_finite_names_base_task_and_round(tmp_path):
    base = tiny_base()
    portal = make_portal(base)
    portal.z.data[1] = float("nan")
    with pytest.raises(BadInput, match="not finite on base tiny, task two, round 1"):
        run_fit(tmp_path, base, portal)
