"""A frozen base model: found by name, loaded, patched once so that a forward pass takes Adapters and a task per row.

There is no code per architecture: any decoder works whose layers hold the seven projections (q, k, v, o, gate, up,
down) as nn.Linear. Each is wrapped in `Adapted`, which adds the low-rank part.
"""
import contextlib, functools, importlib.util, os, pathlib, re, sys
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from kernels.lora import lora_add, lora_linear
from portal import MODULES
from runtime.distributed import RANK
from runtime.files import ROOT, BadInput, first_line

HUB = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B", "qwen3-1.7b": "Qwen/Qwen3-1.7B", "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B", "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B",
    "gemma-3-270m": "google/gemma-3-270m", "gemma-3-1b": "google/gemma-3-1b-pt", "gemma-3-4b": "google/gemma-3-4b-pt",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M", "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
}
TOY_SEEN, TOY_UNSEEN = ("toy-qwen-s", "toy-qwen-m"), ("toy-qwen-l", "toy-gemma")
TOY = {name: ROOT / "toy" / name for name in (*TOY_SEEN, *TOY_UNSEEN)}
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
        return path.stem.lower(), str(path.parent), None, path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"base {spec!r} is a folder but not a model: it has no config.json")
        return path.resolve().name.lower(), str(path), None, None
    if hub := re.fullmatch(r"(\w[\w.-]*/([\w.-]+))(?:@([\w./-]+))?", spec):
        return hub[2].lower(), hub[1], hub[3], None
    raise BadInput(f"unknown base {spec!r}: accepted are {', '.join([*TOY, *HUB])}, a hub id org/name@revision, "
                   "a Hugging Face model folder or a .gguf file")


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


class Adapted(nn.Module):
    """W x + scale B_t A_t x, with the A, B and tasks in its base's `active` during a forward pass."""

    def __init__(self, linear, kind, layer, active):
        super().__init__()
        self.linear, self.kind, self.layer, self.active = linear, kind, layer, active

    def forward(self, x):                                                            # [R, S, d_in]
        if self.kind not in self.active.A:
            return self.linear(x)
        A = self.active.A[self.kind][self.layer]                                     # [T, r, d_in]
        B = self.active.B[self.kind][self.layer]                                     # [T, d_out, r]
        task, scale = self.active.task[x.device], self.active.scale                  # [R]
        if type(self.linear) is not nn.Linear:                                       # quantised: W is not readable
            return lora_add(self.linear(x), x, A, B, task, scale)                    # [R, S, d_out]
        return lora_linear(x, self.linear.weight, self.linear.bias, A, B, task, scale)  # [R, S, d_out]


class Base:
    """A frozen language model: `layers` L, `dims` {m: (d_in, d_out)}, `linears` [L] {m: nn.Linear}, `logits(...)`.
    Raises BadInput for a model without the seven projections in each layer, or with layers of different shapes."""

    def __init__(self, model, tokenizer, name="base", origin="", revision=None, quantize=None):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.origin, self.revision, self.quantize = name, origin, revision, quantize
        self.batch = None                                                            # the last one given to logits()
        self.active = SimpleNamespace(A={}, B={}, task=None, scale=1.0, at=None)     # what the patched modules read
        self.config = model.config.get_text_config()
        self.blocks, self.linears = find_projections(model)
        self.layers, self.dims, paths = len(self.linears), {}, {x: path for path, x in model.named_modules()}
        for layer, row in enumerate(self.linears):
            for m, linear in row.items():
                shape = (linear.in_features, linear.out_features)
                if self.dims.setdefault(m, shape) != shape:
                    raise BadInput(f"{name}: {m}_proj is {self.dims[m]} in layer 0 and {shape} in layer {layer}; only "
                                   "bases whose layers all have the same shapes are supported")
                model.set_submodule(paths[linear], Adapted(linear, m, layer, self.active))
        self.head_hook = model.get_output_embeddings().register_forward_pre_hook(self.pick)
        model.generation_config = GenerationConfig()                                 # no repetition penalty etc.

    def pick(self, head, inputs):
        """The LM head's input [N, d]: x [R, S, d] at the positions `active.at`. Answers are a few tokens of a long row,
        and a small model's vocabulary is its widest matrix: all positions' logits would cost more than the layers."""
        (x,), at = inputs, self.active.at
        return x if at is None else x[tuple(index.to(x.device) for index in at)]

    @property
    def device(self):
        return self.model.device  # of inputs, logits and generated adapters; the layers may be on several others

    @torch.no_grad()
    def weight(self, m, layer):
        """The frozen weight W [d_out, d_in] of module kind m, on `device`."""
        linear = self.linears[layer][m]
        if type(linear) is nn.Linear:
            return linear.weight.to(self.device)
        # Only a quantised layer's own forward can read its weight: W = (W I), without the bias.
        eye = torch.eye(self.dims[m][0], dtype=self.model.dtype, device=linear.weight.device)
        return torch.func.functional_call(linear, {"bias": None}, eye).T.to(self.device)

    def paths(self):
        """{(m, layer): dotted path of that projection in the model}, in the model's order."""
        return {(x.kind, x.layer): path for path, x in self.model.named_modules() if isinstance(x, Adapted)}

    def unpatch(self):
        """The model as transformers loaded it, with its own projections. This Base cannot be used afterwards."""
        for (m, layer), path in self.paths().items():
            self.model.set_submodule(path, self.linears[layer][m])
        self.head_hook.remove()
        if quantizer := getattr(self.model, "hf_quantizer", None):                   # a .gguf file: its weights were
            quantizer.remove_quantization_config(self.model)                         # dequantised when they were loaded
        return self.model

    def logits(self, batch, adapters=None):
        """Logits [N, vocabulary] at the N positions of `batch` (data.collate) that predict a continuation's token.
        adapters: Adapters of the tasks that `batch.task` [R] indexes, or None for the bare base."""
        self.batch = batch
        with self.with_adapters(adapters, batch.task, batch.at):
            return self.model(input_ids=batch.ids, use_cache=False, **self.masks(batch)).logits

    def masks(self, batch):
        """{attention_mask, position_ids} of a forward pass over `batch`, as the model takes them.
        Without a mask, transformers checks whether a row packs several texts, which waits for the device. So each layer
        type gets one, or None where scaled_dot_product_attention's own causal mask is enough. Models without layer
        types (Llama; Mistral, whose layers all slide) take a single mask and check if it is None, so they always get
        one: under 1% of the time on a CPU; on a GPU it rules out the flash kernel."""
        types, attention = set(getattr(self.config, "layer_types", None) or ()), self.config._attn_implementation
        # An architecture uses a window only if its config class declares one; config.json may hold a stray value.
        window = self.config.sliding_window if hasattr(type(self.config), "sliding_window") else None
        single = batch.segments is None                                              # one continuation a row
        if single and (attention not in ("sdpa", "eager") or types - {"full_attention", "sliding_attention"}):
            return {}                                                                # transformers' own masks
        def mask(window):
            plain = single and types and attention == "sdpa" and not (window and batch.ids.shape[1] >= window)
            return None if plain else causal_mask(batch, window, self.model.dtype)
        by_type = {kind: mask(window if kind == "sliding_attention" else None) for kind in types}
        return dict(attention_mask=by_type or mask(window), position_ids=None if single else batch.positions)

    def with_adapters(self, adapters, task, at=None):
        """A context in which row r of a forward pass has the adapters of task[r], and logits are computed only at the
        positions `at` (rows [N], columns [N]; None: everywhere). adapters None: the bare base."""
        if adapters is None:
            return self.activate({"at": at})
        devices = [row["q"].weight.device for row in self.linears]                   # [L], usually all the same
        A, B, scale = adapters.map(lambda t: [x.to(device) for x, device in zip(t.unbind(1), devices)])  # L [T, ...]
        return self.activate(dict(A=A, B=B, task={d: task.to(d) for d in set(devices)}, scale=scale, at=at))

    @contextlib.contextmanager
    def activate(self, state):
        """Updates `active`, which the patched modules read, with `state`; restores it at the end."""
        before = dict(vars(self.active))
        vars(self.active).update(state)
        try:
            yield
        finally:
            vars(self.active).update(before)

    def recompute_layers(self):
        """Keeps only each layer's input and runs the layer again in the backward pass: less memory, 1/3 more time."""
        def contexts():                                                              # other adapters may be active then
            return contextlib.nullcontext(), self.activate(dict(vars(self.active)))
        for layer in self.blocks:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts,
                                              preserve_rng_state=False)              # nothing is random: no dropout

    @torch.no_grad()
    def generate(self, prompts, adapters=None, tasks=None, max_new_tokens=32):
        """The greedy continuations, R texts, of R prompts (texts or lists of token ids), row r with the adapters of
        tasks[r]; one forward pass a token for all rows. A row ends at EOS or after max_new_tokens."""
        prompts = [self.tokenizer(p).input_ids if isinstance(p, str) else p for p in prompts]
        eos, S = self.tokenizer.eos_token_id, max(map(len, prompts))
        # Padded on the left, so that every row's next token has the same column. The mask excludes the padding.
        ids = torch.tensor([[0] * (S - len(p)) + p for p in prompts], device=self.device)  # [R, S]
        mask = torch.tensor([[0] * (S - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        task = None if tasks is None else torch.as_tensor(tasks, device=self.device)  # [R]
        with self.with_adapters(adapters, task):
            new = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens,
                                      eos_token_id=eos, pad_token_id=0 if eos is None else eos)[:, S:].tolist()
        new = [row[:row.index(eos)] if eos in row else row for row in new]
        return self.tokenizer.batch_decode(new, clean_up_tokenization_spaces=False)


def causal_mask(batch, window, dtype):
    """The additive attention mask [1 or R, 1, S, S]: 0 where position i sees position j, else the dtype's minimum.
    i sees j <= i. In rows of a prompt (segment 0) and several continuations (1, 2, ...), i sees the prompt and its own
    continuation only. With a window: only the last `window` position ids, its own included. Padding is on the right, so
    causality alone hides it."""
    segments, positions = batch.segments, torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]  # [1, S]
    sees = positions[:, :, None] >= positions[:, None, :]                            # [1, S, S]
    if segments is not None:
        positions = batch.positions                                                  # [R, S]
        sees = sees & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))  # [R, S, S]
    if window:
        sees = sees & (positions[:, :, None] - positions[:, None, :] < window)
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def find_projections(model):
    """(The decoder's L layers, [L] {module kind: nn.Linear}). Raises BadInput unless every layer holds each of the
    seven projections exactly once."""
    wanted = {f"{m}_proj": m for m in MODULES}
    def linears(module):
        return [(path.split(".")[-1], x) for path, x in module.named_modules() if isinstance(x, nn.Linear)]
    for layers in model.get_decoder().modules():                                     # the text model, no vision tower
        if isinstance(layers, nn.ModuleList):
            rows = [[(wanted[name], x) for name, x in linears(layer) if name in wanted] for layer in layers]
            if rows and all(sorted(m for m, _ in row) == sorted(MODULES) for row in rows):  # no mixture of experts
                return layers, [dict(row) for row in rows]
    names = {name for name, _ in linears(model)}
    found = ", ".join(name for name in wanted if name in names) or "none of them"
    raise BadInput(f"{type(model).__name__} is not supported: looked in its layers for {', '.join(wanted)} as "
                   f"nn.Linear and found {found}; its linear modules are {', '.join(sorted(names))}")


def pretrained(cls, spec, **options):
    """cls.from_pretrained of what `spec` names (see `resolve`), without remote code. Raises BadInput if it fails."""
    _, where, revision, gguf = resolve(spec)
    try:
        return cls.from_pretrained(where, revision=revision, trust_remote_code=False,
                                   **({"gguf_file": gguf} if gguf else {}), **options)
    except Exception as error:                                                       # a broken folder raises anything
        raise BadInput(f"base {spec!r} could not be loaded from {where}: {first_line(error)}")


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
    model = pretrained(AutoModelForCausalLM, spec, device_map=device_map, **options)
    # What fits on no device, accelerate offloads and fetches layer by layer. A backward pass would keep all of it.
    if any(p.is_meta for p in model.parameters()):
        hint = "" if quantize else "; --quantize 4bit makes it about a third of its size"
        raise BadInput(f"base {spec!r} is too big for this machine's devices; training cannot offload a part{hint}")
    for p in model.parameters():                                                     # GGUF loads as float32
        if p.is_floating_point():                                                    # packed weights stay uint8 and
            p.data = p.data.to(dtype)                                                # rotary buffers float32
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
