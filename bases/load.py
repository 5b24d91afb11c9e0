"""Bases by name: an alias, a folder, a .gguf file or a hub id, loaded as a Base.

A base has one identity, a Source. Every command names a base by it: its files in a run by `name`, its provenance by
`id`, the commit of a hub id and the fingerprint of its files, with which it is loaded again.
"""
import functools, importlib.util, os, pathlib, re, sys
from typing import NamedTuple

import huggingface_hub
import torch
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig,
                          AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig,
                          GenerationConfig)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from transformers.utils.peft_utils import find_adapter_config_file

from bases.files import (BITS, DEQUANTISED, check_complete, check_purpose, check_values, dequantised, fingerprint,
                         quantisation, refuse_adapter, refuse_unreadable, right_tokenizer, weight_files)
from bases.frozen import Base
from bases.tokens import prepare
from runtime.distributed import RANK
from runtime.files import PLAIN, ROOT, BadInput, as_nfc, first_line, plain, unreadable

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
WIDE = 512  # the hidden size from which a CPU that computes bfloat16 is faster with it: 576, 640 and 896 were measured
TOY = {name: ROOT / "toy" / name for name in (*TOY_SEEN, *TOY_UNSEEN, "toy-hybrid")}
set_verbosity_error()                             # what it would report of a load is an error here: check_complete
if RANK or not sys.stderr.isatty():
    disable_progress_bar()


class Source(NamedTuple):
    """Where a base comes from."""
    name: str      # short: it names the base's files in a run
    where: str     # what from_pretrained takes: a hub id, or the absolute path of a folder
    revision: str  # of a hub id: a branch, tag or commit, or None for its main branch
    gguf: str      # the name of a .gguf file in the folder `where`, or None
    id: str        # what the provenance records: an alias of the toy, a hub id, or an absolute path with links as given

    @property
    def on_hub(self):
        return not os.path.isabs(self.where)


def source_of(spec):
    """Returns the Source that `spec` names, whether or not it exists. The short name is the alias, or the last part of
    the hub id or path, in small letters."""
    path = TOY.get(spec, pathlib.Path(os.path.expanduser(spec)))
    hub = re.fullmatch(r"(\w[\w.-]*/(\w[\w.-]*))(?:@([\w./-]+))?", spec)
    if spec in HUB:
        return Source(spec, HUB[spec], None, None, HUB[spec])
    if hub and not os.path.lexists(path) and path.suffix != ".gguf":
        return Source(hub[2].lower(), hub[1], hub[3], None, hub[1])
    path = path.absolute()
    path = path.resolve() if path.name == ".." else path
    if path.suffix == ".gguf":
        return Source(as_nfc(path.stem.lower()), str(path.parent), None, path.name, str(path))
    return Source(as_nfc(path.name.lower()), str(path), None, None, spec if spec in TOY else str(path))


def short_name(spec):
    """Returns the short name of the base that `spec` names, whether or not it exists."""
    return source_of(spec).name


def resolve(spec):
    """Returns the Source of the base that `spec` names: an alias of HUB or TOY, a model folder, a .gguf file, or
    org/name@revision on the hub. Raises BadInput if there is no such file or folder."""
    source = source_of(spec)
    path = pathlib.Path(source.where, source.gguf or "")
    if source.on_hub:
        if path.exists():                                                            # transformers would prefer it
            raise BadInput(f"base {spec!r}: a folder {path} is here, which has the name of its hub id; rename it, or "
                           f"name it as ./{path}")
        return source
    if path.is_symlink() and not path.exists():
        raise BadInput(f"base {spec!r} is {unreadable(path)}")
    refuse_unreadable(source.name, pathlib.Path(source.where), source.gguf)
    if path.is_dir() and not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        raise BadInput(f"base {spec!r} is a folder but not a model: it has no config.json"
                       + "; it holds an adapter, which is to be merged into its base first" * adapter)
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise BadInput(f"base {path} is one part of a split file; llama-gguf-split --merge makes one file of all parts")
    if "@" in source.name:                                                           # it comes before n in file names
        raise BadInput(f"base {path.name!r}: the name of a folder or .gguf file may have no @; rename it")
    if not plain(source.name):
        raise BadInput(f"base {spec!r}: its name names files in a run; rename it: accepted is {PLAIN}")
    if not (path.is_file() if source.gguf else path.is_dir()):
        why = "there is no such .gguf file; " * bool(source.gguf) + "a file; name its folder; " * path.is_file()
        raise BadInput(f"unknown base {spec!r}: {why}accepted are {', '.join([*TOY, *HUB])}, a hub id "
                       "org/name@revision, a Hugging Face model folder or a .gguf file")
    return source


def short_names(specs):
    """Returns the short names of bases, which name their files in a run. Raises BadInput if two are the same, or two
    names are one base."""
    sources = {spec: resolve(spec) for spec in specs}
    for spec, source in sources.items():
        for other, its in sources.items():
            if spec < other and (source.name == its.name or same(source, its)):
                raise BadInput(f"bases {spec}, {other}: " + (
                    "two of them have the same short name, which names their files" if source.name == its.name else
                    "two names of one base"))
    return [source.name for source in sources.values()]


def same(source, other):
    """Whether two Sources are one base: the same hub id, or paths that lead to one file or folder."""
    paths = [pathlib.Path(each.where, each.gguf or "") for each in (source, other)]
    return paths[0] == paths[1] or all(path.exists() for path in paths) and paths[0].samefile(paths[1])


# ---------------------------------------------------------------------------------------------- loading
def pinned(source):
    """Returns (source with the commit that its revision is now, the folder that holds its files); of a folder or .gguf
    file as it is. Raises BadInput if the hub, or its cache, has no such base."""
    if not source.on_hub:
        return source, pathlib.Path(source.where)
    try:
        path = pathlib.Path(huggingface_hub.hf_hub_download(source.where, "config.json", revision=source.revision))
    except Exception as error:                                                       # of the network or the hub
        at = f"@{source.revision}" if source.revision else ""
        raise BadInput(f"base {source.where}{at} could not be loaded from the hub: {first_line(error)}")
    return source._replace(revision=path.parent.name), path.parent                   # .../snapshots/<commit>


def pretrained(cls, source, **options):
    """Returns cls.from_pretrained of a pinned Source, without remote code. Raises BadInput if it fails."""
    try:
        return cls.from_pretrained(source.where, revision=source.revision, trust_remote_code=False,
                                   **({"gguf_file": source.gguf} if source.gguf else {}), **options)
    except Exception as error:                                                       # a broken folder raises anything
        raise BadInput(f"base {source.name!r} could not be loaded from {source.where}: {first_line(error)}")


def load_config(spec):
    """Returns the transformers config of the base that `spec` names. Raises BadInput."""
    return pretrained(AutoConfig, pinned(resolve(spec))[0])


def load_tokenizer(spec):
    """Returns the tokenizer of the base that `spec` names, prepared for `encode`. Raises BadInput."""
    source, folder = pinned(resolve(spec))
    return tokenizer_of(source, folder, pretrained(AutoConfig, source))


def tokenizer_of(source, folder, config):
    """Returns the tokenizer of a pinned Source, prepared for `encode`: see prepare. Raises BadInput."""
    tokenizer = pretrained(AutoTokenizer, source)
    if source.gguf:
        return prepare(tokenizer, config)
    tokenizer = right_tokenizer(source.name, tokenizer, folder)
    try:
        eos = GenerationConfig.from_pretrained(source.where, revision=source.revision).eos_token_id
    except (OSError, ValueError) as error:                                           # most often there is none
        if (folder / "generation_config.json").exists():
            raise BadInput(f"base {source.name!r}: generation_config.json is not readable: {first_line(error)}")
        eos = None
    return prepare(tokenizer, config, eos)


def auto_class(config):
    """The transformers class that loads a model of this config: the one that config.json names, which may read images,
    too, so that a module has the path that others know it by. Its text decoder is what is adapted."""
    images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
            images is None or images.__name__ not in (config.architectures or ())):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def usual_dtype(device):
    """Returns the dtype of a base unless --dtype is given: float32 on a CPU, else bfloat16."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


@functools.cache
def cpu_dtype():
    """The dtype of real bases on this CPU: bfloat16 where it has instructions for it (AVX512-BF16 or AMX), which it
    prints once."""
    able = torch.cpu.get_capabilities()
    if able.get("avx512_bf16") or able.get("amx_bf16"):
        print("bases are loaded in bfloat16, which this CPU computes; --dtype float32 is slower and rounds less")
        return torch.bfloat16
    return torch.float32


def default_dtype(config, device):
    """The dtype of a base unless --dtype is given. On a CPU a narrow one, such as the toy's, gains nothing from half of
    float32."""
    narrow = getattr(config.get_text_config(), "hidden_size", 0) < WIDE
    return cpu_dtype() if torch.device(device).type == "cpu" and not narrow else usual_dtype(device)


def four_bits(device, dtype):
    """from_pretrained's config of 4-bit NormalFloat, computing in `dtype`. BadInput without CUDA or bitsandbytes."""
    if torch.device(device).type != "cuda":
        raise BadInput(f"--quantize 4bit needs a CUDA device; this is --device {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("--quantize 4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def reading(source, config, device, dtype, quantize, device_map):
    """Returns (how the weights are quantised or None, from_pretrained's options) for a base with this config.
    quantize: see load_base. Raises BadInput if it does not go with the files."""
    own = None if source.gguf else quantisation(source.name, config)
    if quantize not in (None, own, *["4bit"] * (own is None)):
        raise BadInput(f"base {source.name!r}: --quantize {quantize} does not go with its weights, which are "
                       f"{own or 'not quantised'}")
    # Other shapes than the config's are named by check_complete; transformers' error would not name them.
    options = dict(dtype=torch.float32) if source.gguf else dict(
        dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True)
    if source.on_hub:                                                                # else it looks at the main branch
        options["adapter_kwargs"] = dict(revision=source.revision)
    if quantize and not own:
        options["quantization_config"] = four_bits(device, dtype)
    if own in DEQUANTISED:
        options["config"] = dequantised(config)
    if (quantize or own) in BITS.values():
        device_map = device_map or {"": torch.empty(0, device=device).device}        # packed weights cannot move later
    return own or quantize, dict(options, device_map=device_map)


def load_base(spec, device="cpu", dtype=torch.float32, recompute=False, device_map=None, quantize=None):
    """Returns the Base that `spec` (or a Source) names, its weights from safetensors or GGUF only. Raises BadInput if
    it cannot be loaded, or not completely. dtype None: see default_dtype. recompute: see Base.recompute_layers.
    device_map: accelerate's, instead of all on `device`; "auto" distributes the layers over the GPUs. quantize: "4bit",
    or what the files themselves are."""
    asked = spec if isinstance(spec, Source) else resolve(spec)
    source, folder = pinned(asked)
    config = pretrained(AutoConfig, source)
    dtype = dtype or default_dtype(config, device)
    check_purpose(source.name, config)
    if source.on_hub:
        find_adapter_config_file(source.where, revision=source.revision)             # fetches it, if there is one
    if not source.gguf:
        refuse_adapter(source.name, folder)
    quantize, options = reading(source, config, device, dtype, quantize, device_map)
    listed = getattr(config, "transformers_weights", None)
    if not source.on_hub:                                                            # else they are yet to be fetched
        weight_files(folder, source.gguf, listed)
    model, info = pretrained(auto_class(config), source, output_loading_info=True, **options)
    files = weight_files(folder, source.gguf, listed)
    check_complete(source.name, model, info)
    if not (quantize or source.gguf):
        check_values(source.name, model, files)
    for p in model.parameters() if source.gguf else ():                              # GGUF loads as float32. Otherwise
        p.data = p.data.to(dtype)                                                    # some weights are to stay as wide
    if not options["device_map"]:
        model.to(device)
    base = Base(model, tokenizer_of(source, folder, config), source.name, dict(
        id=source.id, revision=source.revision, requested=asked.revision, quantize=quantize,
        fingerprint=fingerprint(folder, files, source.gguf)))
    if recompute:
        base.recompute_layers()
    return base
