"""Bases by name: an alias, a folder, a .gguf file or a hub id, loaded as a frozen.Base."""
import importlib.util, os, pathlib, re, sys

import torch
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoTokenizer, BitsAndBytesConfig)
from transformers.utils.logging import disable_progress_bar

from frozen import Base
from runtime.distributed import RANK
from runtime.files import ROOT, BadInput, first_line

HUB = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B", "qwen3-1.7b": "Qwen/Qwen3-1.7B", "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B", "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B",
    "gemma-3-270m": "google/gemma-3-270m", "gemma-3-1b": "google/gemma-3-1b-pt", "gemma-3-4b": "google/gemma-3-4b-pt",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M", "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B-Base", "qwen3.5-2b": "Qwen/Qwen3.5-2B-Base",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B-Base", "qwen3.5-9b": "Qwen/Qwen3.5-9B-Base", "gemma-4-e2b": "google/gemma-4-E2B",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3", "gpt-oss-20b": "openai/gpt-oss-20b", "phi-4": "microsoft/phi-4",
    "olmo-3-7b": "allenai/Olmo-3-1025-7B", "smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base",
    "lfm2-1.2b": "LiquidAI/LFM2-1.2B", "lfm2.5-1.2b": "LiquidAI/LFM2.5-1.2B-Base",
    "granite-4-h-micro": "ibm-granite/granite-4.0-h-micro-base", "granite-4-h-1b": "ibm-granite/granite-4.0-h-1b-base",
}
TOY_SEEN, TOY_UNSEEN = ("toy-qwen-s", "toy-qwen-m"), ("toy-qwen-l", "toy-gemma")     # of commands without --bases, --to
TOY = {name: ROOT / "toy" / name for name in (*TOY_SEEN, *TOY_UNSEEN, "toy-hybrid")}
if RANK or not sys.stderr.isatty():
    disable_progress_bar()


def resolve(spec):
    """(short name, where it is loaded from, revision or None, gguf file or None) of the base that `spec` names.
    spec: an alias of HUB or TOY, a model folder, a .gguf file, or org/name@revision on the hub; else BadInput."""
    path = TOY.get(spec, pathlib.Path(os.path.expanduser(spec)))
    if spec in HUB:
        return spec, HUB[spec], None, None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"unknown base {spec!r}: there is no such .gguf file")
        return without_at(path.stem), str(path.parent), None, path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"base {spec!r} is a folder but not a model: it has no config.json")
        return without_at(path.resolve().name), str(path), None, None
    if hub := re.fullmatch(r"(\w[\w.-]*/([\w.-]+))(?:@([\w./-]+))?", spec):
        return hub[2].lower(), hub[1], hub[3], None
    raise BadInput(f"unknown base {spec!r}: accepted are {', '.join([*TOY, *HUB])}, a hub id org/name@revision, "
                   "a Hugging Face model folder or a .gguf file")


def without_at(name):
    """The short name of a folder or file. Raises BadInput for an @, which is what precedes n in a run's file names."""
    if "@" in name:
        raise BadInput(f"base {name!r}: the name of a folder or .gguf file may have no @; rename it")
    return name.lower()


def short_name(spec):
    """resolve()'s short name of a base that a run has recorded, whether or not the base still exists."""
    return pathlib.Path(spec.split("@")[0]).name.removesuffix(".gguf").lower()


def short_names(specs):
    """resolve()'s short names, which name the bases' files in a run. Raises BadInput if two are the same."""
    names = [resolve(spec)[0] for spec in specs]
    if len(set(names)) < len(names):
        raise BadInput(f"bases {', '.join(specs)}: two of them have the same short name, which names their files")
    return names


def lasting(spec):
    """The name of a base in its provenance: an alias of the toy, a hub id, or an absolute path."""
    _, where, _, gguf = resolve(spec)
    path = pathlib.Path(where, gguf or "")
    return spec if spec in TOY else str(path.resolve()) if path.exists() else where


def pretrained(cls, spec, **options):
    """cls.from_pretrained of what `spec` names (see `resolve`), without remote code. Raises BadInput if it fails."""
    _, where, revision, gguf = resolve(spec)
    try:
        return cls.from_pretrained(where, revision=revision, trust_remote_code=False,
                                   **({"gguf_file": gguf} if gguf else {}), **options)
    except Exception as error:                                                       # a broken folder raises anything
        raise BadInput(f"base {spec!r} could not be loaded from {where}: {first_line(error)}")


def auto_class(config):
    """The transformers class that loads a model of this config. Where the causal language models do not know it, it may
    be one that reads images, too; its text decoder is what is adapted."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def four_bits(device, dtype):
    """from_pretrained's config of 4-bit NormalFloat, computing in `dtype`. BadInput without CUDA or bitsandbytes."""
    if torch.device(device).type != "cuda":
        raise BadInput(f"--quantize 4bit needs a CUDA device; this is --device {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("--quantize 4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_base(spec, device="cpu", dtype=torch.float32, recompute=False, device_map=None, quantize=None):
    """The Base that `spec` names, its weights from safetensors or GGUF only. Raises BadInput if it cannot be loaded.
    recompute: see Base.recompute_layers. device_map: accelerate's, instead of all on `device`; "auto" distributes the
    layers over the GPUs. quantize: None or "4bit"."""
    name, _, revision, gguf = resolve(spec)
    options = dict(dtype=torch.float32) if gguf else dict(dtype=dtype, use_safetensors=True)
    if quantize:
        options["quantization_config"] = four_bits(device, dtype)
        device_map = device_map or {"": torch.empty(0, device=device).device}        # packed weights cannot move later
    model = pretrained(auto_class(pretrained(AutoConfig, spec)), spec, device_map=device_map, **options)
    # What fits on no device, accelerate offloads and fetches layer by layer. A backward pass would keep all of it.
    if any(p.is_meta for p in model.parameters()):
        hint = "" if quantize else "; --quantize 4bit makes it about a third of its size"
        raise BadInput(f"base {spec!r} is too big for this machine's devices; training cannot offload a part{hint}")
    for p in model.parameters() if gguf else ():                                     # GGUF loads as float32. Otherwise
        p.data = p.data.to(dtype)                                                    # some weights are to stay as wide
    if not device_map:
        model.to(device)
    revision = getattr(model.config, "_commit_hash", None) or revision
    base = Base(model, pretrained(AutoTokenizer, spec), name, lasting(spec), revision, quantize)
    if recompute:
        base.recompute_layers()
    return base


def reload_base(provenance, *args, **options):
    """load_base of the id and exact revision in a converter's provenance, under the name that its files have."""
    pinned = f"@{provenance['revision']}" if provenance["revision"] else ""
    base = load_base(provenance["id"] + pinned, *args, **options)
    base.name = provenance["base"]
    return base
