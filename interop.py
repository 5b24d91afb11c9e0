"""portallib artifacts, both ways: weights published in that format become a run, a base of a run becomes an artifact.

    python interop.py --artifact DIR --run RUN          read: a new run, or one more base for a run of the same core
    python interop.py --run RUN --to BASE --out DIR     write

An artifact (format 1) holds one base: config.json and model.safetensors, with the latents, the core and that base's
converter. The mathematics is portal.py's with norm="none"; only the names differ. Artifacts that were trained together,
or refitted from one another, share latents and core bit for bit: so they become one run with several bases. What an
artifact does not say, on which and how many rows it was fitted and with which seed, is recorded from --data, --n and
--seed, or as null.
"""
import dataclasses, pathlib

import safetensors, torch

from bases import lasting, reload_base, resolve
from cli import BadInput, find_run, lock, new_folder, occupied, parse, read_json, run_main, today, write_json
from data import load_tasks
from eval import adapters_of
from export import card, check_free, held, origin, write_folder
from portal import (MODULES, Config, Converter, Portal, load_config, load_portal, load_tensors, plain, save_converter,
                    save_portal, save_tensors)

FORMAT = {"format_version": 1, "library_name": "portallib", "architecture": "canonical", "task_type": "CAUSAL_LM"}
METADATA = {"format": "portallib", "format_version": "1"}                            # of model.safetensors
SIZES = {"rank": "rank", "alpha": "alpha", "d_z": "d_z", "d_e": "d_layer", "hidden": "hidden", "d_c": "d_core"}
NAMES = {"z": "task_latents", "W1": "core.l1", "W2": "core.l2", "film": "core.film", "head_A": "core.A", "head_B": "core.B",
         "e": "alignment.layer_embeddings.weight", "P_in": "alignment.input", "P_out": "alignment.output"}


def tensors_of(portal, base, groups):
    """{the artifact's name: tensor} of latents, core and one converter. `groups` {m: (input, output)}: the names under
    which the artifact keeps P_in and P_out of a module kind."""
    found = {}
    ours = {"z": portal.z.data, **portal.core.state_dict(), **portal.converters[base].state_dict()}
    for name, tensor in ours.items():
        first, *rest = name.split(".")                                               # head_A.q.weight -> core.A.q.weight
        if first in ("P_in", "P_out"):
            rest = [groups[rest[0]][first == "P_out"]]
        found[".".join([NAMES[first], *rest])] = tensor
    return found


# ---------------------------------------------------------------------------------------------- reading
def read_artifact(folder):
    """An artifact's folder -> (its config.json, a Portal with the converter of its one base)."""
    def bad(why):
        raise BadInput(f"{folder}: {why}")
    config, weights = read_json(folder / "config.json"), load_tensors(folder / "model.safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    for key, value in METADATA.items():
        if metadata.get(key) != value:
            bad(f"model.safetensors is not an artifact's: its {key} is {metadata.get(key)!r}, {value!r} is accepted")
    for key, value in FORMAT.items():
        if not isinstance(config, dict) or config.get(key, value) != value:
            bad(f"config.json must have {key} {value!r}")
    try:
        groups, places = {}, []
        for target in config["projection_targets"]:
            m = target["module_name"]
            groups.setdefault(m, set()).add((target["input_group"], target["output_group"]))
            places.append((m, target["layer_index"]))
        cfg = Config(tasks=list(config["tasks"]), modules=list(groups), norm="none",
                     **{ours: config[theirs] for ours, theirs in SIZES.items()})
        layers, name = config["n_layers"], resolve(config["base_model_name_or_path"])[0]
        if not all(isinstance(size, int) and size > 0 for size in (layers, *(getattr(cfg, ours) for ours in SIZES))):
            raise ValueError("sizes are whole numbers above 0")
        if not set(groups) <= set(MODULES) or not cfg.tasks or len(set(cfg.tasks)) < len(cfg.tasks):
            raise ValueError("modules and tasks have names, none twice")
    except (KeyError, TypeError, ValueError) as error:
        bad(f"config.json is not an artifact's ({error})")
    for task in cfg.tasks:                                                           # a task's name is a folder's name here
        if not plain(task):
            bad(f"task {task!r} cannot be the name of a folder")
    everywhere = sorted((m, layer) for m in groups for layer in range(layers))
    if sorted(places) != everywhere or max(map(len, groups.values())) > 1:
        bad("it adapts only some layers, or layers of different shapes; only bases whose layers are alike are supported")
    groups = {m: group for m, (group,) in groups.items()}
    if any(len(set(side)) < len(side) for side in zip(*groups.values())):
        bad("two of its modules share an alignment group, which portallib does not accept either")
    try:
        dims = {m: (weights[f"{NAMES['P_in']}.{i}"].shape[1], weights[f"{NAMES['P_out']}.{o}"].shape[0])
                for m, (i, o) in groups.items()}
        portal = Portal(cfg)
        portal.converters[name] = Converter(cfg, layers, dims)
        places = tensors_of(portal, name, groups)
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in places.items()}:
            raise KeyError
    except (KeyError, IndexError):
        bad("the tensors of model.safetensors are not those of its config.json")
    for key, place in places.items():                                                # views of the portal's own parameters
        place.copy_(weights[key])
    return config, portal


def read(args):
    """Make a run of an artifact, or add its base to a run that has the same latents and core."""
    config, portal = read_artifact(args.artifact)
    (name,), run = portal.converters, args.run
    if args.data:
        load_tasks(args.data, portal.cfg.tasks)                                      # it must know every task
    p = dict(base=name, id=lasting(config["base_model_name_or_path"]), revision=config.get("base_model_revision"),
             ported=args.ported, n=args.n, seed=args.seed, data=args.data and str(args.data.resolve()), date=None,
             artifact=str(args.artifact.resolve()))

    def add(folder, saved):
        provenance = folder / "converters" / f"{name}.json"                          # as in port.py: without it the rest
        provenance.unlink(missing_ok=True)                                           # does not count
        (folder / "final" / "converters" / f"{name}.safetensors").unlink(missing_ok=True)
        save_converter(folder, portal, name, name)
        write_json(provenance, p)
        others = [b for b in saved["bases"] if b["base"] != name]
        known = {key: p[key] if saved[key] is None else saved[key] for key in ("seed", "data")}
        write_json(folder / "portal.json", {**saved, **known, "bases": others if args.ported else [*others, p]})

    lock(run)
    if (run / "portal.json").exists():
        saved, cfg = load_config(run)
        mine = load_portal(run)
        pairs = zip([mine.z, *mine.core.state_dict().values()], [portal.z, *portal.core.state_dict().values()])
        if dataclasses.replace(portal.cfg, gain=cfg.gain) != cfg or not all(torch.equal(a, b) for a, b in pairs):
            raise BadInput(f"{run} has other tasks, sizes, latents or another core than {args.artifact}; "
                           "--run DIR names another run")
        if (run / "converters" / f"{name}.json").exists() and not args.overwrite:
            raise BadInput(f"{run} already holds {name}; --overwrite replaces its converter")
        add(run, saved)
    else:
        if occupied(run):
            raise BadInput(f"{run} is neither empty nor a run folder; --run DIR names another")
        with new_folder(run) as folder:
            save_portal(folder, portal)
            add(folder, dict(config=vars(portal.cfg), bases=[], seed=None, data=None, trained=today()))
    print(f"{name}: read from {args.artifact} into {run}")


# ---------------------------------------------------------------------------------------------- writing
def write(args):
    """One base of a run as an artifact."""
    run = find_run(args.run)
    _, cfg = load_config(run)
    if cfg.norm != "none":
        raise BadInput(f"{run}: its trunk has LayerNorm (norm is {cfg.norm!r}) and a portallib artifact's has none; "
                       "python train.py --norm none trains one that can be written")
    tag, p = held(run, args.to)
    check_free(args.out, args.overwrite)
    base = reload_base(p, dtype=torch.bfloat16)                                      # for its modules' paths alone
    adapters_of(run, "portal", tag, base)                                            # BadInput if they do not fit the base
    paths, targets = base.paths(), []
    for layer in range(base.layers):
        for m in cfg.modules:
            layer_path, _, module_path = paths[m, layer].rpartition(f".{layer}.")    # model.layers, self_attn.q_proj
            targets.append(dict(layer_index=layer, module_name=m, module_path=module_path, in_features=base.dims[m][0],
                                out_features=base.dims[m][1], input_group=m, output_group=m))
    config = {**FORMAT, **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}, "tasks": cfg.tasks,
              "n_layers": base.layers, "layer_path": layer_path, "projection_targets": targets,
              "base_model_name_or_path": origin(p), "base_model_revision": p["revision"]}
    tensors = tensors_of(load_portal(run, [tag]), tag, {m: (m, m) for m in cfg.modules})

    def fill(folder):
        write_json(folder / "config.json", config)
        save_tensors(folder / "model.safetensors", tensors, METADATA)
        (folder / "README.md").write_text(card(
            run, p, "portal", cfg.tasks, "portallib", "Task latents, core and one base's converter, in portallib's format.",
            'from portallib import PortalModel\n\nportal = PortalModel.from_pretrained("this folder")'))
    write_folder(args.out, fill)


def main(argv=None):
    args = parse(__doc__, "artifact ported data n seed run to out overwrite", argv,
                 to=dict(type=str, metavar="BASE", help="the base to write, one that the run holds"),
                 n=dict(help="training rows a task that the artifact was fitted on"),
                 seed=dict(help="the seed it was fitted with"),
                 data=dict(help="the folder of tasks it was fitted on: DIR/<task>/{train,eval}.jsonl"),
                 overwrite=dict(help="replace the run's converter of that base, or an earlier export in --out"))
    if (args.artifact is None) == (args.out is None):
        raise BadInput("one of --artifact DIR (an artifact to read) and --out DIR (one to write) is needed")
    if args.artifact and args.run is None:
        raise BadInput("--run DIR is needed: the run to make, or to add the artifact's base to")
    if args.out and args.to is None:
        raise BadInput("--to BASE is needed: the base to write, one that the run holds")
    read(args) if args.artifact else write(args)


if __name__ == "__main__":
    run_main(main)
