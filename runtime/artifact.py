"""Reads and writes portallib artifacts (format 1): folders with config.json and model.safetensors, for one base each.

Its tensors are the latents, the core and that base's converter of a Portal with norm="none", under other names.
"""
import hashlib

import safetensors

from portal import MODULES, Config, Converter, Portal
from runtime.files import BadInput, read_json, write_json
from runtime.run_folder import load_tensors, plain, save_tensors

FORMAT = {"format_version": 1, "library_name": "portallib", "architecture": "canonical", "task_type": "CAUSAL_LM"}
METADATA = {"format": "portallib", "format_version": "1"}                            # of model.safetensors
SIZES = {"rank": "rank", "alpha": "alpha", "d_z": "d_z", "d_e": "d_layer", "hidden": "hidden", "d_c": "d_core"}
NAMES = {"z": "task_latents", "W1": "core.l1", "W2": "core.l2", "film": "core.film", "head_A": "core.A",
         "head_B": "core.B", "e": "alignment.layer_embeddings.weight", "P_in": "alignment.input",
         "P_out": "alignment.output"}


def is_artifact(folder):
    """Whether a folder's config.json says that it is a portallib artifact."""
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    return isinstance(config, dict) and config.get("library_name") == FORMAT["library_name"]


def digest_of(folder):
    """Returns the SHA-256 digest of an artifact's model.safetensors."""
    try:
        with open(folder / "model.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{folder}: not an artifact ({error.strerror}: model.safetensors)")


def tensors_of(portal, base, groups):
    """Returns {artifact's name: tensor} of latents, core and the converter of `base`, as views of the parameters.
    groups: {m: (input, output, ...)}, the names under which the artifact keeps P_in and P_out of module kind m."""
    found = {}
    for name, view in {"z": portal.z.data, **portal.core.state_dict(), **portal.converters[base].state_dict()}.items():
        first, *rest = name.split(".")                                               # head_A.q.weight: core.A.q.weight
        if first in ("P_in", "P_out"):
            rest = [groups[rest[0]][first == "P_out"]]
        found[".".join([NAMES[first], *rest])] = view
    return found


def require(condition, why):
    if not condition:
        raise ValueError(why)


def check_config(config, metadata):
    """Returns (Config, {module kind: [input group, output group, d_in, d_out]}). metadata: of model.safetensors.
    Raises KeyError, TypeError or ValueError if this is no artifact, or none that a Portal can hold."""
    for name, found, wanted in (("model.safetensors", metadata, METADATA), ("config.json", FORMAT | config, FORMAT)):
        for key, value in wanted.items():
            require(found.get(key) == value, f"{name}: {key} {value!r} is accepted, not {found.get(key)!r}")
    keys = ("module_name", "layer_index", "input_group", "output_group", "in_features", "out_features")
    targets = [[target[key] for key in keys] for target in config["projection_targets"]]
    kinds = {m: alike for m, _, *alike in targets}
    layers, dims = config["n_layers"], sum((alike[2:] for alike in kinds.values()), [])
    cfg = Config(tasks=list(config["tasks"]), modules=list(kinds), norm="none",
                 **{ours: config[theirs] for ours, theirs in SIZES.items()})
    sizes = [layers, *dims, *(config[key] for key in SIZES.values())]
    require(all(isinstance(size, int) and size > 0 for size in sizes), "sizes are whole numbers above 0")
    require(kinds.keys() <= set(MODULES) and cfg.tasks and len(set(cfg.tasks)) == len(cfg.tasks),
            "modules and tasks have names, none twice")
    for task in cfg.tasks:
        require(plain(task), f"task {task!r} cannot be the name of a folder")
    require(sorted(targets) == sorted([m, layer, *alike] for m, alike in kinds.items() for layer in range(layers)),
            "it adapts only some layers, or layers of different shapes, which is not supported")
    require(all(len({alike[side] for alike in kinds.values()}) == len(kinds) for side in (0, 1)),
            "two of its modules share an alignment group, which portallib does not accept either")
    return cfg, kinds


def read_artifact(folder):
    """Returns (config.json, a Portal whose one converter is named base_model_name_or_path). Raises BadInput."""
    path = folder / "model.safetensors"
    config, weights = read_json(folder / "config.json"), load_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        cfg, kinds = check_config(config, metadata)
        portal, base = Portal(cfg), str(config["base_model_name_or_path"])
        portal.converters[base] = Converter(cfg, config["n_layers"], {m: dims for m, (_, _, *dims) in kinds.items()})
        views = tensors_of(portal, base, kinds)
        require({k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in views.items()},
                "the tensors of model.safetensors are not those of its config.json")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: config.json or model.safetensors is not an artifact's that a run can hold ({error})")
    for name, view in views.items():
        view.copy_(weights[name])
    return config, portal


def save_artifact(folder, portal, tag, base, origin, revision):
    """Writes latents, core and converter `tag` as an artifact. base: the loaded Base, for the paths of its modules;
    origin, revision: its hub id or folder, and the hub's revision or None."""
    cfg, paths = portal.cfg, base.paths()                                            # model.layers.0.self_attn.q_proj
    targets = [dict(layer_index=layer, module_name=m, module_path=paths[m, layer].rpartition(f".{layer}.")[2],
                    in_features=base.dims[m][0], out_features=base.dims[m][1], input_group=m, output_group=m)
               for layer in range(base.layers) for m in cfg.modules]
    write_json(folder / "config.json", {
        **FORMAT, **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}, "tasks": cfg.tasks,
        "n_layers": base.layers, "layer_path": paths[cfg.modules[0], 0].rpartition(".0.")[0],
        "projection_targets": targets, "base_model_name_or_path": origin, "base_model_revision": revision})
    save_tensors(folder / "model.safetensors", tensors_of(portal, tag, {m: (m, m) for m in cfg.modules}), METADATA)
