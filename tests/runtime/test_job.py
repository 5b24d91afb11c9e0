"""Killed at any moment and started again: the numbers of an undisturbed run. Every SIGKILL here is a real one, of a fork of
this process (which has torch loaded already)."""
import itertools, json, os, pathlib, random, re, resource, shutil, signal, time

import pytest
import torch
from conftest import TRAIN, save_tiny, command, edit, fingerprint, one_line

import eval as evaluation, port, train
from bases import frozen
from runtime import job, resume, run_folder

forks = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
PORT = ["--to", "./base-c", "--n", "4,8", "--epochs", "2", "--batch-size", "2"]
VARIES = {"seconds", "tokens_per_s", "peak_memory", "date", "trained", "fitted"}               # times, dates, memory


def scrub(value):
    if isinstance(value, dict):
        return {k: scrub(v) for k, v in value.items() if k not in VARIES}
    return [scrub(v) for v in value] if isinstance(value, list) else value


def numbers(run):
    """All that must be equal: which files there are, every tensor bit for bit, every JSON row but for times, in order."""
    found = fingerprint(run)
    for name in found:
        if name.endswith((".json", ".jsonl")):
            text = (run / name).read_text()
            found[name] = [scrub(json.loads(t)) for t in (text.splitlines() if name.endswith("l") else [text])]
        elif not name.endswith(".safetensors"):
            found[name] = None
    return found


def beside(run):
    """What lies beside a run, but for its lock file, which stays."""
    return sorted(name for name in os.listdir(run.parent) if name not in (run.name, f".{run.name}.lock"))


# What a command does to its files and parameters, one after the other.
STEPS = [(os, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "rename"), (shutil, "rmtree"),
         (train, "task_gradients"), (train, "evaluate"), (job, "append_jsonl"), (resume, "append_jsonl"), (evaluation, "evaluate")]


def before_each_step(patch, action):
    """Call action(k) before the k-th step."""
    count = itertools.count(1)
    def wrap(real):
        def step(*args, **kwargs):
            action(next(count))
            return real(*args, **kwargs)
        return step
    for owner, name in STEPS:
        patch(owner, name, wrap(getattr(owner, name)))


def save_every_round():
    job.Job.due = property(lambda self: 0, lambda self, value: None)


def start(module, *argv, prepare=lambda: None):
    """A command in a fork of this process -> its pid."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            prepare()
            code = command(module, *argv)
        finally:
            os._exit(code)
    return pid


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies(module, *argv, at, often):
    """Run a command that kills itself before its step `at` -> exit code."""
    def prepare():
        if often:
            save_every_round()
        before_each_step(setattr, lambda k: k == at and os.kill(os.getpid(), signal.SIGKILL))
    return end(start(module, *argv, prepare=prepare))


def survives(module, argv, fresh, monkeypatch, last=3, kills=3):
    """Undisturbed on one copy; on others killed at random steps and at the last ones, started again (every other one is
    killed again), and then done. `fresh(name)` -> a new run folder of that name."""
    steps = []
    with monkeypatch.context() as patch:
        before_each_step(patch.setattr, steps.append)
        want = fresh("want")
        assert command(module, *argv, "--run", want) == 0
    want, N, rng = numbers(want), len(steps), random.Random(0)
    points = rng.sample(range(2, N - last), kills) + list(range(N - last + 1, N + 1))
    for number, at in enumerate(points):
        run = fresh(f"got{number}")
        assert dies(module, *argv, "--run", run, at=at, often=number % 2) == -signal.SIGKILL
        code = -signal.SIGKILL
        if number % 2:
            code = dies(module, *argv, "--run", run, at=rng.randint(1, N // 3), often=True)
        if code == -signal.SIGKILL:
            code = command(module, *argv, "--run", run)
        if code:                                                                     # the run was whole: what was left to
            assert code == 2 and at > N - 4 and module is train                      # do was to remove
        assert numbers(run) == want, at
        assert not [p for p in os.listdir(run.parent) if p.startswith(f".{run.name}.") and p[len(run.name) + 2:] not in ("part", "lock")]


@forks
def test_training(world, monkeypatch):
    survives(train, TRAIN, lambda name: world / "runs" / name, monkeypatch, last=4)


@pytest.fixture
def copies(trained):
    def fresh(name):
        return pathlib.Path(shutil.copytree(trained, trained.parents[1] / "runs" / name))
    return fresh


@forks
def test_porting_a_sweep(copies, monkeypatch):
    survives(port, PORT, copies, monkeypatch)


@forks
def test_evaluating(copies, monkeypatch):
    """Its LoRA fits are three learners with rounds of their own; a cell that is measured is not measured again, or twice."""
    survives(evaluation, ["--bases", "./base-b", "--eval-rows", "3", "--methods", "lora,cross_lora,portal"], copies, monkeypatch)


@forks
def test_training_killed_at_any_time(world):
    """Not between two steps of Python's, but whenever."""
    began = time.time()
    assert command(train, *TRAIN, "--run", "want") == 0
    whole, rng, codes = time.time() - began, random.Random(1), []
    while 0 not in codes:
        pid = start(train, *TRAIN, "--run", "got", prepare=save_every_round)
        time.sleep(rng.uniform(0.1, 0.3) * whole * (1 + len(codes) / 4))
        try:
            os.kill(pid, signal.SIGKILL)
        finally:
            codes.append(end(pid))
    assert len(codes) > 2 and set(codes) == {0, -signal.SIGKILL}
    assert numbers(world / "got") == numbers(world / "want")


@forks
def test_a_killed_overwrite_leaves_the_old_run(trained):
    before = fingerprint(trained)
    assert dies(train, *TRAIN, "--overwrite", "--seed", "3", at=12, often=True) == -signal.SIGKILL
    assert fingerprint(trained) == before
    assert command(train, *TRAIN, "--overwrite", "--seed", "3") == 0
    assert command(train, *TRAIN, "--seed", "3", "--run", "want") == 0
    assert numbers(trained) == numbers(pathlib.Path("want")) and beside(trained) == []


@forks
def test_killed_while_one_run_takes_the_place_of_another(trained):
    """Before the new one is whole, the old one stays; between two of its files the folder is no run, and the next
    command completes it."""
    before, again = fingerprint(trained), [*TRAIN, "--overwrite", "--seed", "3"]
    def dies_at(owner, name, number):
        def prepare():
            calls, real = itertools.count(1), getattr(owner, name)
            def dies(source, *args):
                if re.search(r"/\.portal-(new|whole)\d+", str(source)) and next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(source, *args)
            setattr(owner, name, dies)
        return prepare
    assert end(start(train, *again, prepare=dies_at(pathlib.Path, "rename", 1))) == -signal.SIGKILL
    with run_folder.LOCKS:
        run_folder.lock(trained)
    assert fingerprint(trained) == before and beside(trained) == [f".{trained.name}.part"]
    assert end(start(train, *again, prepare=dies_at(shutil, "move", 3))) == -signal.SIGKILL and not (trained / "portal.json").exists()
    assert run_folder.find_run(trained) == trained and command(train, *TRAIN, "--seed", "3", "--run", "want") == 0
    assert numbers(trained) == numbers(pathlib.Path("want")) and not [p for p in trained.iterdir() if p.name.startswith(".")]


# ---------------------------------------------------------------------------------------------- stopped, not killed
def stop_at_round(monkeypatch, number, error=None):
    """Ctrl-C (or `error`) in the middle of a round."""
    rounds, real = itertools.count(1), train.task_gradients
    def task_gradients(*args):
        if next(rounds) == 2 * number:                                               # two bases
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(train, "task_gradients", task_gradients)


def test_ctrl_c_finishes_the_round_and_saves(world, capsys, monkeypatch):
    assert command(train, *TRAIN, "--run", "want") == 0
    for what in ("round", "evaluate"):
        with monkeypatch.context() as patch:
            if what == "round":
                stop_at_round(patch, 3)
            else:                                                                    # while the first epoch is scored
                patch.setattr(train, "evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
            capsys.readouterr()
            assert command(train, *TRAIN, "--run", what) == 130
            where = f"after round {3 if what == 'round' else 4}"
            one_line(capsys, ["interrupted", where, "the same command goes on"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert command(train, *TRAIN, "--run", what, "--max-tokens", "4000") == 0
        assert f"continuing train {where} (complete epochs: 0); delete" in capsys.readouterr().out
        assert numbers(world / what).keys() == numbers(world / "want").keys()
        got, want = (json.loads((world / run / "log.jsonl").read_text().splitlines()[1]) for run in (what, "want"))
        assert scrub(got) == scrub(want)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_finaliser_is_not_lost(world, capsys, monkeypatch):
    """Python ignores exceptions in __del__: the fit then stops after the next round."""
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
    rounds = itertools.count(1)
    monkeypatch.setattr(job.Job, "forget_batches", lambda self: Dying() if next(rounds) == 2 else None)
    assert command(train, *TRAIN) == 130
    one_line(capsys, ["interrupted", "after round 3", "the same command goes on"])


@forks
def test_ctrl_c_from_outside(world, capfd):
    """At whatever moment it comes: exit code 130, one line, no traceback."""
    pid = start(train, *TRAIN, "--run", "r", "--epochs", "500", prepare=save_every_round)
    while not (world / ".r.part" / "train.safetensors").exists():
        time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    assert end(pid) == 130
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "the same command goes on" in err, err


def test_the_state_of_another_configuration_is_left_aside(world, capsys, monkeypatch):
    def interrupted(*argv):
        with monkeypatch.context() as patch:
            stop_at_round(patch, 6)                                                  # the second epoch: the log has a line
            assert command(train, *argv) == 130
    def anew(*argv):
        capsys.readouterr()
        assert command(train, *argv) == 0
        assert "train starts from round 0" in capsys.readouterr().out
        return world / "out" / "base-a+base-b"
    interrupted(*TRAIN)
    shutil.rmtree(anew(*TRAIN, "--seed", "1"))
    interrupted(*TRAIN)
    shutil.rmtree(world / "base-b")
    save_tiny(world / "base-b", "llama", 9)                                          # other weights of the same name
    shutil.rmtree(anew(*TRAIN))
    interrupted(*TRAIN)
    edit(world / "data" / "one" / "train.jsonl", 1, {"prompt": "w3 w4"})
    got = anew(*TRAIN)
    assert command(train, *TRAIN, "--run", "want") == 0
    assert numbers(got) == numbers(world / "want")                                   # and the log has no line too many


@forks
def test_one_command_at_a_time_writes_into_a_run(trained, capsys):
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        run_folder.lock(trained)
        os.write(tell, b".")
        time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    before = fingerprint(trained)
    for module, argv in ((train, [*TRAIN, "--overwrite"]), (port, PORT), (evaluation, [])):
        capsys.readouterr()
        assert command(module, *argv) == 2
        one_line(capsys, [str(trained.name), f"process {holder} is writing"])
    assert command(evaluation, "--show", "1") == 0                                   # that one only reads
    assert fingerprint(trained) == before
    os.kill(holder, signal.SIGKILL)
    end(holder)
    assert command(port, "--to", "./base-c", "--n", "4", "--epochs", "1") == 0
    assert beside(trained) == []                              # no lock file is left


# ---------------------------------------------------------------------------------------------- what the machine refuses
def test_a_full_disk_leaves_the_last_good_state(world, capsys, monkeypatch):
    assert command(train, *TRAIN, "--run", "want") == 0
    real, states = job.safetensors.torch.save_file, []
    def full(tensors, path, *args):
        if path.name.startswith(".train.safetensors"):
            states.append(path)
            if len(states) == 4:
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        return real(tensors, path, *args)
    with monkeypatch.context() as patch:
        patch.setattr(job.safetensors.torch, "save_file", full)
        patch.setattr(job.Job, "due", property(lambda self: 0, lambda self, value: None), raising=False)
        capsys.readouterr()
        assert command(train, *TRAIN, "--run", "got") == 2
        one_line(capsys, [".got.part/train.safetensors: not written (No space left on device)"])
    assert os.listdir(world / ".got.part") == ["train.safetensors"]
    assert command(train, *TRAIN, "--run", "got") == 0
    assert "continuing train after round 3 (" in capsys.readouterr().out
    assert numbers(world / "got") == numbers(world / "want")


@forks
def test_a_limit_of_the_system_is_one_line(world, capfd):
    """The real thing: no file may grow beyond 2,000 bytes."""
    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    assert end(start(train, *TRAIN, prepare=prepare)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "train.safetensors: not written" in err, err


@forks
def test_a_folder_that_cannot_be_written(world, capsys, monkeypatch):
    (world / "file").touch()
    assert command(train, *TRAIN, "--run", "file/run") == 2
    one_line(capsys, ["file/run: not written ("])
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert command(train, *TRAIN, "--run", "got") == 2
        one_line(capsys, [".got.part/train.safetensors: not written (Permission denied)"])


def out_of_cpu_memory():
    with pytest.raises(RuntimeError) as info:
        torch.empty(1 << 55, dtype=torch.uint8)
    return info.value


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), out_of_cpu_memory(), MemoryError()]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_names_the_place(world, capsys, monkeypatch, error):
    real, calls = frozen.linear_nll, itertools.count()
    def linear_nll(*args, **kwargs):
        if next(calls) == 5:
            raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(frozen, "linear_nll", linear_nll)
    assert command(train, *TRAIN) == 2                                               # two bases, a pass each: round 3
    one_line(capsys, ["train: out of memory on base base-b, round 3", "rows by", "tokens of one", "--max-tokens"])
