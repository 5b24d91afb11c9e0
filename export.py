"""Adapters leave: a task on one of the run's bases, as a PEFT LoRA folder or merged into the base's weights.

    python export.py --to toy-gemma --task largest --out out/largest          adapter_config.json, adapter_model.safetensors
    python export.py --to toy-gemma --task all --out out/adapters             one folder a task
    python export.py --to toy-gemma --task largest --merge --out out/merged   a plain Hugging Face model: W + scale B A

A generated adapter is an ordinary LoRA. What reads LoRA folders or Hugging Face models reads these, without this project.
"""
import json, pathlib

import torch

from bases import reload_base, resolve
from cli import BadInput, find_run, first_sentence, new_folder, occupied, parse, read_json, run_main, write_json
from eval import adapters_of, read_results
from portal import load_config, provenances, save_tensors

MARK = "Exported by PorTAL"  # in every model card, so that --overwrite replaces nothing else


# ---------------------------------------------------------------------------------------------- what the run holds
def held(run, spec):
    """(tag, provenance) of a base that the run holds, named by its short name, its id or its folder; <base>@<n> is a
    smaller sample of a sweep. A base of the same short name from somewhere else is another base."""
    tags = provenances(run)
    wanted = {spec, str(pathlib.Path(spec).expanduser().resolve())}
    for tag, p in tags.items():
        if tag == spec or tag == p["base"] and wanted & {p["id"], f"{p['id']}@{p['revision']}"}:
            return tag, p
    raise BadInput(f"--to: base {spec!r} is not in {run}; it holds {', '.join(tags)}; python port.py --to NAME adds one")


def origin(p):
    """What everybody else calls the base: its hub id, its folder or its .gguf file."""
    _, where, _, gguf = resolve(p["id"])
    return p["id"] if gguf else where


def check_free(path, overwrite):
    """BadInput unless `path` may be written: it is new, it is empty, or --overwrite replaces an earlier export."""
    if not occupied(path):
        return
    readme = path / "README.md"
    if not readme.is_file() or MARK not in readme.read_text(errors="replace"):
        raise BadInput(f"{path} is neither empty nor a folder that an export wrote; --out DIR names another")
    if not overwrite:
        raise BadInput(f"{path} already holds an export; --overwrite replaces it, --out DIR writes beside it")


def write_folder(path, write):
    """Call `write(new folder)`; it takes the place of `path` when it is whole."""
    try:
        with new_folder(path) as folder:
            write(folder)
    except OSError as error:
        raise BadInput(f"{path}: not written ({first_sentence(error)})")
    print(f"written: {path}")


# ---------------------------------------------------------------------------------------------- the model card
def measured(run, p, method, task):
    """What results.jsonl says of a task, in words."""
    results = read_results(run) if (run / "results.jsonl").exists() else {}
    row = results.get((p["base"], 0 if method == "base" else p["n"], method, "best"), {}).get(task)
    if row is None or row["seed"] != p["seed"]:
        return "not measured"
    return f"{row['acc_norm']:.3f} on {row['rows']} evaluation rows"


def card(run, p, method, tasks, library, what, use):
    """A model card: where this comes from, how well it does, how it is loaded."""
    facts = {"base": origin(p), "revision of the base": p["revision"], "seen in training": "no" if p["ported"] else "yes",
             "method": method, "run": run.resolve().name, "training rows a task (n)": p["n"], "seed": p["seed"],
             "fitted": p["date"]}
    added = read_json(run / "portal.json").get("added", {})
    for task in tasks:
        if method == "portal" and task in added:
            facts[f"{task} was learned later"] = f"{added[task]['n']} rows on {', '.join(added[task]['bases'])}"
        facts[f"acc_norm of {task}"] = measured(run, p, method, task)
        facts[f"the bare base's on {task}"] = measured(run, p, "base", task)
    table = "\n".join(f"| {key} | {'not recorded' if value is None else value} |" for key, value in facts.items())
    return (f"---\nbase_model: {json.dumps(origin(p))}\nlibrary_name: {library}\ntags:\n- lora\n- portal\n---\n\n"
            f"# {', '.join(tasks)} on {p['base']}\n\n{what} {MARK}.\n\n"
            f"| | |\n|---|---|\n{table}\n\n```python\n{use}\n```\n")


# ---------------------------------------------------------------------------------------------- the two forms
def target_modules(base, paths):
    """PEFT takes a name for every module whose path ends in it. A vision tower has a q_proj, too: where the short names
    would reach further than the adapters do, the full paths are given."""
    names = {path.split(".")[-1] for path in paths}
    reached = {path for path, _ in base.model.named_modules() if path.split(".")[-1] in names}
    return sorted(names) if reached == set(paths) else list(paths)


def save_peft(folder, base, p, adapters, t):
    """Task t as adapter_config.json and adapter_model.safetensors, PEFT's names and shapes."""
    paths = {path: key for key, path in base.paths().items() if key[0] in adapters.A}
    rank = next(iter(adapters.A.values())).shape[2]
    tensors = {}
    for path, (m, layer) in paths.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = adapters.A[m][t, layer]  # [r, d_in]
        tensors[f"base_model.model.{path}.lora_B.weight"] = adapters.B[m][t, layer]  # [d_out, r]
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=origin(p), revision=p["revision"],
        r=rank, lora_alpha=round(adapters.scale * rank),                             # PEFT's scale is alpha / r, too
        target_modules=target_modules(base, paths),
        lora_dropout=0.0, bias="none", fan_in_fan_out=False, use_rslora=False, use_dora=False, inference_mode=True))


@torch.no_grad()
def save_merged(folder, model, base, adapters, t):
    """Task t in the weights of the unpatched `model`; the weights are then put back, for the next task."""
    before = []
    for m in adapters.A:
        for layer in range(base.layers):
            linear = base.linears[layer][m]
            W, A, B = linear.weight.data, adapters.A[m][t, layer], adapters.B[m][t, layer]
            exact = torch.promote_types(W.dtype, A.dtype)                            # add in float32, then round once
            delta = adapters.scale * B.to(exact) @ A.to(exact)                       # [d_out, d_in]
            linear.weight.data = (W.to(exact) + delta).to(W.dtype)
            before.append((linear, W))
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    for linear, W in before:
        linear.weight.data = W


# ---------------------------------------------------------------------------------------------- the command
def main(argv=None):
    args = parse(__doc__, "run to task method merge out device dtype overwrite", argv,
                 to=dict(type=str, required=True, metavar="BASE", help="a base that the run holds"),
                 task=dict(required=True), out=dict(required=True),
                 overwrite=dict(help="replace what an earlier export wrote there"))
    run = find_run(args.run)
    _, cfg = load_config(run)
    tag, p = held(run, args.to)
    if args.task not in ("all", *cfg.tasks):
        raise BadInput(f"--task: unknown task {args.task!r}; this run knows {', '.join(cfg.tasks)}, or 'all'")
    if args.method != "portal" and not (run / "baselines" / args.method / f"{tag}.safetensors").exists():
        raise BadInput(f"{run} holds no {args.method} adapters of {tag}; python eval.py --bases {p['base']} makes them")
    folders = {task: args.out / task for task in cfg.tasks} if args.task == "all" else {args.task: args.out}
    for folder in folders.values():
        check_free(folder, args.overwrite)
    base = reload_base(p, args.device, args.dtype)
    adapters = adapters_of(run, args.method, tag, base)
    for task in folders:
        if cfg.tasks.index(task) >= len(adapters.tensors()[0]):
            raise BadInput(f"{run}: its {args.method} adapters of {tag} are older than its task {task!r}; "
                           f"python eval.py --bases {p['base']} makes them again")
    model = base.unpatch() if args.merge else None
    _, where, _, gguf = resolve(p["id"])
    options = {k: v for k, v in (("revision", p["revision"]), ("gguf_file", gguf)) if v}
    load = f"AutoModelForCausalLM.from_pretrained({', '.join([repr(where), *(f'{k}={v!r}' for k, v in options.items())])})"

    for task, folder in folders.items():
        def write(new):
            t = cfg.tasks.index(task)
            if args.merge:
                save_merged(new, model, base, adapters, t)
                text = card(run, p, args.method, [task], "transformers", "A LoRA, merged into its base.",
                            "from transformers import AutoModelForCausalLM\n\n"
                            'model = AutoModelForCausalLM.from_pretrained("this folder")')
            else:
                save_peft(new, base, p, adapters, t)
                text = card(run, p, args.method, [task], "peft", "A LoRA in PEFT's format.",
                            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
                            f'model = PeftModel.from_pretrained({load}, "this folder")')
            (new / "README.md").write_text(text)
        write_folder(folder, write)


if __name__ == "__main__":
    run_main(main)
