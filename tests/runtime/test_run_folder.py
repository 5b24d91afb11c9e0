"""A run on disk and back; files that are malformed; which run; a folder replaced as a whole."""
import errno, os, pathlib

import pytest
import torch
from conftest import command, fingerprint, one_line, tiny_base
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


def test_a_new_folder_takes_the_place_of_our_files_alone(tmp_path, monkeypatch):
    """Also where the folder cannot be renamed: a mount point. A folder of somebody's stays, and so does a file of theirs
    that has the name of one of ours, with all the rest."""
    run = tmp_path / "run"
    for name in ("portal.json", "converters/old.json", "converters/mine.txt", "final/core.safetensors", ".git/HEAD", ".git/.x.json.7"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("old")
    rename = pathlib.Path.rename
    def refuse(self, target):
        if run in (self, pathlib.Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    def write(*names):
        with run_folder.new_folder(run) as new:
            for name in names:
                (new / name).parent.mkdir(exist_ok=True), (new / name).write_text("new")
    before = fingerprint(run)
    with pytest.raises(BadInput, match="converters/mine.txt is in the way, and no command of ours wrote it"):
        write("portal.json", "converters/mine.txt")
    with pytest.raises(KeyboardInterrupt), run_folder.new_folder(run) as new:
        (new / "portal.json").touch()
        raise KeyboardInterrupt
    assert fingerprint(run) == before
    write("portal.json", "converters/new.json")
    found = {name: (run / name).read_text() for name in fingerprint(run)}
    assert found == {"portal.json": "new", "converters/new.json": "new", "converters/mine.txt": "old", ".git/HEAD": "old",
                     ".git/.x.json.7": "old"} and not (run / "final").exists()


def test_leftovers_are_of_an_exact_form_and_a_dead_process(tmp_path, monkeypatch):
    """Beside a run whose name is a pattern: what other runs and people have there, and a live process, stays."""
    run, me = tmp_path / "exp[1]", os.getpid()
    kept = [".exp[1].new2.part/train.safetensors", ".exp[1].new2.lock", ".exp1.new999999/x", f".exp[1].new{me}/x", "exp[1]/.notes.2",
            "exp[1]/.git/.x.tmp999999", "exp[1]/.notes.md.tmp999999", "exp[1]/mine/.core.safetensors.tmp999999", "exp[1]/.new2/x", f"exp[1]/.core.safetensors.tmp{me}", "exp[1]/portal.json", ".exp[1].new999999.tar"]
    gone = [".exp[1].new999999/x", "exp[1]/.core.safetensors.tmp999999", "exp[1]/.portal-new999999/portal.json",
            "exp[1]/final/converters/.a.json.tmp999999", ".exp[1].part/.log.jsonl.tmp999999"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with run_folder.LOCKS:
        run_folder.lock(run)
    assert sorted(fingerprint(tmp_path)) == sorted([*kept, ".exp[1].lock"])
    (tmp_path / ".f.json.tmp999999").touch(), (tmp_path / ".g.json.tmp999999").touch()
    write_json(tmp_path / "f.json", 1)                                               # the next write of the same file
    assert (tmp_path / ".g.json.tmp999999").exists() and not (tmp_path / ".f.json.tmp999999").exists()


def test_what_cannot_be_written_is_refused_before(tmp_path, monkeypatch):
    """A folder, and a file that is appended to; as root, permissions stop nothing, so that the calls refuse here."""
    (tmp_path / "run" / "converters").mkdir(parents=True), (tmp_path / "run" / "log.jsonl").touch()
    def fails(words):
        with run_folder.LOCKS, pytest.raises(BadInput, match=words):
            run_folder.lock(tmp_path / "run")
    def temporary(dir):
        if dir.name == "converters":
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return open(os.devnull)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.tempfile, "TemporaryFile", temporary)
        fails("run: cannot be written .Permission denied: .*converters.; make it writable, or copy it")
    (tmp_path / "run" / "log.jsonl").unlink(), (tmp_path / "run" / "log.jsonl").mkdir()
    fails("run: cannot be written .Is a directory: .*log.jsonl")
    (tmp_path / "disk" / "lost+found").mkdir(parents=True), (tmp_path / "disk" / ".lock").touch()
    assert not run_folder.occupied(tmp_path / "disk") and run_folder.occupied(tmp_path / "run")
    (tmp_path / "link").symlink_to("nowhere")
    assert run_folder.occupied(tmp_path / "link")


def test_equally_new_runs_are_ambiguous(world):
    for name, date in (("a", "2026-01-01"), ("b", "2026-02-01"), ("copy of b", "2026-02-01")):
        write_json(world / "out" / name / "portal.json", {"trained": date})
    with pytest.raises(BadInput, match="out/b, out/copy of b are equally new .copies..; --run DIR names one"):
        run_folder.find_run(None)


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
