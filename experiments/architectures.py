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
import contextlib, copy, functools, multiprocessing, os, pathlib, resource, sys, tempfile, traceback

import peft, torch, transformers
from torch.overrides import TorchFunctionMode

from data import Item, Row
from experiments.tiny_models import CAUSAL, IMAGE_TEXT, VARIANTS, logits_of, not_counted, tiny_model, tokens
from export import save_peft
from frozen import Base
from portal import MODULES, Adapters
from runtime.files import ROOT, BadInput, first_line, today, write_whole
from runtime.flags import NAMES, parse, run_main
from score import score

SECONDS, BYTES = 120, 3 << 30                                                        # that one model's process may use
LIMIT = 1e-9                                                                         # of a difference, see `same`


# ---------------------------------------------------------------------------------------------- the comparisons
class Exact(TorchFunctionMode):
    """A context in which models compute in float64 what they otherwise do in float32: norms, softmax, positions."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)

    def __torch_function__(self, f, types, args=(), kwargs=None):
        f = torch.Tensor.double if f is torch.Tensor.float else f
        def wide(x):
            return torch.float64 if x is torch.float32 else x
        return f(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})


class Wrong(Exception):
    """A comparison that failed."""


def same(what, a, b, limit=LIMIT):
    """Raises Wrong unless tensors a and b differ by at most `limit` of the largest value in b."""
    difference = float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))
    if not difference <= limit:                                                      # NaN is wrong, too
        raise Wrong(f"{what}: the difference is {difference:.1e} of the largest value")


def random_adapters(base, std=0.5):
    """Returns Adapters of two tasks on all of a base's projections, of rank 3, that ask for gradients. Their values
    are float32's, which a file keeps exactly. std: of B."""
    def factor(std, *shape):
        return (std * torch.randn(2, *shape, dtype=torch.float32)).to(base.model.dtype).requires_grad_()
    torch.manual_seed(1)
    return Adapters({g: factor(0.5, len(layers), 3, d_in) for g, (_, layers, d_in, _) in base.groups.items()},
                    {g: factor(std, len(layers), d_out, 3) for g, (_, layers, _, d_out) in base.groups.items()}, 2.0)


@torch.no_grad()
def check_patching(model):
    """Comparison 1. Returns [] or, where B = 0 is the identity but not bit for bit, to what. Unpatches the model."""
    ids = torch.tensor([tokens(9, 1), tokens(9, 2)])
    plain = model(input_ids=ids, use_cache=False).logits
    base = Base(model, None, "tiny")
    if not torch.equal(model(input_ids=ids, use_cache=False).logits, plain):
        raise Wrong("patching changes the bare logits")
    with base.with_adapters(random_adapters(base, std=0), torch.tensor([1, 0])):
        zero = model(input_ids=ids, use_cache=False).logits
    same("B = 0 is not the identity", zero, plain, 1e-6)
    base.unpatch()
    return [] if torch.equal(zero, plain) else [f"B = 0 to {float((zero - plain).abs().max() / plain.abs().max()):.0e}"]


@contextlib.contextmanager
def peft_models(base, plain, adapters):
    """A context with a PEFT model of each task, from copies of the plain model and the exported adapters."""
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for path in (pathlib.Path(folder) / "0", pathlib.Path(folder) / "1"):
            path.mkdir()
            save_peft(path, base, dict(id="tiny/model", revision=None), adapters, len(models))
            models.append(peft.PeftModel.from_pretrained(copy.deepcopy(plain), path, is_trainable=True).eval())
        yield models


def check_gradients(base, models, adapters):
    """Comparison 2. Returns {layer: kinds that do not reach the logits}."""
    ids, factors = [tokens(9, 3), tokens(9, 4)], base.factors(adapters)              # {path: (A, B)}
    with base.with_adapters(adapters, torch.tensor([0, 1])):
        ours = base.model(input_ids=torch.tensor(ids), use_cache=False).logits       # [2, S, vocabulary]
    if not ours.requires_grad:
        raise Wrong(f"none of the projections reaches the logits: {', '.join(list(factors)[:2])} ...")
    weight, wanted = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)), []
    gradients = torch.autograd.grad((ours * weight).sum(), adapters.tensors(), materialize_grads=True)
    for t, model in enumerate(models):
        layers = [model.base_model.model.get_submodule(path) for path in factors]
        for path, layer in zip(factors, layers):
            if not (hasattr(layer, "lora_A") and torch.equal(layer.lora_A["default"].weight, factors[path][0][t])):
                raise Wrong(f"PEFT reads no adapter of {path} from the exported folder, or another one")
        own = [getattr(layer, side)["default"].weight for layer in layers for side in ("lora_A", "lora_B")]
        theirs = logits_of(model, ids[t])
        same("logits beside PEFT's", ours[t], theirs)
        wanted.append(torch.autograd.grad((theirs * weight[t]).sum(), own, materialize_grads=True))
    # A LoRA of a fused layer is composed of its projections' factors: the chain rule leads back to these.
    composed = [factor for pair in factors.values() for factor in pair]              # [T, ...] each
    wanted = torch.autograd.grad(composed, adapters.tensors(), [torch.stack(both) for both in zip(*wanted)])
    for (side, g), mine, theirs in zip([(side, g) for side in "AB" for g in base.groups], gradients, wanted):
        same(f"gradient of {side} of {g} beside PEFT's", mine, theirs)
    without = {}
    for group, gradient in zip(base.groups.values(), gradients[len(base.groups):]):  # of B
        for layer in (layer for layer, own in zip(group.layers, gradient.unbind(1)) if not own.any()):
            without.setdefault(layer, []).append(group.kind)
    return without


@torch.no_grad()
def check_scores(base, plain, models, adapters):
    """Comparison 3."""
    items = [Item(t, tokens(n, 10 + n), [tokens(k, 20 + n + k) for k in lengths], Row("t", "", [], 0))
             for t, n, lengths in ((0, 8, (3, 1, 4)), (1, 11, (2, 5)), (0, 2, (1, 1)))]
    # Rows of one continuation have other masks.
    first = [item._replace(continuations=item.continuations[:1]) for item in items]
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
    """Comparison 4. Returns [], or what is to be said of transformers' own decoding of one row, which ours is compared
    with: it fails, or is not that by whole forward passes."""
    prompts, whole, own, logits = [tokens(11, 6), tokens(5, 7)], [], [], []
    for model, prompt in zip(models, prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 5:
            ids.append(int(logits_of(model, ids)[-1].argmax()))
        whole.append(ids[len(prompt):])
        try:
            out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0,
                                 eos_token_id=None, return_dict_in_generate=True, output_logits=True)
            own += out.sequences[:, len(prompt):].tolist()
            logits.append(out.logits)
        except Exception as error:
            return [f"transformers cannot decode with it ({first_line(error)})"]
    got = base.generate(prompts, adapters, [0, 1], 5)
    if got != own:
        raise Wrong(f"greedy decoding gives {got}, that of each row alone {own}")
    if base.pads:                                                                    # tokens may agree by chance
        with base.with_adapters(adapters, torch.tensor([0, 1])):
            padded = base.decode(prompts, 5).logits
        for step, both in enumerate(padded):
            same(f"logits of greedy decoding, step {step}", both, torch.cat([alone[step] for alone in logits]), 1e-6)
    return [] if own == whole else ["transformers' own decoding is not that by whole forward passes"]


HIDES = {"q": ("v", 0.0), "k": ("v", 0.0), "up": ("gate", -60.0)}  # the output of another kind that hides the first


@torch.no_grad()
def check_slices(base, plain):
    """Comparison 5. Values that are zero hide queries and keys, a closed gate hides up. At the first position, with a
    single key, neither q nor k matters unless attention has sinks, and q there matters nowhere."""
    def hook(_, inputs, y, site, f):
        y = y.clone()                                                                # [..., S, d_out]
        rows = y.view(-1, y.shape[-1])
        rows[:, site.rows] = f(rows[:, site.rows])
        return y
    def moved(noise, kind, layer, **changes):
        """Returns where, [S], `noise` in the output of a kind moves the logits, with `changes` {m: f} of others."""
        logits = []
        for outputs in (changes, {**changes, kind: noise}):
            handles = [plain.get_submodule(base.sites[m, layer].path).register_forward_hook(
                functools.partial(hook, site=base.sites[m, layer], f=f)) for m, f in outputs.items()]
            logits.append(logits_of(plain, tokens(6, 8)))
            for handle in handles:
                handle.remove()
        return (logits[0] - logits[1]).abs().amax(-1) > LIMIT
    def everywhere(rows):
        return rows + torch.randn_like(rows)
    def first(rows):
        return torch.cat([everywhere(rows[:1]), rows[1:]])
    sinks = any("sink" in name for name, _ in plain.named_parameters())
    fused = {key: site for key, site in base.sites.items() if site.rows is not None}
    for (m, layer), site in fused.items():
        other, value = HIDES.get(m, (None, None))
        right = moved(everywhere, m, layer).any()
        if (other, layer) in fused:
            right &= not moved(everywhere, m, layer, **{other: lambda rows: torch.full_like(rows, value)}).any()
        if m in ("q", "k", "v") and not sinks:
            at = moved(first, m, layer)                                              # q nowhere, k later, v at once
            right &= not at.any() if m == "q" else at.any() and bool(at[0]) == (m == "v")
        if not right:
            raise Wrong(f"the rows taken as {m} of {site.path} are not {m}")


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
