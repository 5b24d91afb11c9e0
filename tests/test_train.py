"""The mixed-task round against the one-task-at-a-time loop, and the pieces of the optimiser against worked examples."""
import functools, json
from types import SimpleNamespace

import pytest
import torch
from conftest import exact_norms, lora_hooks, plain_loss, tiny_base, tiny_model, tiny_tokenizer
from helpers import NeverWaits, make_portal, of_task, small_rows, some_items
from transformers import LlamaConfig, LlamaForCausalLM

from bases import Base, Item, encode
from data import Cycle, micro_batches
from portal import Config, Converter, Portal
from runtime.files import BadInput
from runtime.job import Job
from presets import REAL, resolve_settings
from score import delta_ratio
from experiments.contestants import EMA
from train import Learner, balance, fit, one_round, portal_learner, task_gradients


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
    shared = [p for m in (portal.core, *portal.converters.values()) for p in m.parameters()]
    portal.rates = lambda lr: [{"params": shared, "lr": lr}, {"params": [portal.z], "lr": 2 * lr}]
    learner = portal_learner(portal, rows, settings)
    fit(Job("test", settings, seed, tmp_path / "log.jsonl"), bases, portal.adapters, [learner], rows,
        functools.partial(one_round, weigh=EMA() if ema else None))
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
    assert base.packs and base.head                                                  # asked once, before the first round
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


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_weights_of_continuations_weigh_their_nll(packs, max_tokens):
    """Loss and gradients, float64, against an unpatched model that sees a continuation at a time; beside such items, one
    with a gold continuation alone."""
    base, portal = tiny_base(dtype=torch.float64), None
    exact_norms(base.model)
    base.__dict__["packs"] = packs                                                   # as if the layers ignored masks
    portal = make_portal(base)
    portal.core.double(), portal.converters["tiny"].double()
    portal.z.data = portal.z.data.double()
    items = [Item(t, tokens, [[7, 8, 9], [10], [11, 12]], None, w) for t, tokens, w in
             ((0, [5, 6], (0.5, 0.25, 0.25)), (1, [20, 21, 22], (0.0, 0.0, 1.0)), (0, [30], (0.125, 0.75, 0.125)))]
    items.append(Item(1, [40, 41], [[42, 43]], None))
    adapters = portal.adapters("tiny")
    losses, gradients = task_gradients(base, adapters, items, max_tokens)

    model, leaf = exact_norms(tiny_model(dtype=torch.float64)), adapters.map(lambda a: a.detach().requires_grad_())
    for t in (0, 1):
        pairs = [(item._replace(continuations=[own]), w) for item in items if item.task == t
                 for own, w in zip(item.continuations, item.weights or (1,))]
        total = sum(w * len(one.continuations[0]) for one, w in pairs)
        loss = sum(w * len(one.continuations[0]) * plain_loss(model, of_task(leaf, t), [one]) for one, w in pairs) / total
        loss.backward()
        assert abs(losses[t] - loss) < 1e-6
    for got, want in zip(gradients, leaf.tensors(), strict=True):
        torch.testing.assert_close(got, want.grad, rtol=1e-6, atol=1e-9)


def test_recomputed_layers_give_the_same_gradients():
    """Each micro-batch's layers run again in its backward pass, with the adapters and tasks they had."""
    found = []
    for recompute in (False, True):
        base, calls = tiny_base("gemma3"), []
        assert base.packs and base.head
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


def rates_of(portal):
    """{parameter's id: its learning rate} at lr 1."""
    groups = portal_learner(portal, small_rows(), dict(SETTINGS, lr=1.0)).optimizer.param_groups
    return {id(p): group["initial_lr"] for group in groups for p in group["params"]}


def test_rates_follow_the_number_of_terms_in_a_sum():
    sizes = dict(d_z=9, d_e=4, hidden=16, d_c=25)
    portal = make_portal(tiny_base(), **sizes)
    core, converter, rates = portal.core, portal.converters["tiny"], rates_of(portal)
    want = {core.W1: 13, core.W2: 16, core.norm2: 16, core.film: 9, core.head_A["q"]: 16 * 5, core.head_B["v"]: 16}
    assert all(rates[id(p)] == pytest.approx(1 / n) for layer, n in want.items() for p in layer.parameters())
    assert rates[id(converter.P_in["q"])] == pytest.approx(1 / converter.P_in["q"].shape[1])
    assert rates[id(converter.P_out["v"])] == pytest.approx(1 / 25)
    assert rates[id(converter.e)] == pytest.approx(1 / 2) and rates[id(portal.z)] == pytest.approx(1 / 3)
    assert len(rates) == 1 + len([*core.parameters(), *converter.parameters()])
    core.requires_grad_(False)
    assert rates_of(portal).keys() == {id(p) for p in (portal.z, *converter.parameters())}
    portal = make_portal(tiny_base(), "none", **sizes)
    assert {rate for p, rate in rates_of(portal).items() if p != id(portal.z)} == {1.0} and rates_of(portal)[id(portal.z)] == 2


def test_the_write_ups_recipe_changes_settings_and_adds_none():
    for default in (REAL, REAL["port"]):
        plain, written = (resolve_settings(SimpleNamespace(), default, norm) for norm in ("layer", "none"))
        assert written.keys() == plain.keys() and {k for k in plain if written[k] != plain[k]} == {"lr", "whiten"} & plain.keys()


def test_few_steps_take_a_larger_rate_but_not_one_that_is_given():
    def lr(n, given=None, norm="layer"):
        args = SimpleNamespace(lr=given, epochs=3)
        return resolve_settings(args, REAL, norm, {"one": (range(n), []), "two": (range(2), [])})["lr"]
    assert lr(8) == 2 * REAL["lr"]                                                   # 3 epochs of 2 rounds, a quarter of 24 steps
    assert lr(32) == lr(999) == REAL["lr"] < lr(28)
    assert lr(8, 0.002) == 0.002 and lr(8, norm="none") == lr(999, norm="none") == 1e-3


def first_ratio(width, norm="layer", **sizes):
    """score.delta_ratio after one step at the preset's full rate on a random base of this width, whose projections keep
    their input's size as those of a trained one do."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, initializer_range=width ** -0.5)
    base = Base(LlamaForCausalLM(config), tiny_tokenizer())
    portal = Portal(Config(tasks=list(small_rows()), norm=norm, **sizes))
    portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    settings = resolve_settings(SimpleNamespace(), REAL, norm)
    learner, items = portal_learner(portal, small_rows(), settings), some_items()
    for group in learner.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    one_round([base], portal.adapters, [learner], {base.name: items}, 4096)
    return delta_ratio(base, portal.adapters(base.name), items)


def test_the_first_step_is_as_large_at_any_width():
    """Relative to the frozen projections; at the write-up's scales and rates it grows with the widths."""
    found = [first_ratio(width, d_c=d_c, hidden=hidden) for width, d_c, hidden in
             [(32, 64, 512), (32, 1024, 512), (128, 256, 512), (512, 64, 512), (512, 1024, 512), (128, 256, 64)]]
    assert max(found) < 3 * min(found) and 1e-3 < min(found) and max(found) < 0.1
    assert first_ratio(512, "none", d_c=1024) > 5 * first_ratio(32, "none", d_c=64)


@torch.no_grad()
def test_the_ratio_is_that_of_plain_passes():
    """score.delta_ratio on padded rows against rows run alone through an unpatched model, its projections by hand."""
    base = tiny_base()
    portal, model = make_portal(base), tiny_model()
    adapters, items = portal.adapters("tiny"), [item for item in some_items() if item.task == 1]
    (A, B, scale), found = of_task(adapters, 1), {}
    lora_hooks(model, A, B, scale)
    for l, layer in enumerate(model.model.layers):
        for g, linear in (("q", layer.self_attn.q_proj), ("v", layer.self_attn.v_proj)):
            def record(linear, inputs, y, g=g, l=l):
                (x,), factors = inputs, (A[g][l], B[g][l])
                BA_x, W_x = scale * x @ factors[0].T @ factors[1].T, x @ linear.weight.T
                found.setdefault((g, l), []).append((BA_x.square().sum(), W_x.square().sum()))
            linear.register_forward_hook(record)
    for item in items:
        model(torch.tensor([item.prompt + item.continuations[0][:-1]]))
    sums = [torch.tensor(rows).sum(0) for rows in found.values()]
    assert len({item.length() for item in items}) > 1 and len(sums) == 2 * len(model.model.layers)
    want = sum((low / frozen).sqrt() for low, frozen in sums) / len(sums)
    assert delta_ratio(base, adapters, items) == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("gold, says", [(1, False), (0, True)])
def test_a_fit_that_ends_above_the_bare_base_says_so(tmp_path, capsys, gold, says):
    """Trained towards the second choice of every row, it is worse than the bare base where the first is right."""
    base = tiny_base()
    rows = {task: (train, [row._replace(gold=gold) for row in train]) for task, (train, _) in small_rows().items()}
    settings = dict(epochs=8, batch_size=2, lr=5.0, least=1, max_tokens=100)
    portal = make_portal(base, random=False)
    fit(Job("a fit", settings, 0, tmp_path / "log.jsonl"), [base], portal.adapters, [portal_learner(portal, rows, settings)], rows)
    out = capsys.readouterr().out
    assert ("a fit: the held-out log_loss ends at" in out and "above the bare base's" in out) == says
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert f"|BAx|/|Wx| {log[0]['delta_ratio'][0]:.2g}" in out and log[0]["delta_ratio"][0] > 0


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
