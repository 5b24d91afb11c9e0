"""Reads and writes portallib artifacts (format 1): folders with config.json and model.safetensors, for one base each.

Its tensors are the latents, the core and that base's converter of a Portal with norm="none", under other names.
"""
import collections, hashlib

import safetensors
import torch
from torch.nn.utils import parameters_to_vector

from bases import resolve
from portal import MODULES, Config, Converter, Portal, group_sites, layers_of
from runtime.files import BadInput, plain, read_json, remove, today, unreadable, write_json
from runtime.run_folder import LOCKS, lock, new_folder, occupied
from runtime.saved import load_config, load_portal, load_tensors, save_converter, save_portal, save_tensors
from tasks.rows import load_tasks

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
    except OSError:
        raise BadInput(f"{folder}: not an artifact ({unreadable(folder / 'model.safetensors')}: model.safetensors)")


def state_of(portal, base):
    """Returns {name: view of the parameter} of latents, core and the converter of `base`."""
    return {"z": portal.z.data, **portal.core.state_dict(), **portal.converters[base].state_dict()}


def name_of(name, groups):
    """Returns an artifact's name for the tensor `name` of state_of: core.A.q.weight for head_A.q.weight.
    groups: {g: (input, output, ...)}, its names for P_in and P_out of group g; several groups may share one."""
    first, *rest = name.split(".")
    if first in ("P_in", "P_out"):
        rest = [groups[rest[0]][first == "P_out"]]
    return ".".join([NAMES[first], *rest])


def require(condition, why):
    if not condition:
        raise ValueError(why)


def check_config(config, metadata):
    """Returns (Config, {g: Group}, {g: (input group, output group)}). metadata: of model.safetensors.
    Raises KeyError, TypeError or ValueError if this is no artifact, or none that a Portal can hold."""
    for name, found, wanted in (("model.safetensors", metadata, METADATA), ("config.json", FORMAT | config, FORMAT)):
        for key, value in wanted.items():
            require(found.get(key) == value, f"{name}: {key} {value!r} is accepted, not {found.get(key)!r}")
    keys = ("module_name", "layer_index", "in_features", "out_features", "input_group", "output_group")
    targets = sorted([target[key] for key in keys] for target in config["projection_targets"])
    fullest = collections.Counter(layer for _, layer, *_ in targets)                 # a layer may lack some kinds
    kinds = list(dict.fromkeys(target["module_name"] for target in sorted(
        config["projection_targets"], key=lambda target: -fullest[target["layer_index"]])))
    cfg = Config(tasks=list(config["tasks"]), modules=kinds, norm="none",
                 **{ours: config[theirs] for ours, theirs in SIZES.items()})
    sizes = [config["n_layers"], *(config[key] for key in SIZES.values()), *(size for t in targets for size in t[2:4])]
    require(all(isinstance(size, int) and size > 0 for size in sizes), "sizes are whole numbers above 0")
    require(set(kinds) <= set(MODULES) and cfg.tasks and len(set(cfg.tasks)) == len(cfg.tasks),
            "modules and tasks have names, none twice")
    for task in cfg.tasks:
        require(plain(task), f"task {task!r} cannot be the name of a folder")
    sites = {(m, layer): (d_in, d_out) for m, layer, d_in, d_out, *_ in targets}
    require(targets and len(sites) == len(targets) and all(layer in range(config["n_layers"]) for _, layer in sites),
            "it adapts nothing, a projection twice, or a layer that is not there")
    groups, names = group_sites(dict(sorted(sites.items(), key=lambda site: kinds.index(site[0][0])))), {}
    for m, layer, d_in, d_out, *own in targets:
        g = next(g for g, group in groups.items() if group[::2] == (m, d_in) and group.d_out == d_out)
        require(names.setdefault(g, own) == own, f"sites of {m} of one shape belong to different alignment groups")
    for side in (0, 1):
        users = {(names[g][side], group.kind, group[2 + side]) for g, group in groups.items()}
        require(len(users) == len({name for name, *_ in users}),
                "two of its modules share an alignment group, which portallib does not accept either")
    return cfg, groups, names


def read_artifact(folder):
    """Returns (config.json, a Portal whose one converter is named base_model_name_or_path). Raises BadInput."""
    path = folder / "model.safetensors"
    config, weights = read_json(folder / "config.json"), load_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        cfg, groups, names = check_config(config, metadata)
        portal, base = Portal(cfg), str(config["base_model_name_or_path"])
        portal.converters[base] = Converter(cfg, groups)
        state = state_of(portal, base)
        shapes = {name_of(name, names): tuple(view.shape) for name, view in state.items()}
        shapes[NAMES["e"]] = config["n_layers"], cfg.d_e                             # of layers without a site, too
        require({name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes,
                "the tensors of model.safetensors are not those of its config.json")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: config.json or model.safetensors is not an artifact's that a run can hold ({error})")
    weights[NAMES["e"]] = weights[NAMES["e"]][layers_of(groups)]
    for name, view in state.items():
        view.copy_(weights[name_of(name, names)])
    return config, portal


def alignment_groups(converter, groups):
    """Returns {g: (input group, output group)}, portallib's names: the kind where all of its sites have one width, else
    the kind and the width. Groups whose tensors differ cannot share one and keep their own name."""
    names = {g: [] for g in groups}
    for side, P, dim in (("in", converter.P_in, 2), ("out", converter.P_out, 3)):
        for g, group in groups.items():
            alike = [other for other in groups if groups[other].kind == group.kind]
            same = [other for other in alike if groups[other][dim] == group[dim]]
            shared = group.kind if same == alike else f"{group.kind}__{side}_{group[dim]}"
            names[g].append(shared if all(torch.equal(P[g], P[other]) for other in same) else g)
    return names


def save_artifact(folder, portal, tag, base, origin, revision):
    """Writes latents, core and converter `tag` as an artifact. base: the loaded Base, for the paths of its modules;
    origin, revision: its hub id or folder, and the hub's revision or None. Raises BadInput for fused projections."""
    cfg, converter, state = portal.cfg, portal.converters[tag], state_of(portal, tag)
    groups = base.groups_of(cfg.modules)
    names, layers = alignment_groups(converter, groups), layers_of(groups)
    sites = {(m, layer): base.sites[m, layer] for layer in layers for m in cfg.modules if (m, layer) in base.sites}
    if fused := [site.path for site in sites.values() if site.rows is not None]:
        raise BadInput(f"{tag}: {fused[0]} has several projections fused in it, which a portallib artifact cannot say")
    group_of = {(group.kind, layer): g for g, group in groups.items() for layer in group.layers}
    paths = [site.path.partition(f".{layer}.")[::2] for (_, layer), site in sites.items()]  # model.layers, attn.q_proj
    targets = [dict(layer_index=layer, module_name=m, module_path=path, in_features=groups[g].d_in,
                    out_features=groups[g].d_out, input_group=names[g][0], output_group=names[g][1])
               for (m, layer), (_, path) in zip(sites, paths) for g in [group_of[m, layer]]]
    tensors = {name_of(name, names): view for name, view in state.items()}
    tensors[NAMES["e"]] = torch.zeros(len(base.blocks), cfg.d_e).index_copy(0, torch.tensor(layers), state["e"])
    write_json(folder / "config.json", {
        **FORMAT, **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}, "tasks": cfg.tasks,
        "n_layers": len(base.blocks), "layer_path": paths[0][0],
        "projection_targets": targets, "base_model_name_or_path": origin, "base_model_revision": revision})
    save_tensors(folder / "model.safetensors", tensors, METADATA)


# ---------------------------------------------------------------------------------------------- artifacts and runs
def import_artifact(artifact, run, ported=False, n=None, seed=None, data=None, overwrite=False):
    """Makes a portallib artifact the run folder `run`, or adds its base to a run with the same latents and core.
    ported: the artifact is a refit. n, seed, data: the rows that it was fitted on, if known. Raises BadInput."""
    config, portal = read_artifact(artifact)
    (spec, converter), = portal.converters.items()
    source = resolve(spec)
    name = source.name
    portal.converters = {name: converter}
    if data:
        load_tasks(data, portal.cfg.tasks)                                           # BadInput unless it has every task
    p = dict(base=name, id=source.id, revision=config.get("base_model_revision"), ported=ported, n=n, seed=seed,
             data=data and str(data.resolve()), date=None, artifact=digest_of(artifact))
    def add(folder, saved):
        provenance = folder / "converters" / f"{name}.json"                          # written last, as in port.py:
        remove(provenance)                                                           # without it the rest is ignored
        remove(folder / "final" / "converters" / f"{name}.safetensors")
        save_converter(folder, portal, name, name)
        write_json(provenance, p)
        known = {key: p[key] if saved[key] is None else saved[key] for key in ("seed", "data")}
        bases = [b for b in saved["bases"] if b["base"] != name] + [p] * (not ported)
        write_json(folder / "portal.json", {**saved, **known, "bases": bases})

    if occupied(run) and not (run / "portal.json").exists():
        raise BadInput(f"{run} is neither empty nor a run folder; --run DIR names another")
    with LOCKS:                                                                      # unlocks at the end: the command
        lock(run)                                                                    # that goes on with `run` locks it
        if (run / "portal.json").exists():
            saved, cfg = load_config(run)
            mine, its = (parameters_to_vector([x.z, *x.core.parameters()]) for x in (load_portal(run), portal))
            if portal.cfg != cfg or not torch.equal(mine, its):
                raise BadInput(f"{run} has other tasks, sizes, latents or core than {artifact}; python export.py "
                               f"--artifact {artifact} --run DIR reads it into another run")
            if (run / "converters" / f"{name}.json").exists() and not overwrite:
                raise BadInput(f"{run} already holds {name}; --overwrite replaces its converter")
            add(run, saved)
        else:
            with new_folder(run) as folder:
                save_portal(folder, portal)
                add(folder, dict(config=vars(portal.cfg), bases=[], seed=None, data=None, trained=today()))
    print(f"{name}: read from {artifact} into {run}")
