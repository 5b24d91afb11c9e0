"""A run's files: the method's parameters in safetensors, their provenance in JSON."""
import contextlib, functools, pathlib, re, shutil

import safetensors, safetensors.torch
import torch, transformers

from portal import Adapters, Config, Converter, Group, Portal
from runtime.distributed import RANK
from runtime.files import (PLAIN, BadInput, out_of_memory, plain, read_json, remove, today, unreadable, write_json,
                           write_whole)
from runtime.resume import forget, state_file
from runtime.run_folder import new_folder, sibling


def save_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as safetensors, whole or not at all. Raises BadInput."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, lambda p: safetensors.torch.save_file(tensors, p, metadata))


def load_tensors(path):
    """Returns {name: tensor}. Raises BadInput if the file is missing, truncated or something else, or a number in it is
    not finite."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({unreadable(path) or error}); restore it or repeat the "
                       "command that made it")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise BadInput(f"{path}: {bad[0]} is not finite; restore it or repeat the command that made it")
    return tensors


@contextlib.contextmanager
def fitting(path):
    """Yields load_tensors(path); where their use inside finds other names or shapes, raises a BadInput."""
    try:
        yield load_tensors(path)
    except (KeyError, IndexError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise BadInput(f"{path}: its tensors do not fit this run's portal.json (another configuration's file?)")


def save_adapters(path, adapters):
    save_tensors(path, {**{f"A.{m}": a for m, a in adapters.A.items()}, **{f"B.{m}": b for m, b in adapters.B.items()},
                        "scale": torch.tensor(adapters.scale)})


def load_adapters(path, device="cpu"):
    tensors = {name: tensor.to(device) for name, tensor in load_tensors(path).items()}
    if "scale" not in tensors:
        raise BadInput(f"{path}: holds no adapters")
    A, B = ({name[2:]: t for name, t in tensors.items() if name.startswith(side)} for side in ("A.", "B."))
    return Adapters(A, B, float(tensors["scale"]))


def save_portal(run, portal, final=False):
    """Writes latents, core and converters; final: as the last epoch's, in final/, beside the selected one's."""
    folder = run / "final" if final else run
    save_tensors(folder / "core.safetensors", portal.core.state_dict())
    save_tensors(folder / "latents.safetensors", {"z": portal.z})
    for name in portal.converters:
        save_converter(run, portal, name, name, final)


def save_converter(run, portal, name, tag, final=False):
    """Writes the converter of base `name` as converters/<tag>.safetensors (a sweep's tags are <base>@<n>). Where the
    layers of a group are not 0 to len(e) - 1, their numbers are beside it, layers.<g> [L_g]."""
    folder, converter = run / "final" if final else run, portal.converters[name]
    layers = {f"layers.{g}": torch.tensor(group.layers) for g, group in converter.groups.items()
              if group.layers != tuple(range(len(converter.e)))}
    save_tensors(folder / "converters" / f"{tag}.safetensors", {**converter.state_dict(), **layers})


def saved_at(run, name, final):
    """The path of a file: in final/ (the last epoch's state where another was selected) if it is there, or in run."""
    return run / "final" / name if final and (run / "final" / name).exists() else run / name


def load_config(run):
    """Returns (portal.json as a dict, Config). Raises BadInput if it is malformed."""
    saved = read_json(run / "portal.json")
    try:
        config = {key: value for key, value in saved["config"].items() if key != "gain"}  # of runs of an earlier recipe
        cfg, names = Config(**config), [*saved["config"]["tasks"], *(b["base"] for b in saved["bases"])]
        saved["seed"], saved["data"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{run / 'portal.json'}: not a PorTAL configuration ({error})")
    for name in names:
        if not plain(name):
            raise BadInput(f"{run / 'portal.json'}: {name!r} is no name of a task or a base, which is {PLAIN}")
    return saved, cfg


def provenances(run):
    """Returns {tag: provenance}, the contents of converters/<tag>.json of a run. Raises BadInput."""
    return {path.stem: read_json(path) for path in sorted((run / "converters").glob("*.json"))}


def load_converter(cfg, path):
    with fitting(path) as tensors:
        groups, every = {}, torch.arange(len(tensors["e"]))
        for m in cfg.modules:
            for g in [name.removeprefix("P_in.") for name in tensors if re.fullmatch(rf"P_in\.{m}(_\d+x\d+)?", name)]:
                layers = tuple(tensors.pop(f"layers.{g}", every).tolist())
                groups[g] = Group(m, layers, tensors[f"P_in.{g}"].shape[1], len(tensors[f"P_out.{g}"]))
        converter = Converter(cfg, groups)
        converter.load_state_dict(tensors)
    return converter


def load_portal(run, tags=(), final=False):
    """Returns a saved run as a Portal with the converters of `tags`, of the selected epoch or (final) the last. Raises
    BadInput if a file is missing or does not fit portal.json."""
    run = pathlib.Path(run)
    newest = functools.partial(saved_at, run, final=final)
    _, cfg = load_config(run)
    portal = Portal(cfg)
    with fitting(newest("core.safetensors")) as tensors:
        portal.core.load_state_dict(tensors)
    with fitting(newest("latents.safetensors")) as tensors:
        z = tensors["z"][:len(cfg.tasks)]  # the file has more rows if an --add-task was killed before portal.json
        if z.shape != portal.z.shape:
            raise IndexError(z.shape)
        portal.z.data.copy_(z)                                                       # aligned, as when it was trained
    for tag in tags:
        portal.converters[tag] = load_converter(cfg, newest(f"converters/{tag}.safetensors"))
    return portal


def save_states(learners, epochs, save):
    """Calls save(final=True) with the last epoch where another was selected for some learner, then save(final=False)
    with the selected one."""
    if any(learner.epoch < epochs for learner in learners):
        save(final=True)
    for learner in learners:
        learner.load_best()
    save(final=False)


def save_run(run, portal, learner, bases, settings, fitted):
    """Writes the run folder, whole or not at all; fitted: what the provenance of every converter says of the fit."""
    part = sibling(run, "part")
    with new_folder(run) as folder:                                                  # becomes `run` when it is whole
        save_states([learner], settings["epochs"], lambda final: save_portal(folder, portal, final))
        provenance = [dict(base=base.name, **base.provenance, ported=False, **fitted) for base in bases]
        for p in provenance:
            write_json(folder / "converters" / f"{p['base']}.json", p)
        write_json(folder / "portal.json", dict(
            config=vars(portal.cfg), bases=provenance, seed=fitted["seed"], data=fitted["data"], trained=today(),
            **settings, versions=dict(torch=torch.__version__, transformers=transformers.__version__)))
        write_whole(folder / "log.jsonl", lambda p: shutil.copy(part / "log.jsonl", p))
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)


def save_port(run, tag, portal, learner, provenance, journal):
    """Saves a port as converters/<tag>, selected and last epoch, and records it in the command's journal."""
    path = run / "converters" / f"{tag}.json"  # written last: without it the other files do not count as a port
    remove(path)
    remove(run / "final" / "converters" / f"{tag}.safetensors")
    save_states([learner], provenance["epochs"],
                lambda final: save_converter(run, portal, provenance["base"], tag, final))
    journal.add(tag)                                                                 # counts only with its provenance
    write_json(path, {**provenance, "epoch_selected": learner.epoch, "date": today()})
    forget(state_file(run, f"port-{tag}"))
    print(f"{tag}: epoch {learner.epoch} of {provenance['epochs']} selected on held-out rows; "
          f"saved to {run / 'converters'}")
