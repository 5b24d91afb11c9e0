"""One more task for a run: a new latent is learned; core and converters stay frozen (train.py --add-task DIR).

The latent is fitted on bases of the run, by default those that the core was trained on; a ported base then gives no
data for the task, and its converter decodes the latent all the same. The latent starts at the mean of the trained
ones: the core has seen no others. Nothing is drawn, so the start does not depend on the seed.
"""
import torch

from bases import find_base, reload_base
from exports.hub import run_of
from presets import preset, resolve_settings
from runtime.files import PLAIN, BadInput, as_nfc, plain, today, write_json
from runtime.job import DryRun, Job
from runtime.resume import digests_of, forget, state_file
from runtime.run_folder import find_run, lock
from runtime.saved import load_config, load_portal, load_tensors, provenances, save_tensors
from tasks.rows import load_tasks, named, sample


def bases_for(args, run, saved, cfg):
    """Returns the task's name and {name: provenance} of the bases to fit on. Raises BadInput if it cannot be added."""
    folder, added, seen = args.add_task.resolve(), saved.get("added", {}), {b["base"]: b for b in saved["bases"]}
    task = named(folder.name, cfg.tasks) or as_nfc(folder.name)
    if not plain(task):
        raise BadInput(f"--add-task: the name of {folder} names files; rename it: accepted is {PLAIN}")
    for flag in ("data", "tasks", "modules", "rank", "norm"):
        if getattr(args, flag):
            raise BadInput(f"--{flag} does not go with --add-task: the run has it already, and DIR is the task")
    if not all((folder / f"{split}.jsonl").is_file() for split in ("train", "eval")):
        raise BadInput(f"--add-task: {args.add_task} is not a task, which is a folder with train.jsonl and eval.jsonl")
    if task in cfg.tasks and task not in added:
        raise BadInput(f"{run}: the core was trained with a task {task!r}; another needs another name, its folder's")
    if task in added and not (args.overwrite or args.dry_run):
        raise BadInput(f"{run} has learned {task!r} already; --overwrite learns it again")
    held = seen | {tag: p for tag, p in provenances(run).items() if tag == p["base"]}  # without a sweep's other samples
    names = dict.fromkeys(find_base(held, spec, run) for spec in args.bases or seen)
    if not names:
        raise BadInput(f"--bases: {run} has converters of {', '.join(held) or 'none'}; accepted are some of these")
    return task, {name: held[name] for name in names}


def new_latent(portal, trained):
    """Gives the portal one latent, the mean of `trained` [T, d_z], and freezes everything else. Returns the frozen
    parameters."""
    portal.z = torch.nn.Parameter(trained.detach().mean(0, keepdim=True))            # [1, d_z]
    modules = portal.core, *portal.converters.values()
    return [p.requires_grad_(False) for module in modules for p in module.parameters()]


def new_task(args):
    """Returns (job, Portal, bases, rows, settings, save(learner)) of one more task, that in the folder args.add_task.
    args: train.py's flags. Raises BadInput."""
    run = find_run(run_of(args.run))
    saved, cfg = load_config(run)
    (task, fitted_on), added = bases_for(args, run, saved, cfg), saved.get("added", {})
    folder, settings = args.add_task.resolve(), resolve_settings(args, preset(fitted_on), cfg.norm)
    seed = (saved["seed"] or 0) if args.seed is None else args.seed
    rows = {task: sample(load_tasks(folder.parent, [task])[task]["train"], settings["n"], seed)}
    bases = [reload_base(p, args.device, args.dtype, args.recompute, args.device_map,
                         args.quantize or p.get("quantize"), allow_changed=args.allow_changed_base)
             for p in fitted_on.values()]

    portal = load_portal(run, fitted_on).to(args.device)
    frozen = new_latent(portal, portal.z[:len(cfg.tasks) - len(added)])              # without the tasks added before
    before, state = [p.clone() for p in frozen], state_file(run, f"add-{task}")
    if not args.dry_run:
        lock(run)
    job = (DryRun if args.dry_run else Job)(f"add {task}", settings, seed, run / "log.jsonl", state, frozen)
    def save(learner):
        assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or converters changed"
        learner.load_best()
        how = dict(folder=str(folder), bases=list(fitted_on), n=settings["n"], seed=seed, rows=digests_of(rows)[task],
                   epochs=settings["epochs"], epoch_selected=learner.epoch, seconds=round(job.seconds, 1), date=today())
        save_latent(run, saved, task, portal.z.detach().cpu(), how)
        forget(state)
        print(f"{task}: epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; added to {run}; "
              "python eval.py measures it on every base")
    return job, portal, bases, rows, settings, save


def save_latent(run, saved, task, new, how):
    """Writes the latent [1, d_z] of a task into a run, in place of an earlier one of that task, and how it was learned
    into portal.json, whose contents are `saved`."""
    tasks = saved["config"]["tasks"]
    t, T = (tasks.index(task) if task in tasks else len(tasks)), len(tasks)
    for path in (run / "final" / "latents.safetensors", run / "latents.safetensors"):
        if path.exists():
            z = load_tensors(path)["z"]                                           # may have a row too many: load_portal
            save_tensors(path, {"z": torch.cat([z[:t], new, z[t + 1:T]])})           # [T + 1 or again T, d_z]
    write_json(run / "portal.json", {                                             # last: until then the run has T tasks
        **saved, "config": {**saved["config"], "tasks": tasks if t < T else [*tasks, task]},
        "added": {**saved.get("added", {}), task: how}})
