"""A frozen base model, patched once so that a forward pass takes Adapters and a task for each row.

There is no code per architecture: sites.py finds the projections of a decoder's layers by their names. Each of these
linear layers is wrapped in `Adapted`, which adds the low-rank part.
"""
import contextlib, functools, math
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

import bases.decoding as decoding
import bases.heads as heads
import bases.masks as masks
from bases.sites import find_sites, shape
from kernels.cross_entropy import linear_nll, nll_of
from kernels.lora import lora_add, lora_linear
from portal import MODULES, group_sites, same_depth
from runtime.files import BadInput


class Adapted(nn.Module):
    """W x + scale B_t A_t x, with the A, B and tasks in its base's `active` during a forward pass."""

    def __init__(self, linear, path, active):
        super().__init__()
        self.linear, self.path, self.active = linear, path, active

    def forward(self, x):                                                            # [R, S, d_in]
        if self.path not in self.active.factors:
            return self.linear(x)
        A, B = self.active.factors[self.path]                                        # [T, r, d_in], [T, d_out, r]
        task, scale = self.active.task[x.device], self.active.scale                  # [R]
        rows = x if x.dim() == 3 else x.reshape(len(task), -1, x.shape[-1])          # [R S, d_in] in a shared expert
        if type(self.linear) is not nn.Linear:                                       # quantised: W is not readable
            y = lora_add(self.linear(rows), rows, A, B, task, scale)                 # [R, S, d_out]
        else:
            y = lora_linear(rows, self.linear.weight, self.linear.bias, A, B, task, scale)  # [R, S, d_out]
        return y if x.dim() == 3 else y.view(*x.shape[:-1], -1)


class Base:
    """A frozen language model with its `sites` {(m, layer): Site} in `groups` {g: Group}, and `logits(...)`.
    provenance: what a run records of where it comes from, see bases.load_base. Raises BadInput for a model without any
    sites."""

    def __init__(self, model, tokenizer, name="base", provenance=None):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.provenance = name, provenance or dict(id="", revision=None, quantize=None)
        self.batch = None                                                            # the last one given to logits()
        # what the patched modules read
        self.active = SimpleNamespace(factors={}, task=None, scale=1.0, at=None, caught=None)
        self.config = model.config.get_text_config()
        self.blocks, self.sites, self.lacks = find_sites(model)
        self.kinds = [m for m in MODULES if m not in self.lacks]
        dims = {key: site.dims() for key, site in self.sites.items()}
        self.groups = group_sites({key: dims[key] for m in self.kinds for key in dims if key[0] == m})
        self.places = {}                                                  # {path: [(g, index in the group, rows)]}
        for g, (m, layers, _, _) in self.groups.items():
            for index, layer in enumerate(layers):
                linear, path, rows = self.sites[m, layer]
                rows = rows if rows is None else rows.to(linear.weight.device)
                self.places.setdefault(path, []).append((g, index, rows))
        if not self.sites or model.get_output_embeddings() is None:
            why = "it names no layer that makes the logits" if self.sites else self.lacks["q"]
            raise BadInput(f"{name}: {type(model).__name__} is not supported: {why}")
        self.linears = {site.path: site.linear for site in self.sites.values()}
        for path, linear in self.linears.items():
            model.set_submodule(path, Adapted(linear, path, self.active))
        self.head_hook = model.get_output_embeddings().register_forward_pre_hook(self.pick)
        model.generation_config = GenerationConfig()                                 # no repetition penalty etc.

    def groups_of(self, kinds):
        """{g: Group} of these module kinds, in their order. Raises BadInput for a kind that the base lacks."""
        for m in kinds:
            if m in self.lacks:
                raise BadInput(f"{self.name}: {type(self.model).__name__} has no {m} to adapt: {self.lacks[m]}")
        return {g: group for m in kinds for g, group in self.groups.items() if group.kind == m}

    def sites_of(self, m):
        """[(layer, its group, its index in the group)] of the sites of a kind, by layer."""
        return sorted((layer, g, index) for g, group in self.groups.items() if group.kind == m
                      for index, layer in enumerate(group.layers))

    def pick(self, head, inputs):
        """The LM head's input [1, N, d]: x [R, S, d] at the positions `active.at`. Answers are a few tokens of a long
        row, and a small model's vocabulary is its widest matrix: all positions' logits would cost more than the layers.
        """
        (x,), at = inputs, self.active.at
        x = x if at is None else x[tuple(index.to(x.device) for index in at)][None]
        if self.active.caught is None:
            return x
        self.active.caught.append(x)                                                 # see nll
        return x[:, :0]

    @property
    def device(self):
        return self.model.device  # of inputs, logits and generated adapters; the layers may be on several others

    @torch.no_grad()
    def weight(self, m, layer):
        """The frozen weight W [d_out, d_in] of a site, on `device`."""
        linear, path, rows = self.sites[m, layer]
        if type(linear) is nn.Linear:
            W = linear.weight
        elif type(linear) is Conv1D:
            W = linear.weight.T
        else:
            # Only a quantised layer's own forward can read its weight: W = (W I), without the bias.
            eye = torch.eye(shape(linear)[0], dtype=self.model.dtype, device=linear.weight.device)
            W = torch.func.functional_call(linear, {"bias": None}, eye).T
        return (W if rows is None else W[rows.to(W.device)]).to(self.device)

    def unpatch(self):
        """The model as transformers loaded it, with its own projections. This Base cannot be used afterwards."""
        for path, linear in self.linears.items():
            self.model.set_submodule(path, linear)
        self.head_hook.remove()
        if quantizer := getattr(self.model, "hf_quantizer", None):                   # a .gguf file: its weights were
            quantizer.remove_quantization_config(self.model)                         # dequantised when they were loaded
        return self.model

    def logits(self, batch, adapters=None):
        """Logits [N, vocabulary] at the N positions of `batch` (data.collate) that predict a continuation's token.
        adapters: Adapters of the tasks that `batch.task` [R] indexes, or None for the bare base."""
        self.batch = batch
        with self.with_adapters(adapters, batch.task, batch.at):
            return self.model(input_ids=batch.ids, use_cache=False, **masks.of(self, batch)).logits[0]

    def nll(self, batch, adapters=None, weight=None):
        """Returns (loss, nll [M], best [M]) of the answer tokens of `batch`: their NLL, float32 at least, the sum of it
        times weight [M], which alone has a gradient, and the most probable token in the place of each, None where the
        loss has a gradient. weight None: ones. adapters: see logits.

        The logits of all positions are not kept where the head is a plain one: it then gets no positions, and
        kernels/cross_entropy.py what it would have got."""
        weight = torch.ones(batch.target.shape, device=self.device) if weight is None else weight
        if self.head is None:
            return nll_of(self.logits(batch, adapters), batch.source, batch.target, weight)
        with self.activate({"caught": []}):
            self.logits(batch, adapters)
            h, = self.active.caught[0]                                               # [N, d]
        linear, scale, cap = self.head
        found = linear_nll(h, linear.weight, linear.bias, batch.source, batch.target, weight, scale, cap)
        return tuple(a if a is None else a.to(self.device) for a in found)

    @functools.cached_property
    def head(self):
        """The LM head, if it is a plain one: heads.Head or None; found out by trying, once."""
        return heads.find(self)

    @functools.cached_property
    def packs(self):
        """Whether a row can hold a prompt and several continuations; found out by trying, once."""
        return masks.keeps_apart(self)

    @functools.cached_property
    def pads(self):
        """Whether `generate` may pad prompts on the left; found out by trying, once."""
        return masks.ignores_padding(self)

    @functools.cached_property
    def drops(self):
        """Whether a row may leave the batch that `generate` decodes; found out by trying, once."""
        return masks.goes_on_alone(self)

    def with_adapters(self, adapters, task, at=None):
        """A context in which row r of a forward pass has the adapters of task[r], and logits are computed only at the
        positions `at` (rows [N], columns [N]; None: everywhere). adapters None: the bare base."""
        if adapters is None:
            return self.activate({"at": at})
        factors = self.factors(adapters)
        devices = {A.device for A, _ in factors.values()}
        return self.activate(dict(factors=factors, task={device: task.to(device) for device in devices},
                                  scale=adapters.scale, at=at))

    def factors(self, adapters):
        """{path of a linear layer: (A [T, r, d_in], B [T, d_out, r])} of Adapters, each on its layer's device. A layer
        that several projections are fused in has one LoRA of the sum of their ranks: their A one below the other, and
        the rows of B that are not a projection's zero."""
        A, B, _ = adapters.map(lambda t: t.unbind(1))                                # {g: L_g [T, ...]}
        found = {}
        for path, places in self.places.items():
            device = self.linears[path].weight.device                                # usually all the same
            own = [(A[g][i].to(device), B[g][i].to(device), rows) for g, i, rows in places if g in A]
            if own and own[0][2] is None:
                found[path] = own[0][:2]
            elif own:
                start, d_out = 0, shape(self.linears[path])[1]
                fused = own[0][1].new_zeros(len(own[0][1]), d_out, sum(b.shape[2] for _, b, _ in own))
                for a, b, rows in own:
                    fused[:, rows.to(device), start:start + b.shape[2]] = b
                    start += b.shape[2]
                found[path] = torch.cat([a for a, _, _ in own], 1), fused
        return found

    @contextlib.contextmanager
    def activate(self, state):
        """Updates `active`, which the patched modules read, with `state`; restores it at the end."""
        before = dict(vars(self.active))
        vars(self.active).update(state)
        try:
            yield
        finally:
            vars(self.active).update(before)

    def recompute_layers(self):
        """Keeps only each layer's input and runs the layer again in the backward pass: less memory, 1/3 more time."""
        def contexts():                                                              # other adapters may be active then
            return contextlib.nullcontext(), self.activate(dict(vars(self.active)))
        for layer in self.blocks:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts,
                                              preserve_rng_state=False)              # nothing is random: no dropout

    def generate(self, prompts, adapters=None, tasks=None, max_new_tokens=32, lines=math.inf, stop=None):
        """The greedy continuations, R texts, of R prompts (texts or lists of token ids), row r with the adapters of
        tasks[r]; one forward pass a token for all rows. A row ends at EOS, after max_new_tokens, or with the new line
        after `lines` lines, and then leaves the batch. Both are a number, or a list of one for each row. stop: see
        decoding.texts."""
        each = [value if isinstance(value, (list, tuple)) else [value] * len(prompts)
                for value in (max_new_tokens, lines)]
        return decoding.texts(self, prompts, adapters, tasks, *each, stop)


def same_depths(target, source, m):
    """Pairs each site of kind m of a base with that of another base at the same relative depth: a list of [(layer,
    group, index) of the target, the same of the source]. Layers without the kind do not count."""
    sites, others = target.sites_of(m), source.sites_of(m)
    return [(site, others[same_depth(k, len(sites), len(others))]) for k, site in enumerate(sites)] if others else []
