"""The frozen head and NLL block by block against all logits in float64 autograd: the torch twin, and the Triton kernel
in Triton's interpreter (float32), compiled for an H100 without having one, and on a GPU where there is one."""
import os, pathlib, subprocess, sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cross_entropy as ce

triton = pytest.importorskip("triton")
HEADS = dict(plain=dict(), scaled=dict(scale=0.3), capped=dict(cap=2.0), both=dict(scale=1.7, cap=3.0))
SHAPES = {"odd": (7, 301, 9, 12), "one position": (1, 130, 5, 1), "one position, three targets": (1, 33, 4, 3),
          "above a tile": (5, 4500, 3, 8), "a power of 2": (8, 256, 16, 8)}           # N, V, d, M


def case(N=7, V=301, d=9, M=12, dtype=torch.float64, device="cpu", bias=True):
    """Random h, W, bias, source, target, weight: positions with several targets, the same one twice among them, and
    with none; a weight of zero; the largest logits mostly at the end, where they change a maximum so far."""
    torch.manual_seed(N + V)
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)
    source, target, weight = torch.randint(0, N, (M,)), torch.randint(0, V, (M,)), torch.rand(M, dtype=torch.float64)
    source[-1], target[-1], weight[0] = source[0], target[0], 0.0 if M > 1 else 0.7
    return draw(N, d), draw(V, d), 2 * draw(V).sort()[0] if bias else None, *(a.to(device) for a in (source, target, weight))


def run(f, inputs, **head):                                                          # loss, nll, dh of 1.5 loss
    h = inputs[0].detach().clone().requires_grad_()
    loss, nll, *_ = f(h, *inputs[1:], **head)
    return [loss.detach(), nll, *torch.autograd.grad(1.5 * loss, h)]


def in_float64(inputs):
    return [a.double() if a is not None and a.is_floating_point() else a for a in inputs]


def errors(got, want):                                                               # relative, of norms
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


def plain(h, W, bias, source, target, weight, scale=1.0, cap=None):
    """The reference, a target at a time."""
    z = [scale * (W @ h[n] + (0 if bias is None else bias)) for n in source.tolist()]
    z = z if cap is None else [cap * (own / cap).tanh() for own in z]
    nll = torch.stack([own.exp().sum().log() - own[v] for own, v in zip(z, target.tolist())])
    return (weight * nll).sum(), nll.detach()


@pytest.fixture
def interpreted(monkeypatch):                                                        # see test_lora.py
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the kernel is compiled for the GPU; TRITON_INTERPRET=1 runs it here")
    monkeypatch.setattr(ce, "fused", lambda x: True)


def small_blocks(monkeypatch, rows, cached, V):
    monkeypatch.setattr(ce, "BLOCK", dict(cpu=rows * V, cuda=rows * V))
    monkeypatch.setattr(ce, "CACHED", cached * V)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twins_and_kernel_equal_a_loop_over_targets_with_the_gradient(request, shape, head):
    inputs, narrow = case(*shape), case(*shape, dtype=torch.float32)
    for f in (ce.linear_nll, ce.naive):
        assert max(errors(run(f, inputs, **head), run(plain, inputs, **head))) < 1e-13
    request.getfixturevalue("interpreted")
    assert max(errors(run(ce.linear_nll, narrow, **head), run(plain, in_float64(narrow), **head))) < 5e-6


@pytest.mark.parametrize("rows, cached", [(1, 1), (2, 1), (3, 2), (6, 4), (7, 3), (100, 100)])
def test_where_the_blocks_end_does_not_matter(monkeypatch, request, rows, cached):
    want = run(plain, case(bias=False), cap=3.0)
    small_blocks(monkeypatch, rows, cached, V=301)
    assert max(errors(run(ce.linear_nll, case(bias=False), cap=3.0), want)) < 1e-13
    request.getfixturevalue("interpreted")
    inputs = case(bias=False, dtype=torch.float32)
    got = run(ce.linear_nll, inputs, cap=3.0)
    assert max(errors(got, run(plain, in_float64(inputs), cap=3.0))) < 5e-6
    assert all(torch.equal(a, b) for a, b in zip(got, run(ce.linear_nll, inputs, cap=3.0)))


def test_the_largest_tensor_that_is_made_is_a_block(monkeypatch):
    inputs, sizes = case(40, 301, 5, 40, dtype=torch.bfloat16), []
    small_blocks(monkeypatch, 8, 2, V=301)
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(a.numel() for a in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(a))
            return out
    with Watch():
        run(ce.linear_nll, inputs)
    assert max(sizes) == 8 * 301


@pytest.mark.parametrize("triton_too", [False, True])
def test_bfloat16_is_as_exact_as_all_logits_in_bfloat16(triton_too, request):
    """Rounding of the logits, of their gradient and of dh, a relative 2^-9 each, is that of the plain way. Also where
    the model is sure: there softmax - 1 would be lost if it were rounded before the subtraction. (The interpreter cuts
    bits off where a GPU rounds, an error twice as large.)"""
    if triton_too:
        request.getfixturevalue("interpreted")
    for sure in (False, True):
        h, W, _, source, target, weight = case(16, 200, 64, 16, dtype=torch.bfloat16)
        if sure:
            source = torch.arange(16)
            h = (W[target] * 0.2 + h * 0.05).to(torch.bfloat16)
        inputs = h, W / 4, None, source, target, weight
        want = run(plain, in_float64(inputs))
        ours, eager = errors(run(ce.linear_nll, inputs), want), errors(run(ce.naive, inputs), want)
        more = 2.5 if triton_too else 1.25
        assert ours[2] < 2e-2 and all(a <= more * b + 1e-6 for a, b in zip(ours, eager)), (sure, ours, eager)


@pytest.mark.parametrize("triton_too", [False, True])
def test_a_sure_model_has_an_exact_loss(triton_too, request):
    """An NLL of e^-10 beside a logit of 1,000, whose float32 neighbours are 6e-5 apart; far-off logits do no harm."""
    if triton_too:
        request.getfixturevalue("interpreted")
    W = torch.tensor([[1000.0], [990.0], [-1e30], [-torch.inf]])
    for f in (ce.linear_nll, ce.naive):
        loss, nll, dh = run(f, (torch.ones(1, 1), W[:3], None, *torch.tensor([[0, 0], [0, 1]]), torch.tensor([1.0, 0.0])))
        assert nll.tolist() == pytest.approx([4.54e-5, 10], rel=1e-2) and torch.isfinite(dh).all()
    loss, nll, _ = ce.linear_nll(torch.ones(1, 1), W, None, *torch.tensor([[0], [0]]), torch.ones(1))
    assert nll == pytest.approx(4.54e-5, rel=1e-2)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_best_token_is_that_of_all_logits(monkeypatch, rows, head):
    inputs = h, W, bias, source, *_ = case(7, 301, 9, 20)
    small_blocks(monkeypatch, rows, 2, V=301)
    for bias in (bias, None):
        want = [int((head.get("scale", 1.0) * (W @ h[n] + (0 if bias is None else bias))).argmax()) for n in source.tolist()]
        for f in (ce.linear_nll, ce.naive):
            assert f(h, W, bias, *inputs[3:], **head)[2].tolist() == want


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_best_token_in_half_precision_is_that_of_rounded_logits(head):
    """Scale and cap make neighbouring numbers equal, of which the first is decoded."""
    g = torch.Generator().manual_seed(0)
    h = torch.eye(400, dtype=torch.bfloat16)
    W = (12 + 0.3 * torch.randn(50, 400, generator=g)).to(torch.bfloat16)
    z = W.T * torch.tensor(head.get("scale", 1.0), dtype=torch.bfloat16) if "scale" in head else W.T
    want = (z if head.get("cap") is None else torch.tanh(z / head["cap"]) * head["cap"]).argmax(1)
    at = torch.arange(400)
    assert torch.equal(ce.linear_nll(h, W, None, at, at % 50, torch.ones(400), **head)[2], want)


def test_no_work_for_a_gradient_nobody_needs(monkeypatch):
    inputs, needs = case(), []
    monkeypatch.setattr(ce, "softmax_gradient_", lambda *a, f=ce.softmax_gradient_: needs.append(a[-1]) or f(*a))
    loss, nll, best = ce.linear_nll(*inputs)
    h = inputs[0].requires_grad_()
    with torch.no_grad():
        ce.linear_nll(h, *inputs[1:])
    assert needs == [False, False] and not loss.requires_grad
    loss, again, none = ce.linear_nll(h, *inputs[1:])
    assert needs[2] and loss.requires_grad and not again.requires_grad and torch.equal(nll, again) and none is None


def test_inputs_keep_their_values_may_have_strides_and_must_fit():
    inputs = h, W, bias, source, target, weight = case()
    strided, before = torch.cat([h, h], 1)[:, :9], [a.clone() for a in inputs]
    got = run(ce.linear_nll, (strided, *inputs[1:]))
    assert max(errors(got, run(plain, inputs))) < 1e-13 and all(torch.equal(a, b) for a, b in zip(before, inputs))
    for k in range(6):
        with pytest.raises(ValueError, match="do not fit"):
            ce.linear_nll(*inputs[:k], inputs[k][..., 1:] if k else h[None], *inputs[k + 1:])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import cross_entropy as ce
for logits, need in (("*bf16", True), ("*bf16", False), ("*fp32", True)):
    constants = dict(NEED=need, CAPPED=need, BV=4096)
    kinds = dict(logits=logits, first="*i64", target="*i64", V="i32", scale="fp32", cap="fp32")
    signature = {k: "constexpr" if k in constants else kinds.get(k, "*fp32") for k in ce.softmax_gradient_kernel.arg_names}
    binary = triton.compile(ASTSource(fn=ce.softmax_gradient_kernel, signature=signature, constexprs=constants),
                            target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8))
    assert binary.asm["cubin"] and "atom" not in binary.asm["ptx"]
    print("compiled", logits, need)
"""


def test_the_kernel_compiles_for_an_h100():
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)})
    assert done.returncode == 0 and done.stdout.count("compiled") == 3, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_on_a_gpu(head, monkeypatch):
    """float32 equals float64, bf16 is as exact as eager bf16, and runs are bit-equal."""
    torch.set_float32_matmul_precision("highest")
    small_blocks(monkeypatch, 64, 64, V=5000)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case(300, 5000, 128, 500, dtype, "cuda")
        inputs = inputs[0] / 8, *inputs[1:]
        got, want = run(ce.linear_nll, inputs, **head), run(ce.naive, in_float64(inputs), **head)
        bounds = [1e-5] * 3 if dtype == torch.float32 else [1.5 * b + 1e-6 for b in errors(run(ce.naive, inputs, **head), want)]
        assert all(a < b for a, b in zip(errors(got, want), bounds))
        assert all(torch.equal(a, b) for a, b in zip(got, run(ce.linear_nll, inputs, **head)))
