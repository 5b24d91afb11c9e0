"""The batched LoRA matmul against a plain loop over rows, in float64 autograd."""
import pytest
import torch

from kernels.lora import lora_matmul


@pytest.mark.parametrize("task", [[0, 2, 2, 1], [1, 1, 1, 1], [2, 0, 2, 0]])  # mixed, one task, an absent task
@pytest.mark.parametrize("r", [4, 5, 8])
def test_equals_a_loop_over_rows_with_every_gradient(task, r):
    torch.manual_seed(r)
    x, A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 7, 6), (3, r, 6), (3, 10, r)))
    dy = torch.randn(4, 7, 10, dtype=torch.float64)
    y = lora_matmul(x, A, B, torch.tensor(task), 2.0)
    reference = torch.stack([2.0 * (B[t] @ (A[t] @ x[row].T)).T for row, t in enumerate(task)])
    got, want = (torch.autograd.grad(out, (x, A, B), dy) for out in (y, reference))
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    for t in set(range(3)) - set(task):
        assert not got[1][t].any() and not got[2][t].any()
