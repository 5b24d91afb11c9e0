"""PorTAL: a task learned once, in a form that belongs to no base model, and carried to new ones.

    h     = act(W2 [ (1 + gamma(z_t)) * act(W1 [z_t ; e_l]) + beta(z_t) ])       FiLM trunk
    A_hat = Head_A_m(h)   [r, d_c]        B_hat = Head_B_m(h)   [d_c, r]         one pair of heads a module kind m
    A     = A_hat @ P_in  [r, d_in]       B     = P_out @ B_hat [d_out, r]       the aligner, one pair a module kind
    y     = W x + (alpha / r) B (A x)                                            an ordinary LoRA from here on

    z_t, W1, W2, gamma, beta, heads   belong to no base: learned once, then frozen   (latents, Core)
    e_l, P_in, P_out                  belong to one base: refitted at every port     (Converter)

Everything that adapts a base, this generator and the per-task LoRA alike, yields `Adapters`. Training, evaluation
and export consume Adapters and know nothing else. Method: Geist, "PorTAL: Portable Task Adapters for LLMs", 2026.
"""
import dataclasses, pathlib
from typing import NamedTuple

import safetensors, safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from cli import BadInput, read_json, write_whole

MODULES = ("q", "k", "v", "o", "gate", "up", "down")  # the seven projections of a decoder layer: q_proj, ...


class Adapters(NamedTuple):
    """LoRA factors of T tasks on all L layers of one base."""
    A: dict                                                                          # {m: [T, L, r, d_in]}
    B: dict                                                                          # {m: [T, L, d_out, r]}
    scale: float                                                                     # alpha / r

    def map(self, f):
        """The same adapters with f applied to every tensor."""
        return Adapters({m: f(a) for m, a in self.A.items()}, {m: f(b) for m, b in self.B.items()}, self.scale)

    def tensors(self):
        return [*self.A.values(), *self.B.values()]


@dataclasses.dataclass
class Config:
    """What makes two runs comparable. The defaults are the write-up's sizes, but for `norm` (see Core)."""
    tasks: list
    modules: list = dataclasses.field(default_factory=lambda: ["q", "v"])
    rank: int = 8
    alpha: int = 16
    d_z: int = 256                                                                   # task latent
    d_e: int = 32                                                                    # layer embedding
    hidden: int = 512                                                                # trunk
    d_c: int = 1024                                                                  # core width
    norm: str = "layer"                                                              # or "none", the write-up's trunk
    gain: float = 0.1                                                                # of the second LayerNorm, at the start


# ---------------------------------------------------------------------------------------------- belongs to no base
class Core(nn.Module):
    """The FiLM trunk and the heads. B-heads and FiLM start at zero, so that the generated adapter starts as the identity
    (appendix A). `norm="none"` is the write-up's trunk; "layer" puts LayerNorm after W1 and after W2. The second one's
    gain sets the size of the features h: at 1 they, and with them every step of the heads, are ten times the write-up's,
    whose learning rate then diverges at the write-up's widths; at 0.1 the two agree. The toy's widths bear a gain of 1."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.W1 = nn.Linear(cfg.d_z + cfg.d_e, cfg.hidden)
        self.W2 = nn.Linear(cfg.hidden, cfg.hidden)
        self.film = nn.Linear(cfg.d_z, 2 * cfg.hidden)                               # z -> gamma, beta
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.hidden) if cfg.norm == "layer" else nn.Identity() for _ in "12")
        if cfg.norm == "layer":
            nn.init.constant_(self.norm2.weight, cfg.gain)
        self.head_A = nn.ModuleDict({m: nn.Linear(cfg.hidden, cfg.rank * cfg.d_c) for m in cfg.modules})
        self.head_B = nn.ModuleDict({m: nn.Linear(cfg.hidden, cfg.d_c * cfg.rank) for m in cfg.modules})
        for layer in (self.film, *self.head_B.values()):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, z, e):
        """z [T, d_z], e [L, d_e] -> {m: A_hat [T, L, r, d_c]}, {m: B_hat [T, L, d_c, r]}."""
        T, L, r, d_c = len(z), len(e), self.cfg.rank, self.cfg.d_c
        ze = torch.cat([z[:, None].expand(T, L, -1), e[None].expand(T, L, -1)], dim=-1)  # [T, L, d_z + d_e]
        gamma, beta = self.film(z)[:, None].chunk(2, dim=-1)                         # [T, 1, hidden] each
        h = F.gelu(self.norm1(self.W1(ze)))                                          # [T, L, hidden]
        h = F.gelu(self.norm2(self.W2((1 + gamma) * h + beta)))                      # [T, L, hidden]
        return ({m: head(h).view(T, L, r, d_c) for m, head in self.head_A.items()},
                {m: head(h).view(T, L, d_c, r) for m, head in self.head_B.items()})


# ---------------------------------------------------------------------------------------------- belongs to one base
class Converter(nn.Module):
    """Layer embeddings e and the aligner P_in, P_out of one base with `layers` layers and `dims` {m: (d_in, d_out)}.

    At a port the core is already trained and its B-heads are no longer zero: P_out starts at zero instead, so that a
    port, too, starts at the identity. `like` is then the converter of a base that the core was trained on, and e starts
    as its layer embeddings, each layer taking those of the same relative depth: the core has met no others, and a few
    hundred steps hardly move random ones (the write-up's start) to where it knows what to do with them.
    """

    def __init__(self, cfg, layers, dims, like=None):
        super().__init__()
        self.e = nn.Parameter(torch.randn(layers, cfg.d_e) if like is None else
                              torch.stack([like.e.detach()[same_depth(l, layers, len(like.e))] for l in range(layers)]))
        self.P_in = nn.ParameterDict({m: 0.02 * torch.randn(cfg.d_c, dims[m][0]) for m in cfg.modules})
        self.P_out = nn.ParameterDict({m: (0 if like else 0.02) * torch.randn(dims[m][1], cfg.d_c) for m in cfg.modules})


def same_depth(l, layers, source_layers):
    """The layer of a base with `source_layers` at the relative depth of layer l of one with `layers`."""
    return round(l * (source_layers - 1) / max(1, layers - 1))


class Portal:
    """Latents, core and the converters of every base the run knows."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.z = nn.Parameter(0.02 * torch.randn(len(cfg.tasks), cfg.d_z))           # [T, d_z]
        self.core = Core(cfg)
        self.converters = {}                                                         # {base name: Converter}

    @staticmethod
    def load(run, base):
        """What a run folder holds for one loaded base (bases.load_base), on that base's device."""
        return load_portal(pathlib.Path(run), [base.name]).to(base.device)

    def adapters(self, base):
        """Generate the adapters of every task for one base, with their graph."""
        converter = self.converters[base]
        A_hat, B_hat = self.core(self.z, converter.e)
        return Adapters({m: A_hat[m] @ converter.P_in[m] for m in self.cfg.modules},   # [T, L, r, d_in]
                        {m: converter.P_out[m] @ B_hat[m] for m in self.cfg.modules},  # [T, L, d_out, r]
                        self.cfg.alpha / self.cfg.rank)

    def to(self, device):
        self.z.data = self.z.data.to(device)
        for module in (self.core, *self.converters.values()):
            module.to(device)
        return self


# ---------------------------------------------------------------------------------------------- on disk
def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, lambda p: safetensors.torch.save_file(tensors, p, metadata))


def load_tensors(path):
    """Read a safetensors file; BadInput if it is missing, truncated or something else."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); restore it or run the command that made it again")


def load_into(module, path):
    try:
        module.load_state_dict(load_tensors(path))
    except RuntimeError:
        raise BadInput(f"{path}: its tensors do not fit this run's portal.json (another configuration's file?)")


def save_adapters(path, adapters):
    save_tensors(path, {**{f"A.{m}": a for m, a in adapters.A.items()}, **{f"B.{m}": b for m, b in adapters.B.items()},
                        "scale": torch.tensor(adapters.scale)})


def load_adapters(path, device="cpu"):
    tensors = {name: tensor.to(device) for name, tensor in load_tensors(path).items()}
    if "scale" not in tensors:
        raise BadInput(f"{path}: holds no adapters")
    A, B = ({name[2:]: t for name, t in tensors.items() if name.startswith(side)} for side in ("A.", "B."))
    return Adapters(A, B, float(tensors["scale"]))


def save_portal(run, portal, final=False):
    """Latents, core and converters; `final=True`: the last epoch's, beside the selected one's."""
    folder = run / "final" if final else run
    save_tensors(folder / "core.safetensors", portal.core.state_dict())
    save_tensors(folder / "latents.safetensors", {"z": portal.z})
    for name in portal.converters:
        save_converter(run, portal, name, name, final)


def save_converter(run, portal, name, tag, final=False):
    """The converter of base `name` as converters/<tag>.safetensors (a sweep's tags are <base>@<n>)."""
    folder = run / "final" if final else run
    save_tensors(folder / "converters" / f"{tag}.safetensors", portal.converters[name].state_dict())


def saved_at(run, name, final):
    """Where a run keeps `name`: final/ holds the last epoch's state of what had another epoch selected."""
    return run / "final" / name if final and (run / "final" / name).exists() else run / name


def load_config(run):
    """(portal.json as a dict, Config); BadInput if it is not one of ours."""
    saved = read_json(run / "portal.json")
    try:
        cfg, names = Config(**saved["config"]), [*saved["config"]["tasks"], *(b["base"] for b in saved["bases"])]
        saved["seed"], saved["data"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{run / 'portal.json'}: not a PorTAL configuration ({error})")
    for name in names:
        if not plain(name):
            raise BadInput(f"{run / 'portal.json'}: {name!r} is no name of a task or a base: it names files and folders here")
    return saved, cfg


def plain(name):
    """Whether a name that comes out of a file can name a file: it must not lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def provenances(run):
    """{tag: what converters/<tag>.json says of that converter}, of all that a run holds. Raises BadInput."""
    return {path.stem: read_json(path) for path in sorted((run / "converters").glob("*.json"))}


def load_converter(cfg, path):
    tensors = load_tensors(path)
    try:
        dims = {m: (tensors[f"P_in.{m}"].shape[1], tensors[f"P_out.{m}"].shape[0]) for m in cfg.modules}
        converter = Converter(cfg, len(tensors["e"]), dims)
    except (KeyError, IndexError):
        raise BadInput(f"{path}: its tensors do not fit this run's portal.json (another configuration's file?)")
    load_into(converter, path)
    return converter


def load_portal(run, tags=(), final=False):
    """A saved run as a Portal with the converters of `tags`: the selected epoch, or the last where `final/` has it."""
    def newest(name):
        return saved_at(run, name, final)
    _, cfg = load_config(run)
    portal = Portal(cfg)
    load_into(portal.core, newest("core.safetensors"))
    z = load_tensors(newest("latents.safetensors")).get("z")
    T = len(cfg.tasks)                                                               # more rows than that: an --add-task
    if z is None or z.dim() != 2 or z[:T].shape != portal.z.shape:                   # that was killed before portal.json
        raise BadInput(f"{newest('latents.safetensors')}: its tensors do not fit this run's portal.json")
    portal.z.data = z[:T]
    for tag in tags:
        portal.converters[tag] = load_converter(cfg, newest(f"converters/{tag}.safetensors"))
    return portal
