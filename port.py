"""Porting: latents and core stay as they are; a fresh converter is refitted on a base the run has never seen.

    python port.py                                 the toy run, to its two unseen bases
    python port.py --to gemma-3-4b --n 1000        n training rows a task; --n 50,100,200 refits once for each
    python port.py --dry-run                       what that would take in memory and time

The port starts at the identity (P_out is zero) and with the layer embeddings of a base that the core knows; it takes
the training loop as it is: all that differs is what is frozen.
"""
import pathlib

import torch

from bases import load_base, short_names
from cli import (TOY_UNSEEN, BadInput, commas, find_run, lock, parse, positive, read_json, remove, run_main, today,
                 write_json)
from data import load_run_tasks, sample
from portal import Converter, load_config, load_portal, save_converter
from resume import Journal, command_of, forget
from train import REAL, TOY, chosen, dry_run, fit, portal_learner, preset, save_states


def state_of(run, tag):
    return run / ".resume" / f"port-{tag}.safetensors"


def port(run, portal, base, tag, rows, n, seed, data, settings, journal, rehearse=False):
    """Refit one converter and save it as converters/<tag>; core and latents are bit for bit what they were. `portal`
    comes with the converters of the bases that the core was trained on. `rehearse`: only say what that would take."""
    frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
    before = [p.clone() for p in frozen]
    like = min(portal.converters.values(), key=lambda seen: abs(len(seen.e) - base.layers),  # nearest in depth;
               default=None)                                                         # none: all were read as ported
    torch.manual_seed(seed)
    portal.converters = {base.name: Converter(portal.cfg, base.layers, base.dims, like).to(base.device)}
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
        date=today()))
    forget(state_of(run, tag))
    print(f"{tag}: epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; saved to {run / 'converters'}")


def main(argv=None):
    args = parse(__doc__, "to n run data epochs batch-size lr max-tokens recompute seed device dtype device-map quantize "
                          "overwrite dry-run", argv, (TOY["port"], REAL["port"]),
                 n=dict(type=commas(positive(int)), metavar="N[,N]", help="training rows a task; several: one refit each"))
    run = find_run(args.run)
    lock(run)
    saved, _ = load_config(run)
    journal = Journal(run / ".resume" / "port.json", command_of(args, saved))
    if args.to is None and preset([b["base"] for b in saved["bases"]]) is REAL:
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
    for spec, fits in jobs:
        base = load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize)
        default = preset([base.name])["port"]
        settings = {k: v for k, v in chosen(args, default).items() if k != "n"}
        for tag, n in fits:
            rows = {task: sample(splits["train"], n, seed) for task, splits in data.items()}
            port(run, load_portal(run, [b["base"] for b in saved["bases"]]).to(args.device), base, tag, rows, n, seed,
                 str(folder.resolve()), settings, journal, args.dry_run)
    if not args.dry_run:
        forget(journal.path)


if __name__ == "__main__":
    run_main(main)
