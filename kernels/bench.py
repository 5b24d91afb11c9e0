"""Measures what the low-rank part costs beside the frozen matmuls of a decoder layer, forward and backward.

    python kernels/bench.py              prints one table for this machine and saves it as results/kernels-<device>.md
    python kernels/bench.py --quick      fewer shapes

A step computes y, dx, dA and dB of a layer's seven projections, of which q, v or all carry adapters (r = 8). `base`
is y and dx of the seven without adapters, the cost common to all methods. Overhead = (step - base) / base. A and B
are float32, as train.py has them. A way's y and gradients are compared before it is timed."""
import itertools, pathlib, statistics, sys, timeit

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from kernels import lora
from reports.results import hardware
from runtime.files import today, write_whole
from runtime.flags import parse, run_main

RANK, SCALE, DTYPE = 8, 2.0, {"cpu": torch.float32, "cuda": torch.bfloat16}
SHAPES = {"cpu": ("smollm2-135m", (576, 576, 192, 1536)),    # hidden size, q width, k and v width, MLP width
          "cuda": ("qwen3-4b", (2560, 4096, 1024, 9728))}
ROWS = {"cpu": [(14, 37), (56, 73)], "cuda": [(56, 73), (56, 293)]}  # R rows of S tokens: 518, 4,088 or 16,408


# x [R, S, d_in], W [d_out, d_in], A [T, r, d_in], B [T, d_out, r], task [R] -> y [R, S, d_out]
def base(x, W, A, B, task):
    return F.linear(x, W)


def loop(x, W, A, B, task):
    """One task at a time on its own rows, as PEFT mixes adapters in a batch."""
    y = F.linear(x, W)
    for t in range(len(A)):
        own = task == t
        y[own] = y[own] + SCALE * F.linear(F.linear(x[own], A[t]), B[t])
    return y


def gathered(x, W, A, B, task):
    """A[task] and B[task] copied for every row."""
    s = torch.bmm(x, A[task].transpose(1, 2))                                        # [R, S, r]
    return torch.baddbmm(F.linear(x, W), s, B[task].transpose(1, 2), alpha=SCALE)


def ours(x, W, A, B, task):
    """kernels/lora.py: the Triton kernels on a GPU, plain torch on a CPU."""
    return lora.lora_linear(x, W, None, A, B, task, SCALE)


def case(sizes, R, S, T, device):
    """Returns (task [R], sorted, {m: (x, W, dy, A, B)}), a layer's projections with random values."""
    torch.manual_seed(0)
    (d, q, kv, ff), dtype = sizes, DTYPE[device.type]
    def draw(*shape):
        return torch.randn(shape, device=device) * shape[-1] ** -0.5
    dims = dict(q=(d, q), k=(d, kv), v=(d, kv), o=(q, d), gate=(d, ff), up=(d, ff), down=(ff, d))
    return (torch.arange(R, device=device) % T).sort()[0], {
        m: (draw(R, S, d_in).to(dtype).requires_grad_(), draw(d_out, d_in).to(dtype), draw(R, S, d_out).to(dtype),
            draw(T, RANK, d_in).requires_grad_(), draw(T, d_out, RANK).requires_grad_())
        for m, (d_in, d_out) in dims.items()}


def step(way, task, parts, modules):
    """Returns [y, dx, dA, dB, ...] of the adapted modules; the others run as `base`."""
    out = []
    for m, (x, W, dy, A, B) in parts.items():
        adapted = m in modules and way is not base
        a, b = (A, B) if way is ours else (A.to(x.dtype), B.to(x.dtype))
        y = (way if adapted else base)(x, W, a, b, task)
        grads = torch.autograd.grad(y, [x, A, B] if adapted else [x], dy)
        out += [y.detach(), *grads] if adapted else []
    return out


def seconds(step, device):
    """Median seconds of a step: of 10 on a CPU; on a GPU of those in 300 ms, the L2 cache overwritten before each."""
    if device.type == "cuda":
        return lora.triton.testing.do_bench(step, rep=300, return_mode="median") / 1000
    return statistics.median(timeit.repeat(step, number=1, repeat=12)[2:])           # the first two warm up


def layer_rows(task, parts, modules, copy, matmul):
    """Yields [way, ms, ..., peak MB] of every way to adapt `modules`. copy, matmul: bytes/s and FLOP/s, see machine.
    AssertionError if y or a gradient of a way is wrong."""
    gpu, want, floor = task.is_cuda, step(gathered, task, parts, modules), None
    tokens = parts["q"][0].shape[:2].numel()
    moved = 4 * tokens * sum(W.element_size() * sum(W.shape) for m, (_, W, *_) in parts.items() if m in modules)
    flops = 4 * tokens * sum(W.numel() for _, W, *_ in parts.values())               # of the frozen y and dx
    for way in (base, loop, gathered, ours):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()                                       # 0 without a GPU
        for a, b in zip(step(way, task, parts, modules), want):                      # nothing for `base`
            error = float((a.float() - b.float()).norm() / b.float().norm())
            assert error < (3e-2 if gpu else 1e-5), f"{way.__name__}: error {error:.1e}"
        peak = torch.cuda.max_memory_allocated() - before
        t = seconds(lambda: step(way, task, parts, modules), task.device)
        floor = floor or t                                                           # `base` comes first
        added = [""] * 3 if way is base else [f"{t / floor - 1:.1%}", "-", "-"]
        if t > floor:                                                                # else noise exceeds what it adds
            added[1:] = [f"{moved / (t - floor) / 1e9:.1f}", f"{moved / (t - floor) / copy:.0%}"]
        yield [way.__name__, f"{t * 1e3:.3f}", *added, f"{flops / t / 1e12:.2f}", f"{flops / t / matmul:.0%}",
               f"{peak / 2 ** 20:.0f}" if gpu else "-"]


def table(device, quick, copy, matmul):
    """Yields the rows of the table of the ways on whole layers."""
    (model, sizes), counts = SHAPES[device.type], ROWS[device.type][:1 if quick else None]
    yield "shapes,tokens,T,adapted,way,ms,overhead,GB/s,of copy,TFLOP/s,of matmul,peak MB".split(",")
    yield ["---"] * 12
    for (R, S), T in itertools.product(counts, (1, 4, 14)):
        task, parts = case(sizes, R, S, T, device)
        for adapted, modules in (("q,v", ("q", "v")), ("all", tuple(parts))):
            yield from ([model, R * S, T, adapted, *row] for row in layer_rows(task, parts, modules, copy, matmul))


def machine(device):
    """(bytes/s of a copy, FLOP/s of a square matmul) of this machine, measured."""
    gpu = device.type == "cuda"
    big, n = torch.ones(2 ** (28 if gpu else 26), device=device), 8192 if gpu else 1024
    other, (a, b) = torch.empty_like(big), torch.randn(2, n, n, device=device).to(DTYPE[device.type])
    return 2 * big.nbytes / seconds(lambda: other.copy_(big), device), 2 * n ** 3 / seconds(lambda: a @ b, device)


def write_table(path, lines, rows):
    """Prints a page, `lines` and then the rows of a Markdown table, and writes it to `path` after each row."""
    print(*lines, sep="\n")
    for row in rows:
        lines = [*lines, f"| {' | '.join(map(str, row))} |"]
        print(lines[-1], flush=True)
        write_whole(path, lambda p: p.write_text("\n".join([*lines, ""])))
    print(f"saved to {path}")


def main(argv=None):
    args = parse(__doc__, "quick device out", argv, quick=dict(action="store_true", help="fewer shapes"),
                 out=dict(default=pathlib.Path("results"), help="where the table is saved"))
    device = torch.device(args.device)
    copy, matmul = machine(device)
    head = [f"# One layer's projections, forward and backward, {device.type}", "",
            f"`python kernels/bench.py{' --quick' * args.quick}`, {today()}, {hardware()}, {DTYPE[device.type]}, "
            f"{torch.get_num_threads()} threads, r = {RANK}. Copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.2f} "
            "TFLOP/s, both measured here. GB/s: what the low-rank part has to move at the least over the time that it "
            "adds to the base; TFLOP/s: the frozen matmuls over the whole step.", ""]
    write_table(args.out / f"kernels-{device.type}.md", head, table(device, args.quick, copy, matmul))


if __name__ == "__main__":
    run_main(main)
