"""A base that a run has recorded: which one a command names, where it is now, and that its files are still the same."""
import os

from bases.files import fingerprint_at
from bases.load import TOY, load_base, resolve, same, source_of
from runtime.files import BadInput

MOVED = {}                                                                           # {recorded id: Source}: find_base


def find_base(held, spec, run):
    """Returns the tag of the base of a run that `spec` names: the tag itself, a short name, or whatever leads to the
    base recorded: its alias, hub id (with the revision asked for at the time, or the commit), folder or .gguf file, or
    any path with the fingerprint recorded, from which the base is then loaded (MOVED).
    held {tag: provenance}. Raises BadInput, also for a base of the same short name from somewhere else."""
    source = source_of(spec)
    if os.sep not in spec and source.name in held:
        return source.name
    for tag, p in held.items():
        if same(source, source_of(p["id"])) and source.revision in (None, p["revision"], p.get("requested") or "main"):
            return tag
    its = not source.on_hub and os.path.exists(source.where) and fingerprint_at(resolve(spec).where, source.gguf)
    for tag, p in held.items():
        if its and p.get("fingerprint") == its:
            MOVED[p["id"]] = source
            return tag
    if p := held.get(source.name):
        was = "@".join(filter(None, (p["id"], p["revision"])))
        other = [part for part, digest in (p.get("fingerprint") or {}).items() if its and its.get(part) != digest]
        raise BadInput(f"base {spec!r} is not the base {source.name} of {run}, which is {was}"
                       + f": its {' and '.join(other)} differ" * bool(other))
    raise BadInput(f"base {spec!r} is not in {run}; it holds {', '.join(held) or 'none'}; "
                   "python port.py --to NAME adds one")


def located(id):
    """Returns the Source of a base with this id in its provenance, where it is now: see find_base. Raises BadInput."""
    if os.path.isabs(id) and id not in MOVED and not os.path.lexists(id):
        raise BadInput(f"there is no base at {id} any more; name the path where it is (--bases; export.py: --to), or "
                       "put a link to it there")
    return MOVED.get(id) or resolve(id)


def recorded(p):
    """Returns the Source of a base with provenance p: its id, at the commit and under the name recorded."""
    source = located(p["id"])
    if not source.on_hub and p["id"] not in TOY and not os.path.isabs(p["id"]):
        raise BadInput(f"base {p['id']}, a hub id, has the name of a folder here; rename the folder")
    return source._replace(name=p["base"], revision=p["revision"] if source.on_hub else None)


def reload_base(provenance, *args, allow_changed=False, **options):
    """Returns load_base of the id and commit in a converter's provenance, under the name that its files have. Raises
    BadInput if its files are no longer those that the converter was fitted on, unless allow_changed."""
    source = recorded(provenance)
    base = load_base(source, *args, **options)
    before = provenance.get("fingerprint") or {}
    changed = [part for part, digest in before.items() if digest != base.provenance["fingerprint"].get(part)]
    if changed and not allow_changed:
        raise BadInput(f"base {base.name}: {' and '.join(changed)} in {source.where} are not those that its converter "
                       "was fitted on; restore them, fit it again, or go on with --allow-changed-base")
    return base
