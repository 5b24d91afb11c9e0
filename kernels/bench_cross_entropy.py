"""Measures a round's gradients on one base: with the logits of all positions, and block by block.

    python kernels/bench_cross_entropy.py --base BASE     prints a table and saves it as results/cross-entropy-cpu.md

A step is train.task_gradients of 4,096 tokens, at least. Completions: 16 rows of a prompt of 128 tokens and 128 answer
tokens. Choices: 32 rows of a prompt of 96 tokens and four choices of eight tokens, each with its weight, as in
distillation. Each is run in a process of its own, after a small step that warms up. Memory: the peak of the process
above what it held before the step. CPU seconds are those of all threads, and say more than the clock's on a machine
that others use."""
import itertools, multiprocessing, pathlib, sys, time
from concurrent.futures import ProcessPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from bases import Item, load_base
from kernels.bench import write_table
from portal import Adapters
from reports.results import hardware
from runtime.files import today
from runtime.flags import parse, run_main
from tasks.rows import Row
from train import task_gradients

SHAPES = dict(completions=(16, 128, (128,)), choices=(32, 96, (8,) * 4))             # rows, prompt, continuations
HEADER = "rows,dtype,layers,way,positions,s,CPU s,MB above the base,of all logits',mean loss".split(",")


def items_of(kind, V, rows=None):
    """Returns items of random tokens, of two tasks in turn, in the shape of SHAPES or so many `rows` of it."""
    (count, prompt, choices), g = SHAPES[kind], torch.Generator().manual_seed(0)
    weights = tuple(1 / len(choices) for _ in choices) if len(choices) > 1 else None
    def draw(n):
        return torch.randint(5, V, (n,), generator=g).tolist()
    return [Item(r % 2, draw(prompt), [draw(n) for n in choices], Row("t", "", [], 0), weights)
            for r in range(rows or count)]


def memory(field):
    """VmRSS or VmHWM (its peak) of this process, in MB."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def step(spec, dtype, kind, layers, way):
    """Returns positions, seconds, CPU seconds, MB and mean loss of one step."""
    base = load_base(spec, dtype=getattr(torch, dtype), recompute=layers == "recomputed")
    if way == "all logits":
        base.head = None                                                             # see Base.nll
    groups, g = base.groups_of(["q", "v"]), torch.Generator().manual_seed(0)
    A, B = ({name: 0.02 * torch.randn(2, len(group.layers), *shape, generator=g) for name, group in groups.items()
             for shape in [(8, group.d_in) if side == "A" else (group.d_out, 8)]} for side in "AB")
    adapters, V = Adapters(A, B, 2.0), base.config.vocab_size
    items, small = items_of(kind, V), items_of(kind, V, 1)
    task_gradients(base, adapters, small, 4096)
    pathlib.Path("/proc/self/clear_refs").write_text("5")                            # the peak starts anew
    before, clock, cpu = memory("VmRSS"), time.time(), time.process_time()
    losses, _ = task_gradients(base, adapters, items, 8192)                          # one micro-batch
    return (len(base.batch.at[0]), time.time() - clock, time.process_time() - cpu, memory("VmHWM") - before,
            float(losses.mean()))


def table(spec):
    """Yields the rows of the table, the header first."""
    yield from (HEADER, ["---"] * len(HEADER))
    for fixed in itertools.product(("bfloat16", "float32"), SHAPES, ("kept", "recomputed")):
        most = None
        for way in ("all logits", "blocks"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                n, clock, cpu, peak, loss = pool.submit(step, spec, *fixed, way).result()
            most = most or peak
            dtype, kind, layers = fixed
            yield [kind, dtype, layers, way, n, f"{clock:.1f}", f"{cpu:.1f}", f"{peak:.0f}", f"{peak / most:.2f}",
                   f"{loss:.4f}"]


def main(argv=None):
    args = parse(__doc__, "base out", argv, base=dict(metavar="BASE", required=True, help="the base to measure on"),
                 out=dict(default=pathlib.Path("results"), help="where the table is saved"))
    about = " ".join(__doc__[__doc__.index("A step is"):].split())
    head = ["# The head and the NLL in a round", "", f"`python kernels/bench_cross_entropy.py --base "
            f"{pathlib.Path(args.base).name}`, {today()}, {hardware()}, {torch.get_num_threads()} threads. {about}", ""]
    write_table(args.out / "cross-entropy-cpu.md", head, table(args.base))


if __name__ == "__main__":
    run_main(main)
