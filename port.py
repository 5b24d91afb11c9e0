"""Porting: latents and core stay as they are; a fresh converter is refitted on a base that the run has never seen.

    python port.py                                 the toy run, to its two unseen bases
    python port.py --to gemma-3-4b --n 1000        n training rows a task; --n 50,100,200 refits once for each
    python port.py --align                         for few rows: P_in starts by regression on a source base
    python port.py --teacher toy-qwen-m            without labels: fits to the answers of a base of the run
    python port.py --teacher BASE --adapters DIR   or to those of any base with its LoRAs, PEFT folders DIR/<task>
    python port.py --dry-run                       prints what that would take in memory and time

A port starts at the identity (P_out is zero) and with the layer embeddings of a source base (portal.Converter). The
training loop is train.fit: what differs is what is frozen. What else it may start from is in starts/."""
import functools, pathlib

import torch

from bases import TOY_UNSEEN, find_base, load_base, refuse_twin, reload_base, short_name, short_names
from exports.hub import run_of
from portal import Converter, layers_of
from presets import REAL, TOY, preset, resolve_settings
from runtime.files import ROOT, BadInput, read_json
from runtime.flags import commas, parse, positive, run_main
from runtime.job import DryRun, Job
from runtime.resume import Journal, command_of, digests_of, forget, state_file
from runtime.run_folder import find_run, lock
from runtime.saved import load_config, load_portal, provenances, save_port
from starts.align import align, keep_size, texts_of
from starts.teacher import answers, of_peft, of_run, taught
from starts.whiten import unwhiten, whiten
from tasks.rows import load_run_tasks, print_fewer, sample
from train import fit, one_round, portal_learner


# ---------------------------------------------------------------------------------------------- one port
def nearest(converters, groups):
    """Returns the name of the source base that is nearest in number of layers to a base with the sites `groups`; None
    of no converters, as where all of a run's were read as ported."""
    return min(converters, default=None, key=lambda name: abs(len(converters[name].e) - len(layers_of(groups))))


def port(job, portal, base, rows, settings, source=None, step=one_round):
    """Refits a converter for `base` on `rows` {task: (train, held out)}; core and latents stay bit-identical.

    portal: with the converters of the bases that the core was trained on; afterwards with the new one alone. settings:
    a preset's, such as train.REAL["port"]. source(name): loads one of these bases, to align P_in with it; None: P_in
    starts at random. step: see train.fit. Returns the Learner and the name of the base that `source` loaded.
    """
    frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
    before = [p.clone() for p in frozen]
    groups, sources = base.groups_of(portal.cfg.modules), portal.converters
    near = nearest(sources, groups)
    torch.manual_seed(job.seed)
    converter = Converter(portal.cfg, groups, sources.get(near), port=True).to(base.device)
    portal.converters = {base.name: converter}
    if source:
        align(converter, base, sources[near], source(near), texts_of(rows))
        keep_size(portal.core, portal.z, converter)

    core, back, eps = portal.core, {}, float(settings["whiten"])
    start = [*(p.detach().clone() for p in converter.parameters()), torch.tensor(eps)]
    if eps:
        portal.core, back = whiten(core, portal.z, converter, eps)
    learner, job.frozen = portal_learner(portal, rows, settings), frozen
    learner.start = start                                                            # whitened, rounding would tell
    fit(job, [base], portal.adapters, [learner], rows, step)
    unwhiten(learner, back)
    portal.core = core
    assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or latents changed"
    return learner, near if source else None


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


def main(argv=None):
    args = parse(__doc__, "to n align teacher adapters run data epochs batch-size lr max-tokens recompute seed device "
                          "dtype device-map quantize allow-changed-base overwrite dry-run", argv,
                 (TOY["port"], REAL["port"]), n=dict(
                     type=commas(positive(int)), metavar="N[,N]", help="training rows a task; several: one refit each"))
    if args.adapters and not args.teacher:
        raise BadInput("--adapters DIR needs --teacher BASE, the base that they were trained on")
    run = find_run(run_of(args.run))
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

    soft, teacher = {}, args.teacher and (
        short_name(args.teacher) if args.adapters else find_base(held, args.teacher, run))
    if teacher and jobs:                                                             # once, for all fits
        most = max(n for _, fits in jobs for _, n in fits)
        soft = answers(*(of_peft(args, cfg.tasks) if args.adapters else of_run(run, teacher, source(teacher))),
                       cfg.tasks, data, most, seed, args.max_tokens or TOY["port"]["max_tokens"])
    for spec, fits in jobs:
        base = load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize)
        refuse_twin(base, seen)                                                      # it would count as unseen
        for tag, n in fits:
            print_fewer(data, n)
            drawn = {task: sample(splits["train"], n, seed) for task, splits in data.items()}
            rows = taught(drawn, soft) if teacher else drawn
            settings = resolve_settings(args, preset([base.name])["port"], cfg.norm, rows)
            portal = load_portal(run, list(seen)).to(args.device)
            job = (DryRun if args.dry_run else Job)(
                f"port {tag}", settings, seed, run / "log.jsonl", state_file(run, f"port-{tag}"))
            learner, aligned = port(job, portal, base, rows, settings, source if args.align else None)
            if not args.dry_run:
                save_port(run, tag, portal, learner, dict(
                    base=base.name, **base.provenance, ported=True, n=n, seed=seed, data=str(folder.resolve()),
                    rows=digests_of(drawn), epochs=settings["epochs"], seconds=round(job.seconds, 1),
                    aligned=aligned, teacher=teacher,
                    adapters=args.adapters and str(args.adapters.resolve())), journal)
    if not args.dry_run:
        forget(journal.path)


if __name__ == "__main__":
    run_main(main)
