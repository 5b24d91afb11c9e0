"""What the commands share: bad input as one clear line, the flags, files written whole, the run folder.

Nothing here is about the method; portal.py is the place to start reading.
"""
import argparse, contextlib, datetime, fcntl, json, os, pathlib, re, shutil, sys, tempfile

import safetensors, torch

import dist

ROOT = pathlib.Path(__file__).resolve().parent
OUT = pathlib.Path("out")
TOY_SEEN, TOY_UNSEEN = ("toy-qwen-s", "toy-qwen-m"), ("toy-qwen-l", "toy-gemma")


class BadInput(Exception):
    """Something the user can mend. The message says what is wrong, where, and what is accepted."""


def run_main(main):
    """Run `main()`: BadInput becomes one line on stderr and exit code 2, never a traceback."""
    try:
        dist.start()
        with LOCKS:
            main()
        dist.stop()
    except BadInput as error:
        raise SystemExit(fail(error))
    except KeyboardInterrupt as stop:
        say(f"interrupted; {str(stop) or 'what was saved before is untouched'}")
        raise SystemExit(130)
    except Exception as error:
        if out_of_memory(error):
            raise SystemExit(fail(f"out of memory ({first_sentence(error)}); try a smaller --max-tokens"))
        if dist.another_failed():                                                    # it has said why. A sum it did not
            raise SystemExit(2)                                                      # come to is no news from this one
        raise


def first_sentence(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def out_of_memory(error):
    """A GPU's allocator has an exception of its own; a CPU's can be told by its words alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def fail(message):
    say("error: " + " ".join(str(message).split()))
    return 2


def say(last_words):
    if dist.speaks():
        print(last_words, file=sys.stderr)


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
        gpus = torch.cuda.device_count()
        if dist.WORLD > 1 and text != "cpu" and (text != "cuda" or dist.LOCAL_RANK >= gpus):
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: each of several processes takes a GPU of its own, "
                                             f"--device cuda, and this machine has {gpus}; --device cpu is accepted, too")
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: cpu, cuda or cuda:0 are accepted")
    return text


def seed(text):
    if not text.isdecimal() or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a whole number from 0 to 2^63 - 1 is")
    return int(text)


# {group of the help: {flag: ...}}; one meaning everywhere. A default of None means "the preset" (train.py) or "what the run
# was trained with".
FLAGS = {
    "what to work on": {
        "bases": dict(type=commas(), metavar="A,B",
                      help="aliases, hub ids (org/name@revision), local folders or .gguf files"),
        "to": dict(type=commas(), metavar="A,B", help="the bases to port to, named like --bases"),
        "data": dict(type=pathlib.Path, metavar="DIR", help="folder of tasks: DIR/<task>/{train,eval}.jsonl"),
        "tasks": dict(type=commas(), metavar="A,B", help="some of the tasks (default: all); --task is the same"),
        "task": dict(metavar="TASK", help="the task, or 'all'"),
        "add-task": dict(type=pathlib.Path, metavar="DIR",
                         help="learn one more task, DIR/{train,eval}.jsonl, with core and converters of the run frozen; "
                              "--bases: on these of its bases (default: those that the core was trained on)"),
        "n": dict(type=positive(int), metavar="N",
                  help="training rows a task, a seeded random sample (held-out rows are part of it)"),
        "eval-rows": dict(type=positive(int), metavar="N",
                          help="evaluation rows a task, a seeded random sample (default: all)"),
        "methods": dict(type=commas(), metavar="A,B", help="methods to measure, of base,lora,lora_iso,cross_lora,copy,random,"
                        "hypernet,portal (default: all but lora_iso, LoRAs with as many parameters as the converter, and "
                        "hypernet, the generator trained on that base alone)"),
        "method": dict(choices=["portal", "lora", "cross_lora", "copy", "random"], default="portal", help="whose adapters"),
        "artifact": dict(type=pathlib.Path, metavar="DIR",
                         help="a portallib artifact to read: config.json, model.safetensors"),
        "ported": dict(action="store_true", help="the artifact is a refit: its base counts as unseen"),
    },
    "the method": {
        "modules": dict(type=modules, metavar="A,B", help="adapted projections: 'all' or some of q,k,v,o,gate,up,down"),
        "rank": dict(type=positive(int), metavar="N", help="rank of the generated adapters"),
        "align": dict(action="store_true", help="start P_in by regression on a source base of the run, which is loaded, too: "
                                                "fewer rows are then enough"),
        "norm": dict(choices=["layer", "none"], help="LayerNorm in the trunk, or the write-up's trunk as printed"),
    },
    "the optimiser": {
        "epochs": dict(type=positive(int), metavar="N", help="passes over the largest task"),
        "batch-size": dict(type=positive(int), metavar="N", help="rows of every task in a round"),
        "lr": dict(type=positive(float), metavar="RATE", help="learning rate of core and converter (z: twice that)"),
        "seed": dict(type=seed, metavar="N", help="seed of everything random (train: 0; else the run's)"),
    },
    "the machine": {
        "device": dict(type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"),
        "dtype": dict(choices=["float32", "bfloat16", "float16"], help="of the frozen base (CPU: float32, GPU: bfloat16)"),
        "device-map": dict(choices=["auto"], help="spread a base that is too big for one GPU over all of them (accelerate)"),
        "quantize": dict(choices=["4bit"], help="hold the base's weights in 4 bits, NF4 (bitsandbytes; CUDA)"),
        "max-tokens": dict(type=positive(int), metavar="N", help="token budget of a micro-batch, padding included"),
        "recompute": dict(action="store_true", help="keep no layer's inner activations: less memory, more time"),
    },
    "the run and its files": {
        "run": dict(type=pathlib.Path, metavar="DIR", help="run folder (train: out/<bases>; else the run trained last)"),
        "out": dict(type=pathlib.Path, metavar="DIR", help="the folder to write"),
        "merge": dict(action="store_true",
                      help="write the whole model with the adapter in its weights (stored as --dtype)"),
        "overwrite": dict(action="store_true", help="replace what the run folder already holds"),
        "dry-run": dict(action="store_true", help="load everything, run a few rounds, say what the whole would take in "
                                                  "memory and time; write nothing"),
        "show": dict(type=positive(int), metavar="N",
                     help="print N evaluation rows a task, before and after; write nothing"),
        "log": dict(nargs="?", const=True, type=pathlib.Path, metavar="FILE",
                    help="draw loss and held-out acc_norm of the run's log.jsonl, or of FILE, as a .png beside it; no more"),
        "table": dict(choices=["6.1", "6.2", "6.3", "6.4", "ablations", "competition", "tasks", "carry", "all", "readme"],
                      help="write this table of the paper, or all, from the folder --results alone; readme: the README's, "
                           "from every folder in results/"),
        "results": dict(type=pathlib.Path, metavar="DIR",
                        help="folder with results.jsonl and about.json (default: results/toy of this project)"),
    },
}


def parse(description, names, argv=None, defaults=({}, {}), **changes):
    """Parse the flags `names` (spelled as on the command line); `changes` overrides a shared flag or describes its own.
    `defaults`: what stands for a flag that is not given, on the toy and on other bases ({name: value}), for the help."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python %(prog)s [--flag VALUE ...]")
    wanted, shared = names.split(), set().union(*FLAGS.values())
    for title, flags in [*FLAGS.items(), ("its own", {name: {} for name in wanted if name not in shared})]:
        group = parser.add_argument_group(title)                                     # one without flags is not printed
        for name in [name for name in flags if name in wanted]:
            key = name.replace("-", "_")
            spec = {**flags[name], **changes.get(key, {})}
            toy, real = (preset.get(key, spec.get("default")) for preset in defaults)
            if real:
                shown = real if toy == real else f"{toy} on the toy, else {real}"
                spec["help"] += f" (default: {','.join(shown) if isinstance(shown, list) else shown})"
            group.add_argument("--" + name, *(["--task"] if name == "tasks" else []), **spec)
    args = parser.parse_args(argv)
    if getattr(args, "device_map", None):
        if dist.WORLD > 1:
            parser.error("--device-map gives all GPUs to one process, torchrun one to each; it is one or the other")
        args.device = FLAGS["the machine"]["device"]["default"]
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


# Of several processes (dist.py), which all come by here with the same things to write, process 0 writes.
def write_whole(path, write):
    """Call `write(temporary path)` and rename: the file at `path` is the old one or the new one, never half of it."""
    if dist.RANK:
        return
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


def hold_to(path, value):
    """What a folder holds was measured under one set of settings: write them to `path`; BadInput if it has others."""
    if path.exists() and read_json(path) != value:
        raise BadInput(f"{path.parent} holds measurements under other {path.stem}, see {path.name}; --out DIR names another "
                       "folder")
    write_json(path, value)


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})")


def append_jsonl(path, *rows):
    """Append a line a row, all of them in one write, or none: half a line would spoil the next one."""
    if dist.RANK:
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with writing(path), open(path, "ab", buffering=0) as f:
        before = f.tell()
        if f.write(data) < len(data):                                                # the disk took a part and is full
            f.truncate(before)
            raise OSError("no space left")


def remove(path):
    if dist.RANK == 0:
        path.unlink(missing_ok=True)


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


def occupied(path):
    """Whether something stands at `path` that a new folder must not replace unasked; an empty folder does not count."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def beside(run, kind):
    """out/toy -> out/.toy.<kind>"""
    return run.resolve().with_name(f".{run.resolve().name}.{kind}")


LOCKS = contextlib.ExitStack()  # run_main lets go of them


def lock(run):
    """Until this command ends, no other one may write into `run`: BadInput if another does so now. The lock itself is the
    system's and ends with its process, however that ends. The file that carries it lies beside the run, since train.py
    replaces the folder as a whole."""
    if dist.RANK:                                                                    # process 0 holds it for all
        return
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
    if dist.RANK:
        with tempfile.TemporaryDirectory() as elsewhere:
            yield pathlib.Path(elsewhere)
        return
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
