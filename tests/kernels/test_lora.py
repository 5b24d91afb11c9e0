"""The batched LoRA matmul against a plain loop over rows in float64 autograd: the torch twins, and the Triton kernels in
Triton's interpreter (float32), compiled for an H100 without having one, and on a GPU where there is one."""
import os, pathlib, subprocess, sys

import pytest
import torch

from kernels import lora

triton = pytest.importorskip("triton")
MIXED, ONE, ABSENT = [0, 2, 2, 1], [1, 1, 1, 1], [2, 0, 2, 0]


def case(task, r, S=37, d_in=70, d_out=150, dtype=torch.float64, device="cpu", transposed_dy=False):
    """Random inputs (x, W, bias, A, B, task), dy."""
    torch.manual_seed(r + S)
    R, T = len(task), 3
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)
    dy = draw(R, d_out, S).transpose(1, 2) if transposed_dy else draw(R, S, d_out)
    return (draw(R, S, d_in), draw(d_out, d_in), draw(d_out), draw(T, r, d_in), draw(T, d_out, r),
            torch.tensor(task, device=device)), dy


def run(f, inputs, dy, scale=1.7):
    """y, dx, dA, dB of f."""
    x, W, bias, A, B, task = inputs
    x, A, B = (a.detach().clone().requires_grad_() for a in (x, A, B))
    y = f(x, W, bias, A, B, task, scale)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def loop(x, W, bias, A, B, task, scale):
    """The reference: a row at a time, differentiated by autograd."""
    return torch.stack([x[row] @ W.T + bias + scale * (x[row] @ A[t].T) @ B[t].T for row, t in enumerate(task.tolist())])


def in_float64(inputs, dy):
    return [a.double() if a.is_floating_point() else a for a in inputs], dy.double()


def errors(got, want):
    """Relative norm errors of y, dx, dA, dB."""
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want)]


def assert_equals_loop(inputs, dy, bound):
    """lora_linear equals the loop in float64 with every gradient, and a task that no row has gets zeros."""
    got, want = run(lora.lora_linear, inputs, dy), run(loop, *in_float64(inputs, dy))
    assert max(errors(got, want)) < bound
    for t in set(range(3)) - set(inputs[5].tolist()):
        assert not got[2][t].any() and not got[3][t].any()


@pytest.fixture
def interpreted(monkeypatch):
    """Send CPU tensors to the Triton kernels, which run in the interpreter (TRITON_INTERPRET=1, conftest.py)."""
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the kernels are compiled for the GPU; TRITON_INTERPRET=1 runs them here")
    monkeypatch.setattr(lora, "fused", lambda x: True)


@pytest.mark.parametrize("task", [MIXED, ONE, ABSENT], ids=["mixed", "one task", "an absent task"])
@pytest.mark.parametrize("r", [4, 5, 8])
def test_twins_equal_a_loop_over_rows_with_every_gradient(task, r):
    assert_equals_loop(*case(task, r), 1e-14)


@pytest.mark.parametrize("task", [MIXED, ONE, ABSENT], ids=["mixed", "one task", "an absent task"])
@pytest.mark.parametrize("r", [4, 5, 8, 16])
def test_kernels_equal_a_loop_over_rows_with_every_gradient(interpreted, task, r):
    S = 80 if r == 8 else 37                                                         # above and below a tile of 64
    assert_equals_loop(*case(task, r, S, dtype=torch.float32), 1e-6)


def test_kernels_take_strides_as_they_are(interpreted):
    """dy as a transposed view, x as a slice of something wider, A and B as one layer of [T, L, ...]."""
    inputs, dy = case(MIXED, 8, dtype=torch.float32, transposed_dy=True)
    want = run(loop, *in_float64(inputs, dy))
    x, W, bias, A, B, task = inputs
    x = torch.cat([x, x], -1)[..., :x.shape[2]]
    A, B = (torch.stack([torch.zeros_like(a), a], 1).unbind(1)[1] for a in (A, B))
    assert not (dy.is_contiguous() or x.is_contiguous() or A.is_contiguous() or B.is_contiguous())
    before = [a.clone() for a in (x, A, B, dy)]
    leaves = [a.requires_grad_() for a in (x, A, B)]
    y = lora.lora_linear(x, W, bias, A, B, task, 1.7)
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert max(errors(got, want)) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, (x, A, B, dy)))             # nothing that came in was written to


def test_many_short_rows_of_one_task_and_one_long_row_are_split_over_programs(interpreted):
    for task, S in (([0] * 9, 5), ([2], 300)):
        inputs, dy = case(task, 8, S=S, dtype=torch.float32)
        assert max(errors(run(lora.lora_linear, inputs, dy)[:3], run(loop, *in_float64(inputs, dy))[:3])) < 1e-6


def test_B_zero_is_the_base_bit_for_bit_and_twice_run_is_bit_equal(interpreted):
    inputs, dy = case(MIXED, 8, dtype=torch.float32)
    x, W, bias, A, B, task = inputs
    assert torch.equal(lora.lora_linear(x, W, bias, A, torch.zeros_like(B), task, 2.0), torch.nn.functional.linear(x, W, bias))
    assert all(torch.equal(a, b) for a, b in zip(run(lora.lora_linear, inputs, dy), run(lora.lora_linear, inputs, dy)))


@pytest.mark.parametrize("triton_too", [False, True])
def test_a_frozen_layer_may_do_its_own_part(triton_too, request):
    """lora_add on a y that comes from outside, with a graph of its own: the same y and gradients, and y is left as it was."""
    if triton_too:
        request.getfixturevalue("interpreted")
    inputs, dy = case(MIXED, 8, dtype=torch.float32)
    given = []
    def added(x, W, bias, A, B, task, scale):
        given.append(torch.nn.functional.linear(x, W, bias))
        given.append(given[0].detach().clone())
        return lora.lora_add(given[0], x, A, B, task, scale)
    got, want = run(added, inputs, dy), run(loop, *in_float64(inputs, dy))
    assert max(errors(got, want)) < 1e-6 and torch.equal(*given)


def test_no_work_for_gradients_nobody_needs(monkeypatch):
    """A first layer's x needs no gradient; a frozen A none either: then there is no ds at all."""
    inputs, dy = case(MIXED, 8)
    x, W, bias, A, B, task = inputs
    calls = []
    for name in ("shrink", "expand_add_", "outer"):
        monkeypatch.setattr(lora, name, lambda *a, f=getattr(lora, name), name=name: calls.append(name) or f(*a))
    lora.lora_linear(x, W, bias, A, B.requires_grad_(), task, 1.0).backward(dy)
    assert calls == ["shrink", "expand_add_", "outer"]


def test_shapes_that_do_not_fit_are_refused():
    (x, W, bias, A, B, task), _ = case(MIXED, 8)
    for wrong in ((x[0], W, bias, A, B, task), (x, W, bias, A[:, :, 1:], B, task), (x, W, bias, A[1:], B, task),
                  (x, W, bias, A, B[:, :, 1:], task), (x, W, bias, A, B, task[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            lora.lora_linear(*wrong, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lora.lora_add(torch.zeros(4, 37, 149), x, A, B, task, 1.0)


COMPILE ="""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import lora
for kernel, tensors, tiles in ((lora.shrink_kernel, dict(x="x", A="w", s="x"), dict(BS=32, BD=256)),
                               (lora.expand_add_kernel, dict(y="x", s="x", B="w"), dict(BS=64, BD=128)),
                               (lora.outer_kernel, dict(s="x", x="x", out="*fp32"), dict(BS=64, BD=128))):
    for weights in ("*fp32", "*bf16") if kernel is not lora.outer_kernel else ("*fp32",):
        for x, r in (("*bf16", 8), ("*bf16", 16), ("*fp32", 8)):
            constants = dict(tiles, RP=lora.padded(r))
            signature = {}
            for name in kernel.arg_names:
                kind = tensors.get(name, "*i64" if name == "task" else "fp32" if name == "scale" else "i32")
                signature[name] = "constexpr" if name in constants else {"x": x, "w": weights}.get(kind, kind)
            binary = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants),
                                    target=GPUTarget("cuda", 90, 32))
            assert binary.asm["cubin"] and ("mma" in binary.asm["ptx"]) == (x == "*bf16"), (kernel, x, r)
            print("compiled", kernel.__name__, x, weights, r)
"""


def test_kernels_compile_for_an_h100():
    """In a process of its own, since here Triton interprets. bf16 dots must become tensor-core instructions."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 15


@pytest.mark.gpu
@pytest.mark.parametrize("r", [5, 8, 16])
def test_bf16_on_a_gpu_is_as_exact_as_eager_bf16(r):
    inputs, dy = case(MIXED, r, S=300, d_in=512, d_out=1000, dtype=torch.bfloat16, device="cuda")
    want = run(loop, *in_float64(inputs, dy))
    ours, eager = errors(run(lora.lora_linear, inputs, dy), want), errors(run(loop, inputs, dy), want)
    assert max(ours) < 1e-2 and all(a <= 1.5 * b for a, b in zip(ours, eager)), (ours, eager)


@pytest.mark.gpu
def test_float32_on_a_gpu_equals_float64_and_runs_are_bit_equal():
    inputs, dy = case(MIXED, 8, S=300, d_in=512, d_out=1000, dtype=torch.float32, device="cuda")
    got = run(lora.lora_linear, inputs, dy)
    assert max(errors(got, run(loop, *in_float64(inputs, dy)))) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(got, run(lora.lora_linear, inputs, dy)))
