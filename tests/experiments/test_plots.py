"""A training log as a plot."""
import re

from matplotlib.figure import Figure
from conftest import command

from experiments import plots
from runtime.files import append_jsonl, write_json

def test_a_log_becomes_a_plot_of_its_numbers(tmp_path, monkeypatch, capsys):
    def epoch(what, number, loss, acc):
        append_jsonl(tmp_path / "log.jsonl", dict(event="epoch", what=what, epoch=number, loss=loss, held_acc_norm=acc))
    epoch("train", 1, 2.0, 0.25), epoch("train", 2, 1.0, 0.5), epoch("train", 3, 0.5, 0.25)
    epoch("port a", 1, 9.0, 0.0), epoch("port a", 2, 8.0, 0.0)
    append_jsonl(tmp_path / "log.jsonl", dict(event="something else"))
    epoch("train", 3, 0.25, 1.0)                                                     # epoch 3 again, after a kill
    epoch("port a", 1, 4.0, None)                                                    # refitted, with nothing held out
    drawn, savefig = [], Figure.savefig
    def spy(figure, *args, **kwargs):
        drawn.extend({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes)
        return savefig(figure, *args, **kwargs)
    monkeypatch.setattr(Figure, "savefig", spy)
    write_json(tmp_path / "portal.json", {})
    assert command(plots, "--run", tmp_path) == 0
    assert drawn == [{"train": [[1, 2.0], [2, 1.0], [3, 0.25]], "port a": [[1, 4.0]]},
                     {"train": [[1, 0.25], [2, 0.5], [3, 1.0]], "port a": []}]
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.jsonl").write_text('{"event": "epoch"}\n')
    capsys.readouterr()
    assert command(plots, "--run", tmp_path) == 2
    (tmp_path / "log.jsonl").unlink()
    assert command(plots, "--run", tmp_path) == 2
    assert re.search(r"log.jsonl:1: not a row.*\n.*log.jsonl: not readable", capsys.readouterr().err)
