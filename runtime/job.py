"""State file, progress bar, log and error checks of one fit, kept out of the loop in train.fit.

    Job      runs all epochs; restores a killed fit, saves on time and at Ctrl-C, appends a line an epoch to log.jsonl
    DryRun   has the same methods; runs four rounds and one evaluation and prints what the whole fit would take

The state file holds the learners' parameters and optimiser states, the position in the run and a digest of its
configuration; a state of another one is not used. The seed repeats the order of the rows.
"""
import contextlib, datetime, json, math, resource, signal, sys, threading, time
from types import SimpleNamespace

import safetensors
import torch
from tqdm import tqdm

from runtime.distributed import NO_BAR, RANK
from runtime.files import BadInput, append_jsonl, out_of_memory, today, unreadable
from runtime.resume import digest, learner_state, place_lines, restore_learner
from runtime.saved import save_tensors

EVERY = 60  # seconds between two saves within an epoch, at least


def peak_memory(device):
    """Peak memory in bytes: of a GPU since the last call, of this process on a CPU since it started."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def means(scores):
    """Returns the mean acc_norm and log_loss of {(base name, task): (acc_norm, -log_loss)}, None and None of none."""
    columns = zip(*scores.values()) if scores else ()
    acc, log_p = [sum(column) / len(scores) for column in columns] or (None, None)
    return acc, log_p and -log_p


class Job:
    """One fit. `what`: its name in the log; settings: a dict with epochs, batch_size and max_tokens; log: path of
    log.jsonl; state: path of the state file, which the caller removes, or None; frozen: tensors that the adapters
    depend on and no learner has, for the digest. After the fit, `seconds` includes those of killed processes."""

    def __init__(self, what, settings, seed, log, state=None, frozen=()):
        self.what, self.seed, self.log, self.path, self.frozen = what, seed, log, state, frozen
        self.deferred = self.pressed = False                                         # Ctrl-C: see interrupts
        self.n_epochs, self.batch_size = settings["epochs"], settings["batch_size"]
        self.max_tokens = settings["max_tokens"]
        # The position: rounds done; lines of finished epochs; this epoch's loss, tokens and start (in `seconds`).
        self.at = SimpleNamespace(done=0, lines=[], loss=0.0, tokens=0, began=0.0, seconds=0.0)

    seconds = property(lambda self: self.at.seconds)

    @contextlib.contextmanager
    def fit(self, bases, learners, rows, source):
        """Restores before the loop; saves at Ctrl-C; names base, round and tasks when memory is full."""
        self.bases, self.learners, self.source = bases, learners, source
        self.per_epoch = max(learner.rounds for learner in learners)
        self.identity, self.due = self.identify(rows), time.time() + EVERY
        self.load()
        for learner in learners:
            for task in learner.tasks:
                source.skip(task, learner.schedule.last_epoch)                     # the rows of the steps already taken
        self.started, self.round = time.time() - self.at.seconds, self.at.done
        total = self.n_epochs * self.per_epoch
        self.bar = tqdm(total=total, initial=self.at.done, desc=self.what, unit="round", disable=NO_BAR)
        with self.bar, self.interrupts():
            try:
                yield
            except KeyboardInterrupt:
                if self.path is None:
                    raise
                self.save()
                raise KeyboardInterrupt(f"{self.what} is saved after round {self.at.done}; "
                                        "the same command goes on from there")
            except (RuntimeError, MemoryError) as error:
                self.name_memory(error)
                raise

    def epochs(self):
        for epoch in range(len(self.at.lines) + 1, self.n_epochs + 1):
            self.scores = {}
            yield epoch
            with self.defer_interrupt():
                self.end_epoch(epoch)

    def rounds(self, epoch):
        """Yields each round's number in the epoch, from 0. Ctrl-C waits for its end: a part could not be saved."""
        for k in range(self.at.done - (epoch - 1) * self.per_epoch, self.per_epoch):
            self.round = self.at.done + 1
            with self.defer_interrupt():
                yield k
            self.forget_batches()
            self.bar.update()
            if time.time() > self.due:
                self.save()

    def record(self, losses, items):
        """Takes a round's losses [bases, T] and its items {base name: [Item]}. Raises BadInput: see check."""
        losses = losses.cpu()                                                        # waits for the device
        self.check(losses.tolist())
        at, drawn = self.at, [item for own in items.values() for item in own]
        loss = float(losses.sum()) / len({item.task for item in drawn}) / len(self.bases)
        at.done, at.loss, at.seconds = at.done + 1, at.loss + loss, time.time() - self.started
        at.tokens += sum(item.length() for item in drawn)
        self.bar.set_postfix(loss=f"{loss:.3f}", tok_s=int(at.tokens / (at.seconds - at.began)), refresh=False)

    def record_scores(self, scores, ratios, spreads):
        """Takes an epoch's {(base name, task): (acc_norm, -log_loss)} and each base's score.delta_ratio and
        score.task_spread. Raises BadInput: see check."""
        self.forget_batches()
        tasks = self.source.tasks
        self.check([[scores.get((base.name, task), (0, 0))[1] for task in tasks] for base in self.bases], "held-out ")
        self.scores, self.ratios, self.spreads = scores, ratios, spreads

    def compare(self, bare):
        """Prints a line if the fit ends with a higher held-out log-loss than `self.bare`, that of the bare bases, whose
        scores are bare()."""
        if self.at.lines and self.at.lines[-1]["held_log_loss"]:
            ends, (_, self.bare) = self.at.lines[-1]["held_log_loss"], means(bare())
            if ends > self.bare:
                tqdm.write(f"{self.what}: the held-out log_loss ends at {ends:.3f}, above the bare base's "
                           f"{self.bare:.3f}: it diverged or learned its rows by heart; try a smaller --lr, more rows "
                           "or fewer --epochs")

    def check(self, losses, which=""):
        """Raises BadInput if some of losses [bases, T] are not finite."""
        for base, own in zip(self.bases, losses):
            bad = ", ".join(task for task, loss in zip(self.source.tasks, own) if not math.isfinite(loss))
            if bad:
                raise BadInput(f"{self.what}: the {which}loss is not finite on base {base.name}, task {bad}, "
                               f"round {self.round}; try a smaller --lr or --dtype float32, which starts over")

    def end_epoch(self, epoch):
        """Saves the state, appends the epoch's line to the log and prints it."""
        at, (acc, log_loss) = self.at, means(self.scores)
        seconds = at.seconds - at.began
        line = dict(event="epoch", what=self.what, bases=[base.name for base in self.bases], epoch=epoch,
                    loss=at.loss / self.per_epoch, held_acc_norm=acc, held_log_loss=log_loss, delta_ratio=self.ratios,
                    shared=[shared for shared, _ in self.spreads], task_rank=[rank for _, rank in self.spreads],
                    seconds=round(seconds, 2), rounds=self.per_epoch, tokens=at.tokens,
                    tokens_per_s=round(at.tokens / seconds),
                    peak_memory=peak_memory(self.bases[0].device), date=today())
        at.lines, at.loss, at.tokens = [*at.lines, line], 0.0, 0
        at.seconds = at.began = time.time() - self.started
        self.save()                                                               # first: then the line can be put back
        append_jsonl(self.log, line)
        held = f"held-out acc_norm {acc:.3f}, log_loss {log_loss:.3f}" if self.scores else "nothing held out"
        ratio = ", ".join(f"{ratio:.2g}" for ratio in self.ratios)
        shared = ", ".join(f"{shared:.0%}" for shared, _ in self.spreads)
        tqdm.write(f"{self.what} epoch {epoch}/{self.n_epochs}: loss {line['loss']:.3f}, {held}, "
                   f"|BAx|/|Wx| {ratio}, tasks share {shared}, {seconds:.0f} s, {line['tokens_per_s']} tokens/s")

    def identify(self, rows):
        """A digest of all that the fit's numbers follow from. Not of max_tokens and the device, which change rounding
        alone: a fit that ran out of memory may go on with a smaller --max-tokens."""
        facts = [[base.name, {**base.provenance, "id": None}, str(base.model.dtype)] for base in self.bases]
        facts += [[learner.tasks, learner.rounds, learner.schedule.base_lrs] for learner in self.learners]
        weights = [p for base in self.bases for p in base.model.parameters()]      # a folder may hold another model now
        return digest([self.what, facts, rows, (self.n_epochs, self.batch_size, self.seed)],
                      [*weights, *self.frozen, *(p for learner in self.learners for p in learner.start)])

    def load(self):
        """Restores learners, position and log.jsonl if the state file is of this very fit."""
        if self.path is None or not self.path.exists():
            return
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                note = json.loads(file.metadata()["note"])
                same = note["identity"] == self.identity
                tensors = {name: file.get_tensor(name).clone() for name in file.keys() if same}
        except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{self.path}: not a whole state file ({unreadable(self.path) or error}); delete it to "
                           "start over")
        place_lines(self.log, note["at"]["lines"], keep=same)
        if not same:
            return print(f"{self.what} starts from round 0: {self.path} belongs to another configuration")
        def part(prefix):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for i, (learner, rest) in enumerate(zip(self.learners, note["learners"])):
            restore_learner(learner, part(f"{i}."), rest)
        vars(self.at).update(note["at"])
        print(f"continuing {self.what} after round {self.at.done} (complete epochs: {len(self.at.lines)}); "
              f"delete {self.path} to start over")

    def save(self):
        if self.path is None or RANK:
            return
        start, states = time.time(), [learner_state(learner) for learner in self.learners]
        tensors = {f"{i}.{name}": t for i, (own, _) in enumerate(states) for name, t in own.items()}
        note = dict(identity=self.identity, at=vars(self.at), learners=[rest for _, rest in states])
        save_tensors(self.path, tensors, {"note": json.dumps(note)})
        self.due = time.time() + max(EVERY, 20 * (time.time() - start))            # saving takes 5% of the time at most

    @contextlib.contextmanager
    def interrupts(self):
        """Ctrl-C inside raises KeyboardInterrupt, but within `defer_interrupt` at its end; a second one ends the
        process at once. Ctrl-C that does not raise KeyboardInterrupt outside (a background job) is left as it is."""
        ordinary = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not ordinary or threading.current_thread() is not threading.main_thread():
            yield
            return
        def press(*_):
            if self.pressed:
                sys.exit(130)
            self.pressed = True                                                      # else lost in a finaliser: Python
            if not self.deferred:                                                    # ignores what is raised there
                raise KeyboardInterrupt
        signal.signal(signal.SIGINT, press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def defer_interrupt(self):
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.pressed:
            self.pressed = False
            raise KeyboardInterrupt

    def forget_batches(self):
        for base in self.bases:
            base.batch = None

    def name_memory(self, error):
        """Raises BadInput with base, round, micro-batch and tasks if a base's forward pass ran out of memory."""
        used = [base for base in self.bases if base.batch is not None]               # the last one was computing
        if out_of_memory(error) and used:
            base, (rows, tokens) = used[-1], used[-1].batch.ids.shape
            tasks = ", ".join(sorted({item.row.task for item in base.batch.items}))
            raise BadInput(f"{self.what}: out of memory on base {base.name}, round {self.round}, in a micro-batch of "
                           f"{rows} rows by {tokens} tokens of {tasks}; try a smaller --max-tokens, --recompute or "
                           "--dtype bfloat16; what was saved before is untouched")


class DryRun(Job):
    """Stands in for a Job: a round of every task's longest rows (they need the most memory, and this warms up), the
    three rounds that the fit starts with, and one micro-batch of held-out rows on each base. Writes nothing."""

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()

    @contextlib.contextmanager
    def fit(self, bases, learners, rows, source):
        self.device, self.times = bases[0].device, []
        for cycle in source.cycles.values():
            cycle.left = sorted(cycle.items, key=lambda item: item.length())[-self.batch_size:]
        tokens = sum(item.length() for held in source.held.values() for item in held)
        for held in source.held.values():
            held.sort(key=lambda item: item.length(), reverse=True)
            del held[max(1, self.max_tokens // held[0].length()) if held else 0:]
        part = sum(item.length() for held in source.held.values() for item in held)
        yield
        scoring = self.scoring * tokens / part if part else 0.0
        rounds, seconds = max(learner.rounds for learner in learners) * self.n_epochs, sum(self.times[1:]) / 3
        total = datetime.timedelta(seconds=round(rounds * seconds + self.n_epochs * scoring))
        print(f"{self.what}, dry run: {rounds} rounds of {seconds:.2f} s and {self.n_epochs} evaluations of "
              f"{scoring:.1f} s on held-out rows, {total} in all; peak memory "
              f"{peak_memory(self.device) / 2 ** 30:.2f} GiB; nothing was written")

    def epochs(self):
        yield 1

    def rounds(self, epoch):
        for _ in range(4):
            start = self.clock()
            yield 0                                                                  # as in the first round, all learn
            self.times.append(self.clock() - start)
        self.began = self.clock()

    def record(self, losses, items):
        pass

    def record_scores(self, scores, ratios, spreads):
        self.scoring = self.clock() - self.began

    def compare(self, bare):
        pass
