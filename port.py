"""Porting: latents and core stay as they are; a fresh converter is refitted on a base that the run has never seen.

    python port.py                                 the toy run, to its two unseen bases
    python port.py --to gemma-3-4b --n 1000        n training rows a task; --n 50,100,200 refits once for each
    python port.py --align                         for few rows: P_in starts by regression on a source base
    python port.py --teacher toy-qwen-m            without labels: fits to the answers of a base of the run
    python port.py --dry-run                       prints what that would take in memory and time

A port starts at the identity (P_out is zero) and with the layer embeddings of a source base (portal.Converter). The
training loop is train.fit: what differs is what is frozen, and the coordinates of P_in and P_out (whiten)."""
import copy, functools, pathlib
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

from bases import TOY_UNSEEN, find_base, load_base, reload_base, short_names
from checkpoints import refuse_twin
from data import MAX_LENGTH, SoftRow, load_run_tasks, print_fewer, sample
from frozen import same_depths
from learner import portal_learner, save_states
from portal import Converter, layers_of
from runtime.distributed import NO_BAR
from runtime.files import ROOT, BadInput, read_json, remove, today, write_json
from runtime.flags import commas, parse, positive, run_main
from runtime.job import DryRun, Job
from runtime.resume import Journal, command_of, digests_of, forget, state_file
from runtime.run_folder import find_run, load_config, load_portal, lock, provenances, save_converter
from score import per_character, score
from tokens import encode
from train import REAL, TOY, fit, one_round, preset, resolve_settings

ALIGN = 1000  # texts for `align`, in equal parts of all tasks


# ---------------------------------------------------------------------------------------------- P_in at the start
def texts_of(rows):
    """The prompts that an alignment reads, of rows {task: (train, held out)}."""
    return [row.prompt for train, _ in rows.values() for row in train[:max(1, ALIGN // len(rows))]]


@torch.no_grad()
def layer_inputs(base, text, modules):
    """Returns what the sites of `base` read at the S tokens of a text, {(m, layer): [S, d_in]} of those that text
    reaches, and {position of a character: the token that ends there}."""
    tokens = base.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=MAX_LENGTH)
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
    source's converter. Not in the write-up. It uses prompts but no answers.

    min over P_in of  sum |P_in x - P_in' x'|^2 + lambda |P_in|^2,  in float64, for each group of sites: x is what a
    layer of `base` reads at a token of a text, x' what the source's layer of the same relative depth reads at the
    token that ends at the same character. Tokenizers cut texts differently, but most words end at a token's end in
    both.
    """
    modules = {group.kind for group in converter.groups.values()}
    XX, XY = dict.fromkeys(converter.P_in, 0), dict.fromkeys(converter.P_in, 0)
    source_P = {g: P.double() for g, P in like.P_in.items()}                         # [d_c, d_in of the source]
    what = f"aligning {base.name} with {source.name}"
    for text in tqdm(texts, desc=what, unit="text", delay=2, leave=False, disable=NO_BAR):
        x, source_x = shared_inputs(base, source, text, modules)
        for m in modules:
            for (layer, g, _), (source_layer, source_g, _) in same_depths(base, source, m):
                if (m, layer) not in x or (m, source_layer) not in source_x:
                    continue
                X = x[m, layer].double()                                             # [S, d_in]
                Y = source_x[m, source_layer].double() @ source_P[source_g].T                # [S, d_c]
                XX[g], XY[g] = XX[g] + X.T @ X, XY[g] + X.T @ Y
    for g, P_in in converter.P_in.items():
        if torch.is_tensor(XX[g]):                                                   # else text does not reach them
            P_in.copy_(ridge(XX[g], XY[g]).T)                                        # [d_c, d_in]


# ---------------------------------------------------------------------------------------------- whitened features
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


# ---------------------------------------------------------------------------------------------- a teacher's labels
@torch.no_grad()
def soft_rows(teacher, adapters, rows, tasks, max_tokens):
    """Returns {id of a row: its SoftRow}, in which the answers of a base with its adapters take the label's place:
    weights = softmax over the choices of log p(choice | prompt), gold = what acc_norm counts as its answer. Raises
    BadInput for completions, which have no choices."""
    if opened := [row.task for row in rows if row.open]:
        raise BadInput(f"--teacher: task {opened[0]} is of completions; a teacher is asked about choices")
    items, _ = encode(teacher.tokenizer, [row._replace(gold=0) for row in rows], tasks)
    found = {}
    for row, item, log_p in zip(rows, items, score(teacher, adapters, items, max_tokens)):
        weights, scores = torch.tensor(log_p, dtype=torch.float64).softmax(0), per_character(item, log_p)
        found[id(row)] = SoftRow(*row[:3], scores.index(max(scores)), tuple(round(float(w), 6) for w in weights))
    return found


def answers(run, tag, teacher, data, n, seed, max_tokens):
    """Returns soft_rows of the first n rows of every task's sample, with the adapters of a run's converter `tag`."""
    rows = [row for splits in data.values() for part in sample(splits["train"], n, seed) for row in part]
    portal = load_portal(run, [tag]).to(teacher.device)
    return soft_rows(teacher, portal.adapters(tag), rows, portal.cfg.tasks, max_tokens)


# ---------------------------------------------------------------------------------------------- one port
class Change(NamedTuple):
    """What an ablation hands in: change(converter) before the first step; settings in place of the preset's; rates, see
    learner.portal_learner; weigh, step: see train.fit."""
    change: Callable = lambda converter: None
    settings: dict = {}
    rates: dict = {}
    weigh: Callable = None
    step: Callable = one_round


def port(job, portal, base, rows, settings, how=Change(), source=None):
    """Refits a converter for `base` on `rows` {task: (train, held out)}; core and latents stay bit-identical.

    portal: with the converters of the bases that the core was trained on; afterwards with the new one alone. settings:
    a preset's, such as train.REAL["port"]. source(name): loads one of these bases, to align P_in with it. Returns the
    Learner and the name of the base that `source` loaded.
    """
    frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
    before = [p.clone() for p in frozen]
    # The source base that is nearest in number of layers; none if all of the run's converters were read as ported.
    groups = base.groups_of(portal.cfg.modules)
    near = min(portal.converters, default=None,
               key=lambda name: abs(len(portal.converters[name].e) - len(layers_of(groups))))
    like = portal.converters.get(near)
    torch.manual_seed(job.seed)
    converter = Converter(portal.cfg, groups, like, port=True).to(base.device)
    how.change(converter)
    portal.converters = {base.name: converter}
    if source:
        align(converter, base, like, source(near), texts_of(rows))
    core, back, eps = portal.core, {}, float(settings["whiten"])
    start = [*(p.detach().clone() for p in converter.parameters()), torch.tensor(eps)]
    if eps:
        portal.core, back = whiten(core, portal.z, converter, eps)
    learner, job.frozen = portal_learner(portal, rows, settings, how.rates), frozen
    learner.start = start                                                            # whitened, rounding would tell
    fit(job, [base], portal.adapters, [learner], rows, how.weigh, how.step)
    with torch.no_grad():
        for p, best in zip(learner.params, learner.best or ()):                      # a dry run selects nothing
            for value in (p, best) if p in back else ():
                value.copy_(back[p](value))
    portal.core = core
    assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or latents changed"
    return learner, near if source else None


def save_port(run, tag, portal, learner, provenance, journal):
    """Saves a port as converters/<tag>, selected and last epoch, and records it in the command's journal."""
    path = run / "converters" / f"{tag}.json"  # written last: without it the other files do not count as a port
    remove(path)
    remove(run / "final" / "converters" / f"{tag}.safetensors")
    save_states([learner], provenance["epochs"],
                lambda final: save_converter(run, portal, provenance["base"], tag, final))
    journal.add(tag)                                                                 # counts only with its provenance
    write_json(path, {**provenance, "epoch_selected": learner.epoch, "date": today()})
    forget(state_file(run, f"port-{tag}"))
    print(f"{tag}: epoch {learner.epoch} of {provenance['epochs']} selected on held-out rows; "
          f"saved to {run / 'converters'}")


# ---------------------------------------------------------------------------------------------- the command
def fits_to_do(run, args, seen, journal):
    """Returns [(base, [(tag, n)])], what the command has still to fit. The fit with the most rows is saved as <base>,
    the others as <base>@<n>; a converter that the run holds from more rows stays. seen {name: provenance}: the bases
    that the core was trained on. Raises BadInput for a base that the run holds, unless it may be replaced."""
    jobs, specs = [], args.to or TOY_UNSEEN
    for spec, name in zip(specs, short_names(specs)):
        if name in seen:
            find_base(seen, spec, run)                                               # BadInput if from somewhere else
        counts = sorted(args.n or [preset([name])["port"]["n"]])
        path = run / "converters" / f"{name}.json"
        if path.exists() and not (args.overwrite or args.dry_run) and name not in journal.done:
            raise BadInput(f"{run} has already seen {name}: it holds its converter; --overwrite refits it")
        most = max(counts[-1], (read_json(path)["n"] or 0) if path.exists() and len(counts) > 1 else 0)
        tags = {name if n == most else f"{name}@{n}": n for n in counts}
        done = [tag for tag in tags if tag in journal.done and (run / "converters" / f"{tag}.json").exists()]
        for tag in done:                                                         # by this command, before it was killed
            forget(state_file(run, f"port-{tag}"))
        if len(done) < len(tags):
            jobs.append((spec, [(tag, n) for tag, n in tags.items() if tag not in done]))
    return jobs


def main(argv=None, how=Change()):
    args = parse(__doc__, "to n align teacher run data epochs batch-size lr max-tokens recompute seed device dtype "
                          "device-map quantize allow-changed-base overwrite dry-run", argv, (TOY["port"], REAL["port"]),
                 n=dict(type=commas(positive(int)), metavar="N[,N]",
                        help="training rows a task; several: one refit each"))
    run = find_run(args.run)
    lock(run)
    saved, cfg = load_config(run)
    seen = {b["base"]: b for b in saved["bases"]}
    if args.align and not seen:
        raise BadInput(f"--align: {run} holds no base that its core was trained on")
    if args.to is None and preset(seen) is REAL:
        raise BadInput("--to is needed: the base to port to (an alias, a hub id, a folder or a .gguf file)")
    journal = Journal(run / ".resume" / "port.json", command_of(args, saved))
    jobs = fits_to_do(run, args, seen, journal)
    # A run that was read from an artifact does not know its seed and data: train.py's defaults then.
    seed = next(seed for seed in (args.seed, saved["seed"], 0) if seed is not None)
    folder = pathlib.Path(args.data or saved["data"] or ROOT / "data")
    data = load_run_tasks(saved, folder)
    held = provenances(run)
    @functools.cache
    def source(tag):
        return reload_base(held[tag], args.device, args.dtype, device_map=args.device_map,
                           quantize=args.quantize or held[tag].get("quantize"), allow_changed=args.allow_changed_base)

    soft, teacher = {}, args.teacher and find_base(held, args.teacher, run)
    if teacher and jobs:                                                             # once, for all fits
        most = max(n for _, fits in jobs for _, n in fits)
        soft = answers(run, teacher, source(teacher), data, most, seed, args.max_tokens or TOY["port"]["max_tokens"])
    for spec, fits in jobs:
        base = load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize)
        refuse_twin(base, seen)                                                      # it would count as unseen
        for tag, n in fits:
            print_fewer(data, n)
            drawn = {task: sample(splits["train"], n, seed) for task, splits in data.items()}
            rows = {task: tuple([soft.get(id(row), row) for row in part] for part in parts)
                    for task, parts in drawn.items()}
            settings = resolve_settings(args, {**preset([base.name])["port"], **how.settings}, cfg.norm, rows)
            portal = load_portal(run, list(seen)).to(args.device)
            job = (DryRun if args.dry_run else Job)(
                f"port {tag}", settings, seed, run / "log.jsonl", state_file(run, f"port-{tag}"))
            learner, aligned = port(job, portal, base, rows, settings, how, source if args.align else None)
            if not args.dry_run:
                save_port(run, tag, portal, learner, dict(
                    base=base.name, **base.provenance, ported=True, n=n, seed=seed, data=str(folder.resolve()),
                    rows=digests_of(drawn), epochs=settings["epochs"], seconds=round(job.seconds, 1),
                    aligned=aligned, teacher=teacher), journal)
    if not args.dry_run:
        forget(journal.path)


if __name__ == "__main__":
    run_main(main)
