"""A run on disk and back; files that are malformed; which run; a folder replaced as a whole."""
import errno, os, pathlib

import pytest
import torch
from conftest import command, one_line, tiny_base
from helpers import make_portal

import eval as evaluation
from portal import MODULES
from runtime import run_folder
from runtime.files import BadInput, write_json
from runtime.saved import load_config, load_portal, save_portal, save_tensors


def test_a_saved_run_loads_back_equal(tmp_path):
    base = tiny_base(name="base-1.7b")  # a dot in the name must survive
    portal = make_portal(base, modules=MODULES)
    write_json(tmp_path / "portal.json", {"config": vars(portal.cfg), "bases": [], "seed": 0, "data": ""})
    save_portal(tmp_path, portal)
    loaded = load_portal(tmp_path, ["base-1.7b"])
    assert list(loaded.converters) == ["base-1.7b"] and vars(loaded.cfg) == vars(portal.cfg)
    def tensors(p):
        return [p.z, *p.core.state_dict().values(), *p.converters[base.name].state_dict().values()]
    assert all(torch.equal(got, want) for got, want in zip(tensors(loaded), tensors(portal), strict=True))
    for got, want in zip(loaded.adapters(base.name).tensors(), portal.adapters(base.name).tensors(), strict=True):
        torch.testing.assert_close(got, want)
    assert not list(tmp_path.rglob(".*"))  # nothing temporary stays behind


@pytest.mark.parametrize("name", ["core.safetensors", "latents.safetensors", "converters/tiny.safetensors"])
def test_a_truncated_or_foreign_file_is_named(tmp_path, name):
    portal = make_portal(tiny_base())
    write_json(tmp_path / "portal.json", {"config": vars(portal.cfg), "bases": [], "seed": 0, "data": ""})
    save_portal(tmp_path, portal)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=f"{path.name}.*not a whole safetensors"):
        load_portal(tmp_path, ["tiny"])
    save_tensors(path, {"something": torch.zeros(2)})
    with pytest.raises(BadInput, match=f"{path.name}.*do not fit"):
        load_portal(tmp_path, ["tiny"])


@pytest.mark.parametrize("change", [{"config": {"tasks": ["../../elsewhere"]}}, {"bases": [{"base": "a/../../b"}]}])
def test_names_in_portal_json_cannot_lead_out_of_the_run(tmp_path, change):
    saved = {"config": {"tasks": ["one"]}, "bases": [{"base": "tiny"}], "seed": 0, "data": "data"}
    write_json(tmp_path / "portal.json", saved)
    assert load_config(tmp_path)[1].tasks == ["one"]
    write_json(tmp_path / "portal.json", {**saved, **change})
    with pytest.raises(BadInput, match="is no name of a task or a base"):
        load_config(tmp_path)


def test_a_swap_of_folders_that_fails_half_way_restores_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir(), (tmp_path / "run" / "old").touch()
    rename = pathlib.Path.rename
    def fails_on_new(self, target):
        if ".new" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)
    monkeypatch.setattr(pathlib.Path, "rename", fails_on_new)
    with pytest.raises(KeyboardInterrupt), run_folder.new_folder(tmp_path / "run") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["old"]


def test_no_run_yet(world, capsys):
    assert command(evaluation) == 2
    one_line(capsys, ["no run in out", "train.py"])


def test_the_newest_run_is_the_one_used(world, capsys):
    for name, date in (("older", "2026-01-01T00:00:00Z"), ("newer", "2026-02-01T00:00:00Z")):
        write_json(world / "out" / name / "portal.json", {"trained": date})
    assert run_folder.find_run(None) == pathlib.Path("out/newer")


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(lock, **_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(run_folder.filelock.FileLock, "acquire", refuse)
    with run_folder.LOCKS:
        run_folder.lock(tmp_path / "run")
    monkeypatch.setattr(run_folder.filelock.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    with run_folder.LOCKS, pytest.raises(BadInput, match="run: not written .no"):
        run_folder.lock(tmp_path / "run")
