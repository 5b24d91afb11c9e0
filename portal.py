"""PorTAL: a task is learned once, in a form that belongs to no base model, and carried to new base models.

    h     = act(W2 [ (1 + gamma(z_t)) * act(W1 [z_t ; e_l]) + beta(z_t) ])       FiLM trunk
    A_hat = Head_A_m(h)   [r, d_c]        B_hat = Head_B_m(h)   [d_c, r]         a pair of heads for each module kind m
    A     = A_hat @ P_in  [r, d_in]       B     = P_out @ B_hat [d_out, r]       aligner, a pair for each group of sites
    y     = W x + (alpha / r) B (A x)                                            an ordinary LoRA

    z_t, W1, W2, gamma, beta, heads   belong to no base: learned once, then frozen     (latents, Core)
    e_l, P_in, P_out                  belong to one base: refitted at every port       (Converter)

A site is a place in a base that takes such a LoRA: a module kind in a layer. Sites of one kind and one shape form a
group; a base whose layers are all alike has one group for each module kind.

This generator and a per-task LoRA both yield `Adapters`. Training, evaluation and export take Adapters and know nothing
else. Method: Geist, "PorTAL: Portable Task Adapters for LLMs", 2026.
"""
import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

MODULES = ("q", "k", "v", "o", "gate", "up", "down")  # the seven projections of a decoder layer: q_proj, ...


class Group(NamedTuple):
    """Sites of one module kind and one shape, one in each of `layers`."""
    kind: str                                                                        # one of MODULES
    layers: tuple                                                                    # L_g numbers of decoder layers
    d_in: int
    d_out: int


class Adapters(NamedTuple):
    """LoRA factors of T tasks for the groups g of one base, each with its L_g sites in the order of their layers."""
    A: dict                                                                          # {g: [T, L_g, r, d_in]}
    B: dict                                                                          # {g: [T, L_g, d_out, r]}
    scale: float                                                                     # alpha / r

    def map(self, f):
        """Returns the adapters with f applied to every tensor."""
        return Adapters({g: f(a) for g, a in self.A.items()}, {g: f(b) for g, b in self.B.items()}, self.scale)

    def tensors(self):
        return [*self.A.values(), *self.B.values()]


@dataclasses.dataclass
class Config:
    """The tasks and sizes of a run. The defaults are the write-up's, except `norm`: "layer" is described at Core and
    Portal.rates; "none" is the write-up's trunk, initial scales and learning rates."""
    tasks: list
    modules: list = dataclasses.field(default_factory=lambda: ["q", "v"])
    rank: int = 8
    alpha: int = 16
    d_z: int = 256                                                                   # task latent
    d_e: int = 32                                                                    # layer embedding
    hidden: int = 512                                                                # trunk
    d_c: int = 1024                                                                  # core width
    norm: str = "layer"                                                              # or "none", the write-up's


# ---------------------------------------------------------------------------------------------- belongs to no base
class Core(nn.Module):
    """The FiLM trunk and the heads. The B-heads start at zero, so that B = 0 and the adapted base starts as the bare
    one (the adapter is the identity, appendix A); FiLM starts at gamma = beta = 0.

    norm "layer" puts LayerNorm after W1 and after W2, so that the entries of h are of size 1 at any width and after any
    number of steps. The entries of A_hat start at size 1 / sqrt(d_c); those of A are then of size 1 / sqrt(d_in), as a
    LoRA's are."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.W1 = nn.Linear(cfg.d_z + cfg.d_e, cfg.hidden)
        self.W2 = nn.Linear(cfg.hidden, cfg.hidden)
        self.film = nn.Linear(cfg.d_z, 2 * cfg.hidden)                               # z -> gamma, beta
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.hidden) if cfg.norm == "layer" else nn.Identity()
                                  for _ in range(2))
        self.head_A = nn.ModuleDict({m: nn.Linear(cfg.hidden, cfg.rank * cfg.d_c) for m in cfg.modules})
        self.head_B = nn.ModuleDict({m: nn.Linear(cfg.hidden, cfg.d_c * cfg.rank) for m in cfg.modules})
        for layer in (self.film, *self.head_B.values()):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in self.head_A.values() if cfg.norm == "layer" else ():
            nn.init.normal_(layer.weight, std=(cfg.hidden * cfg.d_c) ** -0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, z, e):
        """Returns {m: A_hat [T, L, r, d_c]} and {m: B_hat [T, L, d_c, r]} for z [T, d_z], e [L, d_e]."""
        T, L, r, d_c = len(z), len(e), self.cfg.rank, self.cfg.d_c
        ze = torch.cat([z[:, None].expand(T, L, -1), e[None].expand(T, L, -1)], dim=-1)  # [T, L, d_z + d_e]
        gamma, beta = self.film(z)[:, None].chunk(2, dim=-1)                         # [T, 1, hidden] each
        h = F.gelu(self.norm1(self.W1(ze)))                                          # [T, L, hidden]
        h = F.gelu(self.norm2(self.W2((1 + gamma) * h + beta)))                      # [T, L, hidden]
        return ({m: head(h).view(T, L, r, d_c) for m, head in self.head_A.items()},
                {m: head(h).view(T, L, d_c, r) for m, head in self.head_B.items()})


# ---------------------------------------------------------------------------------------------- belongs to one base
class Converter(nn.Module):
    """Layer embeddings e and the aligner P_in, P_out of one base with the sites `groups` {g: Group}: one e for each of
    the L layers that have a site, one P_in and P_out for each group. Both start as random matrices that keep the size
    of what they multiply at any width of the base; with norm "none" at a standard deviation of 0.02.

    port: the core is already trained and its B-heads are no longer zero. P_out starts at zero instead, so that a port,
    too, starts at the identity. like: the converter of a base that the core was trained on; e starts as its layer
    embeddings at the same relative depth. The core was trained on no others, and a few hundred steps move random ones
    (the write-up's start) little."""

    def __init__(self, cfg, groups, like=None, port=False):
        super().__init__()
        layers = layers_of(groups)
        L, widths = len(layers), cfg.norm == "layer"
        self.e = nn.Parameter(torch.randn(L, cfg.d_e) if like is None else
                              torch.stack([like.e.detach()[same_depth(l, L, len(like.e))] for l in range(L)]))
        self.P_in, self.P_out = nn.ParameterDict(), nn.ParameterDict()
        for g, (_, _, d_in, d_out) in groups.items():
            self.P_in[g] = (d_in ** -0.5 if widths else 0.02) * torch.randn(cfg.d_c, d_in)
            std = min(1, d_out / cfg.d_c) ** 0.5 * cfg.d_c ** -0.5 if widths else 0.02
            self.P_out[g] = (0 if port else std) * torch.randn(d_out, cfg.d_c)
        self.groups = groups
        for g, group in groups.items():                                              # its layers' rows of e  [L_g]
            rows = None if len(group.layers) == L else torch.tensor([layers.index(layer) for layer in group.layers])
            self.register_buffer(f"rows_{g}", rows, persistent=False)

    def forward(self, core, z):
        """Returns A {g: [T, L_g, r, d_in]} and B {g: [T, L_g, d_out, r]} for z [T, d_z]."""
        def of_layers(x, g):                                                         # [T, L, ...] -> [T, L_g, ...]
            rows = getattr(self, f"rows_{g}")
            return x if rows is None else x[:, rows]
        A_hat, B_hat = core(z, self.e)
        return ({g: of_layers(A_hat[group.kind], g) @ self.P_in[g] for g, group in self.groups.items()},
                {g: self.P_out[g] @ of_layers(B_hat[group.kind], g) for g, group in self.groups.items()})


def group_sites(sites):
    """Returns {g: Group} of the sites {(m, layer): (d_in, d_out)} of a base. A group is named after its kind, and after
    its shape, too, where the base has that kind in several."""
    shapes = {}                                                                      # {m: {(d_in, d_out): [layers]}}
    for (m, layer), shape in sites.items():
        shapes.setdefault(m, {}).setdefault(shape, []).append(layer)
    return {m if len(own) == 1 else f"{m}_{d_in}x{d_out}": Group(m, tuple(sorted(layers)), d_in, d_out)
            for m, own in shapes.items() for (d_in, d_out), layers in own.items()}


def layers_of(groups):
    """Returns the layers that have a site of any of `groups` {g: Group}, in order."""
    return sorted({layer for group in groups.values() for layer in group.layers})


def same_depth(l, layers, source_layers):
    """Returns which of `source_layers` layers has the relative depth of layer l of `layers`; layers without a site do
    not count."""
    return round(l * (source_layers - 1) / max(1, layers - 1))


class Portal:
    """Latents, core and the converters of the bases of a run."""

    def __init__(self, cfg):
        self.cfg = cfg
        # z starts as long as e: W1 reads [z ; e], and tasks that differ less than layers do look alike to the trunk.
        std = (cfg.d_e / cfg.d_z) ** 0.5 if cfg.norm == "layer" else 0.02
        self.z = nn.Parameter(std * torch.randn(len(cfg.tasks), cfg.d_z))            # [T, d_z]
        self.core = Core(cfg)
        self.converters = {}                                                         # {base name: Converter}

    def adapters(self, base):
        """Returns the generated Adapters of every task for one base, attached to the autograd graph."""
        return Adapters(*self.converters[base](self.core, self.z), self.cfg.alpha / self.cfg.rank)

    def rates(self, lr):
        """Returns the parameters to train and their learning rates, [{"params", "lr"}] as torch.optim takes them.

        Adam moves every entry of a matrix by its rate, in the direction that lowers the loss. In a sum of n terms these
        moves add up to n times the rate, and A and B are products of such sums: at one rate for all, a step grows with
        the widths of core and base, and with every step before. So a layer whose sums have n terms has the rate lr / n,
        as in muP (Yang et al., 2022, arXiv 2203.03466). A_hat is to move in proportion to its size, 1 / sqrt(d_c). z
        and e are multiplied by random rows, whose terms cancel but for sqrt(n) of n.

        norm "none": the write-up's rates, lr for all and twice that for z (appendix A)."""
        cfg, core, found = self.cfg, self.core, {}                                   # {rate: [parameters]}
        def add(rate, *parameters):
            found.setdefault(rate, []).extend(p for p in parameters if p.requires_grad)
        if cfg.norm == "none":
            add(lr, *(p for module in (core, *self.converters.values()) for p in module.parameters()))
            add(2 * lr, self.z)
        else:
            for layer in (core.W1, core.W2, core.film, *core.head_B.values()):
                add(lr / layer.in_features, *layer.parameters())
            add(lr / cfg.hidden, *core.norm1.parameters(), *core.norm2.parameters())
            for layer in core.head_A.values():
                add(lr / layer.in_features / cfg.d_c ** 0.5, *layer.parameters())
            for converter in self.converters.values():
                for P in (*converter.P_in.values(), *converter.P_out.values()):
                    add(lr / P.shape[1], P)
                add(lr / cfg.d_e ** 0.5, converter.e)
            add(lr / cfg.d_z ** 0.5, self.z)
        return [{"params": parameters, "lr": rate} for rate, parameters in found.items() if parameters]

    def to(self, device):
        self.z.data = self.z.data.to(device)
        for module in (self.core, *self.converters.values()):
            module.to(device)
        return self


def tour():
    """Prints the method's shapes and what steps change, on two made-up bases of which nothing but shapes exists."""
    torch.manual_seed(0)
    cfg = Config(tasks=["dates", "prices", "tone"], d_z=64, hidden=128, d_c=48)
    old, new = ({m: Group(m, tuple(range(layers)), d, d) for m in cfg.modules} for layers, d in ((4, 96), (6, 160)))
    portal = Portal(cfg)
    portal.converters["old"] = converter = Converter(cfg, old)
    A_hat, B_hat = portal.core(portal.z, converter.e)
    A, B, _ = portal.adapters("old")
    for what, *tensors in (("z [T, d_z], e [L, d_e]", portal.z, converter.e),
                           ("A_hat [T, L, r, d_c], B_hat [T, L, d_c, r] of q", A_hat["q"], B_hat["q"]),
                           ("P_in [d_c, d_in], P_out [d_out, d_c] of q", converter.P_in["q"], converter.P_out["q"]),
                           ("A = A_hat P_in, B = P_out B_hat of q", A["q"], B["q"])):
        print(f"{what:50}", *([*t.shape] for t in tensors))
    def train(base, steps):                                                          # towards any B A, here of ones
        optimizer = torch.optim.AdamW(portal.rates(0.3))
        for step in range(steps + 1):
            A, B, _ = portal.adapters(base)
            delta = B["q"] @ A["q"]                                                  # [T, L, d_out, d_in]
            print(f"    {base}, step {step}: |B A| = {delta.detach().norm():.3f}")
            optimizer.zero_grad(), (delta - 1).square().mean().backward(), optimizer.step()
    print("source training changes z, core and the old base's converter; B A starts at zero, the identity:")
    train("old", 2)
    print("a port changes the new base's converter alone; it starts at the identity, too:")
    portal.z.requires_grad_(False), portal.core.requires_grad_(False)
    portal.converters = {"new": Converter(cfg, new, like=converter, port=True)}
    train("new", 2)


if __name__ == "__main__":
    tour()
