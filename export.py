"""Writes what a run has learned in the formats of PEFT, transformers and portallib, and reads portallib artifacts.

    python export.py --to toy-gemma --task largest --out out/largest          a PEFT folder: config and safetensors
    python export.py --to toy-gemma --task all --out out/adapters             one folder a task
    python export.py --to toy-gemma --task largest --merge --out out/merged   a plain Hugging Face model: W + scale B A
    python export.py --to toy-gemma --portallib --out out/artifact            latents, core and one base's converter
    python export.py --push org/name                  the run, or with --to [--task] PEFT folders, to the hub
    python export.py --artifact DIR --run RUN         a new run, or one more base for a run of the same latents and core

Artifacts that were trained together, or refitted from one another, share latents and core bit for bit and so become one
run. What rows and seed one was fitted with it does not say: --data, --n and --seed record them, else they are null.
"""
import contextlib, json, pathlib, re, tempfile

import torch

from bases import auto_class, find_base, recorded, reload_base, usual_dtype
from eval import adapters_of, same_fit
from exports.hub import fetch, push, push_run, run_of
from exports.merge import files_of, save_converted, save_merged
from exports.peft import origin, save_peft
from exports.portallib import import_artifact, save_artifact
from reports.results import read_results
from reports.table import cell
from runtime.files import BadInput, read_json, writing
from runtime.flags import parse, run_main
from runtime.run_folder import files_in, find_run, finish, new_folder, occupied, remove_new
from runtime.saved import load_config, load_portal, provenances
from tasks.rows import named

MARK = "Exported by PorTAL"
LIST = f"<!-- {MARK}: {{}} -->"  # in every model card: the files that --overwrite replaces
CARDS = {  # {library: (what the folder holds, the imports that load it, the call)}
    "peft": ("A LoRA in PEFT's format.", "from peft import PeftModel\nfrom transformers import {auto}",
             'model = PeftModel.from_pretrained({base}, "this folder")'),
    "transformers": ("A LoRA, merged into its base; its weights are stored as {dtype}, whatever config.json says.",
                     "from transformers import {auto}",
                     'model = {auto}.from_pretrained("this folder", dtype="{dtype}")'),
    "portallib": ("Task latents, core and one base's converter, in portallib's format.",
                  "from portallib import PortalModel", 'portal = PortalModel.from_pretrained("this folder")')}


def card(run, p, method, tasks, library, auto, dtype):
    """Returns the text of a model card: where the adapters come from, their acc_norm and how they are loaded. auto: the
    name of the transformers class that loads the base; dtype: that of a merged model's weights."""
    facts = {"base": origin(p), "revision of the base": p["revision"],
             "seen in training": "no" if p["ported"] else "yes", "method": method, "run": run.resolve().name,
             "training rows a task (n)": p["n"], "seed": p["seed"], "fitted": p["date"]}
    added = read_json(run / "portal.json").get("added", {})
    results = read_results(run) if (run / "results.jsonl").exists() else {}
    for task in tasks:
        if method == "portal" and task in added:
            facts[f"{task} was learned later"] = f"{added[task]['n']} rows on {', '.join(added[task]['bases'])}"
        for key, n, which in ((f"acc_norm of {task}", p["n"], method), (f"the bare base's on {task}", 0, "base")):
            row = results.get((p["base"], n, which, "best"), {}).get(task)
            measured = row and row["seed"] == p["seed"]
            facts[key] = f"{row['acc_norm']:.3f} on {row['rows']} evaluation rows" if measured else "not measured"
    table = "\n".join(f"| {cell(key)} | {'not recorded' if value is None else value} |" for key, value in facts.items())
    source = recorded(p)
    options = [f", {key}={value!r}" for key, value in (("revision", source.revision), ("gguf_file", source.gguf))
               if value]
    names = dict(auto=auto, base=f"{auto}.from_pretrained({source.where!r}{''.join(options)})",
                 dtype=str(dtype).removeprefix("torch."))
    what, imports, use = (text.format(**names) for text in CARDS[library])
    return (f"---\nbase_model: {json.dumps(origin(p))}\nlibrary_name: {library}\ntags:\n- lora\n- portal\n---\n\n"
            f"# {', '.join(tasks)} on {p['base']}\n\n{what} {MARK}.\n\n"
            f"| | |\n|---|---|\n{table}\n\n```python\n{imports}\n\n{use}\n```\n")


def exported(path):
    """Returns the names of the files in `path` that an export wrote, as its card lists them; [] without a list."""
    with contextlib.suppress(OSError, ValueError):
        found = re.search(LIST.format("(.*)"), (path / "README.md").read_text(encoding="utf-8", errors="replace"))
        names = [path / name for name in json.loads(found[1] if found else "[]")]
        return [str(name.relative_to(path)) for name in names if ".." not in name.relative_to(path).parts]
    return []


def check_free(path, overwrite, source):
    """Raises BadInput unless `path` is new or empty, or holds an earlier export that `overwrite` replaces, and is apart
    from the base, which `source` names. Removes what a killed export left."""
    finish(path.resolve())
    if occupied(path) and not exported(path):
        raise BadInput(f"{path} is neither empty nor a folder that an export wrote, with a list of its files in its "
                       "README.md; --out DIR names another")
    out, base = path.resolve(), pathlib.Path(source.where, source.gguf or "").resolve()
    if not source.on_hub and (out == base or out in base.parents or base in out.parents):
        raise BadInput(f"{path} is, holds or lies in the base, {base}; --out DIR names another folder")
    if occupied(path) and not overwrite:
        raise BadInput(f"{path} already holds an export; --overwrite replaces it, --out DIR writes beside it")
    remove_new(path.resolve())


FORMS = {  # what the command does: (the flags that it needs, the flags that do not go with it)
    "artifact": ("run", "out push to task method merge portallib"),
    "push": ("", "out merge portallib ported n seed data"),
    "portallib": ("out to", "task method merge ported n seed data"),
    "out": ("out to task", "ported n seed data")}
NEEDED = {"out": "--out DIR (a folder to write) or --artifact DIR (an artifact to read) is required",
          "run": "--run DIR is needed: the run to make, or to add the artifact's base to",
          "to": "--to BASE is needed: the base to write, one that the run holds",
          "task": "--task TASK is needed: the task to write, or 'all'; only --portallib writes without it"}


def parse_flags(argv):
    """Returns the parsed flags. Raises BadInput if one is missing, or does not go with the others."""
    args = parse(__doc__, "artifact ported data n seed run to task method merge portallib out push device dtype "
                 "allow-changed-base overwrite", argv,
                 to=dict(type=str, metavar="BASE", help="the base to write, one that the run holds"),
                 n=dict(help="rows a task that the artifact was fitted on"), seed=dict(help="the seed of that fit"),
                 data=dict(help="the folder of tasks it was fitted on: DIR/<task>/{train,eval}.jsonl"),
                 overwrite=dict(help="replace the run's converter of that base, or an earlier export in --out"))
    form = "artifact" if args.artifact else "push" if args.push else "portallib" if args.portallib else "out"
    given = {name for name, value in vars(args).items()
             if value is not None and value is not False and (name, value) != ("method", "portal")}  # its default
    needed, refused = (names.split() for names in FORMS[form])
    if args.push and not args.to:
        refused += ["task", "method"]
    wrong = [NEEDED[name] for name in needed if name not in given]
    wrong += [f"--{name} does not go with --{form}" for name in refused if name in given]
    if wrong:
        raise BadInput(wrong[0])
    args.task = args.task or ("all" if args.push else None)
    args.dtype = args.dtype or usual_dtype(args.device)
    return args


def loaded(args, run, cfg, tag, p):
    """Returns (Base, Adapters) to export. Raises BadInput if the run does not hold them, or they do not fit it."""
    again = f"python eval.py --bases {p['base']} makes them"
    path = run / "baselines" / args.method / f"{tag}.json"
    if args.method != "portal" and not path.with_suffix(".safetensors").exists():
        raise BadInput(f"{run} holds no {args.method} adapters of {tag}; {again}")
    if args.method == "lora" and path.exists() and not (args.allow_changed_base or same_fit(read_json(path), p)):
        raise BadInput(f"{run}: its lora adapters of {tag} were not fitted on the base and rows of its converter; "
                       f"{again} again")
    base = reload_base(p, *(["cpu", torch.bfloat16] if args.portallib else [args.device, args.dtype]),
                       allow_changed=args.allow_changed_base)
    if args.merge and (own := base.provenance["quantize"]):
        raise BadInput(f"--merge needs weights that are not quantised, and those of {p['base']} are ({own}); without "
                       "--merge an adapter is written")
    adapters = adapters_of(run, args.method, tag, base)                              # BadInput if they do not fit
    for task in cfg.tasks[len(adapters.tensors()[0]):]:
        if args.task in (task, "all"):
            raise BadInput(f"{run}: its {args.method} adapters of {tag} are older than its task {task!r}; "
                           f"{again} again")
    return base, adapters


def main(argv=None):
    args = parse_flags(argv)
    if args.artifact:
        return import_artifact(fetch(args.artifact), args.run, args.ported, args.n, args.seed, args.data,
                               args.overwrite)
    run = find_run(run_of(args.run))
    if args.push and not args.to:
        return push_run(run, args.push)
    with tempfile.TemporaryDirectory() as elsewhere:
        write(args, run, args.out or pathlib.Path(elsewhere, "adapters"))
        if args.push:
            push(pathlib.Path(elsewhere, "adapters"), args.push)


def write(args, run, out):
    """Writes what the flags ask for to `out`, a folder, or out/<task> of all tasks. Raises BadInput."""
    _, cfg = load_config(run)
    if args.portallib and cfg.norm != "none":
        raise BadInput(f"{run}: its trunk has LayerNorm (norm is {cfg.norm!r}) and a portallib artifact's has none; "
                       "python train.py --norm none trains one that can be written")
    held = provenances(run)
    tag = find_base(held, args.to, run)
    p, source = held[tag], recorded(held[tag])
    args.task = args.task and named(args.task, cfg.tasks) or args.task
    if args.task not in (None, "all", *cfg.tasks):
        raise BadInput(f"--task: unknown task {args.task!r}; this run knows {', '.join(cfg.tasks)}, or 'all'")
    folders = {out: cfg.tasks if args.portallib else [args.task]}
    if args.task == "all":
        folders = {out / task: [task] for task in cfg.tasks}
    for folder in folders:
        check_free(folder, args.overwrite, source)
    base, adapters = loaded(args, run, cfg, tag, p)
    auto = auto_class(base.model.config).__name__
    if args.merge:
        base.unpatch()
    library = "portallib" if args.portallib else "transformers" if args.merge else "peft"
    for folder, tasks in folders.items():
        with writing(folder), new_folder(folder, exported) as new:
            if args.portallib:
                save_artifact(new, load_portal(run, [tag]), tag, base, origin(p), p["revision"])
            elif args.merge and source.gguf:
                save_converted(new, source, base, adapters, cfg.tasks.index(tasks[0]))
            elif args.merge:
                save_merged(new, files_of(p | base.provenance), base, adapters, cfg.tasks.index(tasks[0]), args.dtype)
            else:
                save_peft(new, base, p, adapters, cfg.tasks.index(tasks[0]))
            text = card(run, p, args.method, tasks, library, auto, args.dtype)
            if args.push:
                inner = f', subfolder="{tasks[0]}"' if args.task == "all" else ""
                text = text.replace('"this folder"', f'"{args.push}"{inner}')
            text += LIST.format(json.dumps(["README.md", *files_in(new)])) + "\n"
            (new / "README.md").write_text(text, encoding="utf-8")
        if not args.push:
            print(f"written: {folder}")


if __name__ == "__main__":
    run_main(main)
