"""The run folder: which one, its lock, its replacement as a whole."""
import contextlib, errno, os, pathlib, re, shutil, tempfile

import filelock

from runtime.distributed import RANK
from runtime.files import BadInput, as_the_umask_says, leftovers, read_json, write_json, writing

OUT = pathlib.Path("out")
MARKS = "portal.json", "README.md"  # a folder with the first is a run, with the second (a card) an export
STALE = ".portal-stale.json"        # in a finished new folder: what it replaces
RUN_FILES = re.compile(r"portal\.json|\.resume/[^/]+|log\.(jsonl|png)|results\.(jsonl|md)|[^/]+-n\d+\.png|"
                       r"upgrade-[^/]+\.(json|md|png)|(final/)?((core|latents)\.safetensors|"
                       r"(converters|baselines/\w+)/[^/]+\.(safetensors|json))")


def find_run(run):
    """`--run`, or the run trained last (the newest `trained` date in out/*/portal.json). Prints which. Raises
    BadInput, also if several are equally new, as a copy and its original are."""
    if run is None:
        dates = {path.parent: read_json(path).get("trained") or "" for path in sorted(OUT.glob("[!.]*/portal.json"))}
        if not dates:
            raise BadInput(f"no run in {OUT}/: train one first (python train.py) or name one with --run DIR")
        run, *others = [path for path, date in dates.items() if date == max(dates.values())]
        if others:
            raise BadInput(f"{', '.join(map(str, [run, *others]))} are equally new (copies?); --run DIR names one")
    finish(run)
    if not (run / "portal.json").exists():
        raise BadInput(f"{run}: not a run folder (it has no portal.json); python train.py makes one")
    print(f"run: {run}")
    return run


def occupied(path):
    """Whether `path` holds anything that a new folder must not be mixed with unasked. An empty folder does not count,
    nor what a new disk holds, nor our own lock and state in it."""
    free = re.compile(r"lost\+found|\.lock|\.part|\.portal-new\d+")
    return os.path.lexists(path) and not (path.is_dir() and all(free.fullmatch(name) for name in os.listdir(path)))


def sibling(run, kind):
    """out/toy -> out/.toy.<kind>, absolute; out/toy/.<kind> where only the folder itself can be written."""
    path = run.resolve()
    inside = path.is_dir() and not os.access(path.parent, os.W_OK)
    return path / f".{kind}" if inside else path.with_name(f".{path.name}.{kind}")


LOCKS = contextlib.ExitStack()  # closed by run_main at the end of a command


def lock(run):
    """Locks `run` for writing until this command ends, and removes what a killed one left. Raises BadInput if another
    process holds the lock, or a file could not be written. The lock file stays, because removing it would give two
    waiting processes two different files to lock."""
    if RANK:                                                                         # rank 0 holds it for all
        return
    path, file = run.resolve(), sibling(run, "lock")
    with writing(run):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    try_writing(run)


def try_writing(run):
    """Raises BadInput if something in a run could not be written at the end of a long command."""
    try:
        for folder in folders_of_run(run):
            tempfile.TemporaryFile(dir=folder).close()
        for path in (run / "log.jsonl", run / "results.jsonl"):                      # these are appended to
            if path.exists():
                open(path, "ab").close()
    except OSError as error:
        raise BadInput(f"{run}: cannot be written ({error.strerror}: {error.filename or folder}); make it writable, or "
                       "copy it and name the copy with --run DIR")


def remove_leftovers(path):
    """Completes or removes what a killed command left in a run and beside it, and touches nothing else: see leftovers.
    `path`: resolved and locked."""
    finish(path)
    remove_new(path)
    part = sibling(path, "part")
    for folder in (*folders_of_run(path), part):
        for left in leftovers(folder, r"\..+\.tmp(\d+)"):                            # write_whole's
            name = left.with_name(re.sub(r"^\.|\.tmp\d+$", "", left.name))
            if folder == part or RUN_FILES.fullmatch(str(name.relative_to(path))):
                left.unlink()


def remove_new(path):
    """Removes the unfinished new folders of killed commands: see new_folder."""
    form = rf"\.{re.escape(path.name)}\.new(\d+)"
    for left in leftovers(path.parent, form) + leftovers(path, r"\.portal-new(\d+)"):
        shutil.rmtree(left, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- a folder as a whole
def files_in(folder):
    """Returns the relative paths of the files in a folder, as text."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def files_of_run(run):
    """Returns the relative paths of the files in a run that our commands have written."""
    return [name for name in files_in(run) if RUN_FILES.fullmatch(name)]


def folders_of_run(run):
    """Returns the folders in a run that our commands write into, and the run."""
    found = (run, run / ".resume", *run.glob("converters"), *run.glob("final/**"), *run.glob("baselines/**"))
    return [folder for folder in found if folder.is_dir()]


def finish(path):
    """Completes what a command was killed in that was putting a finished new folder into `path`: see new_folder."""
    for whole in leftovers(path, r"\.portal-whole(\d+)") if RANK == 0 else ():
        with writing(path):
            place(whole, path)


def place(whole, path):
    """Moves the files of a finished new folder into `path`, in place of those that it says. If it is interrupted, it
    can be called again."""
    if (whole / STALE).exists():
        for name in read_json(whole / STALE):
            (path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.removedirs((path / name).parent)                                  # those that are empty now
        (whole / STALE).unlink()
    for name in sorted(files_in(whole), key=lambda name: name in MARKS):             # they come last and went first
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(whole / name, path / name)
    shutil.rmtree(whole)


@contextlib.contextmanager
def new_folder(path, ours=files_of_run):
    """Yields a new folder to fill; at the end its files take the place of `ours(path)`, names of files in `path`; what
    else is in there stays. If anything fails before, `path` is as it was; if the command is killed in between, it is
    no run, and the next one completes it (finish). It may be the mount point of a disk: it is never renamed."""
    if RANK:
        with tempfile.TemporaryDirectory() as elsewhere:
            yield pathlib.Path(elsewhere)
        return
    path = path.resolve()
    there = path.is_dir()
    new = path.joinpath(f".portal-new{os.getpid()}") if there else path.with_name(f".{path.name}.new{os.getpid()}")
    with writing(path):
        new.mkdir(parents=True)
    try:
        yield new
        with writing(path):
            for name in (names := files_in(new)):
                as_the_umask_says(new / name)
            if not there:
                new.rename(path)
                return
            old = sorted(ours(path), key=lambda name: name not in MARKS)
            if taken := [name for name in names if name not in old and os.path.lexists(path / name)]:
                raise BadInput(f"{path / taken[0]} is in the way, and no command of ours wrote it; move it elsewhere")
            write_json(new / STALE, old)
            place(new.rename(path / f".portal-whole{os.getpid()}"), path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def lock_for_training(run, cfg, args):
    """Locks the run folder. Raises BadInput if it holds something that may not be replaced."""
    finish(run)
    if occupied(run) and not (run / "portal.json").exists():
        raise BadInput(f"{run} is neither empty nor a run folder; --run DIR names another")
    if args.dry_run:
        return
    lock(run)
    if (run / "portal.json").exists() and not args.overwrite:
        same = read_json(run / "portal.json").get("config") == vars(cfg)
        raise BadInput(f"{run} already holds a trained run{'' if same else ' of another configuration'}; "
                       "--overwrite replaces it, --run DIR trains beside it")
