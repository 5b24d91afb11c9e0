"""Checks Base on every decoder of the installed transformers: a tiny random model of each, in its own process.

    python -m experiments.architectures                       all of them; writes results/architectures.md
    python -m experiments.architectures --types qwen3,falcon  some of them; writes nothing

Compared are, in float64, with adapters of two tasks on all projections that are found:

1. logits before and after patching, bit for bit, and with B = 0;
2. logits and the gradients of A and B with those of PEFT, which reads the exported adapters;
3. log-probabilities of several continuations of several tokens behind a prompt (score.score), with adapters and
   without, with those of plain passes over prompt + continuation;
4. greedy decoding of prompts of different lengths with that of each alone: tokens, and logits to 1e-6;
5. fused projections: whether the rows taken as q, k, v, gate and up are these, by what changes of them do;
6. the frozen weight of every projection (Base.weight) with what the plain layer makes of random inputs.

A base has to take adapters of q and v, the default. The command ends with exit code 1 if a comparison fails, or
anything else but a refusal in one line.
"""
import copy, multiprocessing, os, pathlib, resource, signal, sys, tempfile, traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import peft, torch, transformers

from bases import Base, Item, greedy
from experiments.tiny_models import CAUSAL, IMAGE_TEXT, VARIANTS, Exact, logits_of, not_counted, tiny_model, tokens
from exports.peft import save_peft
from portal import MODULES, Adapters
from runtime.files import ROOT, BadInput, first_line, today, write_whole
from runtime.flags import NAMES, parse, run_main
from score import score
from tasks.rows import Row

SECONDS, BYTES = 120, 3 << 30                                                        # that one model's process may use
LIMIT = 1e-9                                                                         # of a difference, see `same`


# ---------------------------------------------------------------------------------------------- comparisons
class Wrong(Exception):
    """A comparison that failed."""


def same(what, a, b, limit=LIMIT):
    """Raises Wrong unless tensors a and b differ by at most `limit` of the largest value in b."""
    difference = float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))
    if not difference <= limit:                                                      # NaN is wrong, too
        raise Wrong(f"{what}: the difference is {difference:.1e} of the largest value")


def random_adapters(base):
    """Returns Adapters of two tasks on all of a base's projections, of rank 3, that ask for gradients. Their values
    are float32's, which a file keeps exactly."""
    def factor(*shape):
        return (0.5 * torch.randn(2, *shape, dtype=torch.float32)).to(base.model.dtype).requires_grad_()
    torch.manual_seed(1)
    return Adapters({g: factor(len(layers), 3, d_in) for g, (_, layers, d_in, _) in base.groups.items()},
                    {g: factor(len(layers), d_out, 3) for g, (_, layers, _, d_out) in base.groups.items()}, 2.0)


@torch.no_grad()
def check_patching(base, plain, adapters):
    """Comparison 1."""
    ids, zero = tokens(9, 1), Adapters(adapters.A, {g: 0 * B for g, B in adapters.B.items()}, 2.0)
    if not torch.equal(logits_of(base.model, ids), logits_of(plain, ids)):
        raise Wrong("patching changes the bare logits")
    with base.with_adapters(zero, torch.tensor([1])):
        same("B = 0 is not the identity", logits_of(base.model, ids), logits_of(plain, ids))


def peft_model(base, plain, adapters, t):
    """Returns a PEFT model of task t, from a copy of the plain model and the exported adapters."""
    with tempfile.TemporaryDirectory() as folder:
        save_peft(pathlib.Path(folder), base, dict(id="tiny/model", revision=None), adapters, t)
        return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder, is_trainable=True).eval()


def check_gradients(base, models, adapters):
    """Comparison 2."""
    ids, factors = [tokens(9, 3), tokens(9, 4)], base.factors(adapters)              # {path: (A, B)}
    with base.with_adapters(adapters, torch.tensor([0, 1])):
        ours = base.model(input_ids=torch.tensor(ids), use_cache=False).logits       # [2, S, vocabulary]
    weight, wanted = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)), []
    gradients = torch.autograd.grad((ours * weight).sum(), adapters.tensors(), materialize_grads=True)
    for t, model in enumerate(models):
        layers = [model.base_model.model.get_submodule(path) for path in factors]
        own = [getattr(layer, side)["default"].weight for layer in layers for side in ("lora_A", "lora_B")]
        theirs = logits_of(model, ids[t])
        same("logits beside PEFT's", ours[t], theirs)
        wanted.append(torch.autograd.grad((theirs * weight[t]).sum(), own, materialize_grads=True))
    # A LoRA of a fused layer is composed of its projections' factors: the chain rule leads back to these.
    composed = [factor for pair in factors.values() for factor in pair]              # [T, ...] each
    wanted = torch.autograd.grad(composed, adapters.tensors(), [torch.stack(both) for both in zip(*wanted)])
    for (side, g), mine, theirs in zip([(side, g) for side in "AB" for g in base.groups], gradients, wanted):
        same(f"gradient of {side} of {g} beside PEFT's", mine, theirs)


@torch.no_grad()
def check_scores(base, plain, models, adapters):
    """Comparison 3."""
    items = [Item(t, tokens(n, 10 + n), [tokens(k, 20 + n + k) for k in lengths], Row("t", "", [], 0))
             for t, n, lengths in ((0, 5, (3, 1)), (1, 9, (2, 4)), (1, 3, (1, 1, 3)))]
    first = [item._replace(continuations=item.continuations[:1]) for item in items]  # such rows have other masks
    for what, given, by_task, asked in (("bare", None, [plain, plain], items), ("adapted", adapters, models, items),
                                        ("one continuation a row:", adapters, models, first)):
        for item, got in zip(asked, score(base, given, asked, 10 ** 6), strict=True):
            want = []
            for answer in item.continuations:
                log_p = logits_of(by_task[item.task], item.prompt + answer[:-1]).log_softmax(-1)
                want.append(sum(log_p[len(item.prompt) - 1 + i, token] for i, token in enumerate(answer)))
            same(f"{what} scores beside plain passes", torch.tensor(got), torch.stack(want))


@torch.no_grad()
def check_decoding(base, models, adapters):
    """Comparison 4."""
    prompts = [tokens(11, 6), tokens(5, 7)]
    alone = [model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0,
                            eos_token_id=None, return_dict_in_generate=True, output_logits=True)
             for model, prompt in zip(models, prompts)]
    want = [out.sequences[0, len(prompt):].tolist() for out, prompt in zip(alone, prompts)]
    if (got := base.generate(prompts, adapters, [0, 1], 5)) != want:
        raise Wrong(f"greedy decoding gives {got}, that of each row alone {want}")
    if base.pads:                                                                    # tokens may agree by chance
        with base.with_adapters(adapters, torch.tensor([0, 1])):
            greedy(base, prompts, [5, 5], logits=(padded := []))
        for step, both in enumerate(padded):
            same(f"logits of greedy decoding, step {step}", both, torch.cat([out.logits[step] for out in alone]), 1e-6)


@torch.no_grad()
def check_slices(base, plain):
    """Comparison 5. At the first position, with a single key, q matters nowhere, k later and v at once. A closed gate
    hides up."""
    for name, p in plain.named_parameters():
        if "sink" in name:
            p.fill_(-60)                                                             # or it would be a second key
    for (m, layer), (_, path, rows) in base.sites.items():
        def moved(first, gate=None):
            """Returns where, [S], noise in these rows at the first positions moves the logits. gate: rows to close."""
            def hook(noise, y):
                flat = (y := y.clone()).view(-1, y.shape[-1])                        # [S, d_out]
                flat[:first, rows] += noise * torch.randn_like(flat[:first, rows])
                if gate is not None:
                    flat[:, gate] = -60
                return y
            logits = []
            for noise in (0, 1):
                handle = plain.get_submodule(path).register_forward_hook(lambda _, inputs, y: hook(noise, y))
                logits.append(logits_of(plain, tokens(6, 8)))
                handle.remove()
            return (logits[0] - logits[1]).abs().amax(-1) > LIMIT
        if rows is None:
            continue
        right, gate = moved(None).any(), base.sites.get(("gate", layer))
        if m in ("q", "k", "v"):
            at = moved(1)
            right &= not at.any() if m == "q" else at.any() and bool(at[0]) == (m == "v")
        elif m == "up" and gate and gate.path == path:
            right &= not moved(None, gate.rows).any()
        if not right:
            raise Wrong(f"the rows taken as {m} of {path} are not {m}")


@torch.no_grad()
def check_weights(base, plain):
    """Comparison 6."""
    for (m, layer), (_, path, rows) in base.sites.items():
        linear, W = plain.get_submodule(path), base.weight(m, layer)                 # [d_out, d_in]
        x = torch.randn(1, 5, W.shape[1])
        y = linear(x) - linear(torch.zeros_like(x))                                  # without the bias
        same(f"weight of {m} of layer {layer}", x @ W.T, y if rows is None else y[..., rows])


# ---------------------------------------------------------------------------------------------- one model
class Ids:
    """A tokenizer that leaves token ids as they are."""
    eos_token_id = None

    def batch_decode(self, rows, **options):
        return rows


def structure(base):
    """Returns what a base's layers hold, as text."""
    layers, fused, found = {}, {}, []
    for m in base.kinds:
        layers.setdefault(len(base.sites_of(m)), []).append(m)
    for (m, _), site in base.sites.items():
        if site.rows is not None:
            fused.setdefault(site.path.split(".")[-1], {})[m] = None
    for n, kinds in layers.items():
        found.append(f"{', '.join(kinds)} in {'all' if n == len(base.blocks) else f'{n} of'} {len(base.blocks)} layers")
    for words, kinds in (("no", [m for m in MODULES if m not in base.kinds]), ("several shapes of", [
            m for m in base.kinds if sum(group.kind == m for group in base.groups.values()) > 1])):
        found += [f"{words} {', '.join(kinds)}"] * bool(kinds)
    found += [f"{', '.join(kinds)} fused in {name}" for name, kinds in fused.items()]
    return "; ".join([*found, *["one row a choice"] * (not base.packs), *["no padding on the left"] * (not base.pads)])


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
        with Exact():
            model.double().set_experts_implementation("eager")                       # the grouped one has no float64
            plain, base = copy.deepcopy(model), Base(model, Ids(), "tiny")
            adapters = random_adapters(base)
            check_patching(base, plain, adapters)
            models = [peft_model(base, plain, adapters, t) for t in (0, 1)]
            check_gradients(base, models, adapters)
            check_scores(base, plain, models, adapters)
            check_decoding(base, models, adapters)
            check_weights(base, plain)
            check_slices(base, plain)
            base.groups_of(["q", "v"])
            return found, "works", structure(base)
    except BadInput as error:
        return found, "refused", str(error).removeprefix("tiny: ")
    except Wrong as error:
        return found, "wrong", str(error)
    except Exception as error:
        *_, (path, line, *_) = traceback.extract_tb(error.__traceback__)
        return found, "wrong", f"{type(error).__name__}: {first_line(error)} ({os.path.basename(path)}:{line})"


def limited():
    """Limits this process: too many BYTES are an exception, too many SECONDS end it with SIGALRM; it prints nothing."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def in_a_process(name):
    """Returns check(name), or that its process crashed or took too long."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), limited) as pool:
        try:
            return pool.submit(check, name).result()
        except BrokenProcessPool:
            return "-", "wrong", f"its process crashed, or was not done after {SECONDS} seconds"


# ---------------------------------------------------------------------------------------------- the command
TITLES = {  # {verdict: (title, what it says)}
    "wrong": ("Wrong", "A comparison fails, or a command that uses it would end with a traceback."),
    "refused": ("Refused", "The line with which a command that uses it ends."),
    "works": ("Works", "Kinds of projections, with the number of layers that have them. *One row a choice*: several "
                       "continuations in one row would see each other. *No padding on the left*: prompts of different "
                       "lengths are decoded one at a time."),
    "not counted": ("Does not count", "No decoder of text with attention, as its forward passes show."),
    "not built": ("Not built", "Its default configuration, made small, cannot be built here.")}


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
    for v, (title, words) in TITLES.items():
        if rows[v]:
            page += ["", f"## {title}: {len(rows[v])} model types, {len(classes[v] - {'-'})} classes", "", words, "",
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
        write_whole(ROOT / "results" / "architectures.md", lambda path: path.write_text(report(results)))
    if any(verdict == "wrong" for _, verdict, _ in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
