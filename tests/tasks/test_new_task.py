"""A task learned after the port: one more latent, against a plain loop, and nothing else of the run changed."""
import pytest
import torch
from conftest import SIZES, command, exact_norms, fingerprint, one_line, plain_loss, tiny_base, tiny_model, write_task
from helpers import make_portal, of_task

import eval as evaluation, export, port, train
from bases import encode, load_base
from data import Cycle
from portal import Converter
from runtime.files import read_json, read_jsonl, write_json
from runtime.saved import load_portal, load_tensors, save_portal
from tasks import new_task
from tasks.rows import load_tasks, sample

TASKS, SEEN = ["one", "two", "three"], {"base-a": "qwen3", "base-b": "llama"}
PORTED = {"base-c": "gemma3"}
SEEDS = {name: k for k, name in enumerate((*SEEN, *PORTED))}                         # conftest.world's, of the tiny models
ADD = "--epochs 1 --batch-size 2 --lr 0.06".split()


@pytest.fixture
def run(world, monkeypatch):
    """A run with random weights, as train.py and port.py would have left it; two tasks more, outside of its data."""
    monkeypatch.setitem(train.REAL, "lora", dict(epochs=1, batch_size=4, lr=1e-3, least=1, max_tokens=200))
    folder = world / "run"
    portal = make_portal(tiny_base(name="base-a"), tasks=TASKS)
    for name, architecture in (("base-b", "llama"), ("base-c", "gemma3")):
        base = tiny_base(architecture, name=name)
        portal.converters[name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    save_portal(folder, portal)
    provenance = {name: dict(base=name, id=str(world / name), revision=None, ported=name == "base-c", n=8, seed=0,
                             data=str(world / "data"), date="2026-01-01") for name in portal.converters}
    for name, p in provenance.items():
        write_json(folder / "converters" / f"{name}.json", p)
    del portal.converters["base-c"]                                                  # a port is no part of the sources'
    portal.z.data += 1                                                               # last epoch
    save_portal(folder, portal, final=True)
    write_json(folder / "portal.json", dict(config=vars(portal.cfg), bases=[provenance[name] for name in SEEN], seed=0,
                                            data=str(world / "data"), trained="2026-01-01"))
    write_task(world / "aside", "four", train=13)
    write_task(world / "aside", "five", train=5)
    return folder


def latents(run):
    return [load_tensors(folder / "latents.safetensors")["z"] for folder in (run, run / "final")]


def saved(run):
    return read_json(run / "portal.json")


def plain_loop(run, folder, lr, seed, on):
    """One epoch of the task in `folder` on the bases `on`, batches of two: one base and one row after the other through
    unpatched models with hooks, in float64; the optimiser and the balance on z written out. -> z [d_z]"""
    rows, _ = sample(load_tasks(folder.parent, [folder.name])[folder.name]["train"], 2000, seed)
    portal = load_portal(run, list(on))
    for module in (portal.core, *portal.converters.values()):
        module.double().requires_grad_(False)
    z = portal.z.data.double().mean(0).clone().requires_grad_()
    portal.z = z[None]
    models = {name: exact_norms(tiny_model(a, SEEDS[name]).double()) for name, a in on.items()}
    tokenizer = tiny_base().tokenizer
    items = encode(tokenizer, rows, [folder.name], "gold")[0]
    cycles = {name: Cycle(items, 2, f"{seed}/{name}/{folder.name}") for name in on}
    optimizer, rounds = torch.optim.AdamW([z], weight_decay=0.0), -(-len(rows) // 2)
    for k in range(rounds):
        pulls = []
        for name, model in models.items():
            portal.z = z[None]
            loss = plain_loss(model, of_task(portal.adapters(name), 0), cycles[name].next())
            pulls.append(torch.autograd.grad(loss, z)[0])
        mean = sum(pull.norm() for pull in pulls) / len(pulls)
        z.grad = sum(pull * mean / pull.norm() for pull in pulls)
        torch.nn.utils.clip_grad_norm_([z], 1.0)
        optimizer.param_groups[0]["lr"] = lr / len(z) ** 0.5 * min(1.0, (rounds - k) / max(1, rounds - 1))  # one round of warm-up
        optimizer.step()
    return z.detach()


@pytest.mark.parametrize("flags, on, moved", [                                       # on the sources; on a ported base
    ((), SEEN, 0.003), (("--bases", "./base-c"), PORTED, 0.001)])
def test_the_new_latent_is_the_plain_loops_and_nothing_else_changes(run, world, flags, on, moved):
    before, old, was = fingerprint(run), latents(run), saved(run)
    want = plain_loop(run, world / "aside" / "four", 0.06, 7, on)
    assert command(train, "--add-task", "aside/four", "--run", run, *ADD, "--seed", "7", *flags) == 0
    after, new, now = fingerprint(run), latents(run), saved(run)
    assert set(after) - set(before) == {"log.jsonl"}
    assert {name for name in before if after[name] != before[name]} == {
        "portal.json", "latents.safetensors", "final/latents.safetensors"}
    assert all(torch.equal(n[:3], o) and n.shape == (4, SIZES["d_z"]) for n, o in zip(new, old))
    torch.testing.assert_close(new[0][3].double(), want, rtol=1e-3, atol=1e-4)
    assert torch.equal(new[0][3], new[1][3]) and (want - old[0].mean(0)).abs().mean() > moved
    how = now.pop("added")["four"]
    assert (how["folder"], how["bases"], how["n"], how["seed"]) == (str(world / "aside" / "four"), list(on), 2000, 7)
    assert now.pop("config") == {**was.pop("config"), "tasks": [*TASKS, "four"]} and now == was


def test_every_latent_starts_at_the_mean_of_the_trained_ones(run):
    """At a learning rate of next to nothing; the second does not see the first."""
    mean = latents(run)[0].mean(0)
    for name, flags in (("four", ADD), ("five", [*ADD[:-1], "1e-12", "--bases", "./base-b"])):
        assert command(train, "--add-task", f"aside/{name}", "--run", run, *flags) == 0
    z = latents(run)[0]
    torch.testing.assert_close(z[4], mean)
    assert len(z) == 5 and (z[3] - mean).abs().max() > 0.01 and saved(run)["added"]["five"]["bases"] == ["base-b"]
    others = [0, 1, 2, 4]
    assert command(train, "--add-task", "aside/four", "--run", run, *ADD, "--seed", "1", "--overwrite") == 0
    for again, first in zip(latents(run), (z, latents(run)[1])):
        assert torch.equal(again[others], first[others])
    assert not torch.equal(latents(run)[0][3], z[3]) and saved(run)["config"]["tasks"] == [*TASKS, "four", "five"]


def test_a_killed_add_leaves_a_run_that_works(run, monkeypatch):
    z, before = latents(run)[0], (run / "portal.json").read_bytes()
    def stop(*args):
        raise KeyboardInterrupt
    for writer in ("save_tensors", "write_json"):                                    # before the latents, and behind them
        with monkeypatch.context() as patch:
            patch.setattr(new_task, writer, stop)
            assert command(train, "--add-task", "aside/four", "--run", run, *ADD) == 130
        assert (run / "portal.json").read_bytes() == before and torch.equal(load_portal(run).z, z)
    assert len(latents(run)[0]) == 4                                                 # one row too many: it does not count
    assert command(train, "--add-task", "aside/five", "--run", run, *ADD) == 0
    assert len(latents(run)[0]) == 4 and torch.equal(load_portal(run).z[:3], z)
    assert saved(run)["config"]["tasks"] == [*TASKS, "five"]


def test_eval_port_and_export_know_the_task(run, monkeypatch, world, capsys):
    def results():
        return read_jsonl(run / "results.jsonl")
    assert command(evaluation, "--run", run, "--bases", "./base-c") == 0             # the LoRAs of three tasks
    first = results()
    assert command(train, "--add-task", "aside/four", "--run", run, *ADD) == 0
    capsys.readouterr()
    assert command(export, "--run", run, "--to", "base-c", "--task", "four", "--method", "lora", "--out", "x") == 2
    one_line(capsys, ["lora adapters of base-c are older than its task 'four'", "eval.py"])
    assert command(evaluation, "--run", run, "--bases", "./base-c") == 0
    rows = results()[len(first):]
    assert {(r["task"], r["method"]) for r in rows} == {(t, m) for t in (*TASKS, "four") for m in evaluation.USUAL}
    base, eval_rows = load_base("./base-c"), load_tasks(world / "aside", ["four"])["four"]["eval"]
    items, _ = encode(base.tokenizer, eval_rows, saved(run)["config"]["tasks"])
    alone = evaluation.evaluate(base, load_portal(run, ["base-c"]).adapters("base-c"), items, 200)
    got = next(r for r in rows if (r["task"], r["method"], r["select"]) == ("four", "portal", "best"))
    assert got["acc_norm"] == alone[3]["acc_norm"] and got["log_loss"] == pytest.approx(alone[3]["log_loss"], rel=1e-5)
    assert got["role"] == "unseen"
    for r in first:                                                                  # the old tasks: what they were
        if r["method"] in ("base", "portal"):
            now, = (s for s in rows if all(s[k] == r[k] for k in ("task", "method", "select")))
            assert now["acc_norm"] == r["acc_norm"] and now["log_loss"] == pytest.approx(r["log_loss"], rel=1e-5)
    table = (run / "results.md").read_text()
    assert "four was learned later, on base-a, base-b" in table and "\n| four | " in table
    fitted = (run / "baselines" / "lora" / "base-c.safetensors").stat().st_mtime_ns
    assert command(evaluation, "--run", run, "--bases", "./base-c", "--tasks", "four") == 0
    assert (run / "baselines" / "lora" / "base-c.safetensors").stat().st_mtime_ns == fitted
    assert command(export, "--run", run, "--to", "base-c", "--task", "four", "--out", "x") == 0
    assert "| four was learned later | 2000 rows on base-a, base-b |" in (world / "x" / "README.md").read_text()

    seen = []
    monkeypatch.setattr(port, "fit", lambda *args, **_: seen.append(args[4]) or 0.0)
    monkeypatch.setattr("runtime.saved.save_states", lambda *_: None)
    assert command(port, "--run", run, "--to", "./base-c", "--n", "4", "--overwrite") == 0
    assert list(seen[0]) == [*TASKS, "four"]
    assert seen[0]["four"] == sample(load_tasks(world / "aside")["four"]["train"], 4, 0)


def test_bad_input(run, world, capsys):
    def fails(words, *argv):
        capsys.readouterr()
        before = fingerprint(run)
        assert command(train, "--run", run, *argv) == 2
        one_line(capsys, words)
        assert fingerprint(run) == before
    fails(["data is not a task", "train.jsonl and eval.jsonl"], "--add-task", "data")
    fails(["nowhere is not a task"], "--add-task", "nowhere")
    fails(["trained with a task 'one'", "another name"], "--add-task", "data/one", "--overwrite")
    fails(["it holds base-a, base-b, base-c"], "--add-task", "aside/four", "--bases", "./base-d")
    fails(["--modules does not go with --add-task"], "--add-task", "aside/four", "--modules", "all")
    fails(["not finite", "task four"], "--add-task", "aside/four", "--lr", "1e38")
    assert command(train, "--add-task", "aside/four", "--run", run, *ADD) == 0
    fails(["has learned 'four' already", "--overwrite"], "--add-task", "aside/four")
    (world / "aside" / "four" / "train.jsonl").write_text("{oops\n")
    fails(["four/train.jsonl:1", "not JSON"], "--add-task", "aside/four", "--overwrite")
