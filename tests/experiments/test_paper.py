"""The experiments: steps that resume, what each runs, and counted FLOPs against torch's own counter."""
import json, pathlib
from types import SimpleNamespace

import pytest
import torch
from conftest import command, one_line, tiny_base
from helpers import make_portal
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

import port, train
from bases.frozen import Adapted
from experiments import paper
from experiments.ablations import ABLATIONS, COMPETITION, PORT_ABLATIONS, Variant
from portal import Converter
from runtime import run_folder
from runtime.files import BadInput, read_jsonl, write_json


def flags(tmp_path, **changes):
    plain = dict(out=tmp_path, bases=None, to=None, data=None, aside=None, sweep=(8,), train="", add="", port="", eval="")
    return SimpleNamespace(**{**plain, **changes})


def test_a_step_runs_what_is_left_of_it(tmp_path, monkeypatch):
    ran, broken = [], [True]
    def main(argv, **arguments):
        ran.append(argv)
        assert arguments == dict(weigh=None, step=1)
        if "second" in argv and broken:
            raise KeyboardInterrupt
        run = tmp_path / "runs" / "a"
        run.mkdir(parents=True, exist_ok=True)                                       # no portal.json: nothing to count
        (run / "results.jsonl").write_text("".join(
            json.dumps(dict(method=m, task="t", select=s)) + "\n" for s in ("best", "final") for m in ("portal", "lora_iso")))
    one = SimpleNamespace(__name__="train", main=main)
    def go():
        paper.Steps(flags(tmp_path, train="--epochs '1'")).run_step(
            "sweep", "all", "a", (one, "first"), (one, "second"), how=Variant(train=dict(step=1)))
    with pytest.raises(KeyboardInterrupt):
        go()
    broken.clear()
    go(), go()
    name = ["--run", str(tmp_path / "runs" / "a")]
    assert ran == [[*name, part, "--epochs", "1"] for part in ("first", "second", "second")]
    with pytest.raises(BadInput, match="other flags"):                         # which the steps that are done did not have
        paper.Steps(flags(tmp_path))
    rows = read_jsonl(tmp_path / "results.jsonl")
    rows = [{key: value for key, value in row.items() if key != "select"} for row in rows]  # once, not once an epoch
    made = dict(experiment="sweep", commit=paper.commit(), task="t")
    assert rows == [dict(made, variant="all", method="portal"), dict(made, variant="iso", method="lora")]


def test_a_task_aside_and_its_controls(tmp_path, monkeypatch):
    """What each control's run holds when its commands start, and how its rows are labelled."""
    bases, started = [tiny_base(name=name) for name in ("source", "target")], []
    made = make_portal(bases[0], tasks=("one", "two"))
    made.converters["target"] = Converter(made.cfg, bases[1].groups_of(made.cfg.modules))
    made.z.data = torch.tensor([[1.0], [3.0]]).expand(2, made.cfg.d_z)
    def main(module):
        def run(argv, **_):
            folder = pathlib.Path(argv[argv.index("--run") + 1])
            started.append((module.__name__, folder.name, argv))
            saved = dict(config=vars(made.cfg), bases=[dict(base="source")], seed=0, data="")
            if "--seed" in argv:                                                     # source training
                run_folder.save_portal(folder, made)
                for base in bases:
                    write_json(folder / "converters" / f"{base.name}.json", dict(base=base.name, ported=base is bases[1], n=8))
                write_json(folder / "portal.json", saved)
            if "--add-task" in argv:
                z = run_folder.load_tensors(folder / "latents.safetensors")["z"]
                run_folder.save_tensors(folder / "latents.safetensors", {"z": torch.cat([z, torch.full_like(z[:1], 10 + len(z))])})
                saved = json.loads((folder / "portal.json").read_text())
                saved["added"] = {**saved.get("added", {}), argv[argv.index("--add-task") + 1]: {}}
                saved["config"]["tasks"] += [str(len(z))]
                write_json(folder / "portal.json", saved)
            if module is paper.eval:
                row = dict(method="portal", task="three", base="target", z=run_folder.load_tensors(
                    folder / "latents.safetensors")["z"][:, 0].tolist())
                (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
        return run
    for module in (train, port, paper.eval):
        monkeypatch.setattr(module, "main", main(module))
    monkeypatch.setattr(paper, "config_of", lambda spec: SimpleNamespace(model_type="qwen3"))
    monkeypatch.setattr(paper, "count", lambda *args: None)
    chosen = flags(tmp_path, bases=["./source"], to=["./target"], aside=[tmp_path / "three", tmp_path / "four"],
                   train="--tasks one,two", add="--lr 5e-3")                         # two uses of train.py, flags of their own
    paper.Steps(chosen).aside(0)
    rows = read_jsonl(tmp_path / "results.jsonl")
    found = {row["variant"]: (row["z"], row["training_tasks"], row["experiment"]) for row in rows}
    assert found == {name: ([1, 3, *new], 2, "carry") for name, new in dict(
        carried=(12, 13), mean=(2, 2), target=(12, 13)).items()} | {"shuffled": ([13, 1, 3, 12], 2, "carry")}
    on_target = [argv[-4:] for name, run, argv in started if "--add-task" in argv and run == "aside-on-target-seed0"]
    assert on_target == [["--bases", "./target", "--lr", "5e-3"]] * 2
    assert [argv[-2:] for name, _, argv in started if "--seed" in argv] == [["--tasks", "one,two"]]


def test_epochs_of_ports_and_loras_are_the_presets(tmp_path, monkeypatch):
    def epochs(names, **changes):
        found = {}
        def run_step(steps, experiment, variant, name, *commands, how=None):
            for module, *flags in commands:
                methods = flags[flags.index("--methods") + 1] if module is paper.eval else ""
                if module is port or "lora" in methods:
                    found[name, methods] = flags[flags.index("--epochs") + 1] if "--epochs" in flags else None
        monkeypatch.setattr(paper.Steps, "run_step", run_step)
        monkeypatch.setattr(paper.Steps, "fork", lambda steps, source, name, *_: name)
        monkeypatch.setattr(paper.Steps, "worst", lambda *args: "one")
        for name in names:
            getattr(paper.Steps(flags(tmp_path / str(len(changes)), **changes)), name)(0)
        return found
    toy = epochs(paper.EXPERIMENTS)
    assert set(toy.values()) == {None}
    assert len(toy) == 2 + 3 + 1 + len(ABLATIONS) + len(PORT_ABLATIONS) + len(COMPETITION)
    real = epochs(["main", "sweep", "aside"], bases=["a"], to=["b"], aside=[tmp_path / "three"])
    assert set(real.values()) == {None} and len(real) == 2 + 3 + 1             # the aside's ports are main's


def test_flops_equal_torchs_count():
    """Of the projections: forward, the input's gradient, and the adapter of the one task there is."""
    base = tiny_base()
    made = make_portal(base, tasks=("one",))
    adapters = made.adapters("tiny").map(lambda a: a.detach().requires_grad_())
    own = paper.dims_of(adapters)
    every = {m: (len(layers), 0, d_in, d_out) for m, layers, d_in, d_out in base.groups.values()}
    x, tokens = {d: torch.randn(2, 5, d, requires_grad=True) for d in {group.d_in for group in base.groups.values()}}, 10
    in_place = {torch.ops.aten.baddbmm_: lambda y, a, b, out_shape, **_: baddbmm_flop(y, a, b)}  # torch forgets it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, base.with_adapters(adapters, torch.tensor([0, 0])):
        for part in base.model.modules():
            if isinstance(part, Adapted):
                part(x[part.linear.in_features]).sum().backward()
    assert paper.flops(tokens, 0, every, own) == counter.get_total_flops()


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
    counted = paper.generator_flops(cfg, layers, paper.dims_of(adapters))
    assert counter.get_total_flops() - film == pytest.approx(counted, rel=1e-6)


def test_the_last_of_several_fits():
    log = [dict(what=what, epoch=epoch, n=n) for n, (what, epoch) in enumerate(
        [("port a", 1), ("port a", 2), ("port a", 1), ("port b", 1), ("port a", 2), ("port a", 3)])]
    assert [[line["n"] for line in paper.last_fit(log, what)] for what in ("port a", "port b", "port c")] == [
        [2, 4, 5], [3], []]


@pytest.mark.parametrize("argv, words", [
    (["mian"], ["mian", "accepted", "sweep"]), (["ablation", "--bases", "x"], ["--bases", "main"]),
    (["main", "--bases", "x"], ["--to", "--bases"]),
    (["aside", "--bases", "x", "--to", "y"], ["--aside", "--bases"]),
    (["--seeds", "a"], ["'a'", "whole number"]), (["--sweep", "0"], ["'0'", "above 0"])])
def test_bad_input(argv, words, capsys):
    assert command(paper, *argv) == 2
    one_line(capsys, words)
