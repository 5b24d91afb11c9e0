"""Whitening: the coordinates in which a port's P_in and P_out are learned. Not in the write-up."""
import copy

import torch


@torch.no_grad()
def whiten(core, z, converter, eps):
    """Changes the coordinates in which P_in and P_out are learned. Returns (a core to fit them to, {P: function that
    takes its value back to the coordinates of `core`}). Not in the write-up.

    A = A_hat P_in, but the features of a frozen A_hat are correlated, and gradient descent is slow along their small
    directions. With Q = S^-1 P_in in the place of P_in and A_hat S in that of A_hat, A stays as it is;
    S = s (C + eps c I)^(-1/2) makes the features uncorrelated, where C [d_c, d_c] is the mean of a a^T over the rows a
    of A_hat of all tasks and layers, and c the mean of C's diagonal. eps limits how much a small direction gains; s
    keeps the mean of |a|^2, so that a step changes A as much as before. P_out B_hat likewise."""
    def square_roots(rows):                                                          # [..., d_c] -> S, S^-1
        rows = rows.flatten(0, -2).double()
        C = rows.T @ rows / len(rows)
        values, vectors = torch.linalg.eigh(C)
        damped = values.clamp(min=0) + eps * C.diagonal().mean()
        scale = (values.sum() / (values / damped).sum() / damped).sqrt()
        return (vectors * scale @ vectors.T).to(z.dtype), (vectors / scale @ vectors.T).to(z.dtype)
    A_hat, B_hat = core(z, converter.e)
    core, (r, d_c), back = copy.deepcopy(core), (core.cfg.rank, core.cfg.d_c), {}
    for m in core.cfg.modules:
        (S_A, inverse_A), (S_B, inverse_B) = square_roots(A_hat[m]), square_roots(B_hat[m].mT)
        for p in core.head_A[m].parameters():                                        # [r d_c, hidden] and [r d_c]
            p.copy_(torch.einsum("rc...,cd->rd...", p.view(r, d_c, *p.shape[1:]), S_A).reshape(p.shape))
        for p in core.head_B[m].parameters():
            p.copy_(torch.einsum("cr...,cd->dr...", p.view(d_c, r, *p.shape[1:]), S_B).reshape(p.shape))
        for g, group in converter.groups.items():
            if group.kind == m:
                P_in, P_out = converter.P_in[g], converter.P_out[g]
                P_in.copy_(inverse_A @ P_in)
                P_out.copy_(P_out @ inverse_B)
                back |= {P_in: S_A.matmul, P_out: lambda Q, S=S_B: Q @ S}
    return core, back


@torch.no_grad()
def unwhiten(learner, back):
    """Takes a port's parameters, of the last and of the selected epoch, back to the coordinates of the frozen core.
    back: what `whiten` returned."""
    for p, best in zip(learner.params, learner.best or ()):                          # a dry run selects nothing
        for value in (p, best) if p in back else ():
            value.copy_(back[p](value))
