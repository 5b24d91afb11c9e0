"""The sites of a base: the places in its decoder layers that can take a low-rank delta, found by the names of modules.

A site is a module kind m in a layer l: all output rows of a linear layer, or some of them where several projections are
fused in one. Layers may lack a kind, hold it in another shape, or hold something else altogether; nothing is known of
any architecture but these names. Experts of a mixture are no sites: a token passes only some of them."""
import functools, re
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from portal import MODULES

NAMES = {  # {end of a linear layer's path in a decoder layer: the module kind that it is}
    "q_proj": "q", "q_b_proj": "q", "q_gate_proj": "q", "q_proj.linear": "q", "k_proj": "k", "k_proj.linear": "k",
    "v_proj": "v", "v_proj.linear": "v", "o_proj": "o", "o_proj.linear": "o",
    "self_attn.out_proj": "o", "attn.out_proj": "o", "attention.out_proj": "o", "attn.c_proj": "o",
    "self_attn.dense": "o", "attention.dense": "o", "self_attention.dense": "o",
    "gate_proj": "gate", "feed_forward.w1": "gate",
    "up_proj": "up", "feed_forward.w3": "up", "fc1": "up", "dense_h_to_4h": "up", "mlp.c_fc": "up", "mlp.fc_in": "up",
    "down_proj": "down", "feed_forward.w2": "down", "fc2": "down", "dense_4h_to_h": "down", "mlp.c_proj": "down",
    "mlp.fc_out": "down", "shared_mlp.output_linear": "down"}
# Of these names, but something else: attention to another text or an image, the choice of tokens or experts, a part of
# a norm, a gate of attention.
OTHER = re.compile(r"cross|encoder_attn|indexer|compressor|router|layernorm|attn.*(?<!q_)gate_proj|(^|\.)gate\.")
# Of a path in the model: not the decoder's layers, or something within one of them.
NO_STACK = re.compile(r"vision|visual|image|audio|speech|\.\d+\.")


class Site(NamedTuple):
    linear: nn.Module                                                                # nn.Linear, or GPT-2's Conv1D
    path: str                                                                        # its dotted path in the model
    rows: torch.Tensor = None                                                        # [d_out] of its outputs; None: all

    def dims(self):
        """Returns (d_in, d_out)."""
        d_in, d_out = shape(self.linear)
        return d_in, d_out if self.rows is None else len(self.rows)


# ---------------------------------------------------------------------------------------------- fused projections
def qkv(config, linear, by_head):
    """Returns {m: rows of the fused q, k and v}, for H heads of q and G of k and v. The rows are those of q, then of k,
    then of v; by_head: for each of the G in turn its H / G heads of q, one of k, one of v. Raises ValueError."""
    H, d_out = config.num_attention_heads, shape(linear)[1]
    d = getattr(config, "head_dim", None) or config.hidden_size // H
    G = (d_out // d - H) // 2
    if G < 1 or H % G or (H + 2 * G) * d != d_out:
        raise ValueError(f"{d_out} output rows are not {H} heads of {d} and those of k and v")
    rows = torch.arange(d_out)
    if not by_head:
        return dict(zip("qkv", rows.split([H * d, G * d, G * d])))
    rows = rows.view(G, H // G + 2, d)
    return {"q": rows[:, :-2].flatten(), "k": rows[:, -2].flatten(), "v": rows[:, -1].flatten()}


def gate_up(config, linear):
    return dict(zip(("gate", "up"), torch.arange(shape(linear)[1]).view(2, -1)))


def latent_kv(config, linear):
    """Returns {m: rows} of multi-head latent attention's kv_b_proj, which makes keys and values of a common latent: for
    each head its part of k without positions, then its v. Raises RuntimeError for other sizes."""
    rows = torch.arange(shape(linear)[1]).view(-1, config.qk_nope_head_dim + config.v_head_dim)
    return {"k": rows[:, :config.qk_nope_head_dim].flatten(), "v": rows[:, config.qk_nope_head_dim:].flatten()}


FUSED = {  # {end of a linear layer's path in a decoder layer: f(config, linear) -> {m: its rows}}
    "self_attn.qkv_proj": functools.partial(qkv, by_head=False), "attn.Wqkv": functools.partial(qkv, by_head=False),
    "query_key_value": functools.partial(qkv, by_head=True),
    "attn.c_attn": lambda config, linear: qkv(config, linear, by_head=not isinstance(linear, Conv1D)),
    "gate_up_proj": gate_up, "shared_mlp.input_linear": gate_up, "kv_b_proj": latent_kv}


# ---------------------------------------------------------------------------------------------- the search
def shape(linear):
    """Returns (d_in, d_out)."""
    return tuple(linear.weight.shape) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def known(names, path):
    """Returns the value of the name in {end of a path: value} that `path` ends in, or None."""
    return next((names[end] for end in names if f".{path}".endswith(f".{end}")), None)


def projections(layer, config):
    """Returns the projections of a decoder layer, [(m, linear, rows or None)], and what it holds in a form that is not
    adapted, a list of texts."""
    found, left = [], []
    experts = tuple(f"{path}." for path, x in layer.named_modules()
                    if isinstance(x, nn.ModuleList) and "expert" in path)
    for path, x in layer.named_modules():
        m, fused = known(NAMES, path), known(FUSED, path)
        if not (m or fused) or not isinstance(x, (nn.Linear, Conv1D)) or OTHER.search(path):
            continue
        if path.startswith(experts):
            left.append(f"{path} (one of several)")
            continue
        try:
            found += [(m, x, rows) for m, rows in (fused(config, x).items() if fused else [(m, None)])]
        except (AttributeError, RuntimeError, ValueError) as error:
            left.append(f"{path} (fused in an unknown way: {error})")
    return found, left + [f"{path} {[*p.shape]} (experts in one tensor)" for path, p in layer.named_parameters()
                          if p.dim() == 3 and "expert" in path]


def find_sites(model):
    """Returns the decoder's L layers, {(m, layer): Site} and {m: why it has no site}, for a patched or a plain model.

    The layers are the only nn.ModuleList of the decoder, but for those within layers, in which a layer holds a site. A
    kind that some layer holds twice has no sites: which of them is meant is not known."""
    paths, config = {x: path for path, x in model.named_modules()}, model.config.get_text_config()
    for root in (model.get_decoder(), model.base_model):
        stacks = {path: x for path, x in root.named_modules() if isinstance(x, nn.ModuleList)
                  and not NO_STACK.search(path) and any(projections(layer, config)[0] for layer in x)}
        if stacks:
            break
    if len(stacks) > 1:
        return [], {}, dict.fromkeys(MODULES, f"its layers are in several lists, {', '.join(stacks)}")
    blocks = next(iter(stacks.values()), None)
    if blocks is None:
        names = sorted({path.split(".")[-1] for path, x in model.named_modules() if isinstance(x, (nn.Linear, Conv1D))})
        return [], {}, dict.fromkeys(MODULES, "no layer holds a projection of a known name; the model's linear modules "
                                              f"are {', '.join(names)}")
    sites, lacks, doubled, seen = {}, {}, {}, set()
    types = dict(enumerate(getattr(config, "layer_types", None) or ()))
    for l, layer in enumerate(blocks):
        of_layer = config.per_layer_config[l] if getattr(config, "is_heterogeneous", False) else config
        found, left = projections(layer, of_layer)
        if "linear" in types.get(l, ""):                              # recurrent layers fuse q, k and v in other orders
            found = [(m, linear, rows) for m, linear, rows in found if rows is None or m not in "qkv"]
        for m, linear, rows in found:
            if (linear, m) in seen:                                                  # a module that layers share
                continue
            if (m, l) in sites:
                doubled[m] = f"layer {l} holds two: {sites[m, l].path} and {paths[linear]}"
            sites[m, l] = Site(linear, paths[linear], rows)
            seen.add((linear, m))
        has = ", ".join(path for path, x in layer.named_modules() if isinstance(x, (nn.Linear, Conv1D)))
        for m in MODULES:
            if (m, l) not in sites:
                lacks.setdefault(m, f"layer {l} has none among {'; '.join([has, *left[:2]])}")
    have = {m for m, _ in sites} - doubled.keys()
    return (blocks, {key: site for key, site in sites.items() if key[0] in have},
            {m: doubled.get(m) or lacks[m] for m in MODULES if m not in have})
