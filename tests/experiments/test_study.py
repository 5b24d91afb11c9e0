"""experiments/study.py: the search's choice, what is measured, what is continued and what refused; FLOPs."""
import itertools

import pytest
import torch
from conftest import command, one_line, tiny_base, tiny_model
from helpers import make_portal, random_adapters, small_rows
from test_tables import line

from experiments import methods, study
from experiments.methods import World, loras, ports
from runtime.files import read_jsonl
from score import macro


def test_the_search_chooses_on_held_out_rows_and_nothing_is_done_twice(tmp_path, monkeypatch):
    fits = []
    def cell(stand, method, knob, lr, n, rounds, seed, search, bases):
        fits.append((lr, knob, seed, search))
        good = (lr, knob) == (0.2, "b")
        return [line(method, n, rounds, seed, search, [True, good == search], 1.0, lr, knob)]  # on evaluation rows it is bad
    monkeypatch.setattr(study, "cell", cell)
    monkeypatch.setattr(study, "METHODS", {"lora": methods.lora((3, 6), knobs={"a": {}, "b": {}})})
    monkeypatch.setattr(study, "RATES", {loras: ((0.1, 0.2), ())})
    monkeypatch.setattr(study, "SEARCHED", 3 * 8)
    monkeypatch.setattr(study, "load_tasks", lambda *_: {"one": {}})
    argv = ["--n", "32", "--seeds", "0,1", "--out", str(tmp_path)]
    study.main(argv)
    assert fits[:4] == [(0.1, "a", 0, True), (0.1, "b", 0, True), (0.2, "a", 0, True), (0.2, "b", 0, True)]
    assert fits[4:6] == [(0.2, "b", 0, False), (0.2, "b", 1, False)] and len(fits) == 8
    study.main(argv)
    assert len(fits) == 8 and (tmp_path / "study.png").exists()
    text = (tmp_path / "study.md").read_text()
    assert "| lora | 32 | 3 | 0.1 a: 0.500 / 1.000; 0.1 b: 0.500 / 1.000; 0.2 a: 0.500 / 1.000; 0.2 b: 1.000 / 1.000 |" in text
    assert "| lora | 3 | 0.2 | b | 2 | 0.500 ± 0.000 * | 1.000 ± 0.000 |" in text


def lines_of(out):
    """{(method, base, rounds): its lines}"""
    found = {}
    for row in read_jsonl(out / "study.jsonl"):
        found.setdefault((row["method"], row["base"], row["rounds"]), []).append(row)
    return found


def test_ports_and_loras_on_bases_of_ones_own(world, monkeypatch, capsys):
    """The search measures rows held out of train at the rates of other bases; what it chose is measured on evaluation
    rows; a second command goes on in the same folder, and another study is refused there."""
    monkeypatch.setattr(study.Stand, "__new__", lambda cls, *args, new=study.Stand.__new__: new(cls, *args)._replace(held=2))
    monkeypatch.setattr(study, "CODE", "0123456")
    flags = "--bases ./base-a --to ./base-c --data data --tasks one,two --n 4 --source-n 4 --eval-rows 3 --seeds 0 --out out --methods".split()
    assert command(study, *flags, "bare base,portal,lora", "--rounds", "2,3") == 0
    found = lines_of(world / "out")
    assert found.keys() == {("bare base", "base-c", 0), *itertools.product(("portal", "lora"), ["base-c"], (2, 3))}
    for (method, start), rounds in itertools.product((("portal", ports), ("lora", loras)), (2, 3)):
        own, rates = found[method, "base-c", rounds], study.RATES[start][1]
        assert {x["lr"] for x in own if x["search"]} == set(rates) and len(own) == 2 * (3 + 1)
        assert {x["rows"] for x in own if x["search"]} == {2} and {x["rows"] for x in own if not x["search"]} == {3}
        means = {lr: macro([(x["acc_norm"], -x["log_loss"]) for x in own if x["search"] and x["lr"] == lr]) for lr in rates}
        assert {x["lr"] for x in own if not x["search"]} == {max(rates, key=means.get)}
    assert "From base-a to base-c; tasks: one, two." in (world / "out" / "study.md").read_text()
    kept, again = [path for path in (world / "out" / "sources").iterdir() if path.is_dir()], read_jsonl(world / "out" / "study.jsonl")
    assert len(kept) == 2                                                            # the search's source, and the seed's
    lines = (world / "out" / "study.jsonl").rename(world / "lines")
    study.before.cache_clear(), study.world.cache_clear()
    fits, run = [], study.run
    monkeypatch.setattr(study, "run", lambda bases, *args: fits.append(bases[0].name) or run(bases, *args))
    assert command(study, *flags, "bare base,portal,lora", "--rounds", "2,3") == 0
    def measured(lines):
        return [(x["method"], x["lr"], x["seed"], x["search"], x["acc_norm"], x["log_loss"]) for x in lines]
    assert measured(read_jsonl(world / "out" / "study.jsonl")) == measured(again) and set(fits) == {"base-c"}  # no source is trained again
    lines.replace(world / "out" / "study.jsonl")
    assert command(study, *flags, "portal aligned then lora,mean of the other loras", "--rounds", "2") == 0
    more = lines_of(world / "out")
    assert all(more[key] == own for key, own in found.items()) and len(more) == len(found) + 2
    assert all(x["flops"] > 0 for key, own in more.items() if key[2] for x in own)
    capsys.readouterr()
    assert command(study, *flags, "lora", "--rounds", "2", "--eval-rows", "2") == 2
    one_line(capsys, ["out holds another study", "'eval_rows': 3", "'eval_rows': 2"])
    for method, words in (("portal latents swapped", "between two tasks"), ("mean of the other loras", "needs two tasks")):
        assert command(study, *flags, method, "--tasks", "one", "--out", "alone", "--rounds", "2") == 2
        one_line(capsys, [words])
    assert command(study, *flags, "source") == 2 and command(study, "--methods", "lora", "--rounds", "2") == 2
    assert "'source' cannot be measured here" in (text := capsys.readouterr().err) and "--rounds goes with --bases" in text


def test_sources_train_together_beside_a_lora_on_each(world, monkeypatch, capsys):
    monkeypatch.setattr(study.Stand, "__new__", lambda cls, *args, new=study.Stand.__new__: new(cls, *args)._replace(held=2))
    flags = "--bases ./base-a,./base-b --data data --tasks one,two --n 4 --rounds 2 --eval-rows 3 --seeds 0,1 --out out".split()
    trained, fit = [], study.fit
    monkeypatch.setattr(study, "fit", lambda job, bases, *rest: (trained.append([base.name for base in bases]), fit(job, bases, *rest)))
    assert command(study, *flags) == 0 and command(study, *flags) == 0
    assert trained == [*[["base-a"]] * 5, *[["base-b"]] * 5, *[["base-a", "base-b"]] * 5]  # three rates, two seeds, once
    found = lines_of(world / "out")
    assert found.keys() == {(m, b, 0 if m == "bare base" else 2) for m in ("bare base", "lora", "source") for b in ("base-a", "base-b")}
    assert {x["flops"] for x in found["source", "base-b", 2]} == {None}
    chosen = [{x["lr"] for x in found["source", base, 2] if not x["search"]} for base in ("base-a", "base-b")]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 1                            # one for both
    assert "## base-a, 4 rows a task" in (world / "out" / "study.md").read_text()
    assert command(study, *flags, "--methods", "portal") == 2 and "cannot be measured here" in capsys.readouterr().err


def test_held_out_rows_are_the_same_for_every_n_and_never_trained_on(world):
    stand = study.Stand(data=world / "data", held=2, tasks=("one",))
    few, many = (study.rows_of(stand, n, 0, True)["one"] for n in (4, 999))
    assert few[1] == many[1] and len(few[1]) == 2 and (len(few[0]), len(many[0])) == (4, 10)
    assert few[0] == many[0][:4] and not {row.prompt for row in many[0]} & {row.prompt for row in many[1]}
    with pytest.raises(study.BadInput, match="task one has 12 training rows; the search measures 12 and fits"):
        study.rows_of(stand._replace(held=12), 4, 0, True)


def test_flops_are_those_of_a_count_by_hand(monkeypatch):
    """2 a token and weight in each product; what a start reads: a forward pass of both bases."""
    base, source = tiny_base("llama"), tiny_base(name="source")
    def weights(architecture):
        return sum(p.numel() for name, p in tiny_model(architecture).named_parameters() if "_proj.weight" in name)
    adapters = random_adapters(base, rank=4)
    own = sum(a[0].numel() + adapters.B[g][0].numel() for g, a in adapters.A.items())
    assert study.flops(base, adapters, 10) == 10 * (2 * 2 * weights("llama") + 3 * 2 * own)
    portal = make_portal(base)
    trunk = sum(p.numel() for layer in (portal.core.W1, portal.core.W2) for p in [layer.weight])
    heads = sum(head.weight.numel() for side in (portal.core.head_A, portal.core.head_B) for head in side.values())
    with torch.no_grad():
        made = portal.adapters("tiny")
    aligner = sum(made.A[g][0].numel() * 12 + made.B[g][0].numel() * 12 for g in made.A)
    assert study.flops(base, made, 0, 5, portal.cfg) == 5 * 3 * (2 * 2 * 3 * (trunk + heads) + 3 * 2 * aligner)
    here = World([base], small_rows(), source=source)
    here.texts = ["w1 w2 w3", " ".join(["w4"] * 40)]
    monkeypatch.setattr("bases.tokens.MAX_LENGTH", 2)                                # align cuts prompts, too
    assert study.reading(here) == study.reading(here, rank=4, eps=0.1) == study.reading(here, ported=dict(eps=1)) == 0
    assert study.reading(here, aligned=True) == study.reading(here, carry="maps") == study.reading(here, ported=dict(
        aligned=True)) == 2 * 4 * (weights("llama") + weights("qwen3"))
