"""Flags shared by the commands, and the end of a command: exit code, last line, locks released.

A command calls `parse(__doc__, "its flags", ...)` in `main(argv)` and is started by `run_main(main)`.
"""
import argparse, os, pathlib, re, sys

import torch

from runtime import distributed
from runtime.files import ROOT, BadInput, first_line, out_of_memory
from runtime.run_folder import LOCKS


def run_main(main):
    """Runs main(). BadInput and lack of memory end as one line on stderr and exit code 2, Ctrl-C as exit code 130; a
    reader that has closed our pipe (| head) ends it in silence, with the code that a shell gives for that, 141."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":  # in a run, names are UTF-8
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")                            # prints a name that is not UTF-8
    try:
        distributed.start()
        try:
            with LOCKS:
                main()
        finally:
            print(end="", flush=True)                                                # stdout may be closed: None
        distributed.stop()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())               # or Python reports it at the end
        distributed.leave(141)
        raise SystemExit(141)
    except BadInput as error:
        fail(f"error: {error}")
    except KeyboardInterrupt as stop:
        fail(f"interrupted; {str(stop) or 'what was saved before is untouched'}", 130)
    except Exception as error:
        if out_of_memory(error):
            fail(f"error: out of memory ({first_line(error)}); try a smaller --max-tokens")
        if distributed.another_failed():                                             # which has printed the cause; this
            raise SystemExit(2)                                                      # process only lost its partner
        raise


def fail(message, code=2):
    """Ends this process with an exit code; the first of several to fail prints the message, as one line."""
    if distributed.claim_failure():
        print(" ".join(message.split()), file=sys.stderr)
    distributed.leave(code)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the option and what is accepted."""

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            options = [option for action in self._actions for option in action.option_strings]
            message += "; accepted: " + " ".join(option for option in options if option.startswith("--"))
        fail(f"error: {message}")


def refuse(text, accepted):
    raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {accepted}")


def positive(kind):
    """A parser of finite numbers above 0; kind: int or float."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        return value if 0 < value < float("inf") else refuse(text, f"a {'whole ' * (kind is int)}number above 0 is")
    return parse


def commas(kind=str):
    """A parser of a list separated by commas, no part empty or given twice."""
    def parse(text):
        parts = [part.strip() for part in text.split(",")]
        if not all(parts) or len(set(parts)) < len(parts):
            refuse(text, "a list of different names separated by commas is")
        return [kind(part) for part in parts]
    return parse


def some_of(names):
    """A parser of 'all' or a comma-separated list of some of `names`."""
    def parse(text):
        chosen = list(names) if text == "all" else commas()(text)
        return chosen if set(chosen) <= set(names) else refuse(text, f"'all' or some of {','.join(names)} is")
    return parse


def device(text):
    """A torch device of this machine: cpu, cuda or cuda:N."""
    try:
        if torch.device(text).type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: cpu, cuda or cuda:0 are accepted")
    gpus = torch.cuda.device_count()
    if distributed.WORLD > 1 and text != "cpu" and (text != "cuda" or distributed.LOCAL_RANK >= gpus):
        refuse(text, f"each of several processes takes a GPU of its own, --device cuda, and this machine has {gpus}; "
                     "--device cpu is accepted, too")
    return text


def seed(text):
    if text.isdecimal() and int(text) < 2 ** 63:
        return int(text)
    refuse(text, "a whole number from 0 to 2^63 - 1 is")


def hub_id(text):
    return text if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) else refuse(text, "org/name, a repository on the hub, is")


def data_folder(text):
    """The folder that --data names; `everyday` is that of the tasks which come with the code (./everyday is not)."""
    return ROOT / "tasks" / "everyday" if text == "everyday" else pathlib.Path(text)


# {group of the help: {flag: argparse's keywords}}; a flag means the same in every command. A default of None: the
# preset's value (train.py) or what the run was trained with.
FOLDER = dict(type=pathlib.Path, metavar="DIR")
NUMBER = dict(type=positive(int), metavar="N")
NAMES = dict(type=commas(), metavar="A,B")
SWITCH = dict(action="store_true")
FLAGS = {
    "what to work on": {
        "bases": dict(NAMES, help="aliases, hub ids (org/name@revision), local folders or .gguf files"),
        "against": dict(metavar="BASE", help="report what a move from this base of the run to --bases (default: the"
                                             " ported ones) changes: scores, flips, a verdict a task"),
        "to": dict(NAMES, help="the bases to port to, named like --bases"),
        "data": dict(FOLDER, type=data_folder, help="folder of tasks: DIR/<task>/{train,eval}.jsonl, or everyday: the "
                                                    "sixteen tasks that come with the code"),
        "tasks": dict(NAMES, help="some of the tasks (default: all); --task is the same"),
        "task": dict(metavar="TASK", help="the task, or 'all'"),
        "add-task": dict(FOLDER, help="learn one more task, DIR/{train,eval}.jsonl, with core and converters frozen, "
                                      "on --bases of the run (default: those that the core was trained on)"),
        "n": dict(NUMBER, help="training rows a task, a seeded random sample (held-out rows are part of it)"),
        "eval-rows": dict(NUMBER, help="evaluation rows a task, a seeded random sample (default: all)"),
        "methods": dict(NAMES, help="base,lora,cross_lora,copy,random,portal (default: these), lora_iso (LoRAs of the "
                                    "converter's size), hypernet (the generator trained on that base alone)"),
        "method": dict(choices="portal lora cross_lora copy random".split(), default="portal", help="whose adapters"),
        "artifact": dict(FOLDER, help="a portallib artifact to read: a folder or a hub id"),
        "ported": dict(SWITCH, help="the artifact is a refit: its base counts as unseen")},
    "the method": {
        "modules": dict(metavar="A,B", help="adapted projections: 'all' or some of q,k,v,o,gate,up,down"),
        "rank": dict(NUMBER, help="rank of the generated adapters"),
        "align": dict(SWITCH, help="start P_in by regression on one of the run's bases, also loaded; needs fewer rows"),
        "teacher": dict(metavar="BASE", help="fit to the answers of this base, with its adapters in the run or those of"
                                             " --adapters, instead of to labels"),
        "adapters": dict(FOLDER, help="the teacher's adapters: PEFT LoRAs, DIR/<task>/adapter_model.safetensors and"
                                      " adapter_config.json"),
        "norm": dict(choices=["layer", "none"], help="LayerNorm in the trunk, or the write-up's trunk as printed")},
    "the optimiser": {
        "epochs": dict(NUMBER, help="passes over the largest task"),
        "batch-size": dict(NUMBER, help="rows of every task in a round"),
        "lr": dict(type=positive(float), metavar="RATE", help="learning rate; see portal.Portal.rates"),
        "seed": dict(type=seed, metavar="N", help="seed of everything random (train: 0; else the run's)")},
    "the machine": {
        "device": dict(type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"),
        "dtype": dict(choices="float32 bfloat16 float16".split(), help="of the base (bfloat16 if the device has it)"),
        "device-map": dict(choices=["auto"], help="spread a base too big for one GPU over all of them (accelerate)"),
        "quantize": dict(choices=["4bit"], help="hold the base's weights in 4 bits, NF4 (bitsandbytes; CUDA)"),
        "max-tokens": dict(NUMBER, help="token budget of a micro-batch, padding included"),
        "allow-changed-base": dict(SWITCH, help="go on with a base whose files are no longer those of the fit"),
        "recompute": dict(SWITCH, help="keep no layer's inner activations: less memory, more time")},
    "the run and its files": {
        "run": dict(FOLDER, help="run folder (train: out/<bases>; else the run trained last), or org/name on the hub"),
        "out": dict(FOLDER, help="the folder to write"),
        "push": dict(type=hub_id, metavar="ORG/NAME", help="upload the run, or with --to PEFT folders, to the hub"),
        "merge": dict(SWITCH, help="write the whole model with the adapter in its weights (stored as --dtype)"),
        "portallib": dict(SWITCH, help="write a portallib artifact: all tasks on one base"),
        "overwrite": dict(SWITCH, help="replace what the run folder already holds"),
        "dry-run": dict(SWITCH, help="run a few rounds, print what all would take in memory and time; write nothing"),
        "show": dict(NUMBER, help="print N evaluation rows a task, before and after; write nothing")},
}


def parse(description, names, argv=None, defaults=({}, {}), **changes):
    """Returns the parsed flags `names` (spelled as on the command line); bad ones end the command with exit code 2.
    defaults: {name: value} of flags not given, on the toy and on other bases, for the help; changes: argparse's
    keywords of a flag of the command's own, or in place of a shared flag's."""
    module = getattr(sys.modules["__main__"], "__spec__", None)                      # set by python -m
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage=f"python {f'-m {module.name}' if module else '%(prog)s'} [--flag VALUE ...]")
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
        if distributed.WORLD > 1:
            parser.error("--device-map gives all GPUs to one process, torchrun one to each; it is one or the other")
        args.device = FLAGS["the machine"]["device"]["default"]
    if "dtype" in args:
        args.dtype = getattr(torch, args.dtype) if args.dtype else None              # see bases.load.default_dtype
    return args
