"""Porting: latents and core stay as they are; a fresh converter is refitted on a base the run has never seen.

    python port.py                                 the toy run, to its two unseen bases
    python port.py --to gemma-3-4b --n 1000        n training rows a task; --n 50,100,200 refits once for each
    python port.py --align                         for few rows: P_in starts by regression on a source base
    python port.py --dry-run                       what that would take in memory and time

The port starts at the identity (P_out is zero) and with the layer embeddings of a base that the core knows; it takes
the training loop as it is: all that differs is what is frozen.
"""
import functools, pathlib

import torch
from tqdm import tqdm

from bases import load_base, reload_base, short_names
from cli import (TOY_UNSEEN, BadInput, commas, find_run, lock, parse, positive, read_json, remove, run_main, today,
                 write_json)
from data import MAX_LENGTH, load_run_tasks, sample
from dist import NO_BAR
from portal import Converter, load_config, load_portal, same_depth, save_converter
from resume import Journal, command_of, forget
from train import REAL, TOY, chosen, dry_run, fit, portal_learner, preset, save_states


ALIGN = 1000  # texts for `align`, in equal parts of all tasks


def state_of(run, tag):
    return run / ".resume" / f"port-{tag}.safetensors"


# ---------------------------------------------------------------------------------------------- where P_in can start
@torch.no_grad()
def readings(base, text, modules):
    """What the projections of `base` read at the S tokens of a text -> ({(m, layer): [S, d_in]}, {character: the token that
    ends there})."""
    tokens = base.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=MAX_LENGTH)
    found = {}
    def reads(key):
        return lambda linear, args, y: found.update({key: args[0][0].to(base.device)})
    hooks = [row[m].register_forward_hook(reads((m, layer))) for layer, row in enumerate(base.linears) for m in modules]
    base.model.get_decoder()(input_ids=torch.tensor([tokens.input_ids], device=base.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found, {end: k for k, (start, end) in enumerate(tokens.offset_mapping) if end > start}


@torch.no_grad()
def align(converter, base, like, source, texts):
    """Set P_in to where the core is given of `base` what it was given of `source`, a base it was trained on (`like` is that
    one's converter). Not in the write-up. It takes prompts, but no answers: those are few.

    min over P_in of  sum |P_in x - P_in' x'|^2 + lambda |P_in|^2,  in float64, a module kind at a time: x is what a layer
    of `base` reads at a token of a text, x' what the source's layer of the same relative depth reads at its token that
    ends with the same character. Two tokenizers cut a text differently; most words end together.
    """
    modules = list(converter.P_in)
    XX, XY = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)
    source_P = {m: like.P_in[m].double() for m in modules}                           # [d_c, d_in of the source]
    for text in tqdm(texts, desc=f"aligning {base.name} with {source.name}", unit="text", delay=2, leave=False, disable=NO_BAR):
        (x, ends), (source_x, source_ends) = readings(base, text, modules), readings(source, text, modules)
        shared = sorted(ends.keys() & source_ends.keys())
        at, source_at = [ends[c] for c in shared], [source_ends[c] for c in shared]
        for m in modules:
            for layer in range(base.layers):
                twin = same_depth(layer, base.layers, source.layers)
                X = x[m, layer][at].double()                                         # [S, d_in]
                Y = source_x[m, twin][source_at].double() @ source_P[m].T            # [S, d_c]
                XX[m], XY[m] = XX[m] + X.T @ X, XY[m] + X.T @ Y
    for m, P_in in converter.P_in.items():
        ridge = 1e-2 * XX[m].diagonal().mean() * torch.eye(len(XX[m]), dtype=torch.float64, device=base.device)
        P_in.copy_(torch.linalg.solve(XX[m] + ridge, XY[m]).T)                       # [d_c, d_in]


# ---------------------------------------------------------------------------------------------- the command
def port(run, portal, base, tag, rows, n, seed, data, settings, journal, rehearse=False, source=None):
    """Refit one converter and save it as converters/<tag>; core and latents are bit for bit what they were. `portal`
    comes with the converters of the bases that the core was trained on; source(name) loads one of these bases, for
    `align`. `rehearse`: only say what that would take."""
    frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
    before = [p.clone() for p in frozen]
    near = min(portal.converters, key=lambda name: abs(len(portal.converters[name].e) - base.layers),  # in depth;
               default=None)                                                         # none: all were read as ported
    like = portal.converters.get(near)
    torch.manual_seed(seed)
    portal.converters = {base.name: Converter(portal.cfg, base.layers, base.dims, like).to(base.device)}
    if source:
        texts = [row.prompt for train, _ in rows.values() for row in train[:max(1, ALIGN // len(rows))]]
        align(portal.converters[base.name], base, like, source(near), texts)
    learner = portal_learner(portal, rows, *(settings[k] for k in ("epochs", "batch_size", "lr", "least")))
    if rehearse:
        return dry_run(f"port {tag}", [base], portal.adapters, learner, rows, seed, settings)
    seconds = fit(f"port {tag}", [base], portal.adapters, [learner], rows, seed=seed, log=run / "log.jsonl",
                  state=state_of(run, tag), frozen=frozen,
                  **{k: settings[k] for k in ("epochs", "batch_size", "max_tokens")})
    assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or latents changed"

    provenance = run / "converters" / f"{tag}.json"                                  # written last: without it the rest
    remove(provenance)                                                               # does not count as a port
    remove(run / "final" / "converters" / f"{tag}.safetensors")
    save_states([learner], settings["epochs"], lambda final: save_converter(run, portal, base.name, tag, final))
    journal.add(tag)                                                                 # counts only with its provenance
    write_json(provenance, dict(
        base=base.name, id=base.origin, revision=base.revision, ported=True, n=n, seed=seed, data=data,
        epochs=settings["epochs"], epoch_selected=learner.epoch, quantize=base.quantize, seconds=round(seconds, 1),
        aligned=near if source else None, date=today()))
    forget(state_of(run, tag))
    print(f"{tag}: epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; saved to {run / 'converters'}")


def main(argv=None):
    args = parse(__doc__, "to n align run data epochs batch-size lr max-tokens recompute seed device dtype device-map "
                          "quantize overwrite dry-run", argv, (TOY["port"], REAL["port"]),
                 n=dict(type=commas(positive(int)), metavar="N[,N]", help="training rows a task; several: one refit each"))
    run = find_run(args.run)
    lock(run)
    saved, _ = load_config(run)
    seen = {b["base"]: b for b in saved["bases"]}
    if args.align and not seen:
        raise BadInput(f"--align: {run} holds no base that its core was trained on")
    journal = Journal(run / ".resume" / "port.json", command_of(args, saved))
    if args.to is None and preset(seen) is REAL:
        raise BadInput("--to is needed: the base to port to (an alias, a hub id, a folder or a .gguf file)")
    specs = args.to or TOY_UNSEEN
    jobs = []
    for spec, name in zip(specs, short_names(specs)):
        counts = sorted(args.n or [preset([name])["port"]["n"]])
        path = run / "converters" / f"{name}.json"
        if path.exists() and not (args.overwrite or args.dry_run) and name not in journal.done:
            raise BadInput(f"{run} has already seen {name}: it holds its converter; --overwrite refits it")
        # The largest n of a sweep is the base's converter, unless the run holds one of more rows; the others stand beside
        # it as <base>@<n>.
        most = max(counts[-1], (read_json(path)["n"] or 0) if path.exists() and len(counts) > 1 else 0)
        tags = [name if n == most else f"{name}@{n}" for n in counts]
        done = [tag for tag in tags if tag in journal.done and (run / "converters" / f"{tag}.json").exists()]
        for tag in done:                                                             # by this command, before it was killed
            forget(state_of(run, tag))
        if len(done) < len(tags):
            jobs.append((spec, [(tag, n) for tag, n in zip(tags, counts) if tag not in done]))
    seed, folder = saved["seed"] if args.seed is None else args.seed, args.data or saved["data"]
    if seed is None or folder is None:
        raise BadInput(f"--seed and --data are needed: {run} was read from an artifact, which does not say them")
    folder = pathlib.Path(folder)
    data = load_run_tasks(saved, folder)
    @functools.cache
    def source(name):
        return reload_base(seen[name], args.device, args.dtype, device_map=args.device_map,
                           quantize=args.quantize or seen[name].get("quantize"))

    for spec, fits in jobs:
        base = load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize)
        default = preset([base.name])["port"]
        settings = {k: v for k, v in chosen(args, default).items() if k != "n"}
        for tag, n in fits:
            rows = {task: sample(splits["train"], n, seed) for task, splits in data.items()}
            port(run, load_portal(run, list(seen)).to(args.device), base, tag, rows, n, seed, str(folder.resolve()),
                 settings, journal, args.dry_run, source if args.align else None)
    if not args.dry_run:
        forget(journal.path)


if __name__ == "__main__":
    run_main(main)
