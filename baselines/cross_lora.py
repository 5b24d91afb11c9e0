"""Carrying a LoRA to another base without training: Cross-LoRA (Xia et al., 2025, arXiv 2508.05232) and two controls.

Cross-LoRA expresses the source's delta in the singular subspace of the source's weight and re-expresses it in that of
the target's. Its alignment as printed multiplies U_s^T by U_t, which has no meaning where the widths differ. The
well-posed form used here, for W = U S V^T truncated to the leading k directions on both sides:

    delta_t = U_t (U_s^T delta_s V_s) V_t^T        so   B_t = U_t (U_s^T B_s),   A_t = (A_s V_s) V_t^T

which aligns the subspaces direction by direction: the i-th direction of the source is taken for the i-th of the target.
  order   by singular value, largest first;
  signs   (u_i, v_i) and (-u_i, -v_i) are the same direction of W; the one whose entries have the larger sum of cubes
          (u_i and v_i together) is taken, on both sides: a rule that needs no common coordinates;
  layers  target layer l takes the source layer at the same relative depth, round(l (L_s - 1) / (L_t - 1)); counted
          are the layers that have a projection of that kind.

Controls: `copy` uses the source's A and B as they are, cut or zero-padded where the shapes differ; `random` is a
random delta of the source delta's Frobenius norm. None of the three has epochs: "best" and "final" are equal. A delta
that suits the source may be too weak or too strong for the target, so all three choose a factor for it, one a base,
on the target's held-out rows, by which the other methods choose their epoch."""
import functools, hashlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bases import same_depths
from portal import Adapters
from runtime.distributed import NO_BAR, barrier
from runtime.files import read_json, write_json
from runtime.saved import load_adapters, save_adapters
from score import evaluate, macro

FACTORS, HELD = (1, 0.5, 2, 4), 30  # of equally good factors the first counts; tried on so many held-out rows a task
K = 320                             # leading singular directions kept


@functools.lru_cache(maxsize=2)     # a deeper target asks for a source layer several times in a row
def subspace(W):
    """W [d_out, d_in] -> U [d_out, k], V [d_in, k], ordered by singular value, signs fixed."""
    U, _, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    U, V = U[:, :K], Vt[:K].T
    sign = torch.where((U ** 3).sum(0) + (V ** 3).sum(0) < 0, -1.0, 1.0)
    return U * sign, V * sign


def cross_lora(A, B, W_source, W_target):
    """A [T, r, d_in], B [T, d_out, r] of the source -> the target's."""
    (U_s, V_s), (U_t, V_t) = subspace(W_source), subspace(W_target)
    k = min(U_s.shape[1], U_t.shape[1])
    return A @ V_s[:, :k] @ V_t[:, :k].T, U_t[:, :k] @ (U_s[:, :k].T @ B)


def copy(A, B, W_source, W_target):
    d_out, d_in = W_target.shape
    return F.pad(A, (0, d_in - A.shape[-1])), F.pad(B, (0, 0, 0, d_out - B.shape[-2]))  # a negative pad cuts


def random(A, B, W_source, W_target, generator):
    d_out, d_in = W_target.shape
    new_A = torch.randn(*A.shape[:2], d_in, generator=generator).to(A.device)
    new_B = torch.randn(B.shape[0], d_out, B.shape[2], generator=generator).to(A.device)
    return new_A, new_B * (delta_norm(A, B) / delta_norm(new_A, new_B))[:, None, None]


def delta_norm(A, B):
    """||B A||_F for each task [T], from r x r products: tr(B^T B A A^T)."""
    return ((B.transpose(1, 2) @ B) * (A @ A.transpose(1, 2))).sum((1, 2)).clamp(min=0).sqrt()


def transfer(method, adapters, source, target):
    """The source base's Adapters, layer by layer through `method`, as Adapters of the target base."""
    def carry(A, B, m, s, l):
        return method(A, B, source.weight(m, s), target.weight(m, l))
    return site_by_site(carry, adapters, source, target)


def site_by_site(carry, adapters, source, target):
    """The source base's Adapters as the target's: carry(A [T, r, d_in], B [T, d_out, r] of layer s of the source, m, s,
    l) -> those of the target's layer l of the same relative depth."""
    A, B = {}, {}                                                                    # {g: [[T, ...]] a layer}
    kinds = dict.fromkeys(source.groups[g].kind for g in adapters.A)
    for m in tqdm(kinds, desc=f"transfer to {target.name}", delay=2, leave=False, disable=NO_BAR):
        for (l, g, _), (s, source_g, k) in same_depths(target, source, m):
            a, b = (factors[source_g][:, k] for factors in (adapters.A, adapters.B))
            a, b = carry(a, b, m, s, l)
            A.setdefault(g, []).append(a)
            B.setdefault(g, []).append(b)
    return Adapters(*({g: torch.stack(layers, 1).contiguous() for g, layers in side.items()} for side in (A, B)),
                    adapters.scale)


def transfer_all(run, tag, target, source, seed, held, max_tokens):
    """Carries the source's saved LoRAs over in the three ways and saves them as baselines/<method>/<tag>, unless they
    are there already from these very LoRAs. held: items of the target to choose a factor by; without any it is 1."""
    loras = run / "baselines" / "lora" / f"{source.name}.safetensors"
    origin = dict(source=source.name, seed=seed, target=target.provenance,
                  lora=hashlib.sha256(loras.read_bytes()).hexdigest())         # not a date: two fits may share a second
    if lost := [m for m in source.kinds if m in target.lacks]:
        print(f"{target.name} has no {', '.join(lost)}, which the LoRA of {source.name} adapts")
    drawn = functools.partial(random, generator=torch.Generator().manual_seed(seed))
    for name, method in dict(cross_lora=cross_lora, copy=copy, random=drawn).items():
        path = run / "baselines" / name / f"{tag}.json"
        if path.exists() and {**read_json(path), "factor": None} == {**origin, "factor": None}:
            continue
        carried = transfer(method, load_adapters(loras, source.device), source, target)
        scaled = {factor: carried._replace(scale=factor * carried.scale) for factor in FACTORS}
        def on_held_out(factor):
            cells = evaluate(target, scaled[factor], held, max_tokens)
            return macro([(cell["acc_norm"], -cell["log_loss"]) for cell in cells.values()])
        factor = max(FACTORS, key=on_held_out) if held else 1
        barrier()                                                                  # all processes have looked at `path`
        save_adapters(path.with_name(f"{tag}.safetensors"), scaled[factor])
        write_json(path, {**origin, "factor": factor})
    barrier()                                                                       # the others read what 0 has written
