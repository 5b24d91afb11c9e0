"""The comparisons of experiments/architectures.py, which numbers them: a patched tiny model beside plain copies of it
and PEFT. Each raises Wrong where they differ."""
import contextlib, copy, functools, pathlib, tempfile

import peft, torch
from torch.overrides import TorchFunctionMode

from bases import Base, Item, greedy
from experiments.tiny_models import logits_of, tokens
from exports.peft import save_peft
from portal import Adapters
from runtime.files import first_line
from score import score
from tasks.rows import Row

LIMIT = 1e-9                                                                         # of a difference, see `same`


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
            greedy(base, prompts, [5, 5], logits=(padded := []))
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
