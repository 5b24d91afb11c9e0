"""An adapter as a PEFT folder, adapter_config.json and adapter_model.safetensors: written and read."""
import re, sys

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from bases import located, short_name
from portal import Adapters
from runtime.files import BadInput, read_json, write_json
from runtime.saved import load_tensors, save_tensors

PLAIN = {  # {key of adapter_config.json: what it says of a plain LoRA, where it says anything}
    "peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "eva", "orthogonal"],
    **dict.fromkeys(["use_dora", "lora_bias", "use_qalora", "use_bdlora", "modules_to_save", "layer_replication",
                     "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"], [])}
EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}  # PEFT takes these names for experts


def origin(p):
    """Returns the base's hub id, its folder or its .gguf file."""
    source = located(p["id"])
    return f"{source.where}/{source.gguf}" if source.gguf else source.where


def save_peft(folder, base, p, adapters, t):
    """Writes task t as adapter_config.json and adapter_model.safetensors, with PEFT's names and shapes."""
    factors = base.factors(adapters)                                                 # {path: (A, B)}
    # The rank that most modules have; a module with several projections fused in it has the sum of their ranks. PEFT's
    # scale is alpha / r, so that alpha follows r.
    ranks = {path: A.shape[1] for path, (A, _) in factors.items()}
    rank = min(ranks.values())
    wider = {path: r for path, r in ranks.items() if r != rank}
    def alpha(r):
        product = adapters.scale * r
        return int(product) if product == int(product) else product
    # PEFT adapts every module whose path ends in a name that it is given. Where short names would reach other modules,
    # too (the q_proj of a vision tower), it is given full paths.
    names = {path.split(".")[-1] for path in factors}
    reached = {path for path, _ in base.model.named_modules() if path.split(".")[-1] in names}
    # In a mixture of experts PEFT takes some names for those of the experts, which once were modules of these names,
    # and would adapt them instead. Parameters it takes as they are named.
    mixture = any(p.dim() == 3 and "expert" in name for name, p in base.model.named_parameters())
    parameters = [path for path in factors if mixture and path.split(".")[-1] in EXPERTS]
    short = reached == set(factors) and not parameters
    modules = sorted(names) if short else [path for path in factors if path not in parameters]
    stored = checkpoint_names(base.model, factors)
    tensors = {f"base_model.model.{stored[path]}.lora_{side}.weight": factor[t]       # A [r, d_in], B [d_out, r]
               for path, pair in factors.items() for side, factor in zip("AB", pair)}
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=origin(p), revision=p["revision"],
        r=rank, lora_alpha=alpha(rank), rank_pattern=wider,
        alpha_pattern={path: alpha(r) for path, r in wider.items()}, target_modules=modules,
        target_parameters=[f"{path}.weight" for path in parameters] or None,
        lora_dropout=0.0, bias="none", use_rslora=False, use_dora=False, inference_mode=True,
        fan_in_fan_out=any(isinstance(base.linears[path], Conv1D) for path in factors)))


def load_peft(folder, base, tasks):
    """Returns the Adapters of `base` that the PEFT folders folder/<task> of `tasks` hold. Ranks are filled up to the
    largest with zeros, and each LoRA's own scale is part of its B. Raises BadInput: see plain_config and read_peft."""
    found = [read_peft(folder / task, base) for task in tasks]                       # [T] {(g, index): (A, B)}
    rank = max(len(A) for own in found for A, _ in own.values())
    groups = {g: base.groups[g] for g in dict.fromkeys(g for own in found for g, _ in own)}
    A = {g: torch.zeros(len(tasks), len(own.layers), rank, own.d_in, device=base.device) for g, own in groups.items()}
    B = {g: torch.zeros(len(tasks), len(own.layers), own.d_out, rank, device=base.device) for g, own in groups.items()}
    for t, own in enumerate(found):
        for (g, index), (a, b) in own.items():
            A[g][t, index, :len(a)], B[g][t, index, :, :len(a)] = a, b
    return Adapters(A, B, 1.0)


def plain_config(folder, base):
    """Returns a PEFT folder's adapter_config.json; warns if it names another base. Raises BadInput if there is no
    adapter or it is not a plain LoRA."""
    path = folder / "adapter_config.json"
    if not (path.is_file() and (folder / "adapter_model.safetensors").is_file()):
        raise BadInput(f"{folder}: no PEFT adapter; a folder for each task, with adapter_config.json and "
                       "adapter_model.safetensors, is accepted")
    config = read_json(path)
    config = config if isinstance(config, dict) else {}
    odd = [f"{key} {config[key]!r}" for key, plain in PLAIN.items() if config.get(key) and config[key] not in plain]
    if odd or "peft_type" not in config:
        raise BadInput(f"{path}: {', '.join(odd) or 'no peft_type'}; only plain LoRAs are accepted")
    named = config.get("base_model_name_or_path")
    if named and named != base.provenance["id"] and short_name(named) != base.name:
        print(f"warning: {path} names the base {named}; it is read for {base.name}", file=sys.stderr)
    return config


def read_peft(folder, base):
    """Returns {(g, index in the group): (A [r, d_in], scale B [d_out, r])} of the LoRA in a PEFT folder. Of one on a
    matrix in which several projections are fused, each has the whole A and its own rows of B. Raises BadInput if it
    does not fit the base."""
    config, file, factors, found = plain_config(folder, base), folder / "adapter_model.safetensors", {}, {}
    for name, tensor in load_tensors(file).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise BadInput(f"{file}: {name} is no factor of a LoRA; only plain LoRAs are accepted")
        factors.setdefault(match[1], {})[match[2]] = tensor.to(base.device, torch.float32)
    steps = [step for step in get_model_conversion_mapping(base.model) if type(step) is WeightRenaming]
    for stored, pair in factors.items():
        names = stored, rename_source_key(f"{stored}.weight", steps, [])[0].removesuffix(".weight")  # as PEFT does
        path = next((path for name in names for path in base.places if f".{path}".endswith(f".{name}")), "")
        def setting(patterns, default):                                              # as PEFT matches them
            own = (value for key, value in (config.get(patterns) or {}).items() if re.match(rf"(.*\.)?({key})$", path))
            return next(own, config.get(default))
        places = base.places.get(path, [])
        if not places or places[0][:2] in found:
            raise BadInput(f"{file}: {stored} is no projection that can be adapted in {base.name}, or is there twice")
        r, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
        shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
        fits = {"A": (r, base.groups[places[0][0]].d_in), "B": (sum(base.groups[g].d_out for g, *_ in places), r)}
        if shapes != fits or not isinstance(alpha, (int, float)):
            raise BadInput(f"{file}: {stored} is {shapes} with lora_alpha {alpha}; base {base.name} and r need {fits}")
        B = pair["B"] * (alpha / (r ** 0.5 if config.get("use_rslora") else r))
        found |= {(g, index): (pair["A"], B if rows is None else B[rows]) for g, index, rows in places}
    if not found:
        raise BadInput(f"{file}: holds no LoRA")
    return found


def checkpoint_names(model, paths):
    """Returns {path of a linear layer: its path in an adapter's file}. PEFT renames what it reads as transformers
    renames a checkpoint's weights; where that would change our name, the file has the checkpoint's own. Raises
    BadInput."""
    def renamed(name, steps):
        return rename_source_key(f"{name}.weight", steps, [])[0].removesuffix(".weight")
    steps, saving = ([step for step in get_model_conversion_mapping(model, add_legacy=legacy)
                      if type(step) is WeightRenaming] for legacy in (True, False))
    back, names = [step.reverse_transform() for step in saving[::-1]], {}
    for path in paths:
        names[path] = path if path.endswith(renamed(path, steps)) else renamed(path, back)
        if names[path] != path and renamed(names[path], steps) != path:
            raise BadInput(f"PEFT cannot read an adapter of {path}, which it renames; --merge writes a whole model")
    return names
