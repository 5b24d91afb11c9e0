"""Alignment: P_in of a port starts by ridge regression on a base that the core was trained on, at the size of a random
one. Not in the write-up."""
import torch
from tqdm import tqdm

from bases import most_tokens, same_depths
from kernels.cross_entropy import wide
from runtime.distributed import NO_BAR
from runtime.files import BadInput

ALIGN = 256  # texts for `align`, in equal parts of all tasks


def texts_of(rows):
    """The prompts that an alignment reads, of rows {task: (train, held out)}."""
    return [row.prompt for train, _ in rows.values() for row in train[:max(1, ALIGN // len(rows))]]


@torch.no_grad()
def layer_inputs(base, text, modules):
    """Returns what the sites of `base` read at the S tokens of a text, {(m, layer): [S, d_in]} of those that text
    reaches, and {position of a character: the token that ends there}."""
    tokenizer = base.tokenizer
    tokens = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=most_tokens(tokenizer))
    found = {}
    def record(key):
        return lambda linear, args, y: found.update({key: args[0].flatten(0, -2).to(base.device)})
    hooks = [site.linear.register_forward_hook(record(key)) for key, site in base.sites.items() if key[0] in modules]
    first = torch.zeros(1, dtype=torch.long, device=base.device)                     # the one position with logits
    with base.activate({"at": (first, first)}):
        base.model(input_ids=torch.tensor([tokens.input_ids], device=base.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found, {end: k for k, (start, end) in enumerate(tokens.offset_mapping) if end > start}


def shared_inputs(base, source, text, modules):
    """Returns layer_inputs of two bases at the tokens of a text that end at the same characters, in the same order."""
    (x, ends), (source_x, source_ends) = layer_inputs(base, text, modules), layer_inputs(source, text, modules)
    shared = sorted(ends.keys() & source_ends.keys())
    at, source_at = [ends[c] for c in shared], [source_ends[c] for c in shared]
    return {key: own[at] for key, own in x.items()}, {key: own[source_at] for key, own in source_x.items()}


def ridge(XX, XY, by=1e-2):
    """Returns W of min |X W - Y|^2 + lambda |W|^2 from X^T X and X^T Y; lambda is `by` of X^T X's mean diagonal."""
    eye = torch.eye(len(XX), dtype=XX.dtype, device=XX.device)
    return torch.linalg.solve(XX + by * XX.diagonal().mean() * eye, XY)


@torch.no_grad()
def align(converter, base, like, source, texts):
    """Sets P_in by ridge regression towards the inputs of the core on `source`, a base it was trained on; `like` is the
    source's converter. It uses prompts but no answers. Raises BadInput for a tokenizer that does not tell where in a
    text its tokens end.

    min over P_in of  sum |P_in x - P_in' x'|^2 + lambda |P_in|^2,  summed in float64, for each group of sites: x is
    what a layer of `base` reads at a token of a text, x' what the source's layer of the same relative depth reads at
    the token that ends at the same character. Tokenizers cut texts differently, but most words end at a token's end
    in both.
    """
    if slow := [b.name for b in (base, source) if not b.tokenizer.is_fast]:
        raise BadInput(f"--align: the tokenizer of {slow[0]} does not tell where in a text its tokens end")
    modules = {group.kind for group in converter.groups.values()}
    XX, XY = dict.fromkeys(converter.P_in, 0), dict.fromkeys(converter.P_in, 0)
    what = f"aligning {base.name} with {source.name}"
    for text in tqdm(texts, desc=what, unit="text", delay=2, leave=False, disable=NO_BAR):
        x, source_x = shared_inputs(base, source, text, modules)
        read = {}                                                                    # {g: [(X [S, d_in], Y [S, d_c])]}
        for m in modules:
            for (layer, g, _), (source_layer, source_g, _) in same_depths(base, source, m):
                if (m, layer) in x and (m, source_layer) in source_x:
                    X, source_X = (a.to(wide(a.dtype)) for a in (x[m, layer], source_x[m, source_layer]))
                    read.setdefault(g, []).append((X, (source_X @ like.P_in[source_g].to(source_X).T).to(X)))
        for g, pairs in read.items():            # all layers of a group at once: adding to such wide sums takes longest
            X, Y = map(torch.cat, zip(*pairs))
            XX[g], XY[g] = XX[g] + (X.T @ X).double(), XY[g] + (X.T @ Y).double()
    for g, P_in in converter.P_in.items():
        if torch.is_tensor(XX[g]) and XX[g].any():                                   # else text does not reach them
            P_in.copy_(ridge(XX[g], XY[g]).T)                                        # [d_c, d_in]


@torch.no_grad()
def keep_size(core, z, converter):
    """Scales each P_in so that the rows of A are as long as those of A_hat, in the mean over tasks and layers.

    A random P_in keeps that length, and so B, which starts at zero, learns at a rate that suits all groups. Regression
    gives A the size that its inputs ask for: from SmolLM2-135M to Gemma-3-270M, `down` had rows 80 times as long as
    `q`, and 60 times the share of W in what it learned."""
    (A_hat, _), (A, _) = core(z, converter.e), converter(core, z)
    for g, group in converter.groups.items():
        length = A[g].norm(dim=-1).mean()
        if length > 0:                                                               # else it reads zeros
            converter.P_in[g].mul_(A_hat[group.kind].norm(dim=-1).mean() / length)
