"""A dry run: the rounds a fit starts with, and nothing written."""
import itertools
from types import SimpleNamespace

from conftest import TRAIN, command, fingerprint, write_task

import port, train
from runtime import job
from tasks.rows import load_tasks, sample


def test_a_dry_run_rehearses_the_fit_and_writes_nothing(world, capsys, monkeypatch):
    batches, task_gradients = [], train.task_gradients
    def spy(base, adapters, items, max_tokens):
        if base.name == "base-a":
            batches.append({})
        batches[-1][base.name] = [(item.row.prompt, item.length()) for item in items]
        return task_gradients(base, adapters, items, max_tokens)
    monkeypatch.setattr(train, "task_gradients", spy)
    before = fingerprint(world)
    with monkeypatch.context() as patch:                                             # a clock that ticks at every look
        patch.setattr(job, "time", SimpleNamespace(time=itertools.count().__next__))
        assert command(train, *TRAIN, "--dry-run") == 0
    assert fingerprint(world) == before and not (world / "out").exists()
    # 7 rows of the largest task are left to fit on, 4 rounds; a tick a round, and one to score what both bases hold out
    said = "8 rounds of 1.00 s and 2 evaluations of 1.0 s on held-out rows, 0:00:10 in all; peak memory"
    assert said in capsys.readouterr().out
    dry, longest = batches[:], 0
    for splits in load_tasks(world / "data").values():
        rows = sample(splits["train"], 8, 0)[0]
        longest += sum(sorted(len(r.prompt.split()) + len(r.choices[r.gold].split()) - 1 for r in rows)[-2:])
    assert all(sum(length for _, length in own) == longest for own in dry[0].values())
    batches.clear()
    assert command(train, *TRAIN) == 0
    assert len(dry) == 4 and dry[1:] == batches[:3]                                  # then the rounds the fit starts with

    write_task(world / "aside", "four")
    before = fingerprint(world)
    ports = "--to", "./base-c,./base-b", "--n", "2,8"
    for lines, *argv in ((1, train, *TRAIN), (4, port, *ports), (1, train, "--add-task", "aside/four")):
        capsys.readouterr()
        assert command(*argv, "--dry-run") == 0                                      # what is there already is no error
        assert capsys.readouterr().out.count("nothing was written") == lines
    assert fingerprint(world) == before
