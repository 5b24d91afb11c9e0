"""The experiments: steps that resume, the patches of the ablations, and counted FLOPs against torch's own counter."""
import json, pathlib
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZES, tiny_base
from test_cli import command, one_line
from test_portal import make_portal
from test_train import small_rows, some_items
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

import experiments, port, portal, train
from cli import write_json
from portal import Config, Converter, Portal
from train import EMA, portal_learner, task_gradients


def flags(tmp_path, **changes):
    plain = dict(out=tmp_path, bases=None, to=None, data=None, aside=None, sweep=(8,), train="", add="", port="", eval="")
    return SimpleNamespace(**{**plain, **changes})


def test_a_step_runs_what_is_left_of_it(tmp_path, monkeypatch):
    ran, broken = [], [True]
    def main(argv):
        ran.append(argv)
        if "second" in argv and broken:
            raise KeyboardInterrupt
        run = tmp_path / "runs" / "a"
        run.mkdir(parents=True, exist_ok=True)                                       # no portal.json: nothing to count
        (run / "results.jsonl").write_text("".join(
            json.dumps(dict(method=m, task="t", select=s)) + "\n" for s in ("best", "final") for m in ("portal", "lora_iso")))
    one = SimpleNamespace(__name__="train", main=main)
    def go():
        experiments.Steps(flags(tmp_path, train="--epochs '1'")).do("sweep", "all", "a", [(one, ["first"]), (one, ["second"])])
    with pytest.raises(KeyboardInterrupt):
        go()
    broken.clear()
    go(), go()
    name = ["--run", str(tmp_path / "runs" / "a")]
    assert ran == [[*name, part, "--epochs", "1"] for part in ("first", "second", "second")]
    with pytest.raises(train.BadInput, match="other flags"):                         # which the steps that are done did not have
        experiments.Steps(flags(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "select"} for row in rows]  # once, not once an epoch
    made = dict(experiment="sweep", commit=experiments.commit(), task="t")
    assert rows == [dict(made, variant="all", method="portal"), dict(made, variant="iso", method="lora")]


def test_a_task_aside_and_its_controls(tmp_path, monkeypatch):
    """What each control's run holds when its commands start, and how its rows are labelled."""
    bases, started = [tiny_base(name=name) for name in ("source", "target")], []
    made = make_portal(bases[0], tasks=("one", "two"))
    made.converters["target"] = Converter(made.cfg, bases[1].layers, bases[1].dims)
    made.z.data = torch.tensor([[1.0], [3.0]]).expand(2, made.cfg.d_z)
    def main(module):
        def run(argv):
            folder = pathlib.Path(argv[argv.index("--run") + 1])
            started.append((module.__name__, folder.name, argv))
            saved = dict(config=vars(made.cfg), bases=[dict(base="source")], seed=0, data="")
            if "--seed" in argv:                                                     # source training
                portal.save_portal(folder, made)
                for base in bases:
                    write_json(folder / "converters" / f"{base.name}.json", dict(base=base.name, ported=base is bases[1], n=8))
                write_json(folder / "portal.json", saved)
            if "--add-task" in argv:
                z = portal.load_tensors(folder / "latents.safetensors")["z"]
                portal.save_tensors(folder / "latents.safetensors", {"z": torch.cat([z, torch.full_like(z[:1], 10 + len(z))])})
                saved = json.loads((folder / "portal.json").read_text())
                saved["added"] = {**saved.get("added", {}), argv[argv.index("--add-task") + 1]: {}}
                saved["config"]["tasks"] += [str(len(z))]
                write_json(folder / "portal.json", saved)
            if module is experiments.eval:
                row = dict(method="portal", task="three", base="target", z=portal.load_tensors(
                    folder / "latents.safetensors")["z"][:, 0].tolist())
                (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
        return run
    for module in (train, port, experiments.eval):
        monkeypatch.setattr(module, "main", main(module))
    monkeypatch.setattr(experiments, "kind_of", lambda spec: "qwen3")
    monkeypatch.setattr(experiments, "count", lambda *args: None)
    chosen = flags(tmp_path, bases=["./source"], to=["./target"], aside=[tmp_path / "three", tmp_path / "four"],
                   train="--tasks one,two", add="--lr 5e-3")                         # two uses of train.py, flags of their own
    experiments.Steps(chosen).aside(0)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {row["variant"]: (row["z"], row["training_tasks"], row["experiment"]) for row in rows}
    assert found == {name: ([1, 3, *new], 2, "carry") for name, new in dict(
        carried=(12, 13), mean=(2, 2), target=(12, 13)).items()} | {"shuffled": ([13, 1, 3, 12], 2, "carry")}
    on_target = [argv[-4:] for name, run, argv in started if "--add-task" in argv and run == "aside-on-target-seed0"]
    assert on_target == [["--bases", "./target", "--lr", "5e-3"]] * 2
    assert [argv[-2:] for name, _, argv in started if "--seed" in argv] == [["--tasks", "one,two"]]


def fit_once(patch):
    """A round of training under a patch -> (portal, its parameters before)."""
    base = tiny_base()
    with patch:
        torch.manual_seed(0)
        made = Portal(Config(tasks=["one", "two", "three"], **SIZES))
        made.converters[base.name] = Converter(made.cfg, base.layers, base.dims)
        torch.nn.init.normal_(made.core.head_B["q"].weight)                          # else the trunk has no gradient yet
        before = {name: p.clone() for name, p in made.core.named_parameters()}
        learner = portal_learner(made, small_rows(), 1, 1, 1e-2)
        train.one_round([base], made.adapters, [learner], {"tiny": some_items()}, 40, {"tiny": EMA()}, made.z)
    return made.core, before


def test_without_film_the_rest_learns():
    core, before = fit_once(experiments.without_film())
    changed = {name for name, p in core.named_parameters() if not torch.equal(p, before[name])}
    assert not core.film.weight.any() and changed >= {"W1.weight", "W2.weight", "head_B.q.weight"}
    core, before = fit_once(experiments.no_balance())                                # and afterwards it is there again
    assert core.film.weight.any()


def test_equal_tasks_and_the_ema():
    base = tiny_base()
    made = make_portal(base)
    plain = task_gradients(base, made.adapters("tiny"), some_items(), 40)
    with experiments.equal_tasks():
        losses, equal = train.task_gradients(base, made.adapters("tiny"), some_items(), 40)
    assert torch.equal(losses, plain[0])
    norms = [torch.cat([g[t].flatten() for g in equal]).norm() for t in range(3)]
    before = [torch.cat([g[t].flatten() for g in plain[1]]).norm() for t in range(3)]
    torch.testing.assert_close(torch.stack(norms), torch.stack(before).mean().expand(3))
    with experiments.with_ema():
        assert port.fit.__kwdefaults__["ema"]                                        # what the ports call, too
    assert not train.fit.__kwdefaults__["ema"]
    with experiments.ema_floor(0.25):
        ema = EMA()
        assert ema.weights(torch.tensor([2.0, 0.125])).tolist() == [0.5, 4]
        torch.testing.assert_close(ema.weights(torch.tensor([1.0, 10.0])), torch.tensor([1 / 1.9, 1 / 1.1125]))


def test_the_ports_patches():
    base = tiny_base()
    made = make_portal(base)
    like = made.converters["tiny"]
    with experiments.ported_from(lambda c: c.e.fill_(7)):
        assert (port.Converter(made.cfg, base.layers, base.dims, like).e == 7).all()
    assert torch.equal(port.Converter(made.cfg, base.layers, base.dims, like).e, like.e)
    with experiments.lr_of_e(0.5):
        groups = port.portal_learner(made, small_rows(), 1, 1, 1e-2, 1).optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [4, 1] and groups[1]["params"][0] is like.e
    assert [group["initial_lr"] for group in groups] == [1e-2, 0.5]


@pytest.mark.parametrize("ema", [False, True])
def test_gradients_between_tasks_add_up_to_the_rounds(tmp_path, ema):
    """The norms and cosines that are written, against one backward pass a task through the generator."""
    base = tiny_base()
    made = make_portal(base)
    learner = portal_learner(made, small_rows(), 1, 1, 0.0)
    with experiments.watched(tmp_path / "g.jsonl"):
        train.one_round([base], made.adapters, [learner], {"tiny": some_items()}, 40,
                        {"tiny": EMA()} if ema else None, made.z)
    record, = map(json.loads, (tmp_path / "g.jsonl").read_text().splitlines())
    own = []
    for t in range(3):
        for p in made.core.parameters():
            p.grad = None
        adapters = made.adapters("tiny")
        losses, gradients = task_gradients(base, adapters, some_items(), 40)
        for g in gradients:
            g[[s for s in range(3) if s != t]] = 0
        torch.autograd.backward(adapters.tensors(), [g / losses[t] if ema else g for g in gradients])
        own.append(torch.cat([p.grad.flatten() for p in made.core.parameters()]))
    for t in range(3):
        others = sum(own) - own[t]
        assert record["norms"][t] == pytest.approx(own[t].norm().item(), rel=1e-4)
        assert record["cosines"][t] == pytest.approx((own[t] @ others / own[t].norm() / others.norm()).item(), abs=1e-4)


def test_flops_equal_torchs_count():
    """Of the projections: forward, the input's gradient, and the adapter of the one task there is."""
    base = tiny_base()
    made = make_portal(base, tasks=("one",))
    adapters = made.adapters("tiny").map(lambda a: a.detach().requires_grad_())
    own = experiments.dims_of(adapters)
    every = {m: (base.layers, 0, *dims) for m, dims in base.dims.items()}
    x, tokens = {d: torch.randn(2, 5, d, requires_grad=True) for d in {d for d, _ in base.dims.values()}}, 10
    in_place = {torch.ops.aten.baddbmm_: lambda y, a, b, out_shape, **_: baddbmm_flop(y, a, b)}  # torch forgets it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, base.adapted(adapters, torch.tensor([0, 0])):
        for part in base.model.modules():
            if hasattr(part, "kind"):
                part(x[part.linear.in_features]).sum().backward()
    assert experiments.flops(tokens, 0, every, own) == counter.get_total_flops()


def test_flops_of_the_generator_equal_torchs_count():
    made = make_portal(tiny_base())
    for p in (made.z, *made.core.parameters()):
        p.requires_grad_(False)
    made.z.requires_grad_()                                                          # so that backward reaches all of the trunk
    with FlopCounterMode(display=False) as counter:
        adapters = made.adapters("tiny")
        torch.autograd.backward(adapters.tensors(), [torch.ones_like(a) for a in adapters.tensors()])
    cfg, (layers, *_), T = made.cfg, made.converters["tiny"].e.shape, 3
    film = 2 * 2 * T * cfg.d_z * 2 * cfg.hidden                                      # once a task, not a layer: left out there
    counted = experiments.generator_flops(cfg, layers, experiments.dims_of(adapters))
    assert counter.get_total_flops() - film == pytest.approx(counted, rel=1e-6)


def test_the_last_of_several_fits():
    log = [dict(what=what, epoch=epoch, n=n) for n, (what, epoch) in enumerate(
        [("port a", 1), ("port a", 2), ("port a", 1), ("port b", 1), ("port a", 2), ("port a", 3)])]
    assert [[line["n"] for line in experiments.last_fit(log, what)] for what in ("port a", "port b", "port c")] == [
        [2, 4, 5], [3], []]


@pytest.mark.parametrize("argv, words", [
    (["mian"], ["mian", "accepted", "sweep"]), (["ablation", "--bases", "x"], ["--bases", "main"]),
    (["main", "--bases", "x"], ["--to", "--bases"]),
    (["aside", "--bases", "x", "--to", "y"], ["--aside", "--bases"]),
    (["--seeds", "a"], ["'a'", "whole number"]), (["--sweep", "0"], ["'0'", "above 0"])])
def test_bad_input(argv, words, capsys):
    assert command(experiments, *argv) == 2
    one_line(capsys, words)
