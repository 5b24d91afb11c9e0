"""Which token of a row sees which: the attention masks, and whether the layers of a base heed them.

A row holds a prompt and one or several continuations behind it, which must not see each other. Recurrent and
convolutional layers ignore masks, some models ignore position ids, others have masks of their own. There is no list of
them: a loaded base is tried with a few tokens.
"""
import re
from types import SimpleNamespace

import torch

from bases.decoding import greedy
from runtime.files import BadInput, first_line, out_of_memory

# Settings of a config that limit what a layer sees, beside those of a plain sliding window.
OTHER_WINDOWS = re.compile(r"(?!_?(use_)?sliding_window(_pattern)?$|max_window_layers$)"
                           r".*(window|attention_chunk|local_att)")

LONGEST = 2048  # tokens: no row is as long, and a wider window is not tried


def layer_types(config):
    """The kinds of a model's layers, a set of names; empty where its config has none."""
    return set(getattr(config, "layer_types", None) or ())


def of(base, batch):
    """{attention_mask, position_ids} of a forward pass over `batch`, as the model takes them; {} leaves the masks to
    transformers, which make a row of one continuation right."""
    return {} if batch.segments is None and not base.packs else ours(base, batch)


def ours(base, batch):
    """{attention_mask, position_ids} that keep the continuations of a row apart.
    Without a mask, transformers checks whether a row packs several texts, which waits for the device. So each layer
    type gets one, or None where scaled_dot_product_attention's own causal mask is enough. Models without layer types
    (Llama; Mistral, whose layers all slide) take a single mask and check if it is None, so they always get one: under
    1% of the time on a CPU; on a GPU it rules out the flash kernel."""
    config, types, single = base.config, layer_types(base.config), batch.segments is None
    # An architecture uses a window only if its config class declares one; config.json may hold a stray value.
    window = config.sliding_window if hasattr(type(config), "sliding_window") else None
    def mask(window):
        plain = single and types and config._attn_implementation == "sdpa" and not (
            window and batch.ids.shape[1] >= window)
        return None if plain else causal_mask(batch, window, base.model.dtype)
    by_type = {kind: mask(window if kind == "sliding_attention" else None) for kind in types}
    # Without positions some models would count them in the mask.
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]       # [1, S]
    return dict(attention_mask=by_type or mask(window), position_ids=columns if single else batch.positions)


def causal_mask(batch, window, dtype):
    """The additive attention mask [1 or R, 1, S, S]: 0 where position i sees position j, else the dtype's minimum.
    i sees j <= i. In rows of a prompt (segment 0) and several continuations (1, 2, ...), i sees the prompt and its own
    continuation only. With a window: only the last `window` position ids, its own included. Padding is on the right, so
    causality alone hides it."""
    segments, positions = batch.segments, torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]  # [1, S]
    sees = positions[:, :, None] >= positions[:, None, :]                            # [1, S, S]
    if segments is not None:
        positions = batch.positions                                                  # [R, S]
        sees = sees & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))  # [R, S, S]
    if window:
        sees = sees & (positions[:, :, None] - positions[:, None, :] < window)
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


# ---------------------------------------------------------------------------------------------- trying a base
def has_other_windows(config):
    """Whether some layer sees a part of the text alone in a way that `ours` does not know: a few tokens do not show
    it."""
    return (any(value and OTHER_WINDOWS.match(name) for name, value in vars(config).items())
            or any(re.search("sparse|chunk", kind) for kind in layer_types(config)))


def probe(n, vocabulary, k=0):
    """n token ids for a comparison of forward passes; the k-th of several such texts."""
    return [(17 + 101 * k + 37 * i) % vocabulary for i in range(n)]


def same(base, a, b, wrong):
    """Whether logits a and b are equal but for rounding. In half precision, which keeps 3 digits in every layer, their
    mean difference is less than a sixth of that of `wrong`, the logits of a pass that is known to be wrong, from b: on
    real models rounding was a tenth of it, and what is left of a leak a quarter."""
    def difference(x):
        return (x.double() - b.double()).abs().mean()
    return bool(difference(a) < (difference(wrong) / 6 if base.model.dtype.itemsize < 4 else 1e-4 * b.double().std()))


def logits(base, ids, last, behind=0, masks={}, rows=1):
    """The logits [last, vocabulary] at the last positions of token ids, but for `behind` tokens. rows: how often the
    batch has these ids."""
    at = torch.arange(last, device=base.device) + len(ids) - behind - last
    with base.activate({"factors": {}, "at": (torch.zeros_like(at), at), "caught": None}):
        return base.model(input_ids=torch.tensor([ids] * rows, device=base.device), use_cache=False, **masks).logits[0]


def require_causal(base, prompt, first, second):
    """Raises BadInput for a model that does not run on text alone, and for one whose logits at a prompt's last tokens
    depend on what is behind them. first, second: other token ids; second in place of the prompt gives wrong logits."""
    last, behind = len(second), len(first)
    longest = getattr(base.config, "max_position_embeddings", None)
    if isinstance(longest, int) and longest < len(prompt + first + second):
        raise BadInput(f"{base.name}: its config.json says that it sees {longest} tokens (max_position_embeddings), "
                       f"too few to try it: {len(prompt + first + second)} are needed")
    try:
        early, late = logits(base, prompt, last), logits(base, prompt + first, last, behind)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput(f"{base.name}: {type(base.model).__name__} does not run on text alone: {first_line(error)}")
    if (early.isnan() | (early == torch.inf)).any():
        raise BadInput(f"{base.name}: its logits are not finite in {str(base.model.dtype).removeprefix('torch.')}; try "
                       "another --dtype (float16 overflows early), or restore its weights")
    if not same(base, early, late, logits(base, second + first, last, behind)):
        raise BadInput(f"{base.name}: the logits of {type(base.model).__name__} depend on later tokens; it is no "
                       "causal language model")


@torch.no_grad()
def keeps_apart(base):
    """Whether `ours` are right for this model: a row of one continuation has the logits that it has without masks, and
    of two in a row the second has those that it has alone, whatever the first is. Raises BadInput, see
    require_causal."""
    config, n, V = base.config, (7, 30, 5), base.config.vocab_size
    if config._attn_implementation not in ("sdpa", "eager"):                         # these take no masks of ours
        return False
    prompt, first, second, other = (probe(length, V, k) for k, length in enumerate((*n, n[1])))
    require_causal(base, prompt, first, second)
    if has_other_windows(config) or layer_types(config) - {"full_attention", "sliding_attention"}:
        return False
    columns = torch.arange(sum(n), device=base.device)[None]                         # [1, S]
    segments = torch.tensor([[0] * n[0] + [1] * n[1] + [2] * n[2]], device=base.device)
    positions = torch.where(segments == 2, columns - n[1], columns)
    def single(length):
        row = torch.arange(length, device=base.device)[None]
        return ours(base, SimpleNamespace(ids=row, segments=None, positions=row))
    def last(ids, masks={}, rows=1):
        return logits(base, ids, n[2], masks=masks, rows=rows)                       # of the second continuation
    try:
        masks = ours(base, SimpleNamespace(ids=columns, segments=segments, positions=positions))
        packed, alone = last(prompt + first + second, masks), last(prompt + second)
        wrong = last(prompt + first + second, {**masks, "position_ids": columns})
        tried = [(packed, alone), (packed, last(prompt + other + second, masks)),
                 (last(prompt + second, single(n[0] + n[2]), 2), alone)]
        if 0 < (getattr(config, "sliding_window", None) or 0) < LONGEST:             # is it used, and as we use it?
            text = probe(config.sliding_window + 8, V)
            tried.append((last(text, single(len(text))), last(text)))
        return all(same(base, a, b, wrong) for a, b in tried)
    except Exception as error:                                                       # it takes no masks of this form
        if out_of_memory(error):
            raise
        return False


def ignores_padding(base):
    """Whether a row that is padded on the left is decoded as alone."""
    short, long = probe(5, base.config.vocab_size), probe(12, base.config.vocab_size)
    both = dict(prompts=[short, long], limits=[2, 2])
    return decoded_alike(base, 0, both, dict(prompts=[short], limits=[2]), dict(both, masked=False))


def goes_on_alone(base):
    """Whether a row is decoded as alone after another has left the batch: whether all that goes from step to step is in
    a cache or a tensor that decoding.rows_of knows."""
    first, second = probe(12, base.config.vocab_size), probe(12, base.config.vocab_size, 1)
    return decoded_alike(base, -1, dict(prompts=[first, second], limits=[1, 3], leave=True),
                         dict(prompts=[second], limits=[3]), dict(prompts=[first], limits=[3]))


@torch.no_grad()
def decoded_alike(base, row, tried, alone, wrong):
    """Whether a row of one way to decode has the logits of another at every step, see `same`; each way: what `greedy`
    takes. A way that the model does not take is not alike, nor is any if what it sees may depend on the length."""
    def steps(how):
        logits = []
        with base.activate({"factors": {}, "task": None}):
            greedy(base, logits=logits, **how)
        return logits
    if has_other_windows(base.config):
        return False
    try:
        tried, wrong = steps(tried), steps(wrong)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    return all(same(base, a[row, None], b, c[:1]) for a, b, c in zip(tried, steps(alone), wrong))
