"""Measures what the low-rank part costs beside the frozen matmuls of a decoder layer, forward and backward.

    python kernels/bench.py              prints one table for this machine and saves it as results/kernels-<device>.md
    python kernels/bench.py --quick      fewer shapes

A step computes y, dx, dA and dB of a layer's seven projections, of which q, v or all carry adapters (r = 8). `base`
is y and dx of the seven without adapters, the cost common to all methods. Overhead = (step - base) / base. A and B
are float32 in ours, as train.py has them; the other ways get them in x's dtype, which spares them the casts. On a CPU
everything is float32 and the shapes are SmolLM2-135M's. A way's y and gradients are compared before it is timed."""
import itertools, pathlib, platform, statistics, sys, timeit

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from kernels import lora
from runtime.files import first_line, today, write_whole
from runtime.flags import parse, run_main

RANK, SCALE, DTYPE = 8, 2.0, {"cpu": torch.float32, "cuda": torch.bfloat16}
SHAPES = {  # hidden size, q width, k and v width, MLP width; the first is the CPU's, the others a GPU's
    "smollm2-135m": (576, 576, 192, 1536), "qwen3-1.7b": (2048, 2048, 1024, 6144), "qwen3-4b": (2560, 4096, 1024, 9728),
    "qwen3-8b": (4096, 4096, 1024, 12288), "gemma-3-4b": (2560, 2048, 1024, 10240),
}
ROWS = {512: (14, 37), 4096: (56, 73), 16384: (56, 293)}  # tokens -> rows R of S tokens: 518, 4,088 and 16,408


# x [R, S, d_in], W [d_out, d_in], A [T, r, d_in], B [T, d_out, r], task [R], rows: task as a list -> y [R, S, d_out]
def base(x, W, A, B, task, rows):
    return F.linear(x, W)


def loop(x, W, A, B, task, rows):
    """One task at a time on its own rows, as PEFT mixes adapters in a batch."""
    y = F.linear(x, W)
    for t in sorted(set(rows)):
        own = [row for row, of in enumerate(rows) if of == t]
        y[own] = y[own] + SCALE * F.linear(F.linear(x[own], A[t]), B[t])
    return y


def gathered(x, W, A, B, task, rows):
    """A[task] and B[task] copied for every row."""
    s = torch.bmm(x, A[task].transpose(1, 2))                                        # [R, S, r]
    return torch.baddbmm(F.linear(x, W), s, B[task].transpose(1, 2), alpha=SCALE)


def dense(x, W, A, B, task, rows):
    """The A of all tasks side by side: one matmul, masked, then one matmul with all B."""
    T, r = A.shape[:2]
    mask = F.one_hot(task, T).to(x.dtype).repeat_interleave(r, 1)[:, None]           # [R, 1, T r]
    s = F.linear(x, A.flatten(0, 1)) * (SCALE * mask)                                # [R, S, T r]
    return F.linear(x, W) + s @ B.permute(0, 2, 1).flatten(0, 1)                     # [T r, d_out]


def grouped(x, W, A, B, task, rows):
    """torch's grouped_mm. The rows come sorted by task, and the sorting is not timed."""
    ends = torch.cumsum(torch.bincount(task, minlength=len(A)) * x.shape[1], 0).int()  # [T]
    s = F.grouped_mm(x.flatten(0, 1), A.transpose(1, 2), offs=ends)                  # [R S, r]
    return F.linear(x, W) + SCALE * F.grouped_mm(s, B.transpose(1, 2), offs=ends).view(*x.shape[:2], -1)


def ours(x, W, A, B, task, rows):
    """kernels/lora.py: the Triton kernels on a GPU, plain torch on a CPU."""
    return lora.lora_linear(x, W, None, A, B, task, SCALE)


WAYS = {f.__name__: f for f in (base, loop, gathered, dense, grouped, ours)} | {"graph": ours}  # a CUDA graph of ours


class Case:
    """A layer's projections with random weights, and R rows of S tokens of T tasks, sorted by task."""

    def __init__(self, model, tokens, T, device):
        torch.manual_seed(0)
        (R, S), (d, q, kv, ff), dtype = ROWS[tokens], SHAPES[model], DTYPE[device.type]
        self.tokens, self.rows = R * S, sorted(row % T for row in range(R))
        self.task, self.parts, self.narrow = torch.tensor(self.rows, device=device), {}, {}
        def draw(*shape):
            return torch.randn(shape, device=device) * shape[-1] ** -0.5
        dims = dict(q=(d, q), k=(d, kv), v=(d, kv), o=(q, d), gate=(d, ff), up=(d, ff), down=(ff, d))
        for m, (d_in, d_out) in dims.items():
            A, B = draw(T, RANK, d_in).requires_grad_(), draw(T, d_out, RANK).requires_grad_()
            x, W, dy = (draw(*shape).to(dtype) for shape in ((R, S, d_in), (d_out, d_in), (R, S, d_out)))
            self.parts[m] = x.requires_grad_(), W, dy, A, B
            self.narrow[m] = [a.detach().to(dtype).requires_grad_() for a in (A, B)]  # for all but ours

    def step(self, way, modules):
        """Returns [y, dx, dA, dB, ...] of the adapted modules; the others run as `base`."""
        out = []
        for m, (x, W, dy, *AB) in self.parts.items():
            AB, adapted = AB if way is ours else self.narrow[m], m in modules and way is not base
            y = (way if adapted else base)(x, W, *AB, self.task, self.rows)
            grads = torch.autograd.grad(y, [x, *AB] if adapted else [x], dy)
            out += [y.detach(), *grads] if adapted else []
        return out


def seconds(step, device):
    """Median seconds of a step: of 10 on a CPU; on a GPU of those in 300 ms, the L2 cache overwritten before each."""
    if device.type == "cuda":
        return lora.triton.testing.do_bench(step, rep=300, return_mode="median") / 1000
    return statistics.median(timeit.repeat(step, number=1, repeat=12)[2:])           # the first two warm up


def graph(step):
    """Captures a step as one CUDA graph and returns its replay: the same kernels without the time to launch them."""
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):                                                  # warm up, before the capture, on
        for _ in range(3):                                                           # a side stream
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def measure(case, name, modules, want):
    """Returns (seconds of a step, its peak bytes on a GPU). AssertionError if y or a gradient is not as in `want`."""
    gpu, step = case.task.is_cuda, lambda: case.step(WAYS[name], modules)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()                                           # 0 without a GPU, at the peak too
    step = graph(step) if name == "graph" else step
    got = step() or ()                                                               # a replay returns None
    peak = torch.cuda.max_memory_allocated() - before
    for a, b in zip(got, want):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error < (3e-2 if gpu else 1e-5), f"error {error:.1e}"
    return seconds(step, case.task.device), peak


def layer_rows(case, modules, copy, matmul):
    """Yields [way, ms, ..., peak MB] of every way to adapt `modules`. copy, matmul: bytes/s and FLOP/s, see machine."""
    want, weights = case.step(gathered, modules), {m: part[1] for m, part in case.parts.items()}
    moved = 4 * case.tokens * sum(W.element_size() * sum(W.shape) for m, W in weights.items() if m in modules)
    flops, floor = 4 * case.tokens * sum(W.numel() for W in weights.values()), None  # of the frozen y and dx
    for name in WAYS if case.task.is_cuda else [name for name in WAYS if name != "graph"]:
        try:
            t, peak = measure(case, name, modules, want)
        except Exception as error:                                                   # torch lacks that way here
            yield [name, f"not measured: {type(error).__name__}: {first_line(error)[:60]}", *[""] * 6]
            continue
        floor = t if name == "base" else floor
        added = [""] * 3 if name == "base" else [f"{t / floor - 1:.1%}", "-", "-"]
        if t > floor:                                                                # else noise exceeds what it adds
            added[1:] = [f"{moved / (t - floor) / 1e9:.1f}", f"{moved / (t - floor) / copy:.0%}"]
        yield [name, f"{t * 1e3:.3f}", *added, f"{flops / t / 1e12:.2f}", f"{flops / t / matmul:.0%}",
               f"{peak / 2 ** 20:.0f}" if case.task.is_cuda else "-"]


def table(device, quick, copy, matmul):
    """Yields the rows of both tables: the ways on whole layers, then the kernels alone on q's x and dy."""
    gpu = device.type == "cuda"
    models, counts = (list(SHAPES)[1:], list(ROWS)) if gpu else (list(SHAPES)[:1], list(ROWS)[:2])
    if quick:
        models, counts = models[:2], counts[1:] if gpu else counts[:1]
    yield "shapes,tokens,T,adapted,way,ms,overhead,GB/s,of copy,TFLOP/s,of matmul,peak MB".split(",")
    yield ["---"] * 12
    for model, tokens, T in itertools.product(models, counts, (1, 4, 14)):
        case = Case(model, tokens, T, device)
        for adapted, modules in (("q,v", ("q", "v")), ("all", tuple(case.parts))):
            yield from ([model, case.tokens, T, adapted, *cells] for cells in layer_rows(case, modules, copy, matmul))
    yield []
    yield "kernel alone, T = 14", "x", "us", "GB/s", "of copy"
    yield ["---"] * 5
    case = Case("qwen3-4b" if gpu else "smollm2-135m", 16384, 14, device)
    (x, _, dy, A, B), task = map(torch.Tensor.detach, case.parts["q"]), case.task
    s = lora.shrink(x, A, task, SCALE)
    for name, moved, f in (("shrink", x.nbytes, lambda: lora.shrink(x, A, task, SCALE)),
                           ("expand_add_", 2 * dy.nbytes, lambda: lora.expand_add_(dy, s, B, task)),
                           ("outer", x.nbytes, lambda: lora.outer(s, x, task, len(A)))):
        t = seconds(f, x.device)
        yield [name, [*x.shape], f"{t * 1e6:.0f}", f"{moved / t / 1e9:.0f}", f"{moved / t / copy:.0%}"]


def machine(device):
    """(bytes/s of a copy, FLOP/s of a square matmul) of this machine, measured."""
    gpu = device.type == "cuda"
    big, n = torch.ones(2 ** (28 if gpu else 26), device=device), 8192 if gpu else 1024
    other, (a, b) = torch.empty_like(big), torch.randn(2, n, n, device=device).to(DTYPE[device.type])
    return 2 * big.nbytes / seconds(lambda: other.copy_(big), device), 2 * n ** 3 / seconds(lambda: a @ b, device)


def main(argv=None):
    args = parse(__doc__, "quick device out", argv, quick=dict(action="store_true", help="fewer shapes"), out=dict(
        type=pathlib.Path, default=pathlib.Path("results"), metavar="DIR", help="where the table is saved"))
    device = torch.device(args.device)
    gpu, (copy, matmul) = device.type == "cuda", machine(device)
    name = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU"
    lines = [f"# One layer's projections, forward and backward: {name}", "",
             f"`python kernels/bench.py{' --quick' * args.quick}`, {today()}, torch {torch.__version__}, "
             f"{DTYPE[device.type]}, {torch.get_num_threads()} threads, r = {RANK}, medians of "
             f"{'300 ms' if gpu else 10}. Copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.2f} TFLOP/s, both "
             "measured here. GB/s: what the low-rank part has to move at the least over the time that it adds to the "
             "base; TFLOP/s: the frozen matmuls over the whole step.", ""]
    print(*lines, sep="\n")
    for row in table(device, args.quick, copy, matmul):
        lines.append(f"| {' | '.join(map(str, row))} |" if row else "")
        print(lines[-1], flush=True)
    lines += [] if gpu else ["", "The Triton kernels on a GPU: not measured."]
    path = args.out / f"kernels-{device.type}.md"
    write_whole(path, lambda p: p.write_text("\n".join([*lines, ""])))
    print(f"saved to {path}")


if __name__ == "__main__":
    run_main(main)
