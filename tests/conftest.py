"""Tiny random models in the real architectures, a word tokenizer, and a plain forward pass to compare with."""
import hashlib, json, os, pathlib, shutil, signal, sys

import torch

# Before triton is imported anywhere. On a GPU the gpu tests need the compiled kernels; the interpreter's tests skip there
# unless TRITON_INTERPRET=1 asks for them (and the gpu tests skip then).
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
sys.path[:0] = map(str, [pathlib.Path(__file__).parents[1], *pathlib.Path(__file__).parent.glob("[a-z]*/")])

import peft
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import train
from bases import Base
from runtime.flags import run_main

torch.set_num_threads(1)  # tiny tensors: two threads would spend their time waiting for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and (not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device, or TRITON_INTERPRET=1"))


SMALL = dict(vocab_size=64, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=40, max_position_embeddings=128, initializer_range=0.3, head_dim=8)
GEMMA = dict(SMALL, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             query_pre_attn_scalar=8)
ARCHITECTURES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gemma3-multimodal": lambda: Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=Gemma3TextConfig(**GEMMA),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4),
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=61, eoi_token_index=62)),
}


def tiny_model(architecture="qwen3", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return ARCHITECTURES[architecture]().to(dtype).eval()


def exact_norms(model):
    """Hugging Face's RMSNorms compute in float32 whatever the dtype; in a float64 comparison that is all the noise."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", None) or module.eps
            shift = 1.0 if "Gemma" in type(module).__name__ else 0.0
            module.forward = lambda x, m=module, e=eps, s=shift: x * (x.pow(2).mean(-1, keepdim=True) + e).rsqrt() * (s + m.weight)
    return model


def tiny_tokenizer(bos=False):
    words = ["<pad>", "<bos>", "<unk>", "<eos>"] + [f"w{i}" for i in range(50)] + ["Answer", ":"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def tiny_base(architecture="qwen3", seed=0, dtype=torch.float32, bos=False, name="tiny"):
    return Base(tiny_model(architecture, seed, dtype), tiny_tokenizer(bos), name)


def save_tiny(folder, architecture="qwen3", seed=0):
    """A tiny base as a Hugging Face folder."""
    tiny_model(architecture, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def lora_hooks(model, A, B, scale):
    """An independent reference: one task's factors {m: [L, ...]} added by forward hooks on an unpatched model."""
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model
    handles = []
    for layer, block in enumerate(text.layers):
        for name, module in block.named_modules():
            m = name.split(".")[-1].removesuffix("_proj")
            if m in A and isinstance(module, torch.nn.Linear):
                def hook(_, args, y, a=A[m][layer], b=B[m][layer]):
                    return y + scale * (args[0] @ a.T @ b.T)
                handles.append(module.register_forward_hook(hook))
    return handles


def plain_loss(model, factors, items):
    """The mean NLL of the items' answer tokens with one task's `factors` (A, B, scale), a row at a time, with its graph."""
    handles, nll, tokens = lora_hooks(model, *factors), 0.0, 0
    for item in items:
        answer = item.continuations[0]
        log_p = model(input_ids=torch.tensor([item.prompt + answer])).logits[0].log_softmax(-1)
        nll = nll - sum(log_p[len(item.prompt) + i - 1, token] for i, token in enumerate(answer))
        tokens += len(answer)
    for h in handles:
        h.remove()
    return nll / tokens


def peft_projections(model):
    """Every LoRA layer of a PEFT model as (module kind, layer, PEFT's module)."""
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            yield name.split(".")[-1].removesuffix("_proj"), int(name.split("layers.")[1].split(".")[0]), module


def write_task(folder, task, train=12, evaluation=6, seed=0):
    """A task of the JSONL format over the tiny tokenizer's words: rows of 2 to 9 words, 2 to 4 choices of 1 to 3 words."""
    import json, random
    rng = random.Random(f"{seed}{task}")
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, n in (("train", train), ("eval", evaluation)):
        rows = []
        for _ in range(n):
            choices = [" " + " ".join(rng.sample([f"w{i}" for i in range(50)], rng.randint(1, 3))) for _ in range(rng.randint(2, 4))]
            rows.append({"task": task, "prompt": " ".join(f"w{rng.randrange(50)}" for _ in range(rng.randint(2, 9))),
                         "choices": choices, "gold_idx": rng.randrange(len(choices))})
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The folder that `world` copies."""
    folder = tmp_path_factory.mktemp("template")
    for k, task in enumerate(("one", "two", "three")):
        write_task(folder / "data", task, train=12 - 4 * k)
    for seed, (name, architecture) in enumerate((("base-a", "qwen3"), ("base-b", "llama"), ("base-c", "gemma3"))):
        save_tiny(folder / name, architecture, seed)
    return folder


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    """A working folder with three tasks under data/ and three tiny bases; `out/` is this folder's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The folder of an empty cache of the hub, which itself cannot be reached: see in_hub_cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub-cache"


def in_hub_cache(cache, folder, org_name, commit):
    """Lays a folder out as the hub's cache does: snapshots/<commit> links to blobs, refs/main names the commit."""
    repo = cache / f"models--{org_name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for made in (snapshot, repo / "blobs", repo / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    for name, digest in fingerprint(folder).items():
        (repo / "blobs" / digest).write_bytes((folder / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(repo / "blobs" / digest)
    return snapshot


SIZES = dict(d_z=8, d_e=4, hidden=16, d_c=12, rank=4, alpha=8)  # of a tiny Portal


# ---------------------------------------------------------------------------------------------- commands in this process
QUICK = "--data data --n 8 --epochs 2 --batch-size 2".split()
TRAIN = ["--bases", "./base-a,./base-b", *QUICK]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train.REAL, "sizes", dict(d_z=8, d_e=4, hidden=16, d_c=12))
    monkeypatch.setitem(train.REAL, "lora", dict(epochs=2, batch_size=2, lr=1e-3, least=1, max_tokens=200))
    monkeypatch.setattr("bases.load.cpu_dtype", lambda: torch.float32)                        # the same on every CPU
    monkeypatch.setattr("reports.table.plot", lambda path, *_: path.touch())                  # slow; test_docs.py draws the README's


def command(module, *argv):
    """Run a command in this process -> its exit code."""
    try:
        run_main(lambda: module.main([str(a) for a in argv]))
    except SystemExit as stop:
        return stop.code
    return 0


def fingerprint(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def trained(world, tmp_path_factory):
    """A run of `world`. It is trained once a session and then copied; its files name the folders of `world`."""
    run, kept = world / "out" / "base-a+base-b", tmp_path_factory.getbasetemp() / "trained"
    if kept.exists():
        shutil.copytree(kept / "out", world / "out")
        for path in run.rglob("*.json"):
            path.write_text(path.read_text().replace((kept / "was").read_text(), str(world)))
    else:
        assert command(train, *TRAIN) == 0
        shutil.copytree(world / "out", kept / "out")
        (kept / "was").write_text(str(world))
    return run


def edit(path, number, change):
    lines = path.read_text().splitlines()
    lines[number - 1] = change if isinstance(change, str) else json.dumps({**json.loads(lines[number - 1]), **change})
    path.write_text("\n".join(lines) + "\n")


def one_line(capsys, words):
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err
