"""Two processes of a real torchrun (gloo, CPU) against one: the same run, written once; and bad input, said once."""
import json, os, subprocess, sys

import pytest
import safetensors.torch
import torch

import eval as evaluation, port, train
from bases import Item
from runtime import distributed, files, run_folder

SIZES, LORA = dict(d_z=8, d_e=4, hidden=16, d_c=12), dict(epochs=2, batch_size=2, lr=1e-3, least=1, max_tokens=200)
TRAIN = "--bases ./base-a,./base-b --data data --n 9 --epochs 2 --batch-size 2 --max-tokens 60 --run".split()
PORT = "--to ./base-c --n 9 --epochs 2 --batch-size 2 --max-tokens 60 --run".split()
EVAL = "--bases base-c --eval-rows 4 --methods lora,cross_lora,portal --run".split()

COMMANDS = f"""
import eval as evaluation, port, train
from reports import table
from runtime import distributed, files, flags, run_folder
table.plot = lambda path, *_: path.touch()                     # slow, and not the point
train.REAL["sizes"], train.REAL["lora"] = {SIZES}, {LORA}
def main():
    try:
        train.main({TRAIN + ["bad", "--lr", "1e38"]})
    except files.BadInput as error:                            # in both; else one would wait for ever
        open(f"process {{distributed.RANK}}", "w").write(str(error))
    train.main({TRAIN + ["two"]})
    run_folder.LOCKS.close()                                        # as the end of a command does
    distributed.barrier()
    port.main({PORT + ["two"]})
    run_folder.LOCKS.close()
    distributed.barrier()
    evaluation.main({EVAL + ["two"]})
flags.run_main(main)
"""

# Process 1 alone meets a problem while the other waits for it in a sum; both meet the same one.
ONE_FAILS ="""
from runtime import distributed, files, flags, run_folder
def main():
    if distributed.RANK == 1:
        raise files.BadInput("only process 1 knows")
    distributed.barrier()
flags.run_main(main)
"""
BOTH_FAIL ="""
from runtime import distributed, files, flags, run_folder
flags.run_main(lambda: flags.parse("", "n", ["--n", "0"]))
"""


def torchrun(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(files.ROOT)}
    return subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, timeout=240, env=env)


def errors(done):
    """What our own processes said."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def tensors(run):
    return {(str(path.relative_to(run)), name): tensor for path in run.rglob("*.safetensors")
            for name, tensor in safetensors.torch.load_file(path).items()}


def rows(path):
    """The lines of a .jsonl file, but for what a clock or a memory gauge said."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s", "peak_memory", "date", "fitted")}
            for line in path.read_text().splitlines()]


def test_two_processes_make_the_run_that_one_makes(world, monkeypatch):
    """Training on two bases, a port, LoRAs and every number of the evaluation; one task is of completions."""
    (world / "data" / "say").mkdir()
    for split in ("train", "eval"):
        (world / "data" / "say" / f"{split}.jsonl").write_text("".join(
            json.dumps({"task": "say", "prompt": f"w{i} w{2 * i}", "completion": f" w{i + 1}" * (1 + i % 3)}) + "\n"
            for i in range(7)))
    (world / "commands.py").write_text(COMMANDS)
    done = torchrun(world / "commands.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; saved to") == 2 and not errors(done)                 # trained and ported, said once each
    refused = [(world / f"process {rank}").read_text() for rank in (0, 1)]
    assert "loss is not finite on base" in refused[0] and refused[0] == refused[1] and not (world / "bad").exists()

    monkeypatch.setitem(train.REAL, "sizes", SIZES), monkeypatch.setitem(train.REAL, "lora", LORA)
    for main, argv in ((train.main, [*TRAIN, "one"]), (port.main, [*PORT, "one"]),
                       (evaluation.main, [*EVAL, "one"])):
        with run_folder.LOCKS:                                                              # as run_main does
            main(argv)
    one, two = world / "one", world / "two"
    assert {str(p.relative_to(two)) for p in two.rglob("*")} == {str(p.relative_to(one)) for p in one.rglob("*")}
    assert not [p for p in world.iterdir() if p.name.startswith(".") and p.suffix != ".lock"]  # nothing half written
    got, want = tensors(two), tensors(one)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda text: f"{key}: {text}")
    assert want["converters/base-c.safetensors", "P_out.q"].abs().max() > 1e-3       # from zero: 100 times what may differ
    for name in ("log.jsonl", "results.jsonl"):
        assert rows(two / name) == [{k: pytest.approx(v, rel=1e-4) if isinstance(v, float) or k in ("delta_ratio", "shared", "task_rank") else v
                                     for k, v in row.items()}
                                    for row in rows(one / name)]


@pytest.mark.parametrize("script, said", [(ONE_FAILS, "only process 1 knows"), (BOTH_FAIL, "'0' is not accepted")])
def test_bad_input_of_one_process_or_of_both_is_one_line(tmp_path, script, said):
    """torchrun then adds a report and a traceback of its own, and exits with 1."""
    (tmp_path / "fails.py").write_text(script)
    done = torchrun(tmp_path / "fails.py")
    assert done.returncode == 1 and len(errors(done)) == 1 and said in errors(done)[0] and done.stdout == ""
    assert "exitcode  : 2" in done.stderr and "fails.py\", line" not in done.stderr  # no traceback of ours


def test_rows_are_dealt_out_evenly_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 3)
    items = [Item(0, [0] * n, [[0]], None) for n in (3, 100, 40, 30, 30, 1, 2, 90, 9)]
    hands = distributed.split_evenly(items)
    assert sorted(id(item) for hand in hands for item in hand) == sorted(map(id, items))
    loads = [sum(item.length() for item in hand) for hand in hands]
    assert max(loads) - min(loads) <= 10 and sum(loads) == 305
    assert [len(hand) for hand in distributed.split_evenly(items[:2])] == [1, 1, 0]                 # fewer rows than processes
