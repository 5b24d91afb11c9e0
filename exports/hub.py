"""A run from the hub and to it: `--run org/name[@revision]`, and `export.py --push org/name`.

The hub's cache is only read: a run, or a portallib artifact, is first read into out/<name>, where converters are added.
"""
import contextlib, json, pathlib, re, shutil, tempfile

import huggingface_hub

from bases import source_of
from exports.portallib import digest_of, import_artifact, is_artifact
from runtime.distributed import RANK, barrier
from runtime.files import BadInput, first_line, read_json, write_json
from runtime.run_folder import LOCKS, OUT, files_of_run, lock, new_folder, occupied
from runtime.saved import load_config, provenances

HUB_ID = re.compile(r"(\w[\w.-]*/(\w[\w.-]*))(?:@([\w./-]+))?")
FILES = ["config.json", "model.safetensors",                                         # of an artifact; the rest of a run
         "portal.json", "core.safetensors", "latents.safetensors", "log.jsonl", "results.jsonl", "results.md",
         "upgrade-*", "converters/*", "baselines/*", "final/*"]


def fetch(spec):
    """Returns the folder of a run or artifact: `spec`, a path, or where the hub's org/name[@revision] was downloaded
    to. Raises BadInput if it cannot be."""
    hub = HUB_ID.fullmatch(str(spec))
    if spec.exists() or spec.parent.exists() or not hub:
        return spec
    options = dict(revision=hub[3], allow_patterns=FILES)
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub[1], **options))
    except Exception as error:                                                       # of the network or the hub
        with contextlib.suppress(Exception):
            return pathlib.Path(huggingface_hub.snapshot_download(hub[1], local_files_only=True, **options))
        raise BadInput(f"{spec} is no folder, and could not be loaded from the hub: {first_line(error)}")


def run_of(spec):
    """Returns the run folder that `spec` names: itself, or out/<name>, into which a run on the hub or a portallib
    artifact (a folder or on the hub) is read if need be; None of None. Raises BadInput."""
    if spec is None or (spec / "portal.json").exists():
        return spec
    folder = fetch(spec)
    on_hub, artifact = folder is not spec, is_artifact(folder)
    if not on_hub and not artifact:
        return spec
    run = OUT / (HUB_ID.fullmatch(str(spec))[2] if on_hub else folder.resolve().name)
    if run.resolve() == folder.resolve():                                            # an artifact in out/
        run = run.with_name(f"{run.name}-run")
    if RANK == 0 and artifact:
        held = provenances(run).values() if (run / "portal.json").exists() else ()
        if digest_of(folder) not in [p.get("artifact") for p in held]:
            import_artifact(folder, run)
    elif RANK == 0:
        read_run(spec, folder, run)
    barrier()
    return run


def read_run(spec, folder, run):
    """Copies a run of the hub from the cache's `folder` to `run`, unless it is there already. Raises BadInput if
    `folder` holds no run, or `run` something else or another commit."""
    if not (folder / "portal.json").exists():
        raise BadInput(f"{spec} on the hub is neither a run, which has a portal.json, nor a portallib artifact")
    saved, _ = load_config(folder)
    origin = dict(id=HUB_ID.fullmatch(str(spec))[1], commit=folder.name)             # .../snapshots/<commit>
    if occupied(run):
        held = read_json(run / "portal.json").get("hub") if (run / "portal.json").exists() else None
        if held != origin:
            raise BadInput(f"{run} is not {spec} at {folder.name}" + (f" but at {held['commit']}" if held else "")
                           + f"; --run {run} goes on with it, and once it is moved elsewhere, {spec} is read again")
        return
    with LOCKS:                                                                      # unlocks at the end
        lock(run)
        with new_folder(run) as new:
            for name in files_of_run(folder):
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, new / name)
            write_json(new / "portal.json", {**saved, "hub": origin})
    print(f"{spec}: read at {folder.name} into {run}")


# ---------------------------------------------------------------------------------------------- to the hub
def push(folder, repo, delete=None):
    """Uploads the files of a folder to a model repository on the hub, which is made, a private one, if need be. delete:
    patterns of files in the repository that go unless the folder has them. Raises BadInput."""
    try:
        url = huggingface_hub.HfApi().create_repo(repo, private=True, exist_ok=True)
        huggingface_hub.HfApi().upload_folder(repo_id=repo, folder_path=folder, delete_patterns=delete,
                                              commit_message="Upload by PorTAL's export.py")
    except Exception as error:                                                       # of the network or the hub
        raise BadInput(f"{repo}: not uploaded to the hub: {first_line(error)}; the same command tries again (hf auth "
                       "login gives it a token that may write)")
    print(f"uploaded: {url}")


def push_run(run, repo):
    """Uploads the files of a run and a card. Converters of an earlier run in the repository go. Raises BadInput."""
    with tempfile.TemporaryDirectory() as folder:
        for name in files_of_run(run):
            if not name.startswith("."):                                             # the state of a killed command
                (new := pathlib.Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / name, new)
        pathlib.Path(folder, "README.md").write_text(run_card(run, repo), encoding="utf-8")
        push(folder, repo, ["converters/*", "baselines/*", "final/*", "upgrade-*", "*.png"])


def run_card(run, repo):
    """Returns the text of a run's card: its tasks, its bases, how it is used."""
    (_, cfg), held = load_config(run), provenances(run)
    hub_ids = {tag: p["id"] for tag, p in held.items() if source_of(p["id"]).on_hub}
    rows = "\n".join(
        f"| {tag} | {hub_ids.get(tag, 'a local folder')} | {p['revision'] or '-'} | {'no' if p['ported'] else 'yes'} | "
        f"{p['n'] or 'not recorded'} | {p['date'] or 'not recorded'} |" for tag, p in held.items())
    of_hub = f"base_model: {json.dumps(sorted(set(hub_ids.values())))}\n" * bool(hub_ids)
    return (f"---\n{of_hub}tags:\n- lora\n- portal\n---\n\n# {repo.split('/')[1]}\n\nA run of PorTAL: latents of the "
            f"tasks {', '.join(cfg.tasks)} and a core, which belong to no base, and a converter for each of the bases "
            f"below. Together they generate a LoRA of rank {cfg.rank} for {', '.join(cfg.modules)}. The rows that "
            "it was trained on are not part of it.\n\n| base | hub id | revision | the core was trained on it | "
            f"training rows a task (n) | fitted |\n|---|---|---|---|---|---|\n{rows}\n\n"
            "With PorTAL's code:\n\n```bash\n"
            f"python port.py --run {repo} --data DIR --to NEW_BASE     # DIR/<task>/train.jsonl, eval.jsonl\n"
            f"python export.py --run {repo} --to {next(iter(held), 'BASE')} --task all --out adapters\n```\n")
