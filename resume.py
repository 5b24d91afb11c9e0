"""A killed command goes on: the same command, started again, ends with the numbers it would have had undisturbed.

    State     all that changes in one training loop (train.fit), saved after every epoch and about once a minute within one
    Journal   which parts a command of many parts (port.py, eval.py) has finished

A kill can come between any two instructions, so nothing may rely on tidying up afterwards. Files are written whole
(cli.write_whole), and lines for a .jsonl file are saved here before they are appended there: on the way back, those that
the file lacks are known, and none can be there twice. What a file belongs to is told by a digest; that of another
configuration, seed or folder of tasks is left aside.

Not saved: the order of the rows, which the seed repeats (data.Cycle), and the frozen base.
"""
import contextlib, hashlib, json, signal, sys, threading, time

import safetensors, safetensors.torch

from cli import BadInput, append_jsonl, read_json, remove, write_json, write_whole, writing
from dist import RANK

EVERY = 60  # seconds between two saves within an epoch, at least


def digest(facts, tensors=()):
    """A hash of JSON-able facts and of the first numbers of tensors, which are other ones in other weights."""
    found = hashlib.sha256(json.dumps(facts).encode())
    for tensor in tensors:
        found.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()


def place_lines(path, rows, keep=True):
    """Make `rows` the last lines of a .jsonl file, each once, whether or not it held them; keep=False: take them out."""
    ours = [json.dumps(row) for row in rows]
    before = path.read_text().splitlines() if path.exists() else []
    after = [line for line in before if line not in ours] + (ours if keep else [])
    if after != before:
        write_whole(path, lambda p: p.write_text("".join(line + "\n" for line in after)))


def forget(path):
    """Remove a file of this module's, and its folder with the last one."""
    with writing(path):
        remove(path)
    with contextlib.suppress(OSError):                                               # it holds more, or is gone
        path.parent.rmdir()


# ---------------------------------------------------------------------------------------------- one training loop
class State:
    """The state file of a fit: tensors as safetensors, all else as JSON in the file's metadata. `path` None: there is none.

    learners: train.Learner, with state() and restore(); running: {base name: train.EMA}; `at`: where the fit stands, a
    namespace that JSON can hold, with the rounds `done` and the `lines` of its finished epochs for log.jsonl.
    """

    def __init__(self, path, what, identity, learners, running, at, log):
        self.path, self.what, self.identity, self.learners = path, what, identity, learners
        self.running, self.at, self.log, self.due = running, at, log, time.time() + EVERY

    def load(self):
        """Put learners, running means, `at` and log.jsonl to where the file has them, if it is of this very fit."""
        if self.path is None or not self.path.exists():
            return
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                note = json.loads(file.metadata()["note"])
                same = note["identity"] == self.identity
                tensors = {name: file.get_tensor(name).clone() for name in file.keys() if same}
        except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{self.path}: not a whole state file ({error}); delete it to start over")
        place_lines(self.log, note["at"]["lines"], keep=same)
        if not same:
            print(f"{self.what} starts anew: {self.path} is the state of another configuration")
            return
        def part(prefix):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for i, (learner, rest) in enumerate(zip(self.learners, note["learners"])):
            learner.restore(part(f"{i}."), rest)
        for name, mean in part("ema.").items():
            self.running[name].mean = mean.to(self.learners[0].params[0].device)
        vars(self.at).update(note["at"])
        print(f"continuing {self.what} after round {self.at.done} (complete epochs: {len(self.at.lines)}); "
              f"delete {self.path} to start over")

    def save(self):
        if self.path is None or RANK:
            return
        start, rests = time.time(), []
        tensors = {f"ema.{name}": ema.mean for name, ema in self.running.items() if ema.mean is not None}
        for i, learner in enumerate(self.learners):
            own, rest = learner.state()
            tensors.update({f"{i}.{name}": t for name, t in own.items()})
            rests.append(rest)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        note = json.dumps(dict(identity=self.identity, at=vars(self.at), learners=rests))
        write_whole(self.path, lambda p: safetensors.torch.save_file(tensors, p, {"note": note}))
        self.due = time.time() + max(EVERY, 20 * (time.time() - start))              # a large one: a twentieth of the time

    @contextlib.contextmanager
    def saved_at_ctrl_c(self):
        """A Ctrl-C inside saves. What must not be cut in two is `unbroken`, so learners and `at` always agree here."""
        try:
            yield
        except KeyboardInterrupt:
            if self.path is None:
                raise
            self.save()
            raise KeyboardInterrupt(f"{self.what} is saved after round {self.at.done}; the same command goes on from there")


@contextlib.contextmanager
def unbroken():
    """Inside, a Ctrl-C waits for the end: half a round could not be saved. A second one ends the process as a kill would.
    Where Ctrl-C does not raise KeyboardInterrupt (a background job, another thread) all stays as it is."""
    ordinary = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ordinary or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    def press(*_):
        if pressed:
            sys.exit(130)
        pressed.append(True)
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------- many parts
class Journal:
    """The finished parts of one command, {name: the lines it wrote}. `command`: its digest."""

    def __init__(self, path, command):
        self.path, self.command = path, command
        saved = read_json(path) if path.exists() else {}
        self.done = saved["done"] if saved.get("command") == command else {}
        if self.done:
            print(f"continuing an interrupted command: {len(self.done)} of its parts are done; delete {path} to start over")

    def add(self, part, path=None, rows=()):
        """Part `part` is finished; `rows` are its lines for the .jsonl file `path`."""
        self.done[part] = rows
        write_json(self.path, dict(command=self.command, done=self.done))
        if rows:
            append_jsonl(path, *rows)

    def place(self, path):
        """Back again: all lines of the finished parts stand in `path`, once."""
        place_lines(path, [row for rows in self.done.values() for row in rows])


def command_of(args, *more):
    """The digest of a command: its flags, but for those that change no more than rounding, and whatever else matters."""
    free = ("device", "device_map", "max_tokens", "recompute")
    return digest([{k: str(v) for k, v in vars(args).items() if k not in free}, *more])
