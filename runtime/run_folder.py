"""The run folder: which one, its lock, its replacement as a whole."""
import contextlib, errno, os, pathlib, re, shutil, tempfile

import filelock

from runtime.distributed import RANK
from runtime.files import BadInput, read_json, writing

OUT = pathlib.Path("out")


def find_run(run):
    """`--run`, or the run trained last (the newest `trained` date in out/*/portal.json). Prints which. Raises
    BadInput."""
    if run is None:
        found = list(OUT.glob("[!.]*/portal.json"))                                  # not .<run>.new<pid>, half written
        if not found:
            raise BadInput(f"no run in {OUT}/: train one first (python train.py) or name one with --run DIR")
        run = max(found, key=lambda p: read_json(p).get("trained", "")).parent
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


def lock_for_training(run, cfg, args):
    """Locks the run folder. Raises BadInput if it holds something that may not be replaced."""
    if occupied(run) and not (run / "portal.json").exists():
        raise BadInput(f"{run} is neither empty nor a run folder; --run DIR names another")
    if args.dry_run:
        return
    lock(run)
    if (run / "portal.json").exists() and not args.overwrite:
        same = read_json(run / "portal.json").get("config") == vars(cfg)
        raise BadInput(f"{run} already holds a trained run{'' if same else ' of another configuration'}; "
                       "--overwrite replaces it, --run DIR trains beside it")
