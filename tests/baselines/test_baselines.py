"""Per-task LoRA: all at once equals one at a time, and PEFT's training. Cross-LoRA: what its algebra promises."""
import pathlib

import peft, pytest, torch
from conftest import QUICK, SIZES, command, peft_projections, tiny_base, tiny_model
from helpers import random_adapters

import eval as evaluation, port, train
from baselines.cross_lora import FACTORS, copy, cross_lora, delta_norm, random, subspace, transfer, transfer_all
from baselines.lora import TaskLoRAs, iso_sizes
from bases import encode
from data import Cycle, rounds_of
from portal import MODULES, Adapters, Config, Converter, same_depth
from runtime.files import read_json
from runtime.job import Job
from runtime.saved import load_adapters, load_portal, save_adapters
from score import evaluate
from tasks.rows import Row
from train import Learner, fit


def rows_of(sizes):
    return {t: ([Row(t, f"w{i} w{k}", [" w1", f" w{(7 * i + k) % 40}"], 1) for i in range(n)],
                [Row(t, f"w{i} w{k}", [" w2", f" w{(7 * i + k) % 40}"], 1) for i in range(2)])
            for k, (t, n) in enumerate(sizes.items(), 1)}


def test_all_tasks_at_once_end_where_each_alone_would(tmp_path):
    """Tasks of 9, 4 and 2 rows: unequal epochs, schedules, clips and selections, and none may leak into another.
    In float64, since AdamW turns the sign of a gradient of 1e-9 into a full step."""
    rows, base = rows_of({"one": 9, "two": 4, "three": 2}), tiny_base(dtype=torch.float64)
    def new():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            return TaskLoRAs(3, base)
        finally:
            torch.set_default_dtype(torch.float32)
    def train(tasks):
        loras = new()
        part = {t: rows[t] for t in rows if t in tasks}
        index = [list(rows).index(t) for t in part]
        generate = lambda _: Adapters(
            {m: torch.stack([a[t] for t in index]) for m, a in loras.A.items()},
            {m: torch.stack([b[t] for t in index]) for m, b in loras.B.items()}, loras.scale)
        learners = [Learner([{"params": loras.of(i), "lr": 1e-2}], [t], rounds_of(rows[t][0], 2), 2) for t, i in zip(part, index)]
        fit(Job("test", dict(epochs=2, batch_size=2, max_tokens=200), 0, tmp_path / "log.jsonl"), [base], generate, learners, part)
        return loras, learners
    together, learners = train(["one", "two", "three"])
    for t, task in enumerate(rows):
        alone, (learner,) = train([task])
        assert learner.epoch == learners[t].epoch
        for got, want in zip(together.of(t), alone.of(t), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert all(b[0].any() for b in together.B.values()) and not torch.equal(together.A["q"][0], new().A["q"][0])


def test_training_equals_pefts(tmp_path):
    """The same initial A, the same batches, torch's own AdamW around PEFT's model: the same B after three rounds."""
    base, rows = tiny_base(), rows_of({"one": 6})
    torch.manual_seed(0)
    loras = TaskLoRAs(1, base, rank=4, alpha=8)
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=[f"{m}_proj" for m in MODULES]))
    for m, layer, module in peft_projections(model):
        module.lora_A["default"].weight.data.copy_(loras.A[m][0][layer])
    learner = Learner([{"params": loras.of(0), "lr": 1e-2}], ["one"], 3, 1)
    fit(Job("test", dict(epochs=1, batch_size=2, max_tokens=200), 0, tmp_path / "log.jsonl"), [base], loras.adapters, [learner], rows)
    cycle = Cycle(encode(base.tokenizer, rows["one"][0], ["one"], choices="gold")[0], 2, "0/tiny/one")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    for rate in (1e-2, 1e-2, 0.5e-2):
        optimizer.param_groups[0]["lr"] = rate
        batch = cycle.next()
        ids = torch.tensor([i.prompt + i.continuations[0] for i in batch])
        labels = torch.tensor([[-100] * len(i.prompt) + i.continuations[0] for i in batch])
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    for m, layer, module in peft_projections(model):
        torch.testing.assert_close(loras.B[m][0][layer], module.lora_B["default"].weight, rtol=1e-3, atol=1e-4)


def test_saved_adapters_load_back(tmp_path):
    adapters = random_adapters(tiny_base())
    save_adapters(tmp_path / "a.safetensors", adapters)
    loaded = load_adapters(tmp_path / "a.safetensors")
    assert loaded.scale == adapters.scale and all(torch.equal(x, loaded.B[m]) for m, x in adapters.B.items())


def test_cross_lora_onto_the_same_weight_is_the_same_delta():
    torch.manual_seed(0)
    W, A, B = torch.randn(12, 12), torch.randn(2, 4, 12), torch.randn(2, 12, 4)
    new_A, new_B = cross_lora(A, B, W, W)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-4, atol=1e-4)


def test_cross_lora_follows_a_rotation_of_the_target():
    """W_t = Q W_s R^T holds the same map in other coordinates, wider ones: the delta must come out as Q delta R^T."""
    torch.manual_seed(0)
    W, A, B = torch.randn(10, 10), torch.randn(1, 3, 10), torch.randn(1, 10, 3)
    Q, R = torch.linalg.qr(torch.randn(16, 10))[0], torch.linalg.qr(torch.randn(14, 10))[0]
    new_A, new_B = cross_lora(A, B, W, Q @ W @ R.T)
    (U_s, V_s), (U_t, _) = subspace(W), subspace(Q @ W @ R.T)
    flips = torch.sign((U_t[:, :10] * (Q @ U_s)).sum(0))                             # the sign rule may flip a pair
    want = (Q @ U_s * flips) @ (U_s.T @ (B @ A)[0] @ V_s) @ (R @ V_s * flips).T
    assert new_A.shape == (1, 3, 14) and new_B.shape == (1, 16, 3)
    torch.testing.assert_close((new_B @ new_A)[0], want, rtol=1e-3, atol=1e-3)


def test_signs_and_order_are_fixed():
    torch.manual_seed(0)
    W = torch.randn(9, 7)
    U, V = subspace(W)
    assert (((U ** 3).sum(0) + (V ** 3).sum(0)) >= 0).all()
    strength = (U.T @ W @ V).diag()
    assert (strength > 0).all() and (strength[:-1] >= strength[1:]).all()


def test_controls():
    torch.manual_seed(0)
    A, B = torch.randn(2, 4, 6), torch.randn(2, 8, 4)
    W_s, wider, narrower = torch.randn(8, 6), torch.randn(10, 9), torch.randn(5, 4)
    new_A, new_B = copy(A, B, W_s, wider)
    assert torch.equal(new_A[..., :6], A) and not new_A[..., 6:].any() and torch.equal(new_B[:, :8], B) and not new_B[:, 8:].any()
    new_A, new_B = copy(A, B, W_s, narrower)
    assert torch.equal(new_A, A[..., :4]) and torch.equal(new_B, B[:, :5])
    new_A, new_B = random(A, B, W_s, wider, torch.Generator().manual_seed(0))
    torch.testing.assert_close((new_B @ new_A).flatten(1).norm(dim=1), (B @ A).flatten(1).norm(dim=1))
    torch.testing.assert_close(delta_norm(A, B), (B @ A).flatten(1).norm(dim=1))


def test_layers_are_matched_by_relative_depth():
    assert [same_depth(l, 5, 3) for l in range(5)] == [0, 0, 1, 2, 2] and [same_depth(l, 3, 5) for l in range(3)] == [0, 2, 4]
    source, target = tiny_base("qwen3"), tiny_base("qwen2", seed=1)
    adapters = transfer(cross_lora, random_adapters(source), source, target)
    assert {g: (a.shape[1], a.shape[-1], adapters.B[g].shape[-2]) for g, a in adapters.A.items()} == {
        g: (len(layers), d_in, d_out) for g, (_, layers, d_in, d_out) in target.groups.items()}


def test_the_factor_of_a_transfer_is_the_best_on_held_out_rows(tmp_path):
    base, source = tiny_base(name="there"), tiny_base(seed=1, name="here")
    adapters = random_adapters(source, tasks=2)
    save_adapters(tmp_path / "baselines" / "lora" / "here.safetensors", adapters)
    rows = [row for train, _ in rows_of({"one": 12, "two": 12}).values() for row in train]
    held = encode(base.tokenizer, rows, ["one", "two"])[0]
    transfer_all(tmp_path, "there", base, source, 0, held, 200)
    factors = set()
    for method, carry in (("cross_lora", cross_lora), ("copy", copy)):
        saved = load_adapters(tmp_path / "baselines" / method / "there.safetensors")
        plain, accs = transfer(carry, adapters, source, base), {}
        for factor in FACTORS:
            cells = evaluate(base, plain._replace(scale=factor * plain.scale), held, 200).values()
            accs[factor] = (sum(c["acc_norm"] for c in cells) / 2, -sum(c["log_loss"] for c in cells) / 2)
        best = max(accs, key=accs.get)
        assert saved.scale == pytest.approx(best * plain.scale) and torch.equal(saved.A["q"], plain.A["q"])
        assert read_json(tmp_path / "baselines" / method / "there.json")["factor"] == best
        factors.add(best)
    assert factors != {1}                                                            # else this would not show a thing
    before = (tmp_path / "baselines" / "copy" / "there.json").stat().st_mtime_ns
    transfer_all(tmp_path, "there", base, source, 0, [], 200)                        # there already
    assert (tmp_path / "baselines" / "copy" / "there.json").stat().st_mtime_ns == before
    save_adapters(tmp_path / "baselines" / "lora" / "here.safetensors", random_adapters(source, tasks=3))
    transfer_all(tmp_path, "there", base, source, 0, [], 200)                        # of LoRAs fitted again, in the same second
    for method in ("cross_lora", "copy", "random"):
        assert load_adapters(tmp_path / "baselines" / method / "there.safetensors").A["q"].shape[0] == 3


def test_the_joint_hypernet_is_source_training_on_the_target(trained):
    """Fitted by eval.py for a port of eight rows a task, and by train.py on that base, with these rows and the run's flags."""
    assert command(port, "--to", "./base-c", "--n", "8", "--epochs", "1") == 0
    assert command(evaluation, "--bases", "./base-c", "--methods", "hypernet") == 0
    assert command(train, "--bases", "./base-c", *QUICK, "--n", "8", "--run", "out/joint") == 0
    joint = load_portal(pathlib.Path("out/joint"), ["base-c"]).adapters("base-c")
    saved = load_adapters(trained / "baselines" / "hypernet" / "base-c.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(joint.tensors(), saved.tensors(), strict=True)) and joint.scale == saved.scale


def test_iso_loras_have_as_many_parameters_as_the_converter():
    base = tiny_base()
    for d_c, rank in ((24, 1), (120, 4)):
        cfg = Config(tasks=["a"] * 9, **{**SIZES, "d_c": d_c})
        loras = TaskLoRAs(9, base, **iso_sizes(cfg, base, 9))
        ours, theirs = sum(p.numel() for p in Converter(cfg, base.groups_of(cfg.modules)).parameters()), sum(
            p.numel() for t in range(9) for p in loras.of(t))
        assert loras.A["q"][0].shape[1] == rank and list(loras.A) == ["q", "v"] and abs(ours / theirs - 1) < 0.15, (ours, theirs)
