"""Checks frozen.Base on every decoder of the installed transformers: a tiny random model of each, in its own process.

    python -m experiments.architectures                       all of them; writes results/architectures.md
    python -m experiments.architectures --types qwen3,falcon  some of them; writes nothing

Compared are, with adapters of two tasks on all projections that are found, in float64 where nothing else is said:

1. logits before and after patching, bit for bit, and with B = 0, to 1e-6 (float32);
2. logits and the gradients of A and B with those of PEFT, which reads the exported adapters;
3. log-probabilities of several continuations of several tokens behind a prompt (score.score), with adapters and
   without, with those of plain passes over prompt + continuation;
4. greedy decoding of prompts of different lengths with that of each alone: tokens, and logits to 1e-6;
5. fused projections: whether the rows taken as q, k, v, gate and up are these, by what changes of them do;
6. the frozen weight of every projection (Base.weight) with what the plain layer makes of random inputs.

A base has to take adapters of q and v, the default. The command ends with exit code 1 if a comparison fails, or
anything else but a refusal in one line.
"""
import contextlib, copy, multiprocessing, os, resource, sys, traceback

import peft, torch, transformers

from bases import Base
from experiments.comparisons import (Exact, Wrong, check_decoding, check_gradients, check_patching, check_scores,
                                     check_slices, check_weights, peft_models, random_adapters)
from experiments.tiny_models import CAUSAL, IMAGE_TEXT, VARIANTS, not_counted, tiny_model
from portal import MODULES
from runtime.files import ROOT, BadInput, first_line, today, write_whole
from runtime.flags import NAMES, parse, run_main

SECONDS, BYTES = 120, 3 << 30                                                        # that one model's process may use


# ---------------------------------------------------------------------------------------------- one model
class Ids:
    """A tokenizer that leaves token ids as they are."""
    eos_token_id = None

    def batch_decode(self, rows, **options):
        return rows


def structure(base, without):
    """Returns what a base's layers hold, a list of texts. without: check_gradients' result."""
    layers, fused, L = {}, {}, len(base.blocks)
    for m in base.kinds:
        layers.setdefault(len(base.sites_of(m)), []).append(m)
    for (m, _), site in base.sites.items():
        if site.rows is not None:
            fused.setdefault(site.path.split(".")[-1], {})[m] = None
    shapes = [m for m in base.kinds if sum(group.kind == m for group in base.groups.values()) > 1]
    absent = [m for m in MODULES if m not in base.kinds]
    return [*(f"{', '.join(kinds)} in {'all' if n == L else f'{n} of'} {L} layers" for n, kinds in layers.items()),
            *[f"no {', '.join(absent)}"] * bool(absent), *[f"several shapes of {', '.join(shapes)}"] * bool(shapes),
            *(f"{', '.join(kinds)} fused in {name}" for name, kinds in fused.items()),
            *(f"{', '.join(kinds)} of layer {layer} without effect on text" for layer, kinds in without.items()),
            *["one row a choice"] * (not base.packs), *["no padding on the left"] * (not base.pads)]


def check(name):
    """Returns (class, verdict, why) of a model type or variant. verdict: a key of TITLES."""
    try:
        model = tiny_model(name)
    except Exception as error:                                                       # its settings; no such library
        return "-", "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found = type(model).__name__
    try:
        if reason := not_counted(model):
            return found, "not counted", reason
        notes = check_patching(model)
        with Exact():
            model.double().set_experts_implementation("eager")                       # the grouped one has no float64
            plain, base = copy.deepcopy(model), Base(model, Ids(), "tiny")
            adapters = random_adapters(base)
            with peft_models(base, plain, adapters) as models:
                without = check_gradients(base, models, adapters)
                check_scores(base, plain, models, adapters)
                notes += check_decoding(base, models, adapters)
            check_slices(base, plain)
            check_weights(base, plain)
            base.groups_of(["q", "v"])
            return found, "works", "; ".join(structure(base, without) + notes)
    except BadInput as error:
        return found, "refused", str(error).removeprefix("tiny: ")
    except Wrong as error:
        return found, "wrong", str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(place.filename)}:{place.lineno}"
        return found, "wrong", f"{type(error).__name__}: {first_line(error)} ({place})"


def in_a_process(name):
    """Returns check(name), or what ended its process: a crash or too many SECONDS. Too many BYTES are an exception."""
    def work():
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            end.send(check(name))
    start, end = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    end.close()
    try:
        return start.recv() if start.poll(SECONDS) else ("-", "wrong", f"not done after {SECONDS} seconds")
    except EOFError:                                                                 # it ended without a word
        process.join()
        return "-", "wrong", f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------- the command
TITLES = {"wrong": "Wrong", "refused": "Refused", "works": "Works", "not counted": "Does not count",
          "not built": "Not built"}
ABOUT = {"wrong": "A comparison fails, or a command that uses it would end with a traceback.",
         "refused": "The line with which a command that uses it ends.",
         "works": "Kinds of projections, with the number of layers that have them. *One row a choice*: several "
                  "continuations in one row would see each other. *No padding on the left*: prompts of different "
                  "lengths are decoded one at a time.",
         "not counted": "No decoder of text with attention, as its forward passes show.",
         "not built": "Its default configuration, made small, cannot be built here."}


def report(results):
    """Returns the page of results {name: (class, verdict, why)}."""
    rows = {v: {name: row for name, row in results.items() if row[1] == v} for v in TITLES}
    classes = {v: {row[0] for row in found.values()} for v, found in rows.items()}
    decoders = classes["works"] | classes["refused"] | classes["wrong"]
    classes["works"] -= classes["wrong"]
    page = ["# Architectures", "", "- command: python -m experiments.architectures",
            f"- versions: {', '.join(f'{x.__name__} {x.__version__}' for x in (transformers, peft, torch))}",
            f"- date: {today()}", f"- {len(classes['works'])} of {len(decoders)} decoder classes work, "
            f"{len(classes['wrong'])} are wrong; several model types may share a class", "",
            *__doc__.split("\n\n", 2)[2].splitlines()]
    for v, title in TITLES.items():
        if rows[v]:
            page += ["", f"## {title}: {len(rows[v])} model types, {len(classes[v] - {'-'})} classes", "", ABOUT[v], "",
                     "| model type | class | |", "|---|---|---|",
                     *(f"| {name} | {row[0]} | {row[2].replace('|', '/')} |" for name, row in rows[v].items())]
    return "\n".join([*page, ""])


def main(argv=None):
    args = parse(__doc__, "types", argv, types=dict(NAMES, help="these alone; names as in results/architectures.md"))
    names = sorted([*CAUSAL, *IMAGE_TEXT, *VARIANTS])
    for name in args.types or ():
        if name not in names:
            raise BadInput(f"--types: unknown type {name!r}; accepted are {', '.join(names)}")
    transformers.logging.set_verbosity_error()
    results = {}
    for name in args.types or names:
        results[name] = in_a_process(name)
        print(name, *results[name], sep=" | ", flush=True)
    if not args.types:
        path = ROOT / "results" / "architectures.md"
        write_whole(path, lambda temporary: temporary.write_text(report(results)))
        print(f"table: {path}")
    if any(verdict == "wrong" for _, verdict, _ in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
