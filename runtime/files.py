"""Files that are written whole or not at all, JSON, and bad input as one clear line.

Of several processes (distributed.py), all of which come to the same write, only rank 0 writes.
"""
import contextlib, datetime, json, math, os, pathlib, re, unicodedata

import safetensors
import torch

from runtime.distributed import RANK

ROOT = pathlib.Path(__file__).resolve().parents[1]


class BadInput(Exception):
    """An error that the user can mend. The message says what is wrong, where, and what is accepted."""


def first_line(error):
    """The first line of an exception's message, at most 300 characters, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def out_of_memory(error):
    """Whether memory is exhausted: a GPU's allocator has its own exception, a CPU's is known by its message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


LFS = b"version https://git-lfs"


def unreadable(path):
    """Returns why a file that is there cannot be read, or None."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS)) == LFS
        return "a Git LFS pointer, not the file itself: git lfs pull fetches it" if pointer else None
    except OSError as error:
        dangling = path.is_symlink() and not os.path.exists(path)
        return f"a link to {os.readlink(path)}, where nothing is" if dangling else error.strerror


def plain(name):
    """Whether a name may be that of a task or base, which names files: text in UTF-8 of at most 200 bytes, without
    control characters, that does not lead out of its folder."""
    return (isinstance(name, str) and name not in ("", ".", "..") and len(name.encode(errors="replace")) <= 200
            and not re.search(r"[/\\\0-\x1f\x7f\ud800-\udfff]", name))


def as_nfc(name):
    """Returns a name in Unicode's normal form C: some file systems and archives turn é into e and an accent."""
    return unicodedata.normalize("NFC", name)


PLAIN = "a name in UTF-8, at most 200 bytes, without / \\ and control characters"     # what `plain` accepts


def leftovers(folder, form):
    """Returns the paths in a folder whose whole name has the form (a regular expression), and whose number, its last
    group, is that of no process of this machine: what a killed command has left."""
    def dead(number):
        try:
            os.kill(int(number), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:                                                      # another user's process
            pass
        return False
    names = os.listdir(folder) if folder.is_dir() and os.access(folder, os.R_OK) else ()
    found = filter(None, (re.fullmatch(form, name) for name in sorted(names)))
    return [folder / each[0] for each in found if dead(each[each.lastindex])]


def as_the_umask_says(path):
    """Gives a file the permissions that other new files have: some writers (safetensors) keep theirs for the owner."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def writing(path):
    """Turns what the file system refuses inside (a full disk, no permission) into a BadInput that names `path`."""
    try:
        yield
    except BrokenPipeError:                                                          # of a print: see flags.run_main
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path}: not written ({getattr(error, 'strerror', None) or first_line(error)}); "
                       "what was saved before is untouched")


def write_whole(path, write):
    """Calls write(temporary path) and renames: `path` holds the old file or the new one, whole. Raises BadInput."""
    if RANK:
        return
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path.parent, rf"\.{re.escape(path.name)}\.tmp(\d+)"):
            left.unlink(missing_ok=True)
        try:
            write(temporary)
            as_the_umask_says(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def as_json(path, value, **options):
    """Returns `value` as JSON, which is to be written to `path`. JSON has no NaN and no infinity: raises BadInput."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        raise BadInput(f"{path}: not written: {', '.join(not_finite(value)) or 'a number'} is not finite")


def not_finite(value, name=""):
    """Returns the keys, a.b.0, of the numbers in a JSON-able value that are not finite."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    here = [name] if isinstance(value, float) and not math.isfinite(value) else []
    return here + [found for key, own in inner for found in not_finite(own, f"{name}.{key}".lstrip("."))]


def write_json(path, value):
    text = as_json(path, value, indent=1)
    write_whole(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def read_json(path):
    """The value in a JSON file. Raises BadInput if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({unreadable(path) or error})")


def each_line(path, use, what):
    """Calls use(value) for every line of a JSON lines file; BadInput names the file, or the line that is not `what`, or
    holds NaN or an infinity."""
    def no_number(text):
        raise ValueError(f"{text} is no number in JSON")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable ({unreadable(path) or error})")
    for number, line in enumerate(lines, 1):
        try:
            use(json.loads(line, parse_constant=no_number))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}:{number}: not {what} ({unreadable(path) or first_line(error)})")


def read_jsonl(path):
    """Returns the values of a JSON lines file, [] if there is no such file. Raises BadInput: see each_line."""
    values = []
    if os.path.lexists(path):
        each_line(path, values.append, "JSON")
    return values


def append_jsonl(path, *rows):
    """Appends one line a row, all rows or none: a partial line would corrupt the next one. Raises BadInput."""
    if RANK:
        return
    data = "".join(as_json(path, row) + "\n" for row in rows).encode()
    with writing(path), open(path, "ab", buffering=0) as f:
        before = f.tell()
        if f.write(data) < len(data):                                                # the disk took a part and is full
            f.truncate(before)
            raise OSError("no space left")


def remove(path):
    if RANK == 0:
        path.unlink(missing_ok=True)


def today():
    """The time now, UTC, as 2026-01-31T12:00:00Z."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
