"""What the commands share: bad input as one clear line, the flags, files written whole, the run folder.

Nothing here is about the method; portal.py is the place to start reading.
"""
import argparse, contextlib, datetime, fcntl, json, os, pathlib, re, shutil, sys

import safetensors, torch

ROOT = pathlib.Path(__file__).resolve().parent
OUT = pathlib.Path("out")
TOY_SEEN, TOY_UNSEEN = ("toy-qwen-s", "toy-qwen-m"), ("toy-qwen-l", "toy-gemma")


class BadInput(Exception):
    """Something the user can mend. The message says what is wrong, where, and what is accepted."""


def run_main(main):
    """Run `main()`: BadInput becomes one line on stderr and exit code 2, never a traceback."""
    try:
        with LOCKS:
            main()
    except BadInput as error:
        raise SystemExit(fail(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise SystemExit(fail(f"out of memory ({first_sentence(error)}); try a smaller --max-tokens"))
    except KeyboardInterrupt as stop:
        print(f"interrupted; {str(stop) or 'what was saved before is untouched'}", file=sys.stderr)
        raise SystemExit(130)


def first_sentence(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def out_of_memory(error):
    """A GPU's allocator has an exception of its own; a CPU's can be told by its words alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def fail(message):
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that names the option and what is accepted."""

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            message += "; accepted: " + " ".join(o for a in self._actions for o in a.option_strings if o.startswith("--"))
        raise SystemExit(fail(message))


def positive(kind):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a {'whole ' * (kind is int)}number above 0 is")
        return value
    return parse


def commas(kind=str):
    def parse(text):
        parts = [part.strip() for part in text.split(",")]
        if not all(parts) or len(set(parts)) < len(parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: names separated by commas, none twice, are")
        return [kind(part) for part in parts]
    return parse


def modules(text):
    from portal import MODULES
    chosen = list(MODULES) if text == "all" else commas()(text)
    if not set(chosen) <= set(MODULES):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: 'all' or some of {','.join(MODULES)} is")
    return chosen


def device(text):
    try:
        if torch.device(text).type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: cpu, cuda or cuda:0 are accepted")
    return text


def seed(text):
    if not text.isdecimal() or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a whole number from 0 to 2^63 - 1 is")
    return int(text)


FLAGS = {  # one meaning everywhere; a default of None means "the preset below" or "what the run was trained with"
    "run": dict(type=pathlib.Path, metavar="DIR", help="run folder (train: out/<bases>; else the run trained last)"),
    "bases": dict(type=commas(), metavar="A,B", help="aliases, hub ids (org/name@revision), local folders or .gguf files"),
    "to": dict(type=commas(), metavar="A,B", help="the bases to port to, named like --bases"),
    "data": dict(type=pathlib.Path, metavar="DIR", help="folder of tasks: DIR/<task>/{train,eval}.jsonl"),
    "tasks": dict(type=commas(), metavar="A,B", help="which tasks of the data folder (default: all); --task is the same"),
    "n": dict(type=positive(int), help="training rows a task, a seeded random sample (held-out rows are part of it)"),
    "modules": dict(type=modules, help="adapted projections: q,v (default) or all"),
    "norm": dict(choices=["layer", "none"], help="LayerNorm in the trunk, or the write-up's trunk as printed"),
    "rank": dict(type=positive(int), help="rank of the generated adapters"),
    "epochs": dict(type=positive(int), help="passes over the largest task"),
    "batch-size": dict(type=positive(int), help="rows of every task in a round"),
    "lr": dict(type=positive(float), help="learning rate of core and converter (z: twice that)"),
    "seed": dict(type=seed, help="seed of everything random"),
    "device": dict(type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"),
    "dtype": dict(choices=["float32", "bfloat16", "float16"], help="of the frozen base (CPU: float32, GPU: bfloat16)"),
    "max-tokens": dict(type=positive(int), help="token budget of a micro-batch, padding included"),
    "recompute": dict(action="store_true", help="keep no layer's inner activations: less memory, more time"),
    "eval-rows": dict(type=positive(int), help="evaluation rows a task, a seeded random sample (default: all)"),
    "show": dict(type=positive(int), metavar="N", help="print N evaluation rows a task, before and after; write nothing"),
    "artifact": dict(type=pathlib.Path, metavar="DIR", help="a portallib artifact to read: config.json, model.safetensors"),
    "ported": dict(action="store_true", help="the artifact is a refit: its base counts as unseen"),
    "task": dict(metavar="TASK", help="the task, or 'all'"),
    "method": dict(choices=["portal", "lora", "cross_lora", "copy", "random"], default="portal", help="whose adapters"),
    "merge": dict(action="store_true", help="write the whole model with the adapter in its weights (stored as --dtype)"),
    "out": dict(type=pathlib.Path, metavar="DIR", help="the folder to write"),
    "overwrite": dict(action="store_true", help="replace what the run folder already holds"),
}


def parse(description, names, argv=None, **changes):
    """Parse the flags `names` (spelled as on the command line); `changes` overrides a shared flag or describes its own."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names.split():
        also = ["--task"] if name == "tasks" else []
        parser.add_argument("--" + name, *also, **{**FLAGS.get(name, {}), **changes.get(name.replace("-", "_"), {})})
    args = parser.parse_args(argv)
    if "dtype" in args:
        args.dtype = getattr(torch, args.dtype or ("float32" if args.device.startswith("cpu") else "bfloat16"))
    return args


# ---------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def writing(path):
    """What the file system refuses inside (a full disk, no permission) becomes one line that names `path`."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path}: not written ({getattr(error, 'strerror', None) or first_sentence(error)}); "
                       "what was saved before is untouched")


def write_whole(path, write):
    """Call `write(temporary path)` and rename: the file at `path` is the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_json(path, value):
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})")


def append_jsonl(path, *rows):
    """Append a line a row, all of them in one write, or none: half a line would spoil the next one."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with writing(path), open(path, "ab", buffering=0) as f:
        before = f.tell()
        if f.write(data) < len(data):                                                # the disk took a part and is full
            f.truncate(before)
            raise OSError("no space left")


def today():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---------------------------------------------------------------------------------------------- the run folder
def find_run(run):
    """`--run`, or the run trained last (the newest `trained` date in out/*/portal.json); prints which."""
    if run is None:
        found = list(OUT.glob("[!.]*/portal.json"))                                  # .<run>.new<pid> is not one yet
        if not found:
            raise BadInput(f"no run in {OUT}/: train one first (python train.py) or name one with --run DIR")
        run = max(found, key=lambda p: read_json(p).get("trained", "")).parent
    if not (run / "portal.json").exists():
        raise BadInput(f"{run}: not a run folder (it has no portal.json); python train.py makes one")
    print(f"run: {run}")
    return run


def beside(run, kind):
    """out/toy -> out/.toy.<kind>"""
    return run.resolve().with_name(f".{run.resolve().name}.{kind}")


LOCKS = contextlib.ExitStack()  # run_main lets go of them


def lock(run):
    """Until this command ends, no other one may write into `run`: BadInput if another does so now. The lock itself is the
    system's and ends with its process, however that ends. The file that carries it lies beside the run, since train.py
    replaces the folder as a whole."""
    path, carrier = run.resolve(), beside(run, "lock")
    with writing(run):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not os.access(path.parent, os.W_OK):                    # then nobody replaces it, either
            carrier = path / ".lock"
        while True:
            file = open(carrier, "a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BadInput(f"{run}: process {file.read() or '(starting)'} is writing into it; wait until it has "
                               "ended, or name another folder with --run DIR")
            except OSError:
                pass                                                                 # a file system that has no locks
            with contextlib.suppress(FileNotFoundError):                             # its last holder may have removed it
                if os.path.samestat(os.fstat(file.fileno()), carrier.stat()):        # after we opened it: once more
                    break
            file.close()
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    LOCKS.callback(file.close)
    LOCKS.callback(carrier.unlink, missing_ok=True)                                  # first, while it is still held
    sweep(path)


def sweep(path):
    """Remove what a killed command left half made in a run that is now locked, and beside it. Killed between the two
    renames of `new_folder`, it left the old run under another name."""
    for left in path.parent.glob(f".{path.name}.old[0-9]*"):
        left.rename(path) if not path.exists() else shutil.rmtree(left, ignore_errors=True)
    for left in path.parent.glob(f".{path.name}.new[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)
    for folder in (path, beside(path, "part")):
        for left in folder.rglob(".*"):
            if re.fullmatch(r"\..+\.\d+", left.name) and left.is_file():             # write_whole's
                left.unlink()


@contextlib.contextmanager
def new_folder(path):
    """Yield a new folder to fill; at the end it takes the place of `path`. If anything fails, `path` is as it was."""
    path = path.resolve()
    new, old = (beside(path, f"{which}{os.getpid()}") for which in ("new", "old"))
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
