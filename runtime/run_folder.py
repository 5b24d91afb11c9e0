"""The run folder: which one, its lock, its replacement as a whole; the method's parameters in safetensors and JSON."""
import contextlib, errno, functools, importlib, os, pathlib, re, shutil, tempfile

import filelock, safetensors, safetensors.torch
import torch

from portal import Adapters, Config, Converter, Group, Portal
from runtime.distributed import RANK
from runtime.files import BadInput, out_of_memory, read_json, write_whole, writing

OUT = pathlib.Path("out")


def find_run(run):
    """`--run`, or the run trained last (the newest `trained` date in out/*/portal.json). A portallib artifact, a folder
    or a hub id, is read into the run out/<its name>. Prints which. Raises BadInput."""
    if run is None:
        found = list(OUT.glob("[!.]*/portal.json"))                                  # not .<run>.new<pid>, half written
        if not found:
            raise BadInput(f"no run in {OUT}/: train one first (python train.py) or name one with --run DIR")
        run = max(found, key=lambda p: read_json(p).get("trained", "")).parent
    if not (run / "portal.json").exists():
        run = importlib.import_module("export").run_of(run)                          # export.py imports this file
    if not (run / "portal.json").exists():
        raise BadInput(f"{run}: not a run folder (it has no portal.json); python train.py makes one")
    print(f"run: {run}")
    return run


def occupied(path):
    """Whether `path` holds anything that a new folder must not replace unasked. An empty folder does not count."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def sibling(run, kind):
    """out/toy -> out/.toy.<kind>, absolute."""
    return run.resolve().with_name(f".{run.resolve().name}.{kind}")


LOCKS = contextlib.ExitStack()  # closed by run_main at the end of a command


def lock(run):
    """Locks `run` for writing until this command ends, and removes what a killed one left. Raises BadInput if another
    process holds the lock. The lock file lies beside the run, since train.py replaces the folder as a whole; it stays
    there, because removing it would give two waiting processes two different files to lock."""
    if RANK:                                                                         # rank 0 holds it for all
        return
    path = run.resolve()
    with writing(run):
        path.parent.mkdir(parents=True, exist_ok=True)
        inside = path.is_dir() and not os.access(path.parent, os.W_OK)           # then no command can replace it either
        file = path / ".lock" if inside else sibling(run, "lock")
        try:
            LOCKS.enter_context(filelock.FileLock(file, fallback_to_soft=False).acquire(timeout=0))
        except filelock.Timeout:
            raise BadInput(f"{run}: process {file.read_text() or '(starting)'} is writing into it; wait until it has "
                           "ended, or name another folder with --run DIR")
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):       # a file system without locks
                raise
        file.write_text(str(os.getpid()))
    remove_leftovers(path)


def remove_leftovers(path):
    """Removes temporary files of a killed command in a locked run and beside it. A command killed between the two
    renames of `new_folder` left the old run under another name: it is renamed back."""
    for left in path.parent.glob(f".{path.name}.old[0-9]*"):
        left.rename(path) if not path.exists() else shutil.rmtree(left, ignore_errors=True)
    for left in path.parent.glob(f".{path.name}.new[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)
    for folder in (path, sibling(path, "part")):
        for left in folder.rglob(".*"):
            if re.fullmatch(r"\..+\.\d+", left.name) and left.is_file():             # write_whole's
                left.unlink()


@contextlib.contextmanager
def new_folder(path):
    """Yields a new folder to fill; at the end it replaces `path`. If anything fails, `path` is as before."""
    if RANK:
        with tempfile.TemporaryDirectory() as elsewhere:
            yield pathlib.Path(elsewhere)
        return
    path = path.resolve()
    new, old = (sibling(path, f"{which}{os.getpid()}") for which in ("new", "old"))
    with writing(path):
        new.mkdir(parents=True)
    try:
        yield new
        with writing(path):
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- tensors and JSON
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
        raise BadInput(f"{path}: not a whole safetensors file ({error}); restore it or repeat the command that made it")
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
            raise BadInput(f"{run / 'portal.json'}: {name!r} is no name of a task or a base: it names files here")
    return saved, cfg


def plain(name):
    """Whether a name read from a file may name a file or folder: it must not lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


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
        portal.z.data = z
    for tag in tags:
        portal.converters[tag] = load_converter(cfg, newest(f"converters/{tag}.safetensors"))
    return portal
