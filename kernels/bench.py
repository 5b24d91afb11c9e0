"""What the low-rank part costs beside the frozen matmuls: forward and backward of one decoder layer's projections.

    python kernels/bench.py              one table for this machine, printed and saved as results/kernels-<device>.md
    python kernels/bench.py --quick      fewer shapes

A step is y, dx, dA and dB of the seven projections of one layer, of which q, v or all carry adapters (r = 8). `base` is
the seven alone: y and dx, what any method pays. Overhead = (step - base) / base. The ways to add the low-rank part:

    loop      a task at a time on its own rows, as PEFT mixes adapters in a batch
    gathered  A[task] and B[task] a row, bmm and baddbmm
    dense     all tasks' A side by side, one matmul, masked, one matmul with all B
    grouped   torch's grouped_mm; the rows come sorted by task, which is given away for free
    ours      kernels/lora.py: on a GPU the Triton kernels, on a CPU their torch twins
    graph     ours under a CUDA graph: the same kernels without the host's time to launch them

A and B are float32 in ours, as train.py has them; the rivals get them in x's dtype, which spares them the casts. On a CPU
everything is float32 and the shapes are SmolLM2-135M's. Every way's y and gradients are compared before it is timed.
"""
import pathlib, platform, statistics, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from cli import parse, run_main, today, write_whole
from kernels import lora

RANK, SCALE = 8, 2.0
SHAPES = {  # hidden size, q width, k and v width, MLP width
    "smollm2-135m": (576, 576, 192, 1536), "qwen3-1.7b": (2048, 2048, 1024, 6144), "qwen3-4b": (2560, 4096, 1024, 9728),
    "qwen3-8b": (4096, 4096, 1024, 12288), "gemma-3-4b": (2560, 2048, 1024, 10240),
}
ROWS = {512: (14, 37), 4096: (56, 73), 16384: (56, 293)}  # tokens -> rows R of S tokens: 518, 4,088 and 16,408


def projections(model):
    """{module kind: (d_in, d_out)} of one layer."""
    d, q, kv, ff = SHAPES[model]
    return {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, ff), "up": (d, ff), "down": (ff, d)}


# ---------------------------------------------------------------------------------------------- the ways
# Each: x [R, S, d_in], W [d_out, d_in], A [T, r, d_in], B [T, d_out, r], task [R], the same as a list -> y [R, S, d_out]
def base(x, W, A, B, task, rows):
    return F.linear(x, W)


def loop(x, W, A, B, task, rows):
    y = F.linear(x, W)
    for t in range(len(A)):
        mine = [row for row, own in enumerate(rows) if own == t]
        if mine:
            y[mine] = y[mine] + SCALE * F.linear(F.linear(x[mine], A[t]), B[t])
    return y


def gathered(x, W, A, B, task, rows):
    s = torch.bmm(x, A[task].transpose(1, 2))                                        # [R, S, r]
    return torch.baddbmm(F.linear(x, W), s, B[task].transpose(1, 2), alpha=SCALE)


def dense(x, W, A, B, task, rows):
    T, r = A.shape[:2]
    mask = F.one_hot(task, T).to(x.dtype).repeat_interleave(r, 1)[:, None]           # [R, 1, T r]
    s = F.linear(x, A.flatten(0, 1)) * (SCALE * mask)                                # [R, S, T r]
    return F.linear(x, W) + s @ B.permute(0, 2, 1).flatten(0, 1)                     # [T r, d_out]


def grouped(x, W, A, B, task, rows):
    ends = torch.cumsum(torch.bincount(task, minlength=len(A)) * x.shape[1], 0).int()  # [T]
    s = F.grouped_mm(x.flatten(0, 1), A.transpose(1, 2), offs=ends)                  # [R S, r]
    return F.linear(x, W) + SCALE * F.grouped_mm(s, B.transpose(1, 2), offs=ends).view(*x.shape[:2], -1)


def ours(x, W, A, B, task, rows):
    return lora.lora_linear(x, W, None, A, B, task, SCALE)


WAYS = {f.__name__: f for f in (loop, gathered, dense, grouped, ours)}


# ---------------------------------------------------------------------------------------------- timing
def seconds(step, device, repeats=10):
    """Median seconds of a step; on a GPU by events, the L2 cache overwritten before each."""
    for _ in range(2):
        step()
    if device.type == "cpu":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return statistics.median(found)
    flush = torch.empty(256 * 2 ** 20, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def machine(device, dtype):
    """(bytes/s of a copy, FLOP/s of a square matmul) of this machine, measured."""
    big = torch.empty(2 ** (28 if device.type == "cuda" else 26), dtype=torch.float32, device=device).fill_(1)
    other = torch.empty_like(big)
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * big.nbytes / seconds(lambda: other.copy_(big), device), 2 * n ** 3 / seconds(lambda: a @ b, device)


class Case:
    """One layer's projections with random weights: `step(way, modules)` runs y, dx, dA, dB of all seven."""

    def __init__(self, model, tokens, T, device, dtype):
        torch.manual_seed(0)
        (R, S), self.dims = ROWS[tokens], projections(model)
        self.rows = sorted(row % T for row in range(R))
        self.task = torch.tensor(self.rows, device=device)
        def draw(*shape, dtype=dtype):
            return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)
        self.x = {m: draw(R, S, d_in).requires_grad_() for m, (d_in, _) in self.dims.items()}
        self.W = {m: draw(d_out, d_in) for m, (d_in, d_out) in self.dims.items()}
        self.dy = {m: draw(R, S, d_out) for m, (_, d_out) in self.dims.items()}
        wide = {m: (draw(T, RANK, d_in, dtype=torch.float32), draw(T, d_out, RANK, dtype=torch.float32))
                for m, (d_in, d_out) in self.dims.items()}
        self.wide = {m: [a.requires_grad_() for a in AB] for m, AB in wide.items()}  # ours
        self.narrow = {m: [a.detach().to(dtype).requires_grad_() for a in AB] for m, AB in wide.items()}

    def step(self, way, modules):
        """-> {m: (y, dx, dA, dB)} of the adapted modules; the others run as `base`."""
        factors, out = self.wide if way is ours else self.narrow, {}
        for m in self.dims:
            adapted = m in modules
            y = (way if adapted else base)(self.x[m], self.W[m], *factors[m], self.task, self.rows)
            leaves = [self.x[m], *factors[m]] if adapted else [self.x[m]]
            grads = torch.autograd.grad(y, leaves, self.dy[m])
            if adapted:
                out[m] = (y, *grads)
        return out

    def bytes(self, modules):
        """What the low-rank part has to move at the least: 8 n (d_in + d_out) in bf16 (kernels/lora.py), twice that in
        float32."""
        n, size = self.task.numel() * next(iter(self.x.values())).shape[1], next(iter(self.x.values())).element_size()
        return sum(4 * size * n * sum(self.dims[m]) for m in modules)

    def flops(self):
        """The frozen y and dx."""
        n = self.task.numel() * next(iter(self.x.values())).shape[1]
        return sum(4 * n * d_in * d_out for d_in, d_out in self.dims.values())


def graph(case, modules):
    """The step of `ours` as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):                                                  # warm up apart, as capture demands
        for _ in range(3):
            case.step(ours, modules)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        case.step(ours, modules)
    return captured.replay


def worst(got, want):
    return max(float((a.float() - b.float()).detach().norm() / b.float().norm()) for m in want for a, b in zip(got[m], want[m]))


def single_kernels(device, dtype, copy):
    """shrink, expand_add_ and outer alone, on qwen3-4b's q at 16,408 tokens, T = 14: lines of the second table."""
    case = Case("qwen3-4b" if device.type == "cuda" else "smollm2-135m", 16384, 14, device, dtype)
    x, dy, (A, B) = case.x["q"].detach(), case.dy["q"], [a.detach() for a in case.wide["q"]]
    s = lora.shrink(x, A, case.task, SCALE)
    for name, moved, f in (("shrink", x.nbytes, lambda: lora.shrink(x, A, case.task, SCALE)),
                           ("expand_add_", 2 * dy.nbytes, lambda: lora.expand_add_(dy, s, B, case.task)),
                           ("outer", x.nbytes, lambda: lora.outer(s, x, case.task, 14))):
        t = seconds(f, device)
        yield f"| {name} | {[*x.shape]} | {t * 1e6:.0f} | {moved / t / 1e9:.0f} | {moved / t / copy:.0%} |"


# ---------------------------------------------------------------------------------------------- the command
def main(argv=None):
    args = parse(__doc__, "quick device out", argv, quick=dict(action="store_true", help="fewer shapes"), out=dict(
        type=pathlib.Path, default=pathlib.Path("results"), metavar="DIR", help="where the table is saved"))
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    copy, matmul = machine(device, dtype)
    models = [m for m in SHAPES if (m == "smollm2-135m") == (device.type == "cpu")]
    counts = [512, 4096] if device.type == "cpu" else list(ROWS)
    if args.quick:
        models, counts = models[:2], [512] if device.type == "cpu" else counts[-2:]
    lines = [f"# One layer's projections, forward and backward: {name}", "",
             f"`python kernels/bench.py{' --quick' if args.quick else ''}`, {today()}, torch {torch.__version__}, {dtype}, "
             f"{torch.get_num_threads()} threads, r = {RANK}, medians of 10. Copy {copy / 1e9:.0f} GB/s, matmul "
             f"{matmul / 1e12:.2f} TFLOP/s, both measured here. GB/s: what the low-rank part has to move at the least over the "
             "time that it adds to the base; TFLOP/s: the frozen matmuls over the whole step.", "",
             "| shapes | tokens | T | adapted | way | ms | overhead | GB/s | of copy | TFLOP/s | of matmul | peak MB |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for model in models:
        for tokens in counts:
            for T in (1, 4, 14):
                case = Case(model, tokens, T, device, dtype)
                floor = seconds(lambda: case.step(base, ()), device)
                for modules in (("q", "v"), tuple(case.dims)):
                    want = case.step(gathered, modules)
                    for way, f in {"base": base, **WAYS, "graph": None}.items():
                        row = [model, case.task.numel() * ROWS[tokens][1], T, "q,v" if len(modules) == 2 else "all", way]
                        memory = 0
                        try:
                            if way == "graph":
                                if device.type == "cpu":
                                    continue
                                step = graph(case, modules)
                            else:
                                step = lambda: case.step(f, modules if f is not base else ())
                                error = worst(step(), want) if f is not base else 0
                                assert error < (3e-2 if dtype == torch.bfloat16 else 1e-5), f"error {error:.1e}"
                            if device.type == "cuda":
                                torch.cuda.reset_peak_memory_stats()
                                memory = torch.cuda.memory_allocated()
                            t = floor if way == "base" else seconds(step, device)
                            peak = f"{(torch.cuda.max_memory_allocated() - memory) / 2**20:.0f}" if memory else "-"
                            shares = [""] * 3 if way == "base" else [f"{t / floor - 1:.1%}", "-", "-"]
                            if way != "base" and t > floor:                          # else the noise is larger than what it adds
                                added = case.bytes(modules) / (t - floor)
                                shares[1:] = [f"{added / 1e9:.1f}", f"{added / copy:.0%}"]
                            row += [f"{t * 1e3:.3f}", *shares, f"{case.flops() / t / 1e12:.2f}",
                                    f"{case.flops() / t / matmul:.0%}", peak]
                        except Exception as error:                                   # a rival that this torch or device lacks
                            row += [f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:60]}", *[""] * 6]
                        lines.append("| " + " | ".join(map(str, row)) + " |")
                        print(lines[-1], flush=True)
    lines += ["", "| kernel alone, T = 14 | x | us | GB/s | of copy |", "|---|---|---|---|---|",
              *single_kernels(device, dtype, copy)]
    print("\n".join(lines[-5:]))
    if device.type == "cpu":
        lines += ["", "The Triton kernels on a GPU: not measured."]
    path = args.out / f"kernels-{device.type}.md"
    write_whole(path, lambda p: p.write_text("\n".join(lines) + "\n"))
    print(f"saved to {path}")


if __name__ == "__main__":
    run_main(main)
