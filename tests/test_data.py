"""The JSONL format and its errors, sampling, tokens, and micro-batches."""
import itertools, json, random, re, runpy, shutil

import pytest
from conftest import command, one_line, save_tiny, tiny_tokenizer, write_task
from test_benchmarks import TASKS

import data as data_command, train
from bases import Item, encode
from data import PASS, Cycle, Rounds, collate, micro_batches
from runtime.files import ROOT, BadInput
from runtime.flags import run_main
from runtime.resume import digests_of
from tasks.rows import Row, as_read, load_run_tasks, load_tasks, print_fewer, read_rows, sample

GOOD = {"task": "t", "prompt": "w1 w2", "choices": [" w3", " w4"], "gold_idx": 1}
OPEN = {"task": "t", "prompt": "w1 w2", "completion": " w3 w4"}


@pytest.mark.parametrize("line, why", [
    ("{not json", "not JSON"), ('["a list"]', "are needed"), (json.dumps({"task": "t"}), "are needed"),
    (json.dumps({**GOOD, "gold_idx": 2}), "gold_idx is 2; 0 to 1 is accepted"),
    (json.dumps({**GOOD, "gold_idx": -1}), "gold_idx is -1"),
    (json.dumps({**GOOD, "gold_idx": True}), "gold_idx is True"),
    (json.dumps({**GOOD, "choices": [" a", "  "]}), "choice 1 is empty or blank"),
    (json.dumps({**GOOD, "choices": [" a"]}), "two or more"), (json.dumps({**GOOD, "choices": "ab"}), "two or more"),
    (json.dumps({**GOOD, "choices": [" a", 3]}), "two or more"), (json.dumps(GOOD).replace("w2", "\0"), "not JSON"),
    (json.dumps({**GOOD, "prompt": "ends in a space "}), "prompt ends in white space"),
    (json.dumps({**GOOD, "prompt": "\ud800"}), "not JSON"), (json.dumps({**GOOD, "prompt": ""}), "prompt is empty"),
    (json.dumps({**GOOD, "task": "other"}), "'other' in the folder of 't'"),
    ('{"task": "t", "prompt": "w1", "prompt": "w2", "choices": [" w3", " w4"], "gold_idx": 1}', "key 'prompt' stands 2"),
    ('{"prompt": "w1", "completion": " w2", "from": [{"a": 1, "a": 1}]}', "key 'a' stands 2 times"),
    (json.dumps({**GOOD, "weight": float("nan")}), "NaN is not JSON"), (json.dumps({**GOOD, "x": [float("-inf")]}), "-Inf"),
    (json.dumps({**GOOD, "prompt": "\u200b\ufeff"}), "prompt is empty"),
    (json.dumps({**GOOD, "prompt": "w1 \u200b"}), "prompt ends in white space"),
    (json.dumps({**GOOD, "choices": [" a", " \u2060"]}), "choice 1 is empty or blank"),
    (json.dumps({**GOOD, "choices": [" a", " b", " b"]}), "choice 2 reads the same as the gold choice"),
    (json.dumps({**GOOD, "choices": ["\u00a0e\u0301 a", " \u00e9  a"]}), "choice 0 reads the same as the gold"),
    (json.dumps({**GOOD, "choices": [" a\u00adb", " ab\u200e"]}), "choice 0 reads the same as the gold"),
])
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, why):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(BadInput, match=f"train.jsonl:2: .*{why}"):
        read_rows(path, "t")


@pytest.mark.parametrize("line, why", [
    (GOOD, "choices in a file that starts with a completion"), ({**OPEN, "completion": " "}, "completion is empty"),
    ({**OPEN, "completion": None}, "completion is empty"), ({**OPEN, "choices": [" a", " b"]}, "not both"),
    ({**OPEN, "gold_idx": 0}, "not both"),
    ({**OPEN, "prompt": "w1 "}, "prompt ends in white space"), ({"completion": " w1"}, "are needed"),
])
def test_a_bad_completion_is_named_with_file_and_number(tmp_path, line, why):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(OPEN) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(BadInput, match=f"train.jsonl:2: .*{why}"):
        read_rows(path, "t")


def test_every_problem_is_reported_and_the_good_rows_are_kept(tmp_path):
    path, found = tmp_path / "train.jsonl", []
    lines = [GOOD, {**GOOD, "choices": ["", " a", " "], "gold_idx": 7, "task": "u"}, OPEN, GOOD, {**GOOD, "choices": 5},
             {**OPEN, "prompt": " "}]
    path.write_bytes("\n".join(map(json.dumps, lines)).encode() + b"\n\xff\n")
    assert read_rows(path, "t", found.append) == [Row("t", "w1 w2", [" w3", " w4"], 1)] * 2
    assert [problem.split("train.jsonl:")[1].split()[:2] for problem in found] == [
        ["2:", "task"], ["2:", "choice"], ["2:", "choice"], ["2:", "gold_idx"], ["3:", "a"], ["5:", "choices"],
        ["6:", "the"], ["7:", "not"]]


def test_two_wrong_choices_may_read_the_same(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**GOOD, "choices": [" a", " b", "a "]}))
    assert read_rows(path, "t") == [Row("t", "w1 w2", [" a", " b", "a "], 1)]


@pytest.mark.parametrize("change", [
    lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n"), lambda data: data + b"\n \r\n\n",
    lambda data: data.rstrip(), lambda data: data.replace(b"\n", b"\r"),
    lambda data: b"".join(b"\xef\xbb\xbf" + line for line in data.splitlines(True))])  # two such files, one behind the other
def test_what_editors_do_to_a_file_is_accepted(tmp_path, change):
    path = tmp_path / "train.jsonl"
    path.write_bytes(change((json.dumps(GOOD) + "\n").encode() * 3))
    assert read_rows(path, "t") == [Row("t", "w1 w2", [" w3", " w4"], 1)] * 3
    path.write_bytes(change((json.dumps(GOOD) + "\n").encode() * 2 + b"\n" + json.dumps(GOOD).encode()))
    with pytest.raises(BadInput, match="train.jsonl:3: not JSON"):                   # an empty line in the middle
        read_rows(path, "t")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    path, found = tmp_path / "train.jsonl", []
    path.write_text(json.dumps(GOOD) + "\n", encoding=encoding)
    with pytest.raises(BadInput, match="train.jsonl: .*UTF-16.* save it as UTF-8"):
        read_rows(path, "t")
    assert read_rows(path, "t", found.append) == [] and len(found) == 1


@pytest.mark.parametrize("text, other", [
    (" a  b\t", "a b"), ("e\u0301", "\u00e9"), ("a\u200bb", "ab"), ("\ufeffa", "a"), ("a\u00ad", "a"), ("e\u200b\u0301", "\u00e9"),
    ("\u200e\u061c\u2060", "")])
def test_as_read_makes_one_text_of_what_looks_the_same(text, other):
    assert as_read(text) == as_read(other) == other == as_read(as_read(text))


def test_as_read_keeps_what_one_sees():
    texts = ["👩\u200d👩\u200d👧", "👩👩👧", "نمی\u200cخواهم", "نمیخواهم", "🏴\U000e0067\U000e0062\U000e007f", "🏴", "A", "a", "ﬁ", "fi"]
    assert len(set(map(as_read, texts))) == len(texts)


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**GOOD, "prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path, "t")[0].prompt == "a\u2028b\u0085c"


def test_load_tasks(tmp_path):
    with pytest.raises(BadInput, match="no tasks here"):
        load_tasks(tmp_path)
    write_task(tmp_path, "a"), write_task(tmp_path, "b")
    write(tmp_path / "notes" / "rows.jsonl", [GOOD])                                 # no task
    assert list(load_tasks(tmp_path)) == ["a", "b"] and list(load_tasks(tmp_path, ["b"])) == ["b"]
    with pytest.raises(BadInput, match="unknown task 'c'.*a, b$"):
        load_tasks(tmp_path, ["c"])
    (tmp_path / "a" / "train.jsonl").write_text("")
    with pytest.raises(BadInput, match="'a' has no training rows"):
        load_tasks(tmp_path)
    write(tmp_path / "b" / "eval.jsonl", []), write(tmp_path / "c" / "eval.jsonl", [{**GOOD, "task": "c"}])
    found = []
    data = load_tasks(tmp_path, report=found.append)
    assert [re.search("no training|no evaluation|not readable", problem)[0] for problem in found] == [
        "no training", "no evaluation", "not readable"]
    assert [(len(data[task]["train"]), len(data[task]["eval"])) for task in "abc"] == [(0, 6), (12, 0), (0, 1)]


def test_an_added_task_has_the_rows_of_its_own_folder(tmp_path):
    """The run's tasks in its order; either folder has other tasks, too."""
    for folder, tasks in (("data", "abc"), ("more", "bde")):
        for task in tasks:
            write_task(tmp_path / folder, task, seed=folder)
    data, more = load_tasks(tmp_path / "data"), load_tasks(tmp_path / "more")
    saved = {"config": {"tasks": ["b", "a", "e"]}, "added": {"e": {"folder": str(tmp_path / "more" / "e")}}}
    found = load_run_tasks(saved, tmp_path / "data")
    assert list(found.items()) == [("b", data["b"]), ("a", data["a"]), ("e", more["e"])]
    found = load_run_tasks({"config": {"tasks": ["c", "b"]}}, tmp_path / "data")
    assert list(found.items()) == [("c", data["c"]), ("b", data["b"])]


def test_tasks_with_fewer_rows_are_named(capsys):
    data = {task: {"train": [0] * n, "eval": [0]} for task, n in (("a", 2), ("b", 3), ("c", 4))}
    print_fewer(data, 2)
    assert not capsys.readouterr().out
    print_fewer(data, 4)
    assert capsys.readouterr().out == "n = 4, but fewer rows in a (2), b (3): all of these are taken\n"


def test_a_task_is_all_choices_or_all_completions(tmp_path):
    write_task(tmp_path, "t", train=1)
    (tmp_path / "t" / "eval.jsonl").write_text(json.dumps(OPEN) + "\n")
    with pytest.raises(BadInput, match="t/eval.jsonl:1: a completion here, choices in train.jsonl"):
        load_tasks(tmp_path)


def check(capsys, *argv):
    """python data.py --check -> (exit code, what it printed)."""
    try:
        run_main(lambda: data_command.main(["--check", *map(str, argv)]))
        return 0, capsys.readouterr().out
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_check_prints_what_a_folder_holds(tmp_path, capsys):
    """Counts done by hand. The tiny tokenizer's tokens are words, so lengths are, too."""
    base, rows = save_tiny(tmp_path / "base"), [{**GOOD, "prompt": f"w{i}"} for i in range(3)]
    write(tmp_path / "data" / "t" / "train.jsonl", [*rows, {**rows[0], "choices": [" w4", " w3"], "gold_idx": 1}])
    write(tmp_path / "data" / "t" / "eval.jsonl", [rows[1], rows[1], {**GOOD, "prompt": "w9 " * 1500 + "w8"}])
    opened = [{"prompt": f"w{i} w2", "completion": " w3 w4 w5"} for i in range(2)]
    write(tmp_path / "data" / "u" / "train.jsonl", opened)
    write(tmp_path / "data" / "u" / "eval.jsonl", [{"prompt": "w7", "completion": " w6"}])
    code, out = check(capsys, tmp_path / "data", "--bases", base)
    assert code == 0 and out.endswith("no problems; 1 warning\n")                   # w0 has two gold choices
    t, u = out.split("u: completions, train 2, eval 1\n")
    for line in ("t: choices, train 4, eval 3", "train gold_idx: 1 100%", 'train gold text: " w3" 25%, " w4" 75%',
                 'eval gold text: " w4" 100%', "0 duplicate rows in train", '1 duplicate rows in eval, such as "w1"',
                 '2 eval rows whose prompt is in train, too, such as "w1"',
                 "median 2, max 1502; 1 of 7 prompts would be cut to 128", "    (no BOS) w2 | w3 | w4\n",
                 'warning: 2 rows with the prompt and choices of another row, but another gold choice, such as "w0"'):
        assert line in t, line
    assert "gold" not in u and "median 6, max 6; 0 of 3 prompts would be cut" in u   # two words, three more, EOS
    assert "u: " not in check(capsys, tmp_path / "data", "--task", "t")[1]


def test_check_warns_of_what_is_legal_but_seldom_meant(tmp_path, capsys):
    """Counts done by hand, over train and eval."""
    base = save_tiny(tmp_path / "base")
    rows = [("w1 w9", ["w2", " w3"], 0), ("w4 <eos>", [" w2", " w3 w4 w5 w6"], 0), ("w5", [" w2", " w3", "  w3"], 0),
            ("w6", [" a", " b"], 0), ("w7\u200b", [" w2", " w3"], 1), ("w7", [" w3", " w2\u200b"], 0),
            ("\u2060w6", [" a", "\u00a0b"], 0), ("w6\u00ad", [" a", " b "], 0)]
    rows = [dict(zip(("prompt", "choices", "gold_idx"), row)) for row in rows]
    write(tmp_path / "data" / "t" / "train.jsonl", rows[:-3])
    write(tmp_path / "data" / "t" / "eval.jsonl", rows[-3:])
    code, out = check(capsys, tmp_path / "data", "--bases", base)
    assert code == 0 and out.endswith("no problems; 5 warnings\n") and out.count("warning: ") == 5
    for line in ("warning: 1 rows with a choice or completion that does not start with white space", 'such as "w1 w9w2"',
                 "warning: 1 rows in which two wrong choices read the same", "3 eval rows whose prompt is in train, too",
                 "1 duplicate rows in eval", "median 2, max 3;",
                 f'warning: {base}: 3 rows in which the gold choice has the same tokens as another, such as " a"',
                 f"warning: {base}: 6 rows with unknown tokens",
                 f'warning: {base}: 1 rows whose text spells a special token, such as "<eos>"'):
        assert line in out, line


def test_check_refuses_what_a_base_cannot_encode(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    write(tmp_path / "data" / "t" / "train.jsonl", [OPEN, {**OPEN, "completion": " w3 <eos>"}])
    write(tmp_path / "data" / "t" / "eval.jsonl", [OPEN])
    code, out = check(capsys, tmp_path / "data", "--bases", base)
    assert code == 2 and f"t: {base}: task 't': the completion ' w3 <eos>' spells the EOS token" in out
    write(tmp_path / "data" / "t" / "train.jsonl", [{**GOOD, "choices": [" w3" * 128, " w4"]}])
    write(tmp_path / "data" / "t" / "eval.jsonl", [GOOD])
    code, out = check(capsys, tmp_path / "data", "--bases", base)                    # a row held out has all its choices
    assert code == 2 and "an answer has 128 tokens" in out
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    with pytest.raises(SystemExit, match="2"):
        run_main(lambda: data_command.main(["--check", str(tmp_path / "data"), "--bases", str(base)]))
    one_line(capsys, ["EOS '<eos>' has id 3", "embedding has 3 rows", str(base)])


def test_check_names_every_problem(tmp_path, capsys):
    write(tmp_path / "one" / "train.jsonl", [GOOD, "{oops", {**GOOD, "gold_idx": 5}])
    write(tmp_path / "two" / "train.jsonl", [{**GOOD, "task": "two"}])
    write(tmp_path / "one" / "eval.jsonl", [{**GOOD, "task": "one", "choices": [" a", " "]}])
    code, out = check(capsys, tmp_path)
    assert code == 2
    for problem in ("one/train.jsonl:1: task is 't'", "one/train.jsonl:2: not JSON", "one/train.jsonl:3: gold_idx is 5",
                    "one/train.jsonl: task 'one' has no training rows", "one/eval.jsonl:1: choice 1 is",
                    "two/eval.jsonl: not readable"):
        assert problem in out
    write(tmp_path / "two" / "eval.jsonl", [{**GOOD, "task": "two"}])
    assert check(capsys, tmp_path, "--tasks", "two")[0] == 0


def test_check_of_the_toy_as_the_readme_has_it(capsys):
    code, out = check(capsys, ROOT / "toy" / "data", "--bases", "toy-gemma", "--tasks", "first,last")
    assert code == 0 and out.count("choices, train 1000, eval 200") == 2


def test_the_command_is_python_data_py(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.py", "--check", str(ROOT / "toy" / "data"), "--task", "first"])
    runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    assert "first: choices, train 1000, eval 200\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["data.py", "--check", str(ROOT / "runtime")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")


def test_sample_is_random_seeded_nested_and_holds_rows_out():
    rows = [Row("t", f"w{i}", [], 0) for i in range(500)]
    train, held = sample(rows, 100, 0)
    assert (len(train), len(held)) == (90, 10) and not set(r.prompt for r in train) & set(r.prompt for r in held)
    assert sample(rows, 100, 0) == (train, held) and sample(rows, 100, 1) != (train, held)
    assert {r.prompt for r in train + held} != {r.prompt for r in rows[:100]}  # never the first rows
    more = sample(rows, 200, 0)
    assert {r.prompt for r in train + held} < {r.prompt for r in more[0] + more[1]}
    assert sample(rows[:1], 5, 0) == (rows[:1], [])
    assert [len(part) for part in sample(rows, 1, 0)] == [1, 0] and [len(part) for part in sample(rows, 2, 0)] == [1, 1]
    assert len(sample(rows * 5, 2000, 0)[1]) == 100


def test_encode_cuts_prompts_from_the_left_but_for_bos():
    tokenizer = tiny_tokenizer(bos=True)
    rows = [Row("b", "w1 w2 w3", [" w4", " w5 w6"], 1), Row("a", " ".join(["w7"] * 30 + ["w8"]), [" w9", " w9"], 0)]
    (short, long), cut = encode(tokenizer, rows, ["a", "b"], max_length=12)
    assert short.task == 1 and short.prompt == [1, 5, 6, 7] and short.continuations == [[8], [9, 10]]
    assert cut == 1 and len(long.prompt) == 11 and long.prompt[:2] == [1, 11] and long.prompt[-1] == 12
    (gold,), _ = encode(tokenizer, rows[:1], ["a", "b"], choices="gold")
    assert gold.continuations == [[9, 10]]
    (item,), _ = encode(tokenizer, [Row("a", "w1 " * 2000 + "w2", [" w3", " w4 w5 w6"], 0)], ["a"])
    assert len(item.prompt) == 1024 - 3
    (item,), _ = encode(tokenizer, [Row("a", "w1 " * 20 + "w2", [" w3", " w4" * 9], 0)], ["a"], max_length=12)
    assert item.prompt == [1, *[5] * 6, 6]                                           # eight are left of any prompt


def test_a_completion_ends_with_eos_and_a_choice_does_not():
    tokenizer, row = tiny_tokenizer(), Row("t", "w1 w2", [" w3 w4"])
    for choices in ("all", "gold"):
        assert encode(tokenizer, [row], ["t"], choices)[0][0].continuations == [[7, 8, tokenizer.eos_token_id]]
    assert encode(tokenizer, [Row("t", "w1", [" w3", " w4"], 0)], ["t"], "gold")[0][0].continuations == [[7]]
    (item,), cut = encode(tokenizer, [Row("t", "w1 " * 30 + "w2", [" w3"])], ["t"], max_length=12)
    assert cut == 1 and len(item.prompt + item.continuations[0]) == 12  # EOS is inside the limit
    tokenizer.eos_token = None
    assert encode(tokenizer, [row], ["t"])[0][0].continuations == [[7, 8]]


def test_micro_batches_keep_the_budget_and_every_item():
    rows = [Row("t", " ".join(["w1"] * n), [" w2", " w3"], 0) for n in (3, 50, 9, 4, 4, 8, 30, 3)]
    items, _ = encode(tiny_tokenizer(), rows, ["t"])
    parts = micro_batches(items, 40)
    assert sorted(id(i) for part in parts for i in part) == sorted(map(id, items))
    for part in parts:
        assert len(part) == 1 or len(part) * max(i.length() for i in part) <= 40
    assert [len(part) for part in micro_batches([Item(0, [1] * 10, [[1]], None)] * 4, 40)] == [4]


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_are_the_cheapest_of_all_cuts(seed):
    """Against every way to cut nine sorted items: padded tokens plus what a pass costs."""
    rng = random.Random(seed)
    lengths = sorted((rng.randint(2, 200) for _ in range(9)), reverse=True)
    items = [Item(0, [1] * n, [[1]], None) for n in lengths]
    def cost(parts):
        return sum(len(part) * part[0] + PASS for part in parts)
    best = float("inf")
    for cuts in itertools.product((False, True), repeat=8):
        parts = [[lengths[0]]]
        for n, cut in zip(lengths[1:], cuts):
            parts += [[n]] if cut else []
            parts[-1] += [] if cut else [n]
        if all(len(part) == 1 or len(part) * part[0] <= 400 for part in parts):
            best = min(best, cost(parts))
    assert cost([[i.length() for i in part] for part in micro_batches(items, 400)]) == best


@pytest.mark.skipif(not TASKS.is_dir(), reason="no prepared rows: set PORTAL_TASKS")
def test_little_of_a_round_of_real_tasks_is_padding():
    """Nine benchmarks, four rows each, word lengths for tokens: under 15%. (With real tokenizers: 10%.)"""
    cycles = []
    for task, splits in load_tasks(TASKS).items():
        lengths = [len(row.prompt.split()) + len(row.choices[row.gold].split()) for row in splits["train"]]
        cycles.append(Cycle([Item(0, [1] * n, [[1]], None) for n in lengths], 4, task))
    parts = [part for _ in range(50) for part in micro_batches([i for c in cycles for i in c.next()], 4096)]
    used = sum(item.length() for part in parts for item in part)
    assert used / sum(len(part) * part[0].length() for part in parts) > 0.85


def test_collate_reads_the_prompts_last_position_once_and_no_continuations_last_token():
    rows = [Row("t", "w1 w2", [" w3", " w4 w5", " w6 w7"], 0), Row("u", "w8", [" w9 w10"])]
    items, _ = encode(tiny_tokenizer(), rows, ["t", "u"])
    batch = collate(items)
    assert batch.ids.tolist() == [[5, 6, 8, 10], [12, 13, 14, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 2], [0, 1, 2, 0]]
    assert batch.segments.tolist() == [[0, 0, 1 + 1, 1 + 2], [0, 1, 1, -1]] and batch.task.tolist() == [0, 1]
    assert [place.tolist() for place in batch.at] == [[0, 0, 0, 1, 1, 1], [1, 2, 3, 0, 1, 2]]
    assert batch.source.tolist() == [0, 0, 1, 0, 2, 3, 4, 5] and batch.row.tolist() == [0] * 5 + [1] * 3
    assert batch.target.tolist() == [7, 8, 9, 10, 11, 13, 14, 3] and batch.owner.tolist() == [0, 1, 1, 2, 2, 3, 3, 3]
    assert collate(items, "meta").segments.device.type == "meta"
    only_one_reaches_in = encode(tiny_tokenizer(), [Row("t", "w1 w2", [" w3", " w4 w5", " w6"], 0)], ["t"])[0]
    assert collate(only_one_reaches_in).segments is None


def test_cycle_passes_over_everything_before_it_repeats():
    cycle = Cycle(list(range(10)), 4, "seed")
    first = [cycle.next() for _ in range(3)]
    assert [len(b) for b in first] == [4, 4, 2] and sorted(sum(first, [])) == list(range(10))
    second = sum((cycle.next() for _ in range(3)), [])
    assert sorted(second) == list(range(10)) and second != sum(first, [])


class TinyBase:
    def __init__(self, name, bos):
        self.name, self.tokenizer = name, tiny_tokenizer(bos)


def some_rounds(length=2):
    bases = [TinyBase("a", bos=False), TinyBase("b", bos=True)]
    rows = {task: ([Row(task, " ".join([f"w{i}"] * length), [" w3", " w4 w5"], i % 2) for i in range(n)],
                   [Row(task, f"w{i}", [" w3", " w4"], 1) for i in range(held)])
            for task, n, held in (("x", 11, 2), ("y", 5, 0), ("z", 1, 1))}
    return bases, rows, Rounds(bases, rows, 4, seed=3)


def test_rounds_take_the_next_batch_of_each_task_in_the_seeds_order(capsys):
    """The order of a Cycle of each base and task, seeded with "seed/base/task"."""
    bases, rows, rounds = some_rounds()
    tasks = list(rows)
    cycles = {(base.name, task): Cycle(encode(base.tokenizer, train, tasks, "gold")[0], 4, f"3/{base.name}/{task}")
              for base in bases for task, (train, _) in rows.items()}
    assert rounds.tasks == tasks and rounds.cycles.keys() == cycles.keys()
    for now in 3 * (["x", "y", "z"], ["x"], ["z", "y"]):                             # a small task may sit rounds out
        taken = rounds.take(now)
        assert taken == {base.name: [item for task in now for item in cycles[base.name, task].next()] for base in bases}
    held = [row for _, held in rows.values() for row in held]
    assert rounds.held == {base.name: encode(base.tokenizer, held, tasks)[0] for base in bases}
    assert rounds.cut == 0 and not capsys.readouterr().out


def test_rounds_skip_is_taking():
    _, _, rounds = some_rounds()
    _, _, skipped = some_rounds()
    for _ in range(5):
        rounds.take(["x", "z"])
    skipped.skip("x", 5), skipped.skip("z", 5)
    assert [skipped.take(["x", "y", "z"]) for _ in range(4)] == [rounds.take(["x", "y", "z"]) for _ in range(4)]


def test_rounds_say_how_many_prompts_were_cut(capsys):
    assert some_rounds(length=2000)[2].cut == 34
    assert capsys.readouterr().out == "34 of 34 training prompts were cut from the left\n"


def test_a_task_has_one_name_in_all_normal_forms(tmp_path):
    """A folder é, written as one character or as two: what macOS and archives make of it. Two folders are twice one task."""
    one, two = "\u00e9", "e\u0301"
    write_task(tmp_path / "a", one), write_task(tmp_path / "b", two)
    (a, rows), (b, other) = (next(iter(load_tasks(tmp_path / folder).items())) for folder in "ab")
    assert a == b == one and [row.task for row in other["eval"]] == [one] * len(other["eval"])
    for asked in (one, two):                                                         # as a run has it recorded
        for folder in "ab":
            assert list(load_run_tasks({"config": {"tasks": [asked]}}, tmp_path / folder)) == [asked]
    write_task(tmp_path / "b", one)
    with pytest.raises(BadInput, match="its name names files; rename it: accepted is a name in UTF-8.*, each once"):
        load_tasks(tmp_path / "b")


def test_a_name_that_can_name_no_file_is_refused_before_training(trained, world, capsys):
    for name in ("win\\task", "a\nb", b"\xff".decode(errors="surrogateescape")):
        shutil.copytree(world / "data" / "one", world / "d" / "task", dirs_exist_ok=True)
        for path in (world / "d" / "task").glob("*.jsonl"):
            path.write_text(path.read_text().replace('"task": "one", ', ""))
        (world / "d" / "task").rename(world / "d" / name)
        assert check(capsys, "--check", "d")[0] == 2
        for flags in (["--data", "d"], ["--add-task", f"d/{name}", "--run", trained]):
            assert command(train, "--bases", "./base-a", *flags) == 2
            one_line(capsys, ["rename it: accepted is a name in UTF-8"])
        assert not (world / "out" / "base-a").exists()
        shutil.rmtree(world / "d")


def test_an_added_task_that_moved_is_taken_from_the_data_folder(tmp_path):
    write_task(tmp_path / "data", "a"), write_task(tmp_path / "data", "e")
    rows = load_tasks(tmp_path / "data")
    how = dict(folder=str(tmp_path / "gone" / "e"), n=4, seed=1, rows=digests_of({"e": sample(rows["e"]["train"], 4, 1)})["e"])
    saved = {"config": {"tasks": ["a", "e"]}, "added": {"e": how}}
    assert load_run_tasks(saved, tmp_path / "data") == rows
    write_task(tmp_path / "data", "e", seed=5)
    with pytest.raises(BadInput, match="data/e: not the rows that e was learned from, in .*gone/e, which is no longer there"):
        load_run_tasks(saved, tmp_path / "data")
