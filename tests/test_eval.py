"""A run with completions from training to results; --show; the table."""
import json, shutil

import pytest
from matplotlib.figure import Figure
from conftest import command, edit, fingerprint, one_line

import eval as evaluation, train
from bases import encode, load_base
from eval import adapters_of
from reports.results import plot, read_results, unpack
from reports.table import write_results
from runtime.files import BadInput, append_jsonl, read_jsonl, write_json
from score import score
from tasks.rows import load_tasks

@pytest.fixture
def opened(world, monkeypatch):
    """A trained run with a task of choices, "one", and one of completions, "say"; -> its folder."""
    monkeypatch.setitem(train.REAL, "sizes", dict(d_z=8, d_e=4, hidden=16, d_c=12))
    monkeypatch.setitem(train.REAL, "lora", dict(epochs=1, batch_size=2, lr=1e-3, least=1, max_tokens=200))
    for split, n in (("train", 6), ("eval", 4)):
        rows = [{"task": "say", "prompt": f"w{i} w{n}", "completion": f" w{i + 7} w{i}"} for i in range(n)]
        (world / "data" / "say").mkdir(exist_ok=True)
        (world / "data" / "say" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--bases ./base-a --data data --tasks one,say --epochs 1 --batch-size 2 --lr 0.1 --run r"
    assert command(train, *flags.split()) == 0
    return world / "r"


def test_a_run_with_completions_end_to_end(opened, capsys):
    before = fingerprint(opened)
    assert command(evaluation, "--run", opened, "--show", "2") == 0
    assert fingerprint(opened) == before                                             # nothing fitted, nothing written
    out = capsys.readouterr().out
    base, tasks = load_base("./base-a"), ["one", "say"]
    adapters = adapters_of(opened, "portal", "base-a", base)
    rows = [row for task, splits in load_tasks(opened.parent / "data", tasks).items() for row in splits["eval"]]
    shown = [row for row in rows if f"base-a, {row.task}:\n    {row.prompt}\n" in out]
    assert [row.task for row in shown] == ["one"] * 2 + ["say"] * 2
    for item in encode(base.tokenizer, shown, tasks)[0]:
        block = out.split(f"{item.row.task}:\n    {item.row.prompt}\n")[1].split("\n\n")[0]
        if item.row.open:
            for what, with_ in (("before", None), ("after ", adapters)):
                text = base.generate([item.prompt], with_, [item.task], 16)[0].strip()
                assert f"  {what} {text!r}" in block
            assert f"  gold   {item.row.choices[0].strip()!r}" in block
        else:
            pairs = zip(*(score(base, a, [item], 100)[0] for a in (None, adapters)))
            for k, (choice, pair) in enumerate(zip(item.row.choices, pairs)):
                numbers = " ".join(f"{lp / len(choice):8.3f}" for lp in pair)
                assert pair[0] != pair[1]
                assert f"{'*' if k == item.row.gold else ' '} {numbers}  {choice!r}" in block
    assert command(evaluation, "--run", opened, "--task", "say", "--show", "1") == 0
    out = capsys.readouterr().out
    assert out.count("base-a, say:") == 1 and "base-a, one:" not in out

    assert command(evaluation, "--run", opened) == 0
    found = [json.loads(line) for line in (opened / "results.jsonl").read_text().splitlines()]
    contract = {"method", "base", "role", "task", "seed", "n", "select", "acc_norm", "log_loss", "rows", "seconds", "correct",
                "measured_on", "fitted"}
    assert {(row["task"], row["method"]) for row in found} == {(t, m) for t in tasks for m in ("base", "lora", "portal")}
    for row in found:
        assert set(row) == contract | {"metric" if row["task"] == "say" else "acc_norm_harness"}
        assert sum(unpack(row["correct"], row["rows"])) / row["rows"] == row["acc_norm"]
    assert "Exact match of the decoded text is reported as acc_norm in say." in (opened / "results.md").read_text()


def test_the_table_takes_the_last_row_of_a_cell(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.table.plot", plot)                                          # as it is
    write_json(tmp_path / "portal.json", {"bases": [{"base": "a"}]})
    def row(method, task, acc, n=10):
        for select in ("best", "final"):
            append_jsonl(tmp_path / "results.jsonl", dict(method=method, base="a", role="seen", task=task, seed=0, n=n,
                                                          select=select, acc_norm=acc, log_loss=1.0, rows=5, seconds=0.1))
    for task, base, lora, portal in (("one", 0.2, 0.9, 0.1), ("two", 0.4, 0.7, 0.6)):
        row("base", task, base, n=0), row("lora", task, lora), row("portal", task, portal)
    row("portal", "one", 0.8)
    assert read_results(tmp_path)["a", 10, "portal", "best"]["one"]["acc_norm"] == 0.8
    write_results(tmp_path, ["one", "two"])
    text = (tmp_path / "results.md").read_text()
    assert "| a | seen | 10 | portal | 0.700 | 0.700 | 1.000 | 80% | 88% |" in text  # (.7 - .3) / (.8 - .3), .7 / .8
    assert "| one | 0.200 | 0.900 | 0.800 |" in text and (tmp_path / "a-n10.png").stat().st_size > 1000


def test_any_methods_make_a_table(tmp_path):
    write_json(tmp_path / "portal.json", {"bases": [{"base": "a"}]})
    def table(*rows):
        (tmp_path / "results.jsonl").unlink(missing_ok=True)
        append_jsonl(tmp_path / "results.jsonl", *(dict(
            method=method, base=base, role="seen", task=task, seed=0, n=0 if method == "base" else 10, select=select,
            acc_norm=0.4, log_loss=1.0, rows=5, **({"measured_on": digest} if digest else {}))
            for base, method, task, digest in rows for select in ("best", "final")))
        write_results(tmp_path, ["one"])
        return (tmp_path / "results.md").read_text()
    share = "0.400 | 0.400 | 1.000 | -"
    text = table(("a", "base", "one", "x"), ("a", "portal", "one", "x"))
    assert f"| a | seen | - | base | {share} | - |\n| a | seen | 10 | portal | {share} | - |" in text
    assert f"without lora: `python eval.py --run {tmp_path} --bases a --methods lora` measures" in text
    text = table(("a", "portal", "one", "x"), ("b", "base", "one", "x"))              # two bases, neither with any other
    assert f"| 10 | portal | {share} | - |" in text and f"| b | unseen | - | base | {share} | - |" in text
    assert "--bases a --methods base,lora`" in text and "--bases b --methods lora`" in text
    text = table(("a", "lora", "one", "x"), ("a", "portal", "one", "x"))
    assert f"| portal | {share} | 100% |" in text and "no lift without base:" in text
    assert "python eval.py" not in table(*(("a", m, "one", "x") for m in ("base", "lora", "portal")))
    assert "python eval.py" not in table(("a", "base", "one", "x"), ("a", "lora", "one", None), ("a", "portal", "one", None))
    text = table(("a", "base", "one", "x"), ("a", "lora", "one", "x"), ("a", "portal", "one", "y"))
    assert "| portal |" not in text and "without one, on which" in text and "--methods base,lora,portal` measures all" in text


def test_what_was_fitted_again_since_is_left_out(tmp_path):
    """A port, a LoRA, and the latent of a task that was added later; a sweep's converter has its n in its name."""
    write_json(tmp_path / "portal.json", {"added": {"two": {"date": "z1"}}})
    for name, date in (("converters/a", "c1"), ("converters/a@5", "c5"), ("baselines/lora/a", "l1"), ("baselines/copy/a", None)):
        write_json(tmp_path / f"{name}.json", {"date": date})
    rows = [("portal", "one", 10, "c1", True), ("portal", "one", 5, "c5", True), ("portal", "one", 4, "c0", False), ("lora", "one", 10, "l1", True),
            ("lora", "two", 10, "l0", False), ("portal", "two", 10, "c1, z1", True), ("portal", "two", 5, "c5, z0", False), ("copy", "one", 10, None, True),
            ("base", "one", 0, None, True), ("random", "one", 10, "gone", True)]
    append_jsonl(tmp_path / "results.jsonl", *(dict(method=m, base="a", task=task, n=n, select="best", acc_norm=0.5, log_loss=1.0, rows=2, fitted=fitted)
                                               for m, task, n, fitted, _ in rows))
    found = {(m, task, n) for (_, n, m, _), tasks in read_results(tmp_path).items() for task in tasks}
    assert found == {(m, task, n) for m, task, n, _, kept in rows if kept}


def test_a_lora_of_another_base_or_quantisation_is_no_same_fit():
    now = dict(id="x", revision=None, n=8, seed=0, data="d", fingerprint={"weights": "1"}, rows={"one": "2"}, quantize="4bit")
    old = {k: v for k, v in now.items() if k not in ("fingerprint", "rows", "quantize")}
    assert evaluation.same_fit(now, now) and evaluation.same_fit(old, now) and evaluation.same_fit(now, {**now, "rows": None})
    for known in (now, {**now, "id": "y", "revision": "r", "data": "e"}):            # moved, with the same files and rows
        assert evaluation.same_fit(known, now)
    for key, value in dict(id="y", revision="r", data="e").items():                  # an older one does not say which
        assert not evaluation.same_fit({**old, key: value}, now)
    for key, value in dict(n=9, seed=1, fingerprint={"weights": "0"}, rows={"one": "0"}, quantize=None).items():
        assert not evaluation.same_fit({**now, key: value}, now)


def test_rows_edited_in_between_are_noticed(opened, capsys):
    """Of evaluation, by the table; of training, by the fit of a LoRA beside the converter."""
    def run(*argv):
        capsys.readouterr()
        return command(evaluation, "--run", opened, *argv)
    data = opened.parent / "data" / "one"
    assert run("--methods", "base,portal") == 0
    assert "| portal |" in (out := capsys.readouterr().out) and "--methods lora` measures" in out
    edit(data / "eval.jsonl", 1, {"prompt": "w1 w2 w3 w4"})
    assert run("--methods", "portal") == 0
    assert "without one, on which some of these methods" in (opened / "results.md").read_text()
    digests = {(row["method"], row["task"]): row["measured_on"] for row in read_jsonl(opened / "results.jsonl")}
    assert digests["base", "one"] != digests["portal", "one"] and digests["base", "say"] == digests["portal", "say"]
    edit(data / "train.jsonl", 1, {"prompt": "w1 w2 w3 w4"})
    assert run("--methods", "lora") == 2
    one_line(capsys, ["the training rows of one are no longer", "base-a", "--overwrite"])
    path = opened / "converters" / "base-a.json"
    write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "rows"})
    assert run("--methods", "lora") == 0                                             # an older run does not say which
    assert "fitted before" not in capsys.readouterr().out
    assert json.loads((opened / "baselines" / "lora" / "base-a.json").read_text())["fingerprint"]["weights"]


def test_json_has_finite_numbers(tmp_path, opened, capsys):
    for write in (lambda value: write_json(tmp_path / "a.json", value), lambda value: append_jsonl(tmp_path / "a.jsonl", {}, value)):
        with pytest.raises(BadInput, match=r"a.jsonl?: not written: loss.0.b is not finite"):
            write({"loss": [{"b": float("nan"), "c": 1.0}]})
    assert not list(tmp_path.glob("a.json*"))
    assert command(evaluation, "--run", opened, "--methods", "base") == 0
    for line in ('"acc_norm": NaN', '"acc_norm": "high"', '"log_loss": Infinity'):
        path = opened / "results.jsonl"
        before = path.read_text()
        key = line.split(":")[0]
        first, rest = before.split("\n", 1)
        path.write_text("\n".join([first.split(key)[0] + line + "," + first.split(key)[1].split(",", 1)[1], rest]))
        capsys.readouterr()
        assert command(evaluation, "--run", opened, "--methods", "base") == 2
        one_line(capsys, ["results.jsonl:1: not a result row"])
        path.write_text(before)


def test_data_that_moved_and_data_without_training_rows(opened, world, capsys):
    """--data counts for LoRAs, too, guarded by the rows' digests; base and portal, fitted already, need rows of eval alone."""
    for task in ("one", "say"):
        (world / "only" / task).mkdir(parents=True)
        shutil.copy(world / "data" / task / "eval.jsonl", world / "only" / task)
    (world / "data").rename(world / "moved")
    def fails(words, *argv):
        capsys.readouterr()
        assert command(evaluation, "--run", opened, *argv) == 2
        one_line(capsys, words)
    fails(["data: no tasks here, as there is no such folder", "--data DIR"], "--methods", "base")
    assert command(evaluation, "--run", opened, "--methods", "base,portal", "--data", "only") == 0
    fails(["only/one/train.jsonl: not readable: No such file"], "--methods", "lora", "--data", "only")
    assert command(evaluation, "--run", opened, "--methods", "base,lora,portal", "--data", "moved") == 0
    fitted = (opened / "baselines" / "lora" / "base-a.json").read_bytes()
    (world / "moved").rename(world / "again")
    assert command(evaluation, "--run", opened, "--methods", "lora", "--data", "again") == 0
    assert (opened / "baselines" / "lora" / "base-a.json").read_bytes() == fitted
    edit(world / "again" / "one" / "train.jsonl", 1, {"prompt": "w1 w2"})
    fails(["again: the training rows of one are no longer those"], "--methods", "lora", "--data", "again", "--overwrite")


def test_a_plot_is_no_reason_to_lose_a_table(tmp_path, monkeypatch, capsys):
    """Any text is a label as it is; without a plot the table is whole."""
    monkeypatch.setattr("reports.table.plot", plot)
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    names = ["cost_$5_vs_$10", "_a|b", "100% \\frac{", "日本"]
    write_json(tmp_path / "portal.json", {"bases": [{"base": "a$_$"}]})
    append_jsonl(tmp_path / "results.jsonl", *(dict(
        method=method, base="a$_$", task=task, n=0 if method == "base" else 1, seed=0, select=select, acc_norm=0.5, log_loss=1.0, rows=2)
        for method in ("base", "portal") for task in names for select in ("best", "final")))
    labels, real = [], Figure.savefig
    def savefig(figure, *args, **options):
        real(figure, *args, **options)
        labels.extend(label.get_text() for label in figure.axes[0].get_xticklabels())
    monkeypatch.setattr(Figure, "savefig", savefig)
    write_results(tmp_path, names)
    assert labels == names and (tmp_path / "a$_$-n1.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| _a\\|b | 0.500 | 0.500 |" in table and "| cost_$5_vs_$10 | 0.500 |" in table
    (tmp_path / "results.md").unlink()
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    write_results(tmp_path, names)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == table
    assert "a$_$-n1.png: not drawn (division by zero); the table is whole" in capsys.readouterr().out
