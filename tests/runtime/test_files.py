"""Files written whole or not at all; lines appended whole or not at all."""
import json, os, pathlib, resource

import pytest
import torch

from runtime import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.json"
    files.write_json(path, {"a": 1})
    def half(temporary):
        temporary.write_text("{half")
        raise OSError(28, "disk full")
    with pytest.raises(files.BadInput, match="f.json: not written .disk full"):
        files.write_whole(path, half)
    assert os.listdir(tmp_path) == ["f.json"] and json.loads(path.read_text()) == {"a": 1}


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
