"""The help of each command: every flag, in its group, with the presets' values."""
import re

import pytest
from conftest import command

import eval as evaluation, export, port, train
from runtime import flags

@pytest.mark.parametrize("module", [train, port, evaluation, export])
def test_the_help_has_every_flag_in_its_group_and_the_presets(module, capsys, monkeypatch):
    parts = {train: lambda preset: preset, port: lambda preset: preset["port"], evaluation: lambda preset: preset["lora"]}
    part = parts.get(module)
    if part:
        monkeypatch.setitem(part(train.TOY), "batch_size", 77)
        monkeypatch.setitem(part(train.REAL), "batch_size", 66)
        monkeypatch.setitem(part(train.REAL), "max_tokens", part(train.TOY)["max_tokens"])
    required = ["--to", "a", "--task", "b", "--out", "c"] if module is export else []
    assert command(module, *required, "--nonsense") == 2
    accepted = set(re.findall(r"--[a-z-]+", capsys.readouterr().err.split("accepted:")[1]))
    assert command(module, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python ") and module.__doc__.strip() in text
    title, found = None, {}
    for line in text.split(module.__doc__.strip())[1].splitlines():
        if re.fullmatch(r"[a-z ]+:", line):
            title = line[:-1]
        invocation = re.match(r"  (?:-h, )?(--[a-z-]+)(?: A,B, (--task) )?", line)
        found.update({flag: title for flag in (invocation.groups() if invocation else ()) if flag})
    assert set(found) == accepted
    groups = {"--" + flag: group for group, flags in flags.FLAGS.items() for flag in flags}
    groups |= {"--help": "options"} | ({} if module is export else {"--task": groups["--tasks"]})
    assert found == {flag: groups[flag] for flag in found}
    text = " ".join(text.split())
    if part:
        assert "(default: 77 on the toy, else 66)" in text and "padding included (default: 4096)" in text
    if module is train:
        assert "k,v,o,gate,up,down (default: q,v)" in text and "adapters (default: 8)" in text
