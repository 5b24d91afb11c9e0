"""PEFT and transformers load the exported folders on a fresh base and compute the logits that Base.logits does."""
import json, os

import huggingface_hub, peft, pytest, torch
from conftest import ARCHITECTURES, SMALL, command, exact_norms, fingerprint, one_line, save_tiny, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from helpers import items, make_portal, random_adapters
from test_sites import base_of, hybrid
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

import export
from bases import Item, load_base, source_of
from data import collate
from eval import adapters_of
from exports.merge import save_merged
from exports.peft import checkpoint_names
from portal import MODULES, Adapters
from runtime.files import BadInput, append_jsonl, write_json
from runtime.saved import load_tensors, save_adapters, save_portal, save_tensors
from tasks.rows import Row

TASKS = ["one", "two", "three"]


def make_run(folder, where, modules=("q", "v"), **sizes):
    """A run with random weights on the base in the folder `where`, as train.py would have left it -> (run, where)."""
    portal = make_portal(load_base(str(where)), modules=modules, **sizes)
    p = dict(base="tiny", id=str(where), revision=None, ported=False, n=8, seed=0, data=str(folder), date="2026-01-01")
    run = folder / "run"
    save_portal(run, portal)
    write_json(run / "converters" / "tiny.json", p)
    write_json(run / "portal.json", dict(config=vars(portal.cfg), bases=[p], seed=0, data=str(folder),
                                         trained=p["date"]))
    return run, where


def assert_same_logits(load, run, where, dtype, method="portal"):
    """load(task) is an ordinary model; it must equal base.logits with the run's adapters, row by row."""
    base = load_base(str(where), dtype=dtype)
    batch, rows = collate(items()), items()
    adapters = adapters_of(run, method, "tiny", base)
    if dtype == torch.float64:
        exact_norms(base.model)
    with torch.no_grad():
        got, without = (base.logits(batch, a)[batch.source] for a in (adapters, None))
        want = []
        for item in rows:
            model = load(TASKS[item.task]).eval()
            model = exact_norms(model) if dtype == torch.float64 else model
            ids = torch.tensor([item.prompt + item.continuations[0]])
            want.append(model(input_ids=ids).logits[0, len(item.prompt) - 1:-1])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, torch.cat(want), rtol=tolerance, atol=tolerance)
    assert (got - without).abs().max() > 0.01                                        # the adapters do something


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3", "gemma3-multimodal"])
def test_peft_loads_the_folders(tmp_path, architecture, dtype):
    modules = MODULES if architecture == "llama" else ("q", "v", "o")
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny", architecture), modules)
    assert command(export, "--run", run, "--to", "tiny", "--task", "all", "--out", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(TASKS)
    config = json.loads((tmp_path / "out" / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(where) and config["lora_alpha"] / config["r"] == 2
    assert type(config["lora_alpha"]) is int
    full_paths = any("." in target for target in config["target_modules"])
    assert full_paths == (architecture == "gemma3-multimodal")                       # its vision tower has a q_proj

    def load(task):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "out" / task)
        adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert len(adapted) == 3 * len(modules)                                      # the decoder's, and nothing else
        return model
    assert_same_logits(load, run, where, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_is_a_plain_one(tmp_path, architecture):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny", architecture), ("q", "down"))
    assert command(export, "--run", run, "--to", where, "--task", "all", "--merge", "--out", tmp_path / "out") == 0
    before = load_file(where / "model.safetensors")
    for task in TASKS:
        after = load_file(tmp_path / "out" / task / "model.safetensors")
        assert set(after) == set(before)                                             # no name of a wrapper is left
        differ = {k for k in before if not torch.equal(before[k], after[k])}
        assert len(differ) == 6 and all("vision" not in k and ("q_proj" in k or "down_proj" in k) for k in differ)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (where, tmp_path / "out" / "two")]
    assert tokenizers[0]("w1 w2 w49").input_ids == tokenizers[1]("w1 w2 w49").input_ids
    def load(task):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out" / task)
    assert_same_logits(load, run, where, torch.float32)


def test_merging_in_float64_is_exact(tmp_path):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny", "gemma3"), MODULES)
    base = load_base(str(where), dtype=torch.float64)
    adapters = adapters_of(run, "portal", "tiny", base)
    base.unpatch()
    for t, task in enumerate(TASKS):
        save_merged(tmp_path / task, where, base, adapters, t, torch.float64)
    assert_same_logits(lambda task: AutoModelForCausalLM.from_pretrained(tmp_path / task, dtype=torch.float64),
                       run, where, torch.float64)


def test_any_methods_adapters_leave(tmp_path):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"))
    base = load_base(str(where))
    torch.manual_seed(5)
    lora = Adapters({m: torch.randn(3, 3, 2, base.groups[m].d_in) for m in ("k", "up")},
                    {m: 0.1 * torch.randn(3, 3, base.groups[m].d_out, 2) for m in ("k", "up")}, 1.375)
    save_adapters(run / "baselines" / "lora" / "tiny.safetensors", lora)
    for task in TASKS:
        argv = ["--run", run, "--to", "tiny", "--task", task, "--out", tmp_path / task, "--method", "lora"]
        assert command(export, *argv) == 0
    assert (tmp_path / "two" / "adapter_config.json").read_text().count('"lora_alpha": 2.75,') == 1
    def load(task):
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), tmp_path / task)
    assert_same_logits(load, run, where, torch.float32, "lora")


COMMIT = "a" * 40


def named_expert(base):
    base.model.register_parameter("expert_bias", torch.nn.Parameter(torch.zeros(2, 2)))
    return base


BASES = {
    "experts": lambda: base_of("Qwen2MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                               num_hidden_layers=2, shared_expert_intermediate_size=16),
    "fused": lambda: base_of("Phi3ForCausalLM", pad_token_id=0, num_hidden_layers=2), "convolutions": hybrid,
    "a mere name": lambda: named_expert(base_of("Qwen3ForCausalLM")),
    "conv1d": lambda: base_of("GPT2LMHeadModel", config="GPT2Config", n_embd=24, n_layer=2, n_head=4, head_dim=6)}


@pytest.mark.parametrize("name, modules, changes", [
    ("experts", "q gate down", dict(
        target_modules=[f"model.layers.{k}.self_attn.q_proj" for k in range(2)],
        target_parameters=[f"model.layers.{k}.mlp.shared_expert.{m}_proj.weight"
                           for m in ("gate", "down") for k in range(2)])),
    ("fused", "o v q", dict(target_modules=["o_proj", "qkv_proj"],
                            rank_pattern={f"model.layers.{k}.self_attn.qkv_proj": 8 for k in range(2)},
                            alpha_pattern={f"model.layers.{k}.self_attn.qkv_proj": 16 for k in range(2)})),
    ("convolutions", "q gate", dict(target_modules=["gate_proj", "q_proj"])),         # [channels, 1, 4]: no experts
    ("a mere name", "gate", dict(target_modules=["gate_proj"])),
    ("conv1d", "up down", dict(fan_in_fan_out=True, target_modules=[
        f"transformer.h.{k}.mlp.{m}" for m in ("c_fc", "c_proj") for k in range(3)]))])
@torch.no_grad()
def test_peft_finds_the_layers_that_are_meant(tmp_path, name, modules, changes):
    """Experts under names that PEFT takes for others, fused or transposed projections, names that others have."""
    base, batch = BASES[name](), collate([Item(1, [5, 6, 7, 8, 9], [[10, 11, 12]], Row("t", "", [], 0))])
    adapters = random_adapters(base, modules=modules.split())
    want, bare = base.logits(batch, adapters), base.logits(batch)
    export.save_peft(tmp_path, base, dict(id="Org/X", revision=COMMIT), adapters, 1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {**dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="Org/X", revision=COMMIT, r=4, lora_alpha=8,
        rank_pattern={}, alpha_pattern={}, target_parameters=None, lora_dropout=0.0, bias="none", use_rslora=False,
        use_dora=False, inference_mode=True, fan_in_fan_out=False), **changes}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model = peft.PeftModel.from_pretrained(base.unpatch(), tmp_path)
    torch.testing.assert_close(model(input_ids=batch.ids).logits[batch.at], want, rtol=1e-4, atol=1e-4)
    assert (want - bare).abs().max() > 0.1


def test_an_adapters_file_has_the_names_that_peft_reads(monkeypatch):
    """PEFT renames as transformers does for the base's files: by the model's own steps and by those for old files."""
    path = "model.layers.0.self_attn.q_proj"
    parts = [f"self_attn.{m}_proj.weight" for m in "qkv"]
    split = WeightConverter(["attn.qkv.weight"], parts, operations=[Chunk(dim=0)])
    def names(own, legacy=()):
        monkeypatch.setattr("exports.peft.get_model_conversion_mapping", lambda model, add_legacy=True: [
            WeightRenaming(*step) if type(step) is tuple else step for step in (*own, *(legacy if add_legacy else ()))])
        return checkpoint_names(None, [path])[path]
    assert names([]) == names([("^model.", "")]) == path                             # PEFT adds the prefix
    assert names([split]) == path
    assert names([("attn.", "self_attn."), split]) == "model.layers.0.attn.q_proj"
    assert names([("attn.", "mid."), ("mid.", "self_attn.")]) == "model.layers.0.attn.q_proj"
    assert names([("attn.", "self_attn.")], [("old.", "attn.")]) == "model.layers.0.attn.q_proj"
    with pytest.raises(BadInput, match=f"PEFT cannot read an adapter of {path}, which it renames; --merge"):
        names([("attn.", "self_attn."), ("self_attn.", "attention.")])
    with pytest.raises(BadInput, match=f"PEFT cannot read an adapter of {path}, which it renames"):
        names([("attn.", "self_attn.")], [("attn.q_proj", "attn.query")])


def test_the_card_in_full(tmp_path):
    run = tmp_path / "run"
    p = dict(base="x", id="Org/X", revision=COMMIT, ported=True, n=8, seed=None, date="2026-01-01")
    write_json(run / "portal.json", dict(added={"two": dict(n=5, bases=["a", "b"])}))
    for seed in (1, None):
        append_jsonl(run / "results.jsonl", dict(method="portal", base="x", task="one", seed=seed, n=8, select="best",
                                                 acc_norm=0.5 if seed is None else 0.25, log_loss=1.0, rows=40))
    assert export.card(run, p, "portal", ["one", "two"], "peft", "AutoX", torch.float32) == f"""---
base_model: "Org/X"
library_name: peft
tags:
- lora
- portal
---

# one, two on x

A LoRA in PEFT's format. {export.MARK}.

| | |
|---|---|
| base | Org/X |
| revision of the base | {COMMIT} |
| seen in training | no |
| method | portal |
| run | run |
| training rows a task (n) | 8 |
| seed | not recorded |
| fitted | 2026-01-01 |
| acc_norm of one | 0.500 on 40 evaluation rows |
| the bare base's on one | not measured |
| two was learned later | 5 rows on a, b |
| acc_norm of two | not measured |
| the bare base's on two | not measured |

```python
from peft import PeftModel
from transformers import AutoX

model = PeftModel.from_pretrained(AutoX.from_pretrained('Org/X', revision='{COMMIT}'), "this folder")
```
"""
    (tmp_path / "X.gguf").touch()
    p = dict(p, id=str(tmp_path / "X.gguf"), revision=None, ported=False, seed=2)
    card = export.card(run, p, "lora", ["two"], "peft", "AutoX", torch.float32)
    assert f"from_pretrained('{tmp_path}', gguf_file='X.gguf')" in card and f"| base | {tmp_path}/X.gguf |" in card
    assert "learned later" not in card and "| seen in training | yes |" in card
    card = export.card(run, p, "portal", ["one"], "peft", "AutoX", torch.float32)
    assert "| seed | 2 |" in card and "| acc_norm of one | not measured |" in card   # another seed's results
    card = export.card(run, p, "lora", ["two"], "transformers", "AutoX", torch.bfloat16)
    assert 'AutoX.from_pretrained("this folder", dtype="bfloat16")' in card


def test_a_folder_beside_a_gguf_file_is_free_and_the_file_is_not(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    source = source_of(str(tmp_path / "models" / "x.gguf"))
    export.check_free(tmp_path / "models" / "out", False, source)
    (tmp_path / "README.md").write_bytes(b"\xff " + export.LIST.format('["README.md"]').encode())  # no text in full
    for path in (tmp_path, tmp_path / "models" / "x.gguf", tmp_path / "models" / "x.gguf" / "new"):
        with pytest.raises(BadInput, match="is, holds or lies in the base, .*/models/x.gguf"):
            export.check_free(path, True, source)
    monkeypatch.chdir(tmp_path)
    export.check_free(tmp_path, True, source_of("Org/X"))                            # no folder here
    with pytest.raises(BadInput, match="already holds an export; --overwrite replaces it"):
        export.check_free(tmp_path, False, source_of("Org/X"))
    (tmp_path / "README.md").write_text("another's")
    with pytest.raises(BadInput, match="is neither empty nor a folder that an export wrote"):
        export.check_free(tmp_path, True, source_of("Org/X"))


def test_each_form_of_export_is_written_from_its_base(tmp_path, monkeypatch, capsys):
    """A .gguf file's merged model is converted; its adapters are PEFT's. A merged model's weights are in --dtype."""
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"), norm="none")
    argv = ["--run", run, "--to", "tiny", "--out", tmp_path / "out"]
    def written(*flags):
        assert command(export, *argv, "--overwrite", *flags) == 0
        return (tmp_path / "out" / "README.md").read_text()
    assert "library_name: portallib\n" in written("--portallib")
    text = written("--task", "two", "--merge", "--dtype", "bfloat16")
    assert "library_name: transformers\n" in text and 'dtype="bfloat16"' in text
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert "library_name: peft\n" in written("--task", "two")
    base, calls, path = load_base(str(where)), [], tmp_path / "tiny" / "x.gguf"
    path.touch()
    provenance = run / "converters" / "tiny.json"
    write_json(provenance, {**json.loads(provenance.read_text()), "id": str(path)})
    monkeypatch.setattr(export, "reload_base", lambda *args, **options: base)
    for name in ("save_converted", "save_peft", "save_merged"):
        monkeypatch.setattr(export, name, lambda folder, *args, name=name: calls.append((name, args)))
    written("--task", "two")
    written("--task", "three", "--merge")
    (peft_, (own, p, adapters, t)), (converted, (source, *rest)) = calls
    assert (peft_, own, p["id"], t) == ("save_peft", base, str(path), 1) and adapters.scale == 2
    assert converted == "save_converted" and source.gguf == "x.gguf" and rest[0] is base and rest[2] == 2


def test_adapters_of_another_fit_or_of_fewer_tasks_are_refused(tmp_path, capsys):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"))
    base, p = load_base(str(where)), json.loads((run / "converters" / "tiny.json").read_text())
    argv = ["--run", run, "--to", "tiny", "--overwrite", "--out", tmp_path / "out", "--method"]
    def refused(words, *flags):
        capsys.readouterr()
        assert command(export, *argv, *flags) == 2
        one_line(capsys, words)
    for method in ("lora", "cross_lora"):
        save_adapters(run / "baselines" / method / "tiny.safetensors", random_adapters(base, tasks=2))
        write_json(run / "baselines" / method / "tiny.json", p)
        assert command(export, *argv, method, "--task", "two") == 0
        for task in ("three", "all"):
            refused([f"its {method} adapters of tiny are older than its task 'three'"], method, "--task", task)
        write_json(run / "baselines" / method / "tiny.json", {**p, "n": 4})
    refused(["lora adapters of tiny were not fitted on the base and rows"], "lora", "--task", "two")
    fit = run / "converters" / "tiny.json"
    write_json(fit, {**p, "fingerprint": {"weights": "0" * 8}})                      # of other weights
    refused(["base tiny: weights in", "--allow-changed-base"], "cross_lora", "--task", "two")
    assert command(export, *argv, "lora", "--task", "two", "--allow-changed-base") == 0
    write_json(fit, p)
    assert command(export, *argv, "cross_lora", "--task", "two") == 0                # made of its source's, not fitted


def test_the_card_says_what_was_measured(tmp_path):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"))
    for method, n, accuracy in (("portal", 8, 0.75), ("base", 0, 0.25), ("lora", 8, 0.5), ("portal", 4, 0.1)):
        append_jsonl(run / "results.jsonl", dict(method=method, base="tiny", task="one", seed=0, n=n, select="best",
                                                 acc_norm=accuracy, log_loss=1.0, rows=40))
    assert command(export, "--run", run, "--to", "tiny", "--task", "all", "--out", tmp_path / "out") == 0
    cards = {task: (tmp_path / "out" / task / "README.md").read_text() for task in TASKS}
    assert "| acc_norm of one | 0.750 on 40 evaluation rows |" in cards["one"]
    assert "on one | 0.250 on 40" in cards["one"]
    assert "| acc_norm of two | not measured |" in cards["two"]
    for fact in ("# two on tiny", "| run | run |", "| seed | 0 |", "(n) | 8 |", "| method | portal |"):
        assert fact in cards["two"]
    assert huggingface_hub.ModelCard.load(tmp_path / "out" / "one" / "README.md").data.base_model == str(where)


def test_bad_input_and_nothing_overwritten(tmp_path, capsys, monkeypatch):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"))
    out = tmp_path / "out"
    def fails(words, *argv):
        before = fingerprint(tmp_path)
        capsys.readouterr()
        assert command(export, "--run", run, *argv) == 2
        one_line(capsys, words)
        assert fingerprint(tmp_path) == before
    good = ["--to", "tiny", "--task", "one", "--out", out]
    fails(["'qwen3-4b' is not in", "holds tiny", "port.py"], "--to", "qwen3-4b", "--task", "one", "--out", out)
    save_tiny(tmp_path / "elsewhere" / "tiny")                                       # the same name, another base
    fails(["is not the base tiny of"], "--to", tmp_path / "elsewhere" / "tiny", "--task", "one", "--out", out)
    fails(["'tiny@4' is not in"], "--to", "tiny@4", "--task", "one", "--out", out)
    fails(["unknown task 'four'", "one, two, three"], "--to", "tiny", "--task", "four", "--out", out)
    fails(["no lora adapters of tiny", "eval.py"], *good, "--method", "lora")
    fails(["--out", "required"], "--to", "tiny", "--task", "one")
    fails(["neither empty nor a folder that an export"], "--to", "tiny", "--task", "one", "--out", where, "--overwrite")
    fails(["not written"], "--to", "tiny", "--task", "one", "--out", run / "portal.json" / "x")
    assert command(export, "--run", run, *good) == 0
    fails(["already holds an export", "--overwrite"], *good)
    before = fingerprint(out)
    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:                                                 # after the weights
        m.setattr(export, "card", killed)
        assert command(export, "--run", run, *good, "--overwrite") == 130
        assert fingerprint(out) == before
        assert command(export, "--run", run, "--to", "tiny", "--task", "two", "--out", tmp_path / "new") == 130
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))         # no half folder
    assert command(export, "--run", run, "--to", "tiny", "--task", "two", "--out", out, "--overwrite") == 0
    assert "# two on tiny" in (out / "README.md").read_text()
    path = run / "converters" / "tiny.safetensors"
    save_tensors(path, {k: v[:2] if k == "e" else v for k, v in load_tensors(path).items()})  # a layer less
    fails(["do not fit base tiny"], "--to", "tiny", "--task", "one", "--out", tmp_path / "other")
    save_portal(run, make_portal(base := load_base(str(where))))
    save_adapters(run / "baselines" / "lora" / "tiny.safetensors", make_portal(base).adapters("tiny"))
    fitted = json.loads((run / "converters" / "tiny.json").read_text())
    write_json(run / "baselines" / "lora" / "tiny.json", {**fitted, "n": 4})
    fails(["lora adapters of tiny were not fitted on the base and rows"], "--to", "tiny", "--task", "one", "--method",
          "lora", "--out", tmp_path / "other")


@pytest.mark.gpu
def test_vllm_serves_several_tasks_from_one_base(tmp_path):
    """vLLM serves one task a request on one base and picks the next token that Base.logits does (head size 64)."""
    vllm = pytest.importorskip("vllm")
    from vllm.lora.request import LoRARequest
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **sizes})).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    run, where = make_run(tmp_path, tmp_path / "tiny", rank=8)
    assert command(export, "--run", run, "--to", "tiny", "--task", "all", "--out", tmp_path / "out") == 0
    base = load_base(str(where))
    rows = [item._replace(task=t, continuations=[[5]]) for t, item in enumerate(items()[:3])]
    with torch.no_grad():
        want = base.logits(collate(rows), adapters_of(run, "portal", "tiny", base)).argmax(-1).tolist()
    engine = vllm.LLM(str(where), enable_lora=True, max_loras=3, max_lora_rank=8, dtype="float32", enforce_eager=True,
                      max_model_len=64, gpu_memory_utilization=0.3)
    requests = [LoRARequest(task, k + 1, str(tmp_path / "out" / task)) for k, task in enumerate(TASKS)]
    answers = engine.generate([{"prompt_token_ids": item.prompt} for item in rows],
                              vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
                              lora_request=requests)
    assert [answer.outputs[0].token_ids[0] for answer in answers] == want


def test_overwrite_replaces_what_an_export_wrote_alone(tmp_path, capsys):
    """Of another kind of export, too, whose files would lie beside; a killed one's folder goes, and nothing of others."""
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"))
    (tmp_path / ".x.new999999").mkdir(), (tmp_path / ".x.news").mkdir(), (tmp_path / "y").mkdir()
    argv = ["--run", run, "--to", "tiny", "--task", "one", "--out", tmp_path / "x"]
    assert command(export, *argv, "--merge") == 0
    assert sorted(p.name for p in tmp_path.glob(".x*")) == [".x.news"]
    for name in (".git/HEAD", "notes.txt"):
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_text("mine")
    assert command(export, *argv, "--overwrite") == 0
    assert set(fingerprint(tmp_path / "x")) == {"README.md", "adapter_config.json", "adapter_model.safetensors", ".git/HEAD", "notes.txt"}
    (tmp_path / "x" / "config.json").write_text("mine")                              # the merged model has one, too
    before = fingerprint(tmp_path / "x")
    card = (tmp_path / "x" / "README.md").read_text()
    capsys.readouterr()
    assert command(export, *argv, "--merge", "--overwrite") == 2
    one_line(capsys, ["x/config.json is in the way", "move it elsewhere"])
    (tmp_path / "y" / "README.md").write_text(card.replace('["README.md"', '["README.md", "../notes.txt"'))
    (tmp_path / "notes.txt").write_text("mine")
    assert command(export, *argv[:-1], tmp_path / "y", "--overwrite") == 0           # a list that leads out of the folder
    assert fingerprint(tmp_path / "x") == before and (tmp_path / "notes.txt").exists()
    (tmp_path / "x" / "README.md").write_text("Exported by PorTAL.")                 # no list, as in earlier versions
    assert command(export, *argv, "--overwrite") == 2
    one_line(capsys, ["neither empty nor a folder that an export wrote", "--out DIR"])
