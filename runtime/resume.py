"""Resuming a killed command: the same command, started again, ends with the numbers of an undisturbed one.

Journal lists the finished parts of a command of many parts (port.py, eval.py); the state of a single fit is job.py's.
A kill can come between any two instructions, so nothing relies on cleaning up afterwards. Files are written whole.
Lines of a .jsonl file are saved here before they are appended there: on restart, missing lines are known and appended
once."""
import contextlib, hashlib, json

import torch

from runtime.files import append_jsonl, read_json, remove, write_json, write_whole, writing


def digest(facts, tensors=()):
    """A SHA-256 digest of JSON-able facts and of the first 64 numbers of each tensor, which differ in other weights."""
    found = hashlib.sha256(json.dumps(facts).encode())
    for tensor in tensors:
        found.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()


def digests_of(rows):
    """{task: the digest of its rows}, 16 hex digits each, of rows {task: lists of rows}, for a provenance."""
    return {task: digest(own)[:16] for task, own in rows.items()}


def place_lines(path, rows, keep=True):
    """Makes `rows` the last lines of a .jsonl file, each once, held already or not; keep=False: takes them out."""
    ours = [json.dumps(row) for row in rows]
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    after = [line for line in before if line not in ours] + (ours if keep else [])
    if after != before:
        write_whole(path, lambda p: p.write_text("".join(line + "\n" for line in after), encoding="utf-8"))


def state_file(run, fit):
    """Returns the path of the state of an unfinished fit, such as "port-<tag>", of a run."""
    return run / ".resume" / f"{fit}.safetensors"


def forget(path):
    """Removes a state file or journal, and its folder if that is then empty."""
    with writing(path):
        remove(path)
    with contextlib.suppress(OSError):                                               # not empty, or gone
        path.parent.rmdir()


class Journal:
    """The finished parts of one command, {name: the lines it wrote}. `command`: its digest."""

    def __init__(self, path, command):
        self.path, self.command = path, command
        saved = read_json(path) if path.exists() else {}
        self.done = saved["done"] if saved.get("command") == command else {}
        if self.done:
            print(f"continuing an interrupted command: {len(self.done)} of its parts are done; "
                  f"delete {path} to start over")

    def add(self, part, path=None, rows=()):
        """Records that `part` is finished, and appends its `rows` to the .jsonl file `path`."""
        self.done[part] = rows
        write_json(self.path, dict(command=self.command, done=self.done))
        if rows:
            append_jsonl(path, *rows)

    def place(self, path):
        """Puts all lines of the finished parts into `path`, each once."""
        place_lines(path, [row for rows in self.done.values() for row in rows])


def command_of(args, *more):
    """The digest of a command: its flags, but for those that change rounding alone, and `more` JSON-able facts."""
    free = ("device", "device_map", "max_tokens", "recompute")
    return digest([{k: str(v) for k, v in vars(args).items() if k not in free}, *more])


# ---------------------------------------------------------------------------------------------- a learner's state
def learner_state(learner):
    """Returns ({name: tensor}, JSON-able rest), from which restore_learner makes an equal learner."""
    tensors = {f"{k}.parameter": p for k, p in enumerate(learner.params)}
    tensors.update({f"{k}.best": p for k, p in enumerate(learner.best or [])})
    for k, p in enumerate(learner.params):  # exp_avg, exp_avg_sq and step; none of them before the first step
        own = learner.optimizer.state.get(p, {})
        tensors.update({f"{k}.{name}": t for name, t in own.items()})
    return tensors, dict(score=learner.score, epoch=learner.epoch, steps=learner.schedule.last_epoch,
                         rates=[group["lr"] for group in learner.optimizer.param_groups])


@torch.no_grad()
def restore_learner(learner, tensors, rest):
    """Makes a Learner what it was when `learner_state` read it."""
    learner.epoch, learner.schedule.last_epoch = rest["epoch"], rest["steps"]
    learner.score = rest["score"] and tuple(rest["score"])
    for group, rate in zip(learner.optimizer.param_groups, rest["rates"]):
        group["lr"] = rate
    for k, p in enumerate(learner.params):
        own = {name.removeprefix(f"{k}."): t.to(p.device)
               for name, t in tensors.items() if name.startswith(f"{k}.")}
        p.copy_(own.pop("parameter"))
        best = own.pop("best", None)
        learner.best = None if best is None else [*(learner.best or []), best]
        if own:
            learner.optimizer.state[p] = own
