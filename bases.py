"""A frozen base: found by name, loaded, and patched once so that a forward pass takes Adapters and a task per row.

There is no code per architecture. Any decoder whose layers hold the seven projections q,k,v,o,gate,up,down as
nn.Linear works: each is wrapped in `Adapted`, which adds the low-rank part, and the LM head is wrapped in
`PickedHead`, which reads it only at the positions somebody asked for.
"""
import contextlib, functools, importlib.util, os, pathlib, re, sys
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, masking_utils
from transformers.utils.logging import disable_progress_bar

from cli import ROOT, TOY_SEEN, TOY_UNSEEN, BadInput, first_sentence
from dist import RANK
from kernels.lora import lora_add, lora_linear
from portal import MODULES

HUB = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B", "qwen3-1.7b": "Qwen/Qwen3-1.7B", "qwen3-4b": "Qwen/Qwen3-4B", "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-3-270m": "google/gemma-3-270m", "gemma-3-1b": "google/gemma-3-1b-pt", "gemma-3-4b": "google/gemma-3-4b-pt",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M", "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B",
}
TOY = {name: ROOT / "toy" / name for name in (*TOY_SEEN, *TOY_UNSEEN)}


def resolve(spec):
    """How a base is named -> (short name, where it is loaded from, revision, gguf file or None).

    An alias of HUB or TOY, a local Hugging Face folder, a .gguf file, or org/name@revision on the hub.
    """
    path = TOY.get(spec, pathlib.Path(os.path.expanduser(spec)))
    if spec in HUB:
        return spec, HUB[spec], None, None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"unknown base {spec!r}: there is no such .gguf file")
        return path.stem.lower(), str(path.parent), None, path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"base {spec!r} is a folder but not a model: it has no config.json, which a Hugging Face model has")
        return path.resolve().name.lower(), str(path), None, None
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", spec)
    if hub and not spec.startswith((".", "/")) and not spec.endswith(".gguf"):
        return hub[1].split("/")[1].lower(), hub[1], hub[2], None
    raise BadInput(f"unknown base {spec!r}: accepted are {', '.join([*TOY, *HUB])}, a hub id org/name@revision, "
                   "a Hugging Face model folder or a .gguf file")


def short_name(spec):
    """resolve()'s short name of a base that a run holds, whether or not the base is still there."""
    return pathlib.Path(spec.split("@")[0]).name.removesuffix(".gguf").lower()


def lasting(spec):
    """How provenance names a base: an alias of the toy, a hub id, or a path that outlives a cd."""
    _, where, _, gguf = resolve(spec)
    if spec in TOY:
        return spec
    return str(pathlib.Path(where, gguf or "").resolve()) if pathlib.Path(where).is_dir() else where


# ---------------------------------------------------------------------------------------------- the patched projections
class Adapted(nn.Module):
    """W x + scale B_t A_t x, with the A, B and task that its base holds `live` during a forward pass."""

    def __init__(self, linear, kind, layer, live):
        super().__init__()
        self.linear, self.kind, self.layer, self.live = linear, kind, layer, live

    def forward(self, x):                                                            # [R, S, d_in]
        if self.kind not in self.live.A:
            return self.linear(x)
        A, B = self.live.A[self.kind][self.layer], self.live.B[self.kind][self.layer]  # [T, r, d_in], [T, d_out, r]
        task, scale = self.live.task[x.device], self.live.scale                      # [R]
        if type(self.linear) is not nn.Linear:                                       # quantised: only the layer itself can
            return lora_add(self.linear(x), x, A, B, task, scale)                    # read its weight     [R, S, d_out]
        return lora_linear(x, self.linear.weight, self.linear.bias, A, B, task, scale)  # [R, S, d_out]


class PickedHead(nn.Module):
    """The LM head at the picked positions alone. Answers are a few tokens of a long row and the vocabulary is the
    widest matrix of a small model: computing every position's logits would cost more than the layers do."""

    def __init__(self, head, live):
        super().__init__()
        self.head, self.live = head, live

    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):                                                            # [R, S, d]
        at = self.live.at
        return self.head(x if at is None else x[tuple(index.to(x.device) for index in at)])  # [N, vocabulary]


class Base:
    """A frozen language model. `layers` L, `dims` {m: (d_in, d_out)}, `logits(...)`."""

    def __init__(self, model, tokenizer, name="base", origin="", revision=None):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.origin, self.revision, self.quantize = name, origin, revision, None
        self.batch = None                                                            # the last one that logits() was given
        self.live = SimpleNamespace(A={}, B={}, task=None, scale=1.0, at=None)
        self.config = model.config.get_text_config()
        self.blocks, projections = find_projections(model)                           # L layers, {m: (parent, attribute)} each
        self.layers, self.dims, self.linears = len(projections), {}, []
        for layer, row in enumerate(projections):
            self.linears.append({m: getattr(*place) for m, place in row.items()})
            for m, (parent, attribute) in row.items():
                linear = getattr(parent, attribute)
                shape = (linear.in_features, linear.out_features)
                if self.dims.setdefault(m, shape) != shape:
                    raise BadInput(f"{name}: {attribute} is {self.dims[m]} in the first layer and {shape} in layer {layer}; "
                                   "only bases whose layers all have the same shapes are supported")
                setattr(parent, attribute, Adapted(linear, m, layer, self.live))
        model.set_output_embeddings(PickedHead(model.get_output_embeddings(), self.live))
        model.generation_config = GenerationConfig()                                 # no repetition penalty and the like

    @property
    def device(self):
        """Where inputs go, logits come out and adapters are generated; the layers may be on several others."""
        return self.model.device

    @torch.no_grad()
    def weight(self, m, layer):
        """The frozen weight W [d_out, d_in] of module kind m, on `device`."""
        linear = self.linears[layer][m]
        if type(linear) is nn.Linear:
            return linear.weight.to(self.device)
        bias, linear.bias = linear.bias, None                                        # a layer that only tells W x, asked
        try:                                                                         # for every column of W at once
            return linear(torch.eye(self.dims[m][0], dtype=self.model.dtype, device=linear.weight.device)).T.to(self.device)
        finally:
            linear.bias = bias

    def paths(self):
        """{(m, layer): dotted path of that projection in the model}, in the model's order."""
        return {(part.kind, part.layer): path for path, part in self.model.named_modules() if isinstance(part, Adapted)}

    def unpatch(self):
        """The model as transformers loaded it: its own projections and head are put back. This Base is done with."""
        for (m, layer), path in self.paths().items():
            self.model.set_submodule(path, self.linears[layer][m])
        self.model.set_output_embeddings(self.model.get_output_embeddings().head)
        quantizer = getattr(self.model, "hf_quantizer", None)
        if quantizer is not None:                                                    # a .gguf file: its weights were
            quantizer.remove_quantization_config(self.model)                         # dequantised when they were loaded
        return self.model

    def logits(self, batch, adapters=None):
        """Logits [N, vocabulary] at the N positions of `batch` (data.collate) that predict a continuation's token.

        adapters: Adapters for the tasks that `batch.task` [R] counts, or None for the bare base. Rows are padded on
        the right, so a causal mask alone keeps the padding out and a training batch needs no mask at all.
        """
        self.batch = batch
        # transformers looks whether one row packs several texts, and waits for the device to tell. No row of ours does.
        unpacked = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        with self.adapted(adapters, batch.task, batch.at), unpacked:
            return self.model(input_ids=batch.ids, use_cache=False, **self.tree(batch)).logits

    def adapted(self, adapters, task, at=None):
        """Inside, row r of a forward pass has the adapters of task[r], and logits are read at the positions `at`."""
        if adapters is None:
            return self.wearing({"at": at})
        places = [row["q"].weight.device for row in self.linears]                    # of the L layers; mostly one for all
        def at_home(tensor):                                                         # a layer's slice, where the layer is
            return [a.to(place) for a, place in zip(tensor.unbind(1), places)]
        return self.wearing(dict(at=at, scale=adapters.scale, task={place: task.to(place) for place in set(places)},
                                 A={m: at_home(a) for m, a in adapters.A.items()},   # L tensors [T, r, d_in]
                                 B={m: at_home(b) for m, b in adapters.B.items()}))  # L tensors [T, d_out, r]

    @contextlib.contextmanager
    def wearing(self, state):
        """The patched modules see `state` while this lasts."""
        before = dict(vars(self.live))
        vars(self.live).update(state)
        try:
            yield
        finally:
            vars(self.live).update(before)

    def recompute_layers(self):
        """Keep nothing of a layer but its input, and run it again in the backward pass: less memory, a third more time."""
        def context():                                                               # by then other adapters may be worn
            return contextlib.nullcontext(), self.wearing(dict(vars(self.live)))
        for layer in self.blocks:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=context,
                                              preserve_rng_state=False)              # nothing is random: no dropout

    @torch.no_grad()
    def generate(self, prompts, adapters=None, tasks=None, max_new_tokens=32):
        """The greedy continuations of R prompts, row r with the adapters of tasks[r] (indices): one forward pass a new
        token for all of them. Prompts are texts or lists of token ids. A row ends at EOS or after max_new_tokens."""
        prompts = [self.tokenizer(p).input_ids if isinstance(p, str) else p for p in prompts]
        eos, S = self.tokenizer.eos_token_id, max(map(len, prompts))
        # Padding stands on the left, so that every row's next token comes at the same place; the mask hides it.
        ids = torch.tensor([[0] * (S - len(p)) + p for p in prompts], device=self.device)  # [R, S]
        mask = torch.tensor([[0] * (S - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        task = None if tasks is None else torch.as_tensor(tasks, device=self.device)    # [R]
        with self.adapted(adapters, task):
            new = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens,
                                      eos_token_id=eos, pad_token_id=0 if eos is None else eos)[:, S:].tolist()
        new = [row[:row.index(eos)] if eos in row else row for row in new]
        return self.tokenizer.batch_decode(new, clean_up_tokenization_spaces=False)

    def tree(self, batch):
        """Mask and positions for rows that hold a prompt (segment 0) and then several continuations (1, 2, ...): each
        continuation sees the prompt and itself, as if it stood alone. Sliding layers count distance in positions.
        The masks are additive, [R, 1, S, S]. A batch with one continuation a row needs nothing of this."""
        if batch.segments is None:
            return {}
        segments, positions = batch.segments, batch.positions                        # [R, S] each
        index = torch.arange(segments.shape[1], device=segments.device)
        sees = (index[:, None] >= index) & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
        window = getattr(self.config, "sliding_window", None)
        near = sees if not window else sees & (positions[:, :, None] - positions[:, None, :] < window)
        def additive(allowed):
            zeros = torch.zeros(allowed.shape, dtype=self.model.dtype, device=allowed.device)
            return zeros.masked_fill_(~allowed, torch.finfo(zeros.dtype).min)[:, None]
        if getattr(self.config, "layer_types", None):                                # Gemma 3, Qwen: a mask a layer type
            mask = {kind: additive(near if kind == "sliding_attention" else sees)
                    for kind in set(self.config.layer_types)}
        else:                                                                        # Llama; Mistral, where all layers slide
            mask = additive(near)
        return {"attention_mask": mask, "position_ids": positions}


def find_projections(model):
    """The decoder's layers and, for each, {module kind: (parent module, attribute name)}; BadInput if it has not each once."""
    best = []
    for layers in model.get_decoder().modules():                                     # the text model, not a vision tower
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            continue
        rows = [[(m, (parent, f"{m}_proj")) for parent in layer.modules() for m in MODULES
                 if isinstance(getattr(parent, f"{m}_proj", None), nn.Linear)] for layer in layers]
        if all(sorted(m for m, _ in row) == sorted(MODULES) for row in rows):        # once each: no mixture of experts
            return layers, [dict(row) for row in rows]
        best = max(best, [m for m in MODULES if any(m == found for row in rows for found, _ in row)], key=len)
    wanted = ", ".join(f"{m}_proj" for m in MODULES)
    linears = sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    raise BadInput(f"{type(model).__name__} is not supported: looked in its layers for {wanted} as nn.Linear and found "
                   f"{', '.join(m + '_proj' for m in best) or 'none of them'}; its linear modules are {', '.join(linears)}")


# ---------------------------------------------------------------------------------------------- loading
if RANK or not sys.stderr.isatty():
    disable_progress_bar()


def pretrained(cls, spec, **options):
    """cls.from_pretrained of what `spec` names (see `resolve`). Remote code is never run."""
    _, where, revision, gguf = resolve(spec)
    try:
        return cls.from_pretrained(where, revision=revision, trust_remote_code=False,
                                   **({"gguf_file": gguf} if gguf else {}), **options)
    except Exception as error:                                                       # whatever the loader meets in a folder
        raise BadInput(f"base {spec!r} could not be loaded from {where}: {first_sentence(error)}")


def four_bits(device, dtype):
    """What from_pretrained is told for QLoRA's 4-bit NormalFloat: weights are held in it, and computed with in `dtype`."""
    if torch.device(device).type != "cuda":
        raise BadInput(f"--quantize 4bit needs a CUDA device; this is --device {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("--quantize 4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_base(spec, device="cpu", dtype=torch.float32, recompute=False, device_map=None, quantize=None):
    """Load and patch the base that `spec` names; `recompute`: see Base.recompute_layers. Weights come from safetensors or
    GGUF only. device_map: which module goes where, in accelerate's terms, instead of all to `device`; "auto" shares the
    layers out to the GPUs. quantize: None or "4bit"."""
    name, where, revision, gguf = resolve(spec)
    options = dict(dtype=torch.float32) if gguf else dict(dtype=dtype, use_safetensors=True)
    if quantize:
        options["quantization_config"] = four_bits(device, dtype)
        device_map = device_map or {"": torch.empty(0, device=device).device}        # packed weights do not move afterwards
    if device_map:
        options["device_map"] = device_map
    model = pretrained(AutoModelForCausalLM, spec, **options)
    # What fits nowhere, accelerate leaves aside and fetches layer by layer. But a backward pass would keep it all.
    if any(p.is_meta for p in model.parameters()):
        raise BadInput(f"base {spec!r} is too big for all devices of this machine together, and training cannot offload a "
                       f"part of it{'' if quantize else '; --quantize 4bit makes it about a third of its size'}")
    for p in model.parameters():                                                     # GGUF loads as float32. Only the
        if p.is_floating_point():                                                    # rotary buffers must remain float32,
            p.data = p.data.to(dtype)                                                # and packed weights (uint8) packed
    if not device_map:
        model.to(device)
    tokenizer = pretrained(AutoTokenizer, spec)
    revision = getattr(model.config, "_commit_hash", None) or revision
    base = Base(model, tokenizer, name, lasting(spec), revision)
    base.quantize = quantize
    if recompute:
        base.recompute_layers()
    return base


def short_names(specs):
    """What the bases' files are called: resolve()'s names, of which no two may be the same."""
    names = [resolve(spec)[0] for spec in specs]
    if len(set(names)) < len(names):
        raise BadInput(f"bases {', '.join(specs)}: two of them have the same short name, which names their files")
    return names


def reload_base(provenance, device="cpu", dtype=torch.float32, recompute=False, device_map=None, quantize=None):
    """The base that a converter's provenance names (its id and exact revision), under the name its files have."""
    pinned = f"@{provenance['revision']}" if provenance["revision"] else ""
    base = load_base(provenance["id"] + pinned, device, dtype, recompute, device_map, quantize)
    base.name = provenance["base"]
    return base
