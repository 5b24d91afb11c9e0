"""PEFT and transformers load the exported folders on a fresh base and compute the logits that Base.logits does."""
import json, os

import huggingface_hub, peft, pytest, torch
from conftest import ARCHITECTURES, SMALL, command, exact_norms, fingerprint, one_line, save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from helpers import items, make_portal
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import export
from bases import load_base
from data import collate
from merge import save_merged
from eval import adapters_of
from portal import MODULES, Adapters
from runtime.files import append_jsonl, write_json
from runtime.run_folder import load_tensors, save_adapters, save_portal, save_tensors

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
