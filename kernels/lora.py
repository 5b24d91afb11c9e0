"""The batched LoRA matmul: every row of a batch has a task and is multiplied by that task's A and B.

    y = x W^T + s B_t^T,   s = scale * x A_t^T            x [R, S, d_in], A [T, r, d_in], B [T, d_out, r], t = task[row]

Why this needs kernels of its own. W is a square-ish matrix and its matmul runs at the speed of the tensor cores; cuBLAS
does that, and nothing here changes it. A and B are narrow: r is 8 or 16. For n = R S tokens in bf16 (2 bytes):

    x W^T        2 n d_in d_out FLOP                              compute bound
    x A_t^T      2 n d_in r     FLOP   reads  2 n d_in  bytes     r FLOP a byte
    + s B_t^T    2 n r d_out    FLOP   reads and writes y:        r / 2 FLOP a byte
                                       4 n d_out bytes

A GPU that does 990 TFLOP/s and moves 3.35 TB/s (an H100, on paper) needs 295 FLOP a byte to be compute bound. So the
adapter's time is the time to move its bytes, and x, y, dx and dy should be read and written as few times as possible:

    s  = scale * x A_t^T          shrink(x, A)         reads x              2 n d_in
    y += s B_t^T                  expand_add_(y, s, B) reads, writes y      4 n d_out
    ds = scale * dy B_t           shrink(dy, B^T)      reads dy             2 n d_out
    dx += ds A_t                  expand_add_(dx, ds, A^T)                  4 n d_in
    dA_t = sum_t ds^T x           outer(ds, x)         reads x              2 n d_in
    dB_t = sum_t (s^T dy)^T       outer(s, dy)         reads dy             2 n d_out
                                                       together             8 n (d_in + d_out) bytes

Three kernels with different arguments do all of it. Qwen3-4B's q (2560 -> 4096) at 4,096 tokens: 218 MB, 65 us at
3.35 TB/s, beside 172 GFLOP, 174 us at 990 TFLOP/s, of the frozen matmul and its dx. q and v of a layer: 100 us of bytes
beside the 1.7 ms of the layer's seven frozen matmuls, 6%; all seven: 0.56 ms, 34%. (Arithmetic; on a GPU not measured.
Fewer passes would be faster: one shrink for q, k, v, which share x, and ds and dB from one reading of dy.) On a
CPU, where matmuls are slower relative to memory, the plain-torch references measure 5% and 19%: results/kernels-cpu.md.

What the other ways cost: gathering A and B a row (`bmm`) copies R r (d_in + d_out) numbers and makes two more
tensors as large as y; a loop over tasks reads `task` on the host, so that the GPU waits, and launches T small matmuls;
one dense matmul with all T tasks' A side by side, masked, does T times the work.

A row belongs to one task as a whole. So a tile of a row needs no sorting, no table of segments and no host
synchronisation on `task`: it loads one integer. And `outer` needs no atomics: one program computes (task t, a tile of
columns) from t's rows in order, so that the same batch gives the same bits. Beside each kernel stands the same in
plain torch, which is its reference and what runs on a CPU."""
from __future__ import annotations  # the kernels' annotations stay text where triton is missing

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                                                                  # no triton for this platform: the
    triton = tl = None                                                            # plain-torch references do everything
jit = triton.jit if triton else lambda kernel: kernel


def fused(x):
    """Whether x goes to the Triton kernels, or to their plain-torch references: on a CPU, and in float64, which
    tl.dot does not take."""
    return x.is_cuda and triton is not None and x.dtype != torch.float64


def padded(r):
    """tl.dot needs at least 16 in every dimension: smaller ranks are filled up with zeros (by masks; nothing is
    copied)."""
    return max(16, triton.next_power_of_2(r))


# ---------------------------------------------------------------------------------------------- s = scale * x A_t^T
def shrink(x, A, task, scale):
    """x [R, S, D], A [T, r, D] of any strides, task [R] -> scale * x A_t^T [R, S, r] in x's dtype."""
    if not fused(x):
        return shrink_torch(x, A, task, scale)
    (R, S, D), r = x.shape, A.shape[1]
    s = x.new_empty(R, S, r)
    BS = 16 if R * S < 4096 else 32                                                 # few tokens: more, smaller programs
    shrink_kernel[R, triton.cdiv(S, BS)](x, A, task, s, scale, S, D, r, *x.stride(), *A.stride(), *s.stride(),
                                         BS=BS, BD=256 if D > 128 else 128, RP=padded(r), num_warps=4, num_stages=3)
    return s


def shrink_torch(x, A, task, scale):
    A = A.to(x.dtype).index_select(0, task)                                          # [R, r, D]
    return torch.baddbmm(x.new_zeros(1), x, A.transpose(1, 2), beta=0, alpha=scale)


@jit
def shrink_kernel(x, A, task, s, scale, S, D, r, xR, xS, xD, AT, Ar, AD, sR, sS, sr,
                  BS: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr):
    """A program: BS tokens of one row, all of D, BD columns at a time. x is read once; A comes out of the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(task + row)
    i, k = tl.program_id(1) * BS + tl.arange(0, BS), tl.arange(0, RP)
    acc = tl.zeros((BS, RP), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        x_tile = tl.load(x + row * xR + i[:, None] * xS + d[None, :] * xD,
                         mask=(i[:, None] < S) & (d[None, :] < D), other=0.0)        # [BS, BD]
        A_tile = tl.load(A + t * AT + d[:, None] * AD + k[None, :] * Ar,
                         mask=(d[:, None] < D) & (k[None, :] < r), other=0.0)        # [BD, RP]
        acc = tl.dot(x_tile, A_tile.to(x_tile.dtype), acc, input_precision="ieee")
    tl.store(s + row * sR + i[:, None] * sS + k[None, :] * sr, (acc * scale).to(s.dtype.element_ty),
             mask=(i[:, None] < S) & (k[None, :] < r))


# ---------------------------------------------------------------------------------------------- y += s B_t^T
def expand_add_(y, s, B, task):
    """y [R, S, D] += s B_t^T in place; s [R, S, r], B [T, D, r] of any strides, task [R]."""
    if not fused(y):
        return expand_add_torch_(y, s, B, task)
    (R, S, D), r, BS, BD = y.shape, s.shape[2], 64, 128
    expand_add_kernel[R, triton.cdiv(S, BS), triton.cdiv(D, BD)](
        y, s, B, task, S, D, r, *y.stride(), *s.stride(), *B.stride(), BS=BS, BD=BD, RP=padded(r), num_warps=4)
    return y


def expand_add_torch_(y, s, B, task):
    return y.baddbmm_(s, B.to(y.dtype).index_select(0, task).transpose(1, 2))


@jit
def expand_add_kernel(y, s, B, task, S, D, r, yR, yS, yD, sR, sS, sr, BT, BD_, Br,
                      BS: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr):
    """A program: one [BS, BD] tile of y, read and written once."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(task + row)
    i, k = tl.program_id(1) * BS + tl.arange(0, BS), tl.arange(0, RP)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    s_tile = tl.load(s + row * sR + i[:, None] * sS + k[None, :] * sr,
                     mask=(i[:, None] < S) & (k[None, :] < r), other=0.0)            # [BS, RP]
    B_tile = tl.load(B + t * BT + d[None, :] * BD_ + k[:, None] * Br,
                     mask=(d[None, :] < D) & (k[:, None] < r), other=0.0)            # [RP, BD]
    place = y + row * yR + i[:, None] * yS + d[None, :] * yD
    inside = (i[:, None] < S) & (d[None, :] < D)
    acc = tl.load(place, mask=inside, other=0.0).to(tl.float32)                      # [BS, BD]
    acc = tl.dot(s_tile, B_tile.to(s_tile.dtype), acc, input_precision="ieee")
    tl.store(place, acc.to(y.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------- dA_t = sum_t s^T x
def outer(s, x, task, T):
    """s [R, S, r], x [R, S, D], task [R] -> [T, r, D], the sum of s^T x over each task's rows; float32 at least.

    A task that no row has gets zeros. Where T and D are too small to give every multiprocessor a program, the tokens
    are split over `rows` x `tiles` programs, whose results are added up afterwards, in order.
    """
    if not fused(x):
        return outer_torch(s, x, task, T)
    (R, S, D), r, BS, BD = x.shape, s.shape[2], 64, 128
    columns = triton.cdiv(D, BD)
    splits = triton.cdiv(512, T * columns)                                           # a few programs a multiprocessor
    tiles = min(splits, triton.cdiv(S, BS))
    rows = min(triton.cdiv(splits, tiles), R)
    out = torch.empty(rows * tiles, T, r, D, dtype=torch.float32, device=x.device)
    outer_kernel[T, columns, rows * tiles](s, x, task, out, R, S, D, r, rows, tiles, *s.stride(), *x.stride(),
                                           *out.stride(), BS=BS, BD=BD, RP=padded(r), num_warps=4, num_stages=3)
    return out[0] if rows * tiles == 1 else out.sum(0)


def outer_torch(s, x, task, T):
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(T, s.shape[2], x.shape[2], dtype=dtype, device=x.device)
    return out.index_add_(0, task, torch.bmm(s.transpose(1, 2), x).to(dtype))


@jit
def outer_kernel(s, x, task, out, R, S, D, r, rows, tiles, sR, sS, sr, xR, xS, xD, oK, oT, oR, oD,
                 BS: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr):
    """A program: BD columns of one task, over every rows-th row and every tiles-th tile of BS tokens."""
    t, share = tl.program_id(0), tl.program_id(2).to(tl.int64)                # int64: so is row, and offsets grow large
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, RP)
    acc = tl.zeros((RP, BD), tl.float32)
    for row in range(share // tiles, R, rows):
        mine = tl.load(task + row) == t
        for start in range((share % tiles) * BS, tl.where(mine, S, 0), tiles * BS):  # no tile of another task's row
            i = start + tl.arange(0, BS)
            s_tile = tl.load(s + row * sR + i[None, :] * sS + k[:, None] * sr,
                             mask=(i[None, :] < S) & (k[:, None] < r), other=0.0)    # [RP, BS]
            x_tile = tl.load(x + row * xR + i[:, None] * xS + d[None, :] * xD,
                             mask=(i[:, None] < S) & (d[None, :] < D), other=0.0)    # [BS, BD]
            acc = tl.dot(s_tile, x_tile.to(s_tile.dtype), acc, input_precision="ieee")
    tl.store(out + share * oK + t * oT + k[:, None] * oR + d[None, :] * oD, acc,
             mask=(k[:, None] < r) & (d[None, :] < D))


# ---------------------------------------------------------------------------------------------- with gradients
class LoRALinear(torch.autograd.Function):
    """The frozen linear layer and the low-rank part as one node, so that the low-rank part can be added in place: to
    the y that the frozen matmul has just made, and to its dx. W and its bias are frozen and get no gradient.

    W None: the frozen layer's y is an input and its part of dx is left to autograd. Neither is changed in place."""

    @staticmethod
    def forward(ctx, x, y, W, bias, A, B, task, scale):
        with torch.cuda.device_of(x):                                              # Triton launches on the current GPU;
            s = shrink(x, A, task, scale)                                        # bases may be on several     [R, S, r]
            ctx.save_for_backward(x, W, A, B, task, s)
            ctx.scale = scale
            return expand_add_(y.clone() if W is None else F.linear(x, W, bias), s, B, task)  # [R, S, d_out]

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, task, s = ctx.saved_tensors
        need_x, need_y, _, _, need_A, need_B, _, _ = ctx.needs_input_grad
        dx = dA = dB = None
        if need_x or need_A:
            ds = shrink(dy, B.transpose(1, 2), task, ctx.scale)                      # [R, S, r]
        if need_x:                                                                  # not in the first layer: embeddings
            frozen = torch.zeros_like(x) if W is None else dy @ W                    # are frozen
            dx = expand_add_(frozen, ds, A.transpose(1, 2), task)                    # [R, S, d_in]
        if need_A:
            dA = outer(ds, x, task, len(A)).to(A.dtype)                              # [T, r, d_in]
        if need_B:
            dB = outer(s, dy, task, len(B)).transpose(1, 2).to(B.dtype)              # [T, d_out, r]
        return dx, dy if need_y else None, None, None, dA, dB, None, None


def lora_linear(x, W, bias, A, B, task, scale):
    """y = x W^T + bias + scale * (x A_t^T) B_t^T (portal.py, last equation), differentiable in x, A and B.

    x [R, S, d_in], W [d_out, d_in], bias [d_out] or None, A [T, r, d_in], B [T, d_out, r], task [R] of integers in
    0..T-1 on x's device -> [R, S, d_out]. A and B may be wider than x (float32 beside bf16): they are rounded tile by
    tile and their gradients are not rounded at all. Raises ValueError for shapes that do not fit.
    """
    check(x, W.shape, A, B, task)
    return LoRALinear.apply(x, None, W, bias, A, B, task, scale)


def lora_add(y, x, A, B, task, scale):
    """y + scale * (x A_t^T) B_t^T, differentiable in y, x, A and B: the same for a layer whose W is not a plain matrix,
    as in a quantised one. y [R, S, d_out] is that layer's output for x [R, S, d_in]."""
    check(x, (y.shape[-1], x.shape[-1]), A, B, task)
    return LoRALinear.apply(x, y, None, None, A, B, task, scale)


def check(x, W_shape, A, B, task):
    fits = x.dim() == 3 and A.dim() == B.dim() == 3 and task.shape == x.shape[:1] and len(A) == len(B)
    if not (fits and A.shape[2] == x.shape[2] == W_shape[1] and B.shape[1] == W_shape[0] and A.shape[1] == B.shape[2]):
        raise ValueError(f"x {[*x.shape]}, W {[*W_shape]}, A {[*A.shape]}, B {[*B.shape]}, task {[*task.shape]} "
                         "do not fit [R, S, d_in], [d_out, d_in], [T, r, d_in], [T, d_out, r], [R]")
