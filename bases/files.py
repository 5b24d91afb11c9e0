"""The files that a base is loaded from: which ones, whether all its weights are in them, how they are quantised, and
their fingerprint. Whatever transformers would replace by random numbers or leave out is refused here.
"""
import contextlib, hashlib, json, mmap, os, pathlib, re

import safetensors
import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from runtime.files import BadInput, read_json, unreadable

PLAIN = "F64", "F32", "F16", "BF16"                                                  # dtypes of unquantised weights
DEQUANTISED = "fp8", "mxfp4"                      # block-wise formats that are read as plain weights, in --dtype
OTHER_WEIGHTS = "bin pt pth ckpt gguf ggml h5 msgpack onnx onnx_data ot npz tflite".split()  # suffixes
BITS = {"load_in_4bit": "4bit", "load_in_8bit": "8bit"}                              # bitsandbytes keeps its layers
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "added_tokens.json")
NO_MATTER = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "chat_template"}  # of the two configs


def weight_files(folder, gguf=None, listed=None):
    """Returns the files that transformers reads a base's weights from. gguf: the name of a .gguf file in `folder`, read
    instead; listed: the safetensors file or index that config.json names, if it does. Raises BadInput, with the cause,
    if there are none or only some."""
    if gguf:
        return [folder / gguf]
    names = [listed] if listed else ["model.safetensors", "model.safetensors.index.json"]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if all((folder / name).exists() for name in names) and len(names) > 1:
        raise BadInput(f"base {folder} has two sets of weights, {' and '.join(names)}; remove the one that is older")
    if path is None:
        found = sorted(p.name for p in folder.iterdir() if re.search(r"\.(safetensors|bin|pth?|ckpt|gguf)$", p.name))
        raise BadInput(f"base {folder} has no {' or '.join(names)}"
                       + (f" but {', '.join(found[:3])}" if found else "")
                       + ("; shards need their index" if any("-of-" in name for name in found) else "")
                       + "; weights are read from safetensors only")
    if path.suffix != ".json":
        return [path]
    shards = sorted(set(weight_map(path).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise BadInput(f"base {folder}: {path.name} lists {', '.join(missing[:3]) or 'no files'}"
                       f"{' ...' * (len(missing) > 3)}, not in the folder ({len(missing)} of {len(shards)} shards)")
    return [folder / shard for shard in shards]


def refuse_unreadable(name, folder, gguf=None):
    """Raises BadInput, with the cause, if a file that a base's folder is loaded from is there but cannot be read."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in [gguf] if gguf else sorted(os.listdir(folder)):
            if gguf or file in TOKENIZER or re.search(r"config\.json$|\.safetensors(\.index\.json)?$", file):
                if os.path.lexists(folder / file) and (why := unreadable(folder / file)):
                    raise BadInput(f"base {name!r}: {folder / file} is not readable: {why}")


def refuse_adapter(name, folder):
    """Raises BadInput if an adapter lies in a base's folder: transformers would add it in silence."""
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"base {name!r} holds an adapter, too ({folder / 'adapter_config.json'}); move its files "
                       "elsewhere, or merge it into the base first")


def weight_map(path):
    """Returns {name of a tensor: its file} of an index of shards. Raises BadInput."""
    index = read_json(path)
    found = index.get("weight_map", {}) if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise BadInput(f"{path}: not an index of shards; it needs a weight_map {{tensor: file}}")
    return found


def check_purpose(name, config):
    """Raises BadInput for the config of a classifier or the like, whose head for words transformers would make up or
    tie. Prints that code of the base's own (auto_map) is not run."""
    made_for = ", ".join(config.architectures or ())
    if re.search("For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|RewardModel", made_for):
        raise BadInput(f"base {name!r} is no language model: its config.json says {made_for}")
    if getattr(config, "auto_map", None):
        print(f"base {name}: its own code (auto_map in config.json) is not run; transformers' {config.model_type} is")


def quantisation(name, config):
    """Returns how a base's own files are quantised: None, "4bit" or "8bit" (bitsandbytes), or the name of the method
    (fp8, mxfp4, ...). Raises BadInput for methods other than bitsandbytes and DEQUANTISED."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = next((name for key, name in BITS.items() if found.get(key)), found.get("quant_method"))
    if method not in (*DEQUANTISED, *BITS.values()):
        raise BadInput(f"base {name!r}: its weights are quantised by {method}; accepted are unquantised ones, "
                       f"bitsandbytes' 4 and 8 bits, {' and '.join(DEQUANTISED)}")
    return method


def dequantised(config):
    """Makes transformers read the weights of a base with this config, of one of the DEQUANTISED methods, as plain ones
    on every device: where it keeps the packed layers, their backward pass is missing or wrong. Returns the config."""
    for each in (config, config.get_text_config()):
        if found := getattr(each, "quantization_config", None):
            each.quantization_config = {**(found if isinstance(found, dict) else found.to_dict()), "dequantize": True}
    return config


def check_complete(spec, model, info):
    """Raises BadInput unless every weight of the model came from its files and every tensor of its layers was used.
    info: what from_pretrained(output_loading_info=True) found. A tied head is not missing. Parts that the model does
    not have (a vision tower, heads that predict several tokens) may be in the files: prints that they are not used."""
    def some(names):
        names = sorted(map(str, names))
        return f"{', '.join(names[:3])}{' ...' * (len(names) > 3)} ({len(names)} in all)"
    other, wrong = {name for name, *_ in info["mismatched_keys"]}, []                # (name, its shapes)
    missing, unused = set(info["missing_keys"]) - other, info["unexpected_keys"]
    if other:
        wrong.append(f"its config.json gives another shape to {some(other)}")
    if missing:
        wrong.append(f"its files lack {some(missing)}" + (f"; they have instead {some(unused)}" if unused else ""))
    # A tensor beside those of a layer that the model has is one that its class does not know: a bias, a norm, a layer.
    def place(name):
        return re.sub(r"\.\d+(?=\.|$)", ".0", name)
    known = {place(name) for name, module in model.named_modules()
             if re.search(r"\.\d+(\.|$)", name) or not any(module.children())}
    strange = [name for name in unused if any(place(name).startswith(f"{own}.") for own in known)]
    if strange and not missing:
        wrong.append(f"{type(model).__name__} does not know {some(strange)}")
    if wrong:
        raise BadInput(f"base {spec!r} is not loaded as it was saved: {'; '.join(wrong)}; restore its files, or the "
                       "config.json that belongs to them")
    if unused:
        print(f"base {spec}: not used of its files: {some(unused)}")
    # What fits on no device, accelerate offloads and fetches layer by layer. A backward pass would keep all of it.
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise BadInput(f"base {spec!r} is too big for this machine's devices; training cannot offload a part; "
                       "--quantize 4bit makes it about a third of its size")


def check_values(name, model, files):
    """Raises BadInput if the files of an unquantised base hold weights that are no plain numbers (packed, or to be
    scaled), or if a weight of the model is not the one of its name in the files: transformers took the former as they
    are, or wrote over the latter."""
    parameters = dict(model.named_parameters())
    for path in files:
        for own, dtype, *_ in headers(path):
            if dtype not in PLAIN and (own in parameters or own.endswith("weight")):
                raise BadInput(f"base {name!r}: {own} is {dtype} in {path.name}, which is no plain weight, and "
                               "config.json has no quantization_config that says what it stands for")
        with safetensors.safe_open(path, "pt") as file:
            for own in file.keys() & parameters.keys():
                tensor, p = file.get_tensor(own), parameters[own]
                if not tensor.isfinite().all():
                    raise BadInput(f"base {name!r}: {own} is not finite in {path.name}; restore the file")
                if tensor.shape == p.shape and not torch.equal(tensor.to(p.device, p.dtype), p):  # else converted
                    raise BadInput(f"base {name!r}: {own} is not as in {path.name}; transformers "
                                   f"{transformers.__version__} changes it when {type(model).__name__} is loaded")


# ---------------------------------------------------------------------------------------------- the tokenizer
PROBE = "The 12,345 naïve  dogs'\n\n\tI'LL say 日本語: def f(x): return x**2  # ünï 🙂 www.a.b/c?d=1"


def right_tokenizer(name, tokenizer, folder):
    """Returns the tokenizer of a base's folder as its files have it. tokenizer: AutoTokenizer's, which is made of
    nothing where the files are missing, and whose class may ignore what tokenizer.json says of byte-level BPE (its
    split of words): then the one that transformers makes of the file alone. Raises BadInput."""
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if tokenizer.vocab_files_names and not any((folder / file).is_file() for file in files):  # bytes need no file
        raise BadInput(f"base {name!r} has no tokenizer: {folder} has none of {', '.join(files)}")
    path = folder / "tokenizer.json"
    if not path.is_file() or '"ByteLevel"' not in json.dumps(read_json(path).get("pre_tokenizer")):
        return tokenizer
    want = Tokenizer.from_file(str(path)).encode(PROBE, add_special_tokens=False).ids
    for candidate in (lambda: tokenizer, lambda: PreTrainedTokenizerFast.from_pretrained(folder)):
        found = candidate()
        if found(PROBE, add_special_tokens=False).input_ids == want:
            return found
    raise BadInput(f"base {name!r}: transformers does not read its tokenizer.json as the file says")


# ---------------------------------------------------------------------------------------------- the fingerprint
def fingerprint(folder, files, gguf=None):
    """Returns {"weights", "config", "tokenizer": SHA-256 digest} of a base; only "weights" of a .gguf file, which holds
    all three. files: weight_files. The same tensors in other shards have the same digest. Keys of config.json that
    change no number do not count."""
    if gguf:
        with open(files[0], "rb") as file:
            return {"weights": hashlib.file_digest(file, "sha256").hexdigest()}
    tensors = sorted(part for path in files for part in tensor_digests(path))
    held = []
    for path in (folder / name for name in TOKENIZER):
        if path.exists():
            held.append([path.name, plain(read_json(path)) if path.name == "tokenizer_config.json" else
                         digest(path.read_bytes())])
    if (path := folder / "generation_config.json").exists():                         # see tokens.prepare
        held.append(read_json(path).get("eos_token_id"))
    return {"weights": digest(tensors), "config": digest(plain(read_json(folder / "config.json"))),
            "tokenizer": digest(held)}


def fingerprint_at(folder, gguf=None):
    """Returns the fingerprint of the base in a folder, or in a .gguf file of it. Raises BadInput."""
    folder = pathlib.Path(folder)
    config = {} if gguf else read_json(folder / "config.json")
    return fingerprint(folder, weight_files(folder, gguf, config.get("transformers_weights")), gguf)


def refuse_twin(base, others):
    """Raises BadInput if a base has the weights of one of `others` {name: provenance} under another name."""
    for name, p in others.items():
        its = p.get("fingerprint")
        if name != base.name and its and its["weights"] == base.provenance["fingerprint"]["weights"]:
            raise BadInput(f"base {base.name} has the weights of {name}, on which the core is trained: one base under "
                           "two names; name another")


def headers(path):
    """Returns [(name, dtype, shape, [first byte, byte behind the last])] of the tensors in a safetensors file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))
    return [(name, own["dtype"], own["shape"], [8 + size + at for at in own["data_offsets"]])
            for name, own in about.items() if name != "__metadata__"]


def tensor_digests(path):
    """Yields [name, dtype, shape, digest of the bytes] of every tensor of a safetensors file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, dtype, shape, (first, last) in headers(path):
            yield [name, dtype, shape, digest(data[first:last])]


def digest(value):
    """The SHA-256 digest of bytes or of a JSON-able value."""
    return hashlib.sha256(value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain(value):
    """A JSON value without the keys that change no number."""
    if isinstance(value, dict):
        return {key: plain(own) for key, own in value.items() if key not in NO_MATTER}
    return value
