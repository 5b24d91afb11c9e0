"""The help of each command: every flag, in its group, with the presets' values."""
import os, pathlib, re, subprocess, sys

import pytest
from conftest import command, write_task

import eval as evaluation, export, port, train
from runtime import flags
from runtime.files import ROOT
from tasks.rows import load_tasks

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


def test_any_locale_and_a_reader_that_leaves(tmp_path):
    """As processes: a task named é where the locale is ASCII, and a pipe that is closed before the first line."""
    write_task(tmp_path, "\u00e9")
    check = [sys.executable, str(ROOT / "data.py"), "--check", str(tmp_path)]
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(check, env=ascii_alone, capture_output=True)
    assert done.returncode == 0 and "\u00e9: choices, train 12, eval 6".encode() in done.stdout, done.stderr
    process = subprocess.Popen(check, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_everyday_is_the_folder_that_comes_with_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "everyday").mkdir()
    assert len(load_tasks(flags.parse("", "data", ["--data", "everyday"]).data)) == 16
    assert flags.parse("", "data", ["--data", "./everyday"]).data == pathlib.Path("everyday")
