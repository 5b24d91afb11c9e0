"""What a model makes of its last hidden states: a plain linear LM head, whose logits may be scaled and soft-capped.

    logits = cap * tanh(z / cap) or z,    z = scale * (W h + bias)

Then the loss needs no logits of all positions (kernels/cross_entropy.py). Some models scale (Cohere, Granite,
Falcon-H1), some cap (Gemma 2), some do other things, and names in a config do not tell. So a loaded base is tried with
a few tokens.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bases.masks import probe
from kernels.cross_entropy import squashed
from runtime.files import out_of_memory

REACH = 64.0                                                                         # of the logits tried
FAR, NEAR = 2.0 ** 20, 2.0 ** -10                                                    # only the cap shows; hardly


class Head(NamedTuple):
    linear: nn.Linear
    scale: float
    cap: float | None


@torch.no_grad()
def find(base):
    """Returns the Head of a base, or None for a model that makes its logits in another way: with a quantised matrix,
    or with something before or behind it.

    The head's output is replaced by known numbers, and the model's output is what it makes of them: from one large and
    one small number come cap and scale, and all others must follow."""
    linear, ids = base.model.get_output_embeddings(), torch.tensor([probe(3, base.config.vocab_size)])
    if type(linear) is not nn.Linear or linear.weight.is_meta or not linear.weight.is_floating_point():
        return None
    seen = []
    def replace(_, inputs, output):
        z = torch.linspace(-REACH, REACH, output.shape[-1], dtype=torch.float64, device=output.device)
        z = z.expand(output.shape).clone()                                           # [1, 3, V]
        z[..., 0], z[..., 1] = FAR, NEAR
        seen.append((inputs[0], output, z))
        return z
    try:
        hook = linear.register_forward_hook(replace)
        try:
            got = base.model(input_ids=ids.to(base.device), use_cache=False).logits  # [1, 3, V]
        finally:
            hook.remove()
        (h, output, z), = seen                                                       # called once
        (far, near), close = got[0, 0, :2].tolist(), 64 * torch.finfo(got.dtype).eps
        cap = None if far > FAR / 2 * near / NEAR else far
        scale = (near if cap is None else cap * math.atanh(near / cap)) / NEAR
        scale = 1.0 if abs(scale - 1) < close else scale
        want = squashed(z, scale, cap).to(got)
        right = got.dtype.itemsize >= 4 and got.shape == z.shape and torch.allclose(got, want, rtol=close, atol=close)
        plain = torch.allclose(output, F.linear(h, linear.weight, linear.bias), rtol=1e-2, atol=1e-2)
        caught = []
        with base.activate({"caught": caught}):
            base.model(input_ids=ids.to(base.device), use_cache=False)
        return Head(linear, scale, cap) if scale > 0 and right and plain and torch.equal(caught[0], h) else None
    except Exception as error:                                                       # it takes no logits but its own
        if out_of_memory(error):
            raise
        return None
