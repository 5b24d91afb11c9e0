"""carry_over.py on a small scale: what is held out, what is frozen, what a killed command does not do again."""
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bases import load_base
from experiments import carry_over
from experiments.carry_over import CarryOver
from runtime import files, run_folder
from toy import grid

SMALL = dict(train=dict(n=8, epochs=1, batch_size=4, lr=1e-3), port=dict(n=8, epochs=1, batch_size=4, lr=1e-3),
             add=dict(n=8, epochs=1, batch_size=4, lr=1e-2), lora=dict(n=8, epochs=1, batch_size=4, lr=1e-3),
             sizes=dict(d_z=8, hidden=16, d_c=12), eval_rows=5)


def test_no_held_out_task_is_in_training_and_all_its_parts_are():
    held = [grid.SKILLS[task] for task in carry_over.HELD_OUT]
    rest = [grid.SKILLS[task] for task in carry_over.REST]
    assert len(set(held)) == 16 and len(set(rest)) == 80 and not set(held) & set(rest)
    for name, kind in held:
        assert sum(n == name for n, _ in rest) >= 6 and sum(k == kind for _, k in rest) >= 10
    for seed in (0, 1):
        samples = [carry_over.tasks_of(T, seed) for T in (8, 32, 80)]
        assert [len(set(s)) for s in samples] == [8, 32, 80]
        assert samples[0] == samples[2][:8] and samples[1] == samples[2][:32]
        assert not set(samples[2]) & set(carry_over.HELD_OUT)
    assert carry_over.tasks_of(8, 0) != carry_over.tasks_of(8, 1)


@pytest.fixture
def few(monkeypatch):
    for name, value in dict(SETTINGS=SMALL, SWEEP=[(4, "noise .1")], CHOICE=4, commit=lambda: "",
                            HELD_OUT=carry_over.HELD_OUT[:2]).items():
        monkeypatch.setattr(carry_over, name, value)


def bases():
    return [load_base(str(grid.FOLDER / name)) for name in (*grid.SOURCES, grid.TARGET)]


def test_nothing_but_the_new_latents_changes(few, tmp_path):
    run = CarryOver(tmp_path, bases(), 0)
    portal, _ = run.carrier(4, "noise .1")
    everything = [portal.z, *portal.core.parameters(), *(p for c in portal.converters.values() for p in c.parameters())]
    before = [p.clone() for p in everything]
    z = run.add("new", portal, carry_over.HELD_OUT, run.bases[:2])
    assert z.shape == (2, 8) and all(torch.equal(p, b) for p, b in zip(everything, before))
    assert (z - portal.z.mean(0)).norm(dim=1).min() > 0 and len(portal.z) == 4 and set(portal.converters) == set(grid.BASES)


def test_noise_is_for_learning_alone(few, tmp_path):
    portal, _ = CarryOver(tmp_path, bases()[1:], 0).carrier(4, "")
    plain, generate = portal.adapters(grid.TARGET).tensors(), carry_over.around(portal, 0.1, 0.0)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(plain, generate(grid.TARGET).tensors()))
    portal.z = nn.Parameter(portal.z.detach())
    other = generate(grid.TARGET).tensors()
    assert any(not torch.equal(a, b) for a, b in zip(plain, other))
    sum(a.square().sum() for a in other).backward()
    assert portal.z.grad.abs().sum() > 0                                             # of the latent, not of a copy


def test_interpolated_latents_lie_between_two():
    """Each where a share of the way, at most .3, leads from its own latent to some task's."""
    class Plain(SimpleNamespace):
        def adapters(self, base):
            return self.z
    made = Plain(z=nn.Parameter(torch.randn(6, 4)))
    z, found = made.z, carry_over.around(made, 0.0, 0.3)("any")
    moved = 0
    for t in range(6):
        ways = z - z[t]                                                              # [T, d_z]
        share = ((found[t] - z[t]) * ways).sum(1) / ways.square().sum(1).clamp(min=1e-9)
        left = (found[t] - z[t] - share[:, None] * ways).norm(dim=1)
        k = int(left.argmin())
        assert left[k] < 1e-5 and 0 <= share[k] <= 0.3
        moved += bool(share[k] > 0)
    assert moved >= 3
    with torch.no_grad():
        assert torch.equal(carry_over.around(made, 0.0, 0.3)("any"), z)


def command(*argv):
    with run_folder.LOCKS:
        carry_over.main([*map(str, argv)])


def lines(out):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}, sort_keys=True) for row in rows)


def test_a_killed_experiment_goes_on_and_does_nothing_twice(few, tmp_path, monkeypatch):
    fits, plain = [], carry_over.fit

    def counted(job, *args):
        fits.append(job.what)
        if len(fits) == killed_at:
            raise RuntimeError("killed")
        return plain(job, *args)

    monkeypatch.setattr(carry_over, "fit", counted)
    killed_at = None
    command("--out", tmp_path / "whole", "--seeds", "1")
    undisturbed, fits[:], killed_at = list(fits), [], 5
    assert len(set(undisturbed)) == 3 + 5                                            # LoRAs; train, port, add three times
    with pytest.raises(RuntimeError, match="killed"):
        command("--out", tmp_path / "parts", "--seeds", "1")
    killed_at = None
    command("--out", tmp_path / "parts", "--seeds", "1")
    assert fits == undisturbed[:5] + undisturbed[4:]                                 # the one that was cut once more
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    rows = [json.loads(line) for line in lines(tmp_path / "whole")]
    assert len(rows) == 3 * (2 + 2 + 5 * 2 + 16)                                     # a line a base, variant and task
    assert {row["role"] for row in rows if row["base"] == grid.TARGET} == {"unseen"}
    command("--out", tmp_path / "parts", "--seeds", "1")                      # a third time: nothing left to do
    assert len(fits) == 9 and lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_other_settings_need_another_folder(few, tmp_path, capsys, monkeypatch):
    (tmp_path / "settings.json").write_text(json.dumps({**SMALL, "eval_rows": 6}))
    with pytest.raises(files.BadInput, match="other settings"):
        command("--out", tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
