"""experiments/fair.py and starts.py: what a start changes and what it leaves, the search's choice, the table."""
import copy, itertools

import numpy as np
import pytest
import torch
from conftest import tiny_base, tiny_model
from helpers import make_portal, small_rows

import port
from baselines.cross_lora import cross_lora
from bases import encode, same_depths
from experiments import fair, fair_tables, starts
from reports.results import pack
from runtime.files import read_jsonl
from score import macro, score
from tasks.rows import SoftRow

MODULES = ["q", "v"]


@pytest.fixture
def here():
    """A port from a tiny Qwen3 to a tiny Llama, of a core of random numbers."""
    source, base, rows = tiny_base(name="source"), tiny_base("llama", name="target"), small_rows()
    portal = make_portal(source)
    with torch.no_grad():
        own, *_ = starts.loras(starts.World(source, portal, source, None, rows))
        loras = own().map(torch.randn_like)
    return starts.World(base, portal, source, lambda: loras, rows)


def test_an_aligned_P_out_solves_its_least_squares(here):
    """On the source itself the ridge map is the identity, and P_out B_hat the source's B."""
    own = starts.World(here.source, here.portal, here.source, None, here.rows)
    own.texts = [" ".join(f"w{(7 * i + j * j) % 50}" for j in range(9)) for i in range(50)]
    with torch.no_grad():
        _, wanted = here.like(here.portal.core, here.portal.z)
        P_out = starts.aligned_P_out(own, by=1e-9)
        _, B_hat = here.portal.core(here.portal.z, own.converter().e)
    found = P_out["v"] @ B_hat["v"]                                                  # q's outputs have fewer dimensions than
    assert (found - wanted["v"]).norm() < 0.01 * wanted["v"].norm()                  # d_out: its B cannot come back whole


def test_ridge_maps_solve_their_least_squares_and_carry_a_lora(here):
    """Against numpy on the same token ends; on the source itself a carried LoRA comes back."""
    here.texts = ["w1 w22 w3 w4", "w40 w4 w7"]
    M, R = here.maps["v", 1]
    X, Y = [], []
    for text in here.texts:
        x, source_x = port.shared_inputs(here.base, here.source, text, ["v"])
        X.append(x["v", 1].double().numpy())
        Y.append(source_x["v", [s for (l, *_), (s, *_) in same_depths(here.base, here.source, "v") if l == 1][0]].double().numpy())
    X, Y = np.concatenate(X), np.concatenate(Y)
    lam = 1e-2 * (X ** 2).sum(0).mean()
    want = np.linalg.lstsq(np.concatenate([X, lam ** 0.5 * np.eye(X.shape[1])]), np.concatenate([Y, np.zeros((X.shape[1], Y.shape[1]))]),
                           rcond=None)[0].T
    np.testing.assert_allclose(M, want, rtol=1e-3, atol=1e-5)
    assert R.shape == (here.base.groups["v"].d_out, here.source.groups["v"].d_out)
    own = starts.World(here.source, here.portal, here.source, here.loras, here.rows)
    own.texts = [" ".join(f"w{(7 * i + j * j) % 50}" for j in range(9)) for i in range(50)]
    own.maps = starts.ridge_maps(own, starts.MODULES, 1e-9)
    carried, loras = starts.by_maps(own), here.loras()
    x = port.layer_inputs(here.source, own.texts[0], ["v"])[0]["v", 0]
    for t in range(3):
        got, want = (x @ a.A["v"][t, 0].T @ a.B["v"][t, 0].T for a in (carried, loras))
        assert (got - want).norm() < 0.05 * want.norm()


def test_ports_leave_the_world_as_it_is_and_start_as_named(here):
    before = copy.deepcopy(here.portal)
    def of(**settings):
        torch.manual_seed(1)
        generate, stages, rows = starts.ports(here, **settings)
        assert "labels" in settings or rows is here.rows
        return generate.__self__, generate("target"), stages
    plain, adapters, stages = of()
    assert all(not b.any() for b in adapters.B.values()) and len(stages) == 1
    (learner,) = stages[0](0.1, 7)
    assert learner.rounds == 7 and {id(p) for p in learner.params} == {id(p) for p in plain.converters["target"].parameters()}
    swapped, *_ = of(swapped=True)
    assert torch.equal(swapped.z[1], here.portal.z[0]) and torch.equal(plain.z, here.portal.z)
    untrained, *_ = of(untrained=True)
    for m in MODULES:
        new, old = untrained.core.head_B[m].weight, here.portal.core.head_B[m].weight
        assert not torch.equal(new, old) and abs(new.std() / old.std() - 1) < 0.2
    assert torch.equal(of(labels=0)[0].z, here.portal.z)
    taught, (own, held) = starts.ports(here, labels=1)[2], here.rows["two"]
    assert taught["two"][1] is held and taught["two"][0][0] is own[0] and len(own) > 1
    assert all(isinstance(row, SoftRow) and row[:3] == was[:3] for row, was in zip(taught["two"][0][1:], own[1:], strict=True))
    assert all(isinstance(row, SoftRow) for row in starts.ports(here, labels=0)[2]["two"][0])
    aligned, both, _ = of(aligned=True, P_out=True)
    assert torch.equal(aligned.converters["target"].P_in["q"], here.P_in["q"]) and both.B["q"].any()
    unfrozen, _, (first, second) = of(unfreeze=True)
    (a,), (b,) = first(0.1, 9), second(0.1, 9)
    assert (a.rounds, b.rounds) == (6, 3) and {id(p) for p in b.params} > {id(p) for p in a.params}
    assert len(b.params) == len(a.params) + 1 + len([*unfrozen.core.parameters()]) and b.z is unfrozen.z
    assert torch.equal(before.z, here.portal.z) and here.portal.core.W1.weight.requires_grad
    assert all(torch.equal(p, q) for p, q in zip(before.core.parameters(), here.portal.core.parameters(), strict=True))


def test_a_carried_lora_starts_where_the_transfer_ends(here):
    generate, *_ = starts.loras(here, carry=cross_lora.copy, factor=0.5)
    carried = cross_lora.transfer(cross_lora.copy, here.loras(), here.source, here.base)
    items = encode(here.base.tokenizer, here.rows[next(iter(here.rows))][1], list(here.rows))[0]
    with torch.no_grad():
        own, half = (score(here.base, adapters, items, 999) for adapters in (
            generate(), carried._replace(scale=carried.scale / 2)))
    torch.testing.assert_close(torch.tensor(own), torch.tensor(half))


def line(method, n, rounds, seed, search, correct, loss, lr=0.1, knob=""):
    return dict(method=method, knob=knob, lr=lr, n=n, rounds=rounds, seed=seed, search=search, tokens=1, flops=2e9, seconds=3.4,
                hardware="an abacus", commit="c", task="one", acc_norm=sum(correct) / len(correct), log_loss=loss,
                rows=len(correct), correct=pack(correct))


def test_the_search_chooses_on_held_out_rows_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    fits = []
    def cell(stand, method, knob, lr, n, rounds, seed, search):
        fits.append((lr, knob, seed, search))
        good = (lr, knob) == (0.2, "b")
        return [line(method, n, rounds, seed, search, [True, good == search], 1.0, lr, knob)]  # on evaluation rows it is bad
    monkeypatch.setattr(fair, "cell", cell)
    monkeypatch.setattr(fair, "METHODS", {"lora": fair.Method(starts.loras, {"a": {}, "b": {}}, (3, 6))})
    monkeypatch.setattr(fair, "RATES", {starts.loras: (0.1, 0.2)})
    monkeypatch.setattr(fair, "SEARCHED", 3 * fair.TOY_STAND.batch)
    argv = ["--n", "32", "--seeds", "0,1", "--out", str(tmp_path)]
    fair.main(argv)
    assert fits[:4] == [(0.1, "a", 0, True), (0.1, "b", 0, True), (0.2, "a", 0, True), (0.2, "b", 0, True)]
    assert fits[4:6] == [(0.2, "b", 0, False), (0.2, "b", 1, False)] and len(fits) == 8
    fair.main(argv)
    assert len(fits) == 8 and (tmp_path / "fair.png").exists()
    text = (tmp_path / "fair.md").read_text()
    assert "| lora | 32 | 3 | 0.1 a: 0.500 / 1.000; 0.1 b: 0.500 / 1.000; 0.2 a: 0.500 / 1.000; 0.2 b: 1.000 / 1.000 |" in text
    assert "| lora | 3 | 0.2 | b | 2 | 0.500 ± 0.000 * | 1.000 ± 0.000 |" in text


def test_on_bases_of_ones_own_rates_and_batches_are_the_real_presets(world, monkeypatch):
    """The search measures rows held out of train; what it chose is measured on evaluation rows."""
    monkeypatch.setattr(fair, "REAL_ROWS", dict(rows=4, held=2, measured=3, batch=4))
    fair.main("--bases ./base-a --to ./base-c --data data --tasks one,two --n 4 --rounds 2,3 --seeds 0 --out out --methods".split() + ["bare base,portal,lora"])
    lines = read_jsonl(world / "out" / "fair.jsonl")
    tasks = len({line["task"] for line in lines})
    assert len(lines) == (1 + 2 * 2 * (4 + 1)) * tasks and {line["rounds"] for line in lines} == {0, 2, 3}
    for (method, start), rounds in itertools.product((("portal", starts.ports), ("lora", starts.loras)), (2, 3)):
        own, rates = [line for line in lines if (line["method"], line["rounds"]) == (method, rounds)], fair.REAL_RATES[start]
        assert {line["lr"] for line in own if line["search"]} == set(rates)
        assert {line["rows"] for line in own if line["search"]} == {2} and {line["rows"] for line in own if not line["search"]} == {3}
        means = {lr: macro([(x["acc_norm"], -x["log_loss"]) for x in own if x["search"] and x["lr"] == lr]) for lr in rates}
        assert {line["lr"] for line in own if not line["search"]} == {max(rates, key=means.get)}
    assert "From base-a to base-c; tasks: one, two." in (world / "out" / "fair.md").read_text()


def test_the_table_compares_with_the_best_lora():
    right = [True] * 16 + [False] * 4
    lines = [line("lora", 32, 3, s, False, [True] * 10 + [False] * 10, 1.0) for s in (0, 1)]
    lines += [line("lora", 32, 6, s, False, right, 0.5) for s in (0, 1)]
    lines += [line("portal", 32, 3, s, False, right[:15] + [False] * 5, 0.7) for s in (0, 1)]
    lines += [line("bare base", 32, 0, 0, False, [True] * 10 + [False] * 10, 3.0)]
    whole = fair_tables.table(fair.TOY_STAND, lines, fair_tables.results(lines))
    page = whole.partition("## 32 rows")[2].splitlines()
    text = [row.strip("| ").split(" | ") for row in page if row.startswith(("| lora |", "| portal |"))]
    assert [row[7].split(" [")[0] for row in text] == ["-0.300", "-", "-0.050"]
    assert [row[5].endswith(" *") for row in text] == [False, True, False]
    assert [row[8].split("% [")[0] for row in text] == ["0.0", "100.0", "83.3"]           # of 0.5 to 0.8
    assert "Within" in whole and "plateau" not in whole                                   # one n: its two tables are alike


def test_a_wider_search_replaces_what_was_measured():
    lines = [line("lora", 32, 3, s, False, [True, False], 1.0, 0.1, "a") for s in (0, 1)]
    lines += [line("lora", 32, 3, 0, True, [True, True], 0.1, 0.05, "a"), line("lora", 125, 3, 0, False, [True, False], 1.0, 0.1, "a")]
    lines += [line("lora", 32, 3, 0, False, [True, True], 0.1, 0.05, "a")]
    rows = fair_tables.results(lines)
    assert rows[["n", "lr", "seed", "acc_norm"]].values.tolist() == [[125, 0.1, 0, 0.5], [32, 0.05, 0, 1.0]]


def test_what_it_takes_counts_from_the_cheapest_lora_on_its_plateau():
    def of(method, n, rounds, right, flops):
        return [dict(line(method, n, rounds, s, False, [True] * right + [False] * (400 - right), 1.0), flops=flops) for s in (0, 1)]
    lines = [*of("lora", 32, 9, 390, 3e9), *of("lora", 125, 6, 399, 2e9), *of("lora", 125, 9, 400, 8e9),
             *of("portal", 32, 3, 398, 1e9), *of("portal", 32, 9, 400, 4e9), *of("portal", 125, 9, 397, 1e9)]
    text = fair_tables.reach(fair_tables.results(lines))
    assert text[1] == "## Within 0.005 of the LoRA's plateau, 1.000"
    at = text.index("## Within 0.005 of the best LoRA on as many rows")
    plateau, own = ([row.strip("| ").split(" | ") for row in part if row.startswith(("| lora", "| portal"))]
                    for part in (text[:at], text[at:]))
    assert plateau == [["portal", "32", "3", "1", "0.50"], ["lora", "125", "6", "2", "1.00"]]
    assert own == [["portal", "32", "3", "1", "0.33"], ["lora", "32", "9", "3", "1.00"], ["lora", "125", "6", "2", "1.00"]]


def test_what_a_start_reads_is_counted(here, monkeypatch):
    """2 FLOPs a token and weight of the frozen projections of both bases."""
    here.texts = ["w1 w2 w3", " ".join(["w4"] * 40)]
    monkeypatch.setattr(fair, "MAX_LENGTH", 2)                                       # align cuts prompts, too
    weights = sum(p.numel() for architecture in ("qwen3", "llama")
                  for name, p in tiny_model(architecture).named_parameters() if "_proj.weight" in name)
    assert fair.reading(here) == 0 and fair.reading(here, rank=4, eps=0.1) == 0
    assert fair.reading(here, aligned=True) == fair.reading(here, carry="maps") == 2 * 4 * weights
    assert fair.reading(here, aligned=True, P_out=True, eps=0.1) == 2 * 2 * 4 * weights
