"""experiments/presets.py on a tiny base: which rows and parameters a cell uses, and what the table calls a cell that fails."""
import functools, json

import torch
from conftest import tiny_base, tiny_tokenizer

from bases import load_base
from experiments import presets


def write(folder, n):
    """A task of n training rows, no two alike."""
    (folder / "one").mkdir()
    rows = [dict(task="one", prompt=f"w{i % 50} w{i // 50}", choices=[" w1", " w2 w3"], gold_idx=i % 2) for i in range(n)]
    for split, own in (("train", rows), ("eval", rows[:2])):
        (folder / "one" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def test_held_out_rows_are_the_same_for_every_n_and_never_trained_on(tmp_path):
    write(tmp_path, 60)
    few, many = (presets.rows_of(tmp_path, ["one"], n)["one"] for n in (8, 999))
    assert few[1] == many[1] and len(few[1]) == presets.HELD and (len(few[0]), len(many[0])) == (8, 60 - presets.HELD)
    assert few[0] == many[0][:8] and not {row.prompt for row in many[0]} & {row.prompt for row in many[1]}


def test_a_port_and_a_latent_leave_the_rest_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "Config", functools.partial(presets.Config, hidden=32, d_c=32))
    write(tmp_path, 40)
    base, other = tiny_base(), tiny_base("llama", name="other")
    rows = presets.rows_of(tmp_path, ["one"], 8)
    source, *_ = presets.measure("source", base, None, rows, 0.03)
    assert source.core.head_B["q"].weight.any()
    port, lines, _ = presets.measure("port", other, source, rows, 0.3)
    assert len(lines) == presets.EPOCHS and list(port.converters) == ["other"]
    latent, *_ = presets.measure("latent", base, source, rows, 0.03)
    assert not torch.equal(latent.z, source.z) and torch.equal(port.z, source.z)
    for portal in (port, latent):
        assert all(torch.equal(p, q) for p, q in zip(portal.core.parameters(), source.core.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(latent.converters["tiny"].parameters(), source.converters["tiny"].parameters()))
    line = presets.line_of("port", other, 0.3, (port, lines, 1.5))
    assert (line["base"], line["lr"], line["bare"]) == ("other", 0.3, 1.5)
    assert len(line["losses"]) == len(line["ratios"]) == presets.EPOCHS


def test_a_random_base_has_the_width_and_the_tokenizer_asked_for(tmp_path):
    base = load_base(presets.random_base(64, tiny_tokenizer(), tmp_path))
    assert (base.name, len(base.blocks), base.groups["q"].d_in) == ("random-64", 4, 64)
    assert base.tokenizer("w1 w2").input_ids == tiny_tokenizer()("w1 w2").input_ids


def test_the_table_marks_what_does_not_hold():
    def cells(n, losses, ends):
        line = dict(kind="port", base="b", tasks="toy", n=n, bare=3.0, ratios=[0.1] * 3, accs=[1.0] * 3, commit="c", hardware="h")
        return [dict(line, lr=presets.preset_lr("port", n) * f, losses=losses if f == 1 else [9.0, 9.0, end])
                for f, end in zip((1 / 9, 1 / 3, 1, 3, 9), ends)]
    good = cells(8, [4.0, 2.0, 1.0], [2.0, 1.5, None, 0.95, 5.0])
    above, far = cells(16, [1.0, 3.1, 1.0], [2.0] * 5), cells(64, [1.0, 1.0, 1.0], [2.0, 2.0, None, 0.8, 5.0])
    lines = presets.table([*good, *above, *far, *good[:3][::-1]]).splitlines()[-3:]
    ends = [line.split(" | ")[-2:] for line in lines]
    assert ends == [["yes", "-0.05 |"], ["**no**", "0.00 |"], ["yes", "**-0.20** |"]]
    assert "0.067: 2.00, 0.2: 1.50, 0.6: 1.00, 1.8: 0.95, 5.4: 5.00" in lines[0]
    assert presets.table(good[2:]).splitlines()[-1].endswith("| yes | - |")          # too few rates to be called best
    assert presets.table([*far, *good[:1]]).splitlines()[-1].endswith("| 3.00 | - | - | 0.067: 2.00 | - | - | - |")
