"""An adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors."""
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from bases import located
from runtime.files import BadInput, write_json
from runtime.saved import save_tensors

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
