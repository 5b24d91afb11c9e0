"""The frozen LM head and the NLL as one node, without the logits [N, V] of all positions.

    z = scale * (h W^T + bias)                        h [N, d], W [V, d], bias [V] or None; source, target, weight [M]
    l = cap * tanh(z / cap), or z
    nll_m = logsumexp(l_n) - l_n,target_m             n = source_m
    loss = sum_m weight_m nll_m

Why this needs code of its own. A vocabulary is wide: Gemma-3-270M has d 640 and V 262,144. For N = 4,096 positions in
bf16, where h and its gradient are 5 MB each and W is 336 MB, the logits are 2.1 GB, and a softmax needs float32:

    logits = h W^T          bf16     written                            2 N V bytes      2.1 GB kept
    float32 logits                   read, written                      6 N V            4.3 GB kept until the softmax
    log-softmax             float32  read, written                      8 N V            4.3 GB kept for its backward
    its gradient            float32  written, filled in; read, written 16 N V            4.3 GB twice
    in bf16                          read, written                      6 N V            2.1 GB
    dh = dlogits W                   read                               2 N V            together 40 N V bytes, 43 GB

That is 13 ms at 3.35 TB/s (an H100, on paper) beside 2.8 ms at 990 TFLOP/s for the two matmuls' 4 N d V = 2.7 TFLOP,
and a peak of about 13 GB; in float32 on a CPU three tensors of 4.3 GB.

Here a block of B positions goes through all of it before the next: logits, softmax, gradient, dh. W is frozen and the
weights are known, so the forward pass ends with dh [N, d], and the backward pass multiplies it by one number. The
softmax and its gradient are one kernel, which works in place, in float32 within a row:

    logits [B, V] = h W^T            matmul             written         2 N V bytes
    softmax_gradient_                read, read, written                6 N V
    dh [B, d] = dlogits W            matmul             read            2 N V            together 10 N V, 3.2 ms
    W                                read twice a block                 4 d V N / B      5 GB, behind the matmuls

On a GPU B V = 2^27 numbers, 512 positions and 268 MB here: each matmul does B = 512 FLOP for a byte of W, more than the
295 that make it compute bound. (Arithmetic; on a GPU not measured.) On a CPU B V = 2^25: 128 positions and 134 MB in
float32, below which its matmuls are slower; measured in results/cross-entropy-cpu.md. Liger's fused linear
cross-entropy cuts the same way; Apple's cut cross-entropy also cuts the vocabulary and forms the logits twice.

Several targets may share a position: the last one of a prompt predicts the first token of each continuation. The
gradient of a row is (sum of its weights) * softmax - (each target's weight at that target), subtracted in float32
before it is rounded, since the two nearly cancel where the model is right. A row is one program's, which goes through
the row's targets in order: no atomics, and the same batch gives the same bits. Beside the kernel stands the same in
plain torch, which is its reference and what runs on a CPU; beside the whole, `naive`, with all logits."""
from __future__ import annotations  # the kernel's annotations stay text where triton is missing

import functools

import torch
import torch.nn.functional as F

from kernels.lora import fused, jit, tl

BLOCK = dict(cpu=2 ** 25, cuda=2 ** 27)                                              # logits in a block
CACHED = 2 ** 21                                                                     # 8 MB, for a CPU's cache


def wide(dtype):
    """Returns the dtype of long sums, as in a softmax: float32 for half precision, float32 and float64 as they are."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------- with all logits
def naive(h, W, bias, source, target, weight, scale=1.0, cap=None):
    """linear_nll, differentiated by autograd."""
    logits = squashed(F.linear(h, W, bias).to(wide(h.dtype)), scale, cap)            # [N, V]
    return nll_of(logits, source, target, weight)


def nll_of(logits, source, target, weight):
    """Returns (loss, nll [M], best [M] or None) of logits [N, V], differentiable in them: see linear_nll."""
    log_p = logits.to(wide(logits.dtype)).log_softmax(-1)
    nll = -log_p[source, target]                                                     # [M]
    loss = (weight.to(nll) * nll).sum()
    return loss, nll.detach(), None if loss.requires_grad else logits.argmax(-1)[source]


def squashed(z, scale, cap):
    """cap * tanh(scale * z / cap), or scale * z where cap is None."""
    z = z if scale == 1 else z * scale
    return z if cap is None else cap * torch.tanh(z / cap)


# ---------------------------------------------------------------------------------------------- a block's softmax
def softmax_gradient_(logits, targets, start, scale, cap, need):
    """Returns the logsumexp of l as (max [B], log of the sum of exp(l - max) [B]), and writes the gradient of the loss
    on `logits` in their place, if `need` says so.

    logits [B, V], contiguous: the positions from `start` on, before scale and cap. targets: see Targets."""
    B, V = logits.shape
    if not fused(logits):
        few = max(1, CACHED // V)                                                    # rows
        parts = [softmax_gradient_torch_(logits[k:k + few], targets, start + k, scale, cap, need)
                 for k in range(0, B, few)]
        return parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
    top, log_sum = logits.new_empty(2, B, dtype=torch.float32)
    order, first = targets.by_position
    softmax_gradient_kernel[B,](
        logits, top, log_sum, targets.share[start:], first[start:], targets.target[order], targets.weight[order], V,
        scale, 0.0 if cap is None else cap, NEED=need, CAPPED=cap is not None, BV=min(4096, max(128, power_of_2(V))),
        num_warps=8)
    return top, log_sum


def softmax_gradient_torch_(logits, targets, start, scale, cap, need):
    x = logits.to(wide(logits.dtype))                                                # a copy, of half precision
    if scale != 1:
        x.mul_(scale)
    if cap is not None:
        x.div_(cap).tanh_()
        slope = 1 - x.square() if need else None
        x.mul_(cap)
    top = x.amax(1, keepdim=True)
    total = x.sub_(top).exp_().sum(1, keepdim=True)                                  # [B, 1]
    if need:
        inside, local = targets.within(start, len(x))
        x.mul_(targets.share[start:start + len(x), None] * scale / total)
        x.index_put_((local, targets.target), torch.where(inside, targets.weight, 0) * -scale, accumulate=True)
        if cap is not None:
            x.mul_(slope)
        if x is not logits:
            logits.copy_(x)
    return top[:, 0], total.log_()[:, 0]


@jit
def softmax_gradient_kernel(logits, top, log_sum, share, first, target, weight, V, scale, cap,
                            NEED: tl.constexpr, CAPPED: tl.constexpr, BV: tl.constexpr):
    """A program: a row, BV columns at a time, read once for its maximum and sum, and once more for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    place, highest, total = logits + row * V, -3e38, 0.0                             # -3e38: a logit may be -inf
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(place + v, mask=v < V, other=0.0).to(tl.float32) * scale         # [BV]
        if CAPPED:
            x = cap * (2 * tl.sigmoid(2 / cap * x) - 1)                              # tanh
        x = tl.where(v < V, x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    tl.store(top + row, highest)
    tl.store(log_sum + row, tl.log(total))
    if NEED:
        factor, begin, end = tl.load(share + row) / total, tl.load(first + row), tl.load(first + row + 1)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(place + v, mask=v < V, other=0.0).to(tl.float32) * scale
            slope = scale
            if CAPPED:
                x = 2 * tl.sigmoid(2 / cap * x) - 1
                slope = scale * (1 - x * x)
                x = cap * x
            x = factor * tl.exp(x - highest)
            for m in range(begin, end):                                              # mostly one
                x -= tl.where(v == tl.load(target + m), tl.load(weight + m), 0.0)
            tl.store(place + v, (x * slope).to(logits.dtype.element_ty), mask=v < V)


def power_of_2(n):
    """Returns the power of 2 that n is, or the next one."""
    return 1 << (n - 1).bit_length()


class Targets:
    """M targets at N positions: source, target, weight [M], and share [N], the sum of each position's weights."""

    def __init__(self, source, target, weight, N):
        self.source, self.target, self.weight, self.N = source, target, weight, N
        self.share = weight.new_zeros(N).index_add_(0, source, weight)

    @functools.cached_property
    def by_position(self):
        """(order [M] that sorts the targets by position, first [N + 1]: where each position's begin in it)."""
        ordered, order = self.source.sort(stable=True)
        return order, torch.searchsorted(ordered, torch.arange(self.N + 1, device=ordered.device))

    def within(self, start, B):
        """(which targets are at the B positions from `start` on [M], their position in there [M]; of the others, any).
        All M each time: how many these are is not known to the host."""
        local = self.source - start
        return (local >= 0) & (local < B), local.clamp(0, B - 1)


# ---------------------------------------------------------------------------------------------- block by block
class LinearNLL(torch.autograd.Function):
    """loss and nll, with the gradient of the loss on h formed beside them, or else `best`. W and bias are frozen and
    get none; nll carries none."""

    @staticmethod
    def forward(ctx, h, W, bias, source, target, weight, scale, cap, need):
        N, V = len(h), len(W)
        h = h.contiguous()                                                           # a CPU's bf16 matmul needs it
        blocks = -(-N * V // BLOCK["cuda" if h.is_cuda else "cpu"])
        size = -(-N // blocks)                                                       # all blocks about as large
        targets = Targets(source, target, weight, N)
        block, dh, nll = h.new_empty(size, V), torch.empty_like(h) if need else None, torch.zeros_like(weight)
        best = None if need else torch.empty(N, dtype=target.dtype, device=h.device)
        with torch.cuda.device_of(h):
            for start in range(0, N, size):
                x = h[start:start + size]
                logits = block[:len(x)]
                torch.mm(x, W.T, out=logits) if bias is None else torch.addmm(bias, x, W.T, out=logits)
                inside, local = targets.within(start, len(x))
                own = squashed(logits[local, target].to(weight.dtype), scale, cap)   # [M]
                if not need:
                    torch.argmax(squashed(logits, scale, cap), 1, out=best[start:start + size])  # it rounds: ties
                top, log_sum = softmax_gradient_(logits, targets, start, scale, cap, need)
                nll = torch.where(inside, (top[local] - own) + log_sum[local], nll)  # exact where own is the highest
                if need:
                    torch.mm(logits, W, out=dh[start:start + size])
        ctx.save_for_backward(dh)
        ctx.mark_non_differentiable(nll)
        return (weight * nll).sum(), nll, None if need else best[source]

    @staticmethod
    def backward(ctx, upstream, *_):
        dh, = ctx.saved_tensors
        return dh * upstream, *[None] * 8


def linear_nll(h, W, bias, source, target, weight, scale=1.0, cap=None):
    """Returns (loss, nll [M], best [M]): nll of target m at position source[m], and their sum times the weights,
    differentiable in h; h's dtype, float32 at least. best: the most probable token at each target's position; None
    where the loss has a gradient, since only evaluation asks for it.

    h [N, d], W [V, d], bias [V] or None; source [M] in 0..N-1, target [M] in 0..V-1, in any order and more than once,
    weight [M]; on W's device, or moved there. Raises ValueError for shapes that do not fit."""
    fits = h.dim() == W.dim() == 2 and h.shape[1] == W.shape[1] and (bias is None or bias.shape == W.shape[:1])
    if not (fits and source.dim() == 1 and source.shape == target.shape == weight.shape):
        raise ValueError(f"h {[*h.shape]}, W {[*W.shape]}, source {[*source.shape]}, target {[*target.shape]}, weight "
                         f"{[*weight.shape]} do not fit [N, d], [V, d], [M], [M], [M]")
    h, source, target = (a.to(W.device) for a in (h, source, target))
    weight = weight.to(W.device, wide(h.dtype))
    need = h.requires_grad and torch.is_grad_enabled()
    return LinearNLL.apply(h, W, bias, source, target, weight, scale, cap, need)
