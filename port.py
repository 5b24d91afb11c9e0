"""Porting: latents and core stay as they are; a fresh converter is refitted on a base the run has never seen.

    python port.py                                 the toy run, to its two unseen bases
    python port.py --to gemma-3-4b --n 1000        n training rows a task; --n 50,100,200 refits once for each

The port starts at the identity (P_out is zero) and takes the training loop as it is: all that differs is what is frozen.
"""
import pathlib, time

import torch

from bases import load_bases
from cli import TOY_SEEN, TOY_UNSEEN, BadInput, commas, find_run, parse, positive, run_main, today, write_json
from data import load_tasks, sample
from portal import Converter, load_config, load_portal, save_converter
from train import fit, portal_learner, preset


def port(run, portal, base, tag, rows, n, seed, settings):
    """Refit one converter and save it as converters/<tag>; core and latents are bit for bit what they were."""
    frozen = [p.requires_grad_(False) for p in (portal.z, *portal.core.parameters())]
    before = [p.clone() for p in frozen]
    torch.manual_seed(seed)
    portal.converters = {base.name: Converter(portal.cfg, base.layers, base.dims, port=True).to(base.device)}
    learner = portal_learner(portal, rows, settings["epochs"], settings["batch_size"], settings["lr"])
    start = time.time()
    fit(f"port {tag}", [base], portal.adapters, [learner], rows, seed=seed, log=run / "log.jsonl",
        **{k: settings[k] for k in ("epochs", "batch_size", "max_tokens")})
    assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or latents changed"
    seconds = round(time.time() - start, 1)

    final = run / "final" / "converters" / f"{tag}.safetensors"
    if learner.epoch < settings["epochs"]:
        save_converter(run, portal, base.name, tag, final=True)
    else:
        final.unlink(missing_ok=True)
    learner.load_best()
    save_converter(run, portal, base.name, tag)
    write_json(run / "converters" / f"{tag}.json", dict(
        base=base.name, id=base.origin, revision=base.revision, ported=True, n=n, seed=seed, epochs=settings["epochs"],
        epoch_selected=learner.epoch, seconds=seconds, date=today()))
    print(f"{tag}: epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; saved to {run / 'converters'}")


def main(argv=None):
    args = parse(__doc__, "to n run data epochs batch-size lr max-tokens seed device dtype overwrite", argv,
                 n=dict(type=commas(positive(int)), metavar="N[,N]", help="training rows a task; several: one refit each"))
    run = find_run(args.run)
    saved, cfg = load_config(run)
    toy = all(b["base"] in TOY_SEEN for b in saved["bases"])
    if args.to is None and not toy:
        raise BadInput("--to is needed: the base to port to (an alias, a hub id, a folder or a .gguf file)")
    bases = load_bases(args.to or TOY_UNSEEN, args.device, args.dtype)
    default = preset([b.name for b in bases])["port"]
    settings = {k: getattr(args, k) or default[k] for k in ("epochs", "batch_size", "max_tokens")}
    settings["lr"] = args.lr or default["lr"][cfg.norm]
    counts = sorted(args.n or [default["n"]])
    seed = saved["seed"] if args.seed is None else args.seed
    data = load_tasks(args.data or pathlib.Path(saved["data"]), cfg.tasks)
    # The largest n is the base's converter; the smaller ones of a sweep stand beside it under <base>@<n>.
    jobs = [(base, base.name if n == counts[-1] else f"{base.name}@{n}", n) for base in bases for n in counts]
    for base, tag, _ in jobs:
        if (run / "converters" / f"{tag}.safetensors").exists() and not args.overwrite:
            raise BadInput(f"{run} has already seen {tag}: it holds its converter; --overwrite refits it")
    for base, tag, n in jobs:
        rows = {task: sample(splits["train"], n, seed) for task, splits in data.items()}
        port(run, load_portal(run).to(args.device), base, tag, rows, n, seed, settings)


if __name__ == "__main__":
    run_main(main)
