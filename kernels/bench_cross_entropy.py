"""Measures a round's gradients on one base: with the logits of all positions, and block by block.

    python kernels/bench_cross_entropy.py BASE          prints a table and saves it as results/cross-entropy-cpu.md

A step is train.task_gradients of 4,096 tokens, at least. Completions: 16 rows of a prompt of 128 tokens and 128 answer
tokens. Choices: 32 rows of a prompt of 96 tokens and four choices of eight tokens, each with its weight, as in
distillation. Each is run in a process of its own, after a small step that warms up. Memory: the peak of the process
above what it held before the step. CPU seconds are those of all threads, and say more than the clock's on a machine
that others use."""
import itertools, pathlib, platform, subprocess, sys, time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from bases import load_base
from portal import Adapters
from runtime.files import today, write_whole
from score import full_precision
from tasks.rows import Row
from train import task_gradients
from tokens import Item

SHAPES = dict(completions=(16, 128, (128,)), choices=(32, 96, (8,) * 4))             # rows, prompt, continuations
HEADER = "| rows | dtype | layers | way | positions | s | CPU s | MB above the base | of all logits' | mean loss |"


def whole(base, batch, adapters, weight):
    """base.nll, with the logits of all positions and their softmax in float32."""
    logits = full_precision(base.logits(batch, adapters))                            # [N, V]
    one = len(logits) == len(batch.source)
    nll = F.cross_entropy(logits if one else logits[batch.source], batch.target, reduction="none")
    return (weight * nll).sum(), nll.detach()


def items_of(kind, V, rows=None):
    count, prompt, choices = SHAPES[kind]
    g = torch.Generator().manual_seed(0)
    def draw(n):
        return torch.randint(5, V, (n,), generator=g).tolist()
    weights = tuple(1 / len(choices) for _ in choices) if len(choices) > 1 else None
    return [Item(r % 2, draw(prompt), [draw(n) for n in choices], Row("t", "", [], 0), weights)
            for r in range(rows or count)]


def memory(field):
    """VmRSS or VmHWM (its peak) of this process, in MB."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def step(folder, kind, dtype, layers, way):
    """Prints positions, seconds, CPU seconds, MB and mean loss of one step."""
    base = load_base(folder, dtype=getattr(torch, dtype), recompute=layers == "recomputed")
    base.__dict__.update(dict(nll=lambda *a: whole(base, *a)) if way == "all logits" else {})
    groups, g = base.groups_of(["q", "v"]), torch.Generator().manual_seed(0)
    A, B = ({name: 0.02 * torch.randn(2, len(group.layers), *shape, generator=g) for name, group in groups.items()
             for shape in [(8, group.d_in) if side == "A" else (group.d_out, 8)]} for side in "AB")
    adapters, items = Adapters(A, B, 2.0), items_of(kind, base.config.vocab_size)
    task_gradients(base, adapters, items_of(kind, base.config.vocab_size, 1), 4096)
    pathlib.Path("/proc/self/clear_refs").write_text("5")                            # the peak starts anew
    before, clock, cpu = memory("VmRSS"), time.time(), time.process_time()
    losses, _ = task_gradients(base, adapters, items, 8192)                          # one micro-batch
    clock, cpu = time.time() - clock, time.process_time() - cpu
    print(len(base.batch.at[0]), f"{clock:.1f}", f"{cpu:.1f}", f"{memory('VmHWM') - before:.0f}",
          f"{float(losses.mean()):.4f}")


def main():
    folder = sys.argv[1]
    if len(sys.argv) > 2:
        return step(*sys.argv[1:])
    about = " ".join(__doc__[__doc__.index("A step is"):].split())
    lines = [f"# The head and the NLL in a round: {platform.machine()} CPU", "",
             f"`python kernels/bench_cross_entropy.py {pathlib.Path(folder).name}`, {today()}, torch "
             f"{torch.__version__}, {torch.get_num_threads()} threads. {about}", "", HEADER,
             "|" + "---|" * (HEADER.count("|") - 1)]
    print(*lines, sep="\n")
    path = ROOT / "results" / "cross-entropy-cpu.md"
    for dtype, kind, layers in itertools.product(("bfloat16", "float32"), SHAPES, ("kept", "recomputed")):
        for way in ("all logits", "blocks"):
            done = subprocess.run([sys.executable, __file__, folder, kind, dtype, layers, way], check=True,
                                  stdout=subprocess.PIPE, text=True)
            n, clock, cpu, peak, loss = done.stdout.split()[-5:]
            if way == "all logits":
                whole = int(peak)
            lines.append(f"| {kind} | {dtype} | {layers} | {way} | {n} | {clock} | {cpu} | {peak} | "
                         f"{int(peak) / whole:.2f} | {loss} |")
            print(lines[-1], flush=True)
            write_whole(path, lambda p: p.write_text("\n".join([*lines, ""])))
    print(f"saved to {path}")


if __name__ == "__main__":
    main()
