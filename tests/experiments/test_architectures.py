"""The fast part of experiments.architectures, a type of each structure; and that its comparisons can fail."""
import os, re, time

import pytest
import torch
from conftest import command, one_line

from bases import Base, sites
from experiments import architectures, tiny_models
from experiments.architectures import check, in_a_process, report
from experiments.tiny_models import Exact
from portal import Adapters

STRUCTURES = {  # {type: what is found in it}
    "smollm3": "q, k, v, o, gate, up, down in all 4 layers",
    "mixtral": "q, k, v, o in all 4 layers; no gate, up, down",                      # experts alone
    "glm4_moe": "several shapes of gate, up, down",                                  # dense layers and a shared expert
    "qwen3_5": "q, k, v, o in 2 of 4 layers; gate, up, down in all 4 layers; one row a choice",
    "falcon_h1": "q, k, v, o, gate, up, down in all 4 layers; one row a choice",     # both in every layer
    "lfm2": "one row a choice",                                                      # convolutions
    "gemma4_text": "k, v in 2 of 4 layers; several shapes of q, k, v, o",
    "gemma4_text (k = v)": "k in 2 of 4 layers; v in 1 of 4 layers",
    "deepseek_v3": "k, v fused in kv_b_proj",
    "phi3": "q, k, v fused in qkv_proj; gate, up fused in gate_up_proj",
    "gpt_neox": "q, k, v fused in query_key_value",
    "gpt2": "no gate; q, k, v fused in c_attn",                                      # Conv1D
    "qwen2_vl": "q, k, v, o, gate, up, down in all 4 layers"}                        # under an image model


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure(name):
    found, verdict, why = check(name)
    assert verdict == "works" and STRUCTURES[name] in why, why


def test_what_is_refused_and_what_does_not_count():
    _, verdict, why = check("codegen")
    assert verdict == "refused" and why.startswith("CodeGenForCausalLM has no q to adapt: layer 0 has none among attn.")
    assert "attn.qkv_proj" in why
    assert check("bert")[1] == check("mamba")[1] == "not counted" and check("no such type")[1] == "not built"


# ---------------------------------------------------------------------------------------------- they can fail
def wrong(name, words):
    found, verdict, why = check(name)
    assert verdict == "wrong" and re.search(words, why), (verdict, why)


@pytest.mark.parametrize("kinds", [("k", "q"), ("v", "k"), ("up", "gate")], ids="-".join)
def test_rows_of_another_projection(monkeypatch, kinds):
    end = "gate_up_proj" if "up" in kinds else "self_attn.qkv_proj"
    rows_of = sites.FUSED[end]
    def swapped(config, linear):
        rows = rows_of(config, linear)
        return rows | {kinds[0]: rows[kinds[1]], kinds[1]: rows[kinds[0]]}
    monkeypatch.setitem(sites.FUSED, end, swapped)
    monkeypatch.setitem(tiny_models.HINTS, "phi3", dict(num_key_value_heads=4))      # q, k and v of one size
    wrong("phi3", "the rows taken as")


def test_continuations_that_see_each_other(monkeypatch):
    monkeypatch.setattr(Base, "packs", True)
    wrong("recurrent_gemma", "bare scores")


def test_padding_that_is_seen(monkeypatch):
    monkeypatch.setattr(Base, "pads", True)
    wrong("whisper", "greedy decoding|IndexError")


@pytest.mark.parametrize("change, words", [
    (lambda A, B: (A, 1.001 * B), "PEFT's"), (lambda A, B: (A.detach(), B), "gradient of A"),
    (lambda A, B: (A.flip(1), B), "logits beside PEFT's")], ids=["scaled", "detached", "permuted"])
def test_factors_that_peft_does_not_have(monkeypatch, change, words):
    plain = Base.with_adapters
    def with_adapters(base, adapters, *args):
        if adapters is None or not adapters.tensors()[0].requires_grad or torch.is_grad_enabled() is False:
            return plain(base, adapters, *args)
        pairs = {g: change(A, adapters.B[g]) for g, A in adapters.A.items()}
        return plain(base, Adapters(*({g: pair[k] for g, pair in pairs.items()} for k in (0, 1)), adapters.scale), *args)
    monkeypatch.setattr(Base, "with_adapters", with_adapters)
    wrong("smollm3", words)


def test_a_patch_that_changes_the_bare_base(monkeypatch):
    pick = Base.pick
    monkeypatch.setattr(Base, "pick", lambda base, head, inputs: pick(base, head, (inputs[0] * (1 + 2 ** -20),)))
    wrong("smollm3", "patching changes the bare logits")


def test_an_exception_is_wrong(monkeypatch):
    def fail(*args):
        raise KeyError("layer")
    monkeypatch.setattr(Base, "factors", fail)
    wrong("smollm3", r"KeyError: 'layer' \(test_architectures.py:\d+\)")


# ---------------------------------------------------------------------------------------------- the rest
def test_exact_computes_in_float64():
    x = torch.randn(3, 5, dtype=torch.float64)
    def norm(x):
        return (x.float() / x.to(torch.float32).norm(dim=-1, keepdim=True)).to(x.dtype)
    with Exact():
        assert torch.equal(norm(x), x / x.norm(dim=-1, keepdim=True)) and torch.zeros(1).dtype == torch.float64
    assert not torch.equal(norm(x), x / x.norm(dim=-1, keepdim=True)) and torch.zeros(1).dtype == torch.float32


def test_a_process_that_crashes_or_hangs_is_a_row(monkeypatch):
    broken = ("-", "wrong", "its process crashed, or was not done after 0.1 seconds")
    monkeypatch.setattr(architectures, "check", os._exit)
    assert in_a_process(7) == (*broken[:2], broken[2].replace("0.1", "120"))
    monkeypatch.setattr(architectures, "check", time.sleep)
    monkeypatch.setattr(architectures, "SECONDS", 0.1)
    assert in_a_process(60) == broken


def test_the_command_and_its_page(monkeypatch, tmp_path, capsys):
    rows = {"llama": ("Llama", "works", "q | v"), "exaone": ("Llama", "works", "q"), "bert": ("Bert", "not counted", "later"),
            "ctrl": ("CTRL", "refused", "no q"), "blt": ("-", "not built", "no library")}
    page = report(rows)
    assert "- 1 of 2 decoder classes work, 0 are wrong" in page and "## Works: 2 model types, 1 classes" in page
    assert "| llama | Llama | q / v |" in page and "## Wrong" not in page
    monkeypatch.setattr(architectures, "ROOT", tmp_path)
    for name, value in (("CAUSAL", ["llama", "bert"]), ("IMAGE_TEXT", ["exaone"]), ("VARIANTS", {"ctrl": 0, "blt": 0})):
        monkeypatch.setattr(architectures, name, value)
    monkeypatch.setattr(architectures, "in_a_process", rows.get)
    assert command(architectures) == 0 and "| bert | Bert | later |" in (tmp_path / "results" / "architectures.md").read_text()
    assert "exaone | Llama | works | q" in capsys.readouterr().out
    rows["bert"] = ("Bert", "wrong", "scores")
    assert command(architectures, "--types", "llama") == 0 and command(architectures) == 1
    assert command(architectures, "--types", "lama") == 2
    one_line(capsys, ["--types", "lama", "llama"])


def test_the_tiny_models_are_tiny():
    for name in ("deepseek_v3", "llava", "qwen3_next"):
        assert sum(p.numel() for p in tiny_models.tiny_model(name).parameters()) < 1e6
