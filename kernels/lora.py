"""The batched LoRA matmul: every row of a batch has a task, and meets that task's A and B.

This is the plain torch form. `index_select` (not `A[task]`) because its backward adds the rows up in order on a CPU:
gradients are the same from run to run. (On a GPU both add atomically, in any order.)
"""
import torch


def lora_matmul(x, A, B, task, scale):
    """scale * (x A_t^T) B_t^T, the low-rank part of y = W x + (alpha / r) B A x (DESIGN equation 5).

    x [R, S, d_in], A [T, r, d_in], B [T, d_out, r], task [R] (integers in 0..T-1) -> [R, S, d_out]
    """
    s = torch.bmm(x, A.index_select(0, task).transpose(1, 2))                        # [R, S, r]
    return scale * torch.bmm(s, B.index_select(0, task).transpose(1, 2))             # [R, S, d_out]
