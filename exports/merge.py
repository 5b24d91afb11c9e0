"""A base with an adapter in its weights: the base's own files, in which the adapted tensors are W + scale B A.

Weights keep their names, shapes, shards and metadata, and every other file arrives byte for byte, so that whatever
reads the base reads the result. transformers would write other names, another config and tokenizer, and leave out
tensors that its class does not use.
"""
import contextlib, functools, json, os, pathlib, re, shutil

import huggingface_hub, safetensors, safetensors.torch
import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.core_model_loading import (WeightConverter, WeightRenaming, rename_source_key,
                                             revert_weight_conversion)
from transformers.pytorch_utils import Conv1D

from bases import OTHER_WEIGHTS, pretrained, recorded, weight_files, weight_map
from runtime.files import BadInput, read_json

WEIGHTS = re.compile(rf".+\.({'|'.join(['safetensors', *OTHER_WEIGHTS])})(\.index\.json)?", re.IGNORECASE)


def files_of(p):
    """Returns the folder with all files of a base with provenance p, but for weights of other formats; where the hub is
    out of reach, with those in its cache. Raises BadInput."""
    source = recorded(p)
    if not source.on_hub:
        return pathlib.Path(source.where)
    fetch = functools.partial(huggingface_hub.snapshot_download, source.where, revision=source.revision,
                              ignore_patterns=[f"*.{kind}" for kind in OTHER_WEIGHTS])
    try:
        return pathlib.Path(fetch())
    except Exception:                                                                # of the network or the hub
        with contextlib.suppress(Exception):
            folder = fetch(local_files_only=True)
            print(f"base {source.where}: the hub is out of reach; its files are taken from {folder}")
            return pathlib.Path(folder)
        raise BadInput(f"base {source.where}: its files could not be loaded from the hub")


@torch.no_grad()
def save_merged(folder, where, base, adapters, t, dtype):
    """Writes the files of `base`, which lie in the folder `where`, to `folder`, with task t in its weights. Tensors of
    floating-point numbers are stored as `dtype`, but for those that transformers keeps wider. The base is unpatched.
    Raises BadInput."""
    files = weight_files(where, None, getattr(base.model.config, "transformers_weights", None))
    if any(not file.is_relative_to(where) or ".." in file.relative_to(where).parts for file in files):
        raise BadInput(f"{where}: its weights are in files outside of it")
    names = loaded_as(base.model, files)
    changes, held, sizes = changes_of(base, adapters, t, names, where), base.model.state_dict(), [0, 0]
    for file in files:
        path, tensors = folder / file.relative_to(where), {}
        with safetensors.safe_open(file, "pt") as opened:
            for key in opened.keys():
                before, own = opened.get_tensor(key), held.get(names[key][0])
                kind = dtype if own is None or not own.is_floating_point() else own.dtype
                tensors[key] = merged(key, before, changes.get(key), kind)
                sizes = [size + x.numel() * x.element_size() for size, x in zip(sizes, (before, tensors[key]))]
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, path, opened.metadata())
    copy_rest(where, folder, {str(file.relative_to(where)) for file in files}, *sizes)


def merged(key, tensor, change, dtype):
    """Returns a tensor of the base's files as it is stored: as `dtype` if it holds floating-point numbers, with what
    the adapter adds to it. change: of changes_of, or None. Raises BadInput."""
    new = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if change:
        W, delta = (x.cpu() for x in change())
        if not torch.equal(tensor.to(W.dtype), W):
            raise BadInput(f"--merge: {key} in the base's files is not the weight that transformers loads under that "
                           "name; without --merge an adapter is written")
        new = (tensor.to(delta.dtype) + delta).to(dtype)                             # add in float32, then round once
    if not new.isfinite().all() and (change or tensor.isfinite().all()):
        raise BadInput(f"--merge: {key} is not finite as {str(dtype).removeprefix('torch.')}; try --dtype float32 or "
                       "bfloat16")
    return new


def copy_rest(where, folder, files, before, after):
    """Copies every file of a base but weights, a README.md and the caches of git and the hub. Of indices, those of the
    weight `files` are copied, with their total size if it is now `after` bytes instead of `before`."""
    left = []
    for root, folders, found in os.walk(where, followlinks=True):
        real = pathlib.Path(root).resolve()
        folders[:] = [name for name in folders if name not in (".git", ".cache")
                      and pathlib.Path(root, name).resolve() not in (real, *real.parents)]  # a link in a circle
        for name in found:
            old = os.path.join(root, name)
            inner = os.path.relpath(old, where)
            new = folder / inner
            if inner in files or inner == "README.md":
                continue
            index = read_json(where / inner) if WEIGHTS.fullmatch(name) and name.endswith(".index.json") else None
            if WEIGHTS.fullmatch(name) and not (index and set(weight_map(where / inner).values()) <= files):
                left.append(inner)
                continue
            new.parent.mkdir(parents=True, exist_ok=True)
            if index and before != after and "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] = after
                new.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(old, new)
    if left:
        print(f"weights in other files are not merged and left out: {', '.join(sorted(left))}")


# ---------------------------------------------------------------------------------------------- names and shapes
def loaded_as(model, files):
    """Returns {name of a tensor in the base's files: (its name in the model, None or the pattern of the conversion by
    which transformers fuses or splits it)}."""
    state, found = model.state_dict(), {}
    both = [[step for step in model._weight_conversions if isinstance(step, kind)]
            for kind in (WeightRenaming, WeightConverter)]
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            for key in opened.keys():
                found[key] = rename_source_key(key, *both, model.base_model_prefix, state)
                if found[key][0] not in state and key in state:                      # as transformers loads them
                    found[key] = rename_source_key(key, [], [], model.base_model_prefix, state)
    return found


def changes_of(base, adapters, t, names, where):
    """Returns {name of a tensor in the files: f() -> (W as loaded, what task t adds to it)}, both in the file's shape.
    names: loaded_as. Raises BadInput if the files do not hold an adapted weight."""
    factors, parameters = base.factors(adapters), dict(base.model.named_parameters(remove_duplicate=False))
    def change(path):
        return base.linears[path].weight, delta_of(base.linears[path], *factors[path], adapters.scale, t)
    found, converted = {}, {}
    for path in factors:
        own = {name for name, p in parameters.items() if p is base.linears[path].weight}  # layers may share a module
        keys = [key for key, (name, pattern) in names.items() if name in own and pattern is None]
        found.update(dict.fromkeys(keys, functools.partial(change, path)))
        if not keys:
            converted[f"{path}.weight"] = change(path)[1]
    for key, pair in (unconverted(base.model, converted) if converted else {}).items():
        found[key] = functools.partial(tuple, pair)
    if missing := sorted(found.keys() - names.keys()):
        raise BadInput(f"--merge: the files of {where} have no {missing[0]}, which an adapted weight is made of; "
                       "without --merge an adapter is written")
    return found


def delta_of(linear, A, B, scale, t):
    """Returns scale B A of task t, in float32 or wider, in the shape of the linear layer's weight: [d_out, d_in], of a
    Conv1D [d_in, d_out]. A: [T, r, d_in], B: [T, d_out, r]."""
    exact = torch.promote_types(torch.promote_types(linear.weight.dtype, A.dtype), torch.float32)
    delta = scale * B[t].to(exact) @ A[t].to(exact)
    return delta.T if isinstance(linear, Conv1D) else delta


def unconverted(model, deltas):
    """Returns {name in the files: (W, delta)} of `deltas` {name of a weight: tensor} to weights that transformers fused
    or split on loading, each by the reverse of that. The other weights made of the same tensors stay as they are."""
    steps = [step.reverse_transform() for step in model._weight_conversions[::-1] if isinstance(step, WeightConverter)]
    state = model.state_dict()
    whole = {name: rename_source_key(name, [], steps)[0] for name in state}
    changed = {whole[name] for name in deltas}
    weights = {name: W for name, W in state.items() if whole[name] in changed}
    deltas = {name: deltas.get(name, torch.zeros_like(W, dtype=torch.float32)) for name, W in weights.items()}
    weights, deltas = (revert_weight_conversion(model, parts) for parts in (weights, deltas))
    return {name: (weights[name], deltas[name]) for name in weights}


# ---------------------------------------------------------------------------------------------- a .gguf file
@torch.no_grad()
def save_converted(folder, source, base, adapters, t):
    """Writes the base of a .gguf file, which is unpatched, as transformers saves it, with task t in its weights. Raises
    BadInput."""
    model, tensors = base.model, base.model.state_dict()
    for path, factors in base.factors(adapters).items():
        W, delta = base.linears[path].weight, delta_of(base.linears[path], *factors, adapters.scale, t)
        tensors[f"{path}.weight"] = merged(f"{path}.weight", W.cpu(), lambda W=W, delta=delta: (W, delta), W.dtype)
    model.generation_config = GenerationConfig.from_model_config(model.config)       # where to stop
    model.save_pretrained(folder, state_dict=tensors)
    pretrained(AutoTokenizer, source).save_pretrained(folder)                        # not as `encode` needs it
