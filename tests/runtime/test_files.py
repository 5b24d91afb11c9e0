"""Files written whole or not at all; lines appended whole or not at all."""
import json, os, pathlib, resource

import pytest
import safetensors.torch
import torch

from runtime import files
from runtime.run_folder import new_folder
from runtime.saved import load_tensors, save_tensors
from tasks.rows import read_rows


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.json"
    files.write_json(path, {"a": 1})
    def half(temporary):
        temporary.write_text("{half")
        raise OSError(28, "disk full")
    with pytest.raises(files.BadInput, match="f.json: not written .disk full"):
        files.write_whole(path, half)
    assert os.listdir(tmp_path) == ["f.json"] and json.loads(path.read_text()) == {"a": 1}


def test_a_file_is_as_readable_as_others(tmp_path):
    """safetensors would keep its own for their owner, also in a folder that is filled by others (a merge)."""
    umask = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
        with new_folder(tmp_path / "merged") as new:
            safetensors.torch.save_file({"x": torch.zeros(1)}, new / "model.safetensors")
    finally:
        os.umask(umask)
    for path in (tmp_path / "x.safetensors", tmp_path / "merged" / "model.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("read", [files.read_json, files.read_jsonl, load_tensors, lambda path: read_rows(path, "t")])
def test_why_a_file_cannot_be_read(tmp_path, read):
    pointer, link = tmp_path / "pointer", tmp_path / "link"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(files.BadInput, match="pointer.*a Git LFS pointer, not the file itself: git lfs pull fetches it"):
        read(pointer)
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(files.BadInput, match="link.*a link to .*gone, where nothing is"):
        read(link)


def test_names_that_may_name_files():
    assert all(map(files.plain, ("one", "été", "cost_$5_vs_$10", "a|b", "a b", "日本", ".x", "é" * 100)))
    assert not any(map(files.plain, ("", ".", "..", "a/b", "win\\task", "a\0", "a\nb", "\x7f", "\udcff", "é" * 101, None, 1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_half_a_line_is_cut_off_again(tmp_path):
    path = tmp_path / "f.jsonl"
    files.append_jsonl(path, {"a": 1})
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12, 12))
        try:
            files.append_jsonl(path, {"b": 2})
        except files.BadInput:
            os._exit(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2 and path.read_text() == '{"a": 1}\n'
    with pytest.raises(files.BadInput, match="/dev/full: not written .No space left"):
        files.append_jsonl(pathlib.Path("/dev/full"), {"a": 1})
