"""The JSONL format and its errors, sampling, tokens, and micro-batches."""
import itertools, json, random

import pytest
from conftest import tiny_tokenizer, write_task

from cli import BadInput
from data import PASS, Cycle, Item, Row, collate, encode, load_tasks, micro_batches, read_rows, sample
from test_benchmarks import TASKS

GOOD = {"task": "t", "prompt": "w1 w2", "choices": [" w3", " w4"], "gold_idx": 1}


@pytest.mark.parametrize("line, why", [
    ("{not json", "not JSON"), ('["a list"]', "are needed"), (json.dumps({"task": "t"}), "are needed"),
    (json.dumps({**GOOD, "gold_idx": 2}), "gold_idx is 2; 0 to 1 is accepted"),
    (json.dumps({**GOOD, "gold_idx": -1}), "gold_idx is -1"), (json.dumps({**GOOD, "gold_idx": True}), "gold_idx is True"),
    (json.dumps({**GOOD, "choices": [" a", "  "]}), "choice 1 is empty or blank"),
    (json.dumps({**GOOD, "choices": [" a"]}), "two or more"), (json.dumps({**GOOD, "choices": "ab"}), "two or more"),
    (json.dumps({**GOOD, "prompt": "ends in a space "}), "prompt ends in white space"),
    (json.dumps({**GOOD, "prompt": "\ud800"}), "not JSON"), (json.dumps({**GOOD, "prompt": ""}), "prompt is empty"), (json.dumps({**GOOD, "task": "other"}), "'other' in the folder of 't'"),
])
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, why):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(BadInput, match=f"train.jsonl:2: .*{why}"):
        read_rows(path, "t")


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**GOOD, "prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path, "t")[0].prompt == "a\u2028b\u0085c"


def test_load_tasks(tmp_path):
    with pytest.raises(BadInput, match="no tasks here"):
        load_tasks(tmp_path)
    write_task(tmp_path, "a"), write_task(tmp_path, "b")
    assert list(load_tasks(tmp_path)) == ["a", "b"] and list(load_tasks(tmp_path, ["b"])) == ["b"]
    with pytest.raises(BadInput, match="unknown task 'c'.*a, b"):
        load_tasks(tmp_path, ["c"])
    (tmp_path / "a" / "train.jsonl").write_text("")
    with pytest.raises(BadInput, match="'a' has no training rows"):
        load_tasks(tmp_path)


def test_sample_is_random_seeded_nested_and_holds_rows_out():
    rows = [Row("t", f"w{i}", [], 0) for i in range(500)]
    train, held = sample(rows, 100, 0)
    assert (len(train), len(held)) == (90, 10) and not set(r.prompt for r in train) & set(r.prompt for r in held)
    assert sample(rows, 100, 0) == (train, held) and sample(rows, 100, 1) != (train, held)
    assert {r.prompt for r in train + held} != {r.prompt for r in rows[:100]}  # never the first rows
    more = sample(rows, 200, 0)
    assert {r.prompt for r in train + held} < {r.prompt for r in more[0] + more[1]}
    assert [len(part) for part in sample(rows, 1, 0)] == [1, 0] and [len(part) for part in sample(rows, 2, 0)] == [1, 1]
    assert len(sample(rows * 5, 2000, 0)[1]) == 100


def test_encode_joins_what_was_encoded_apart_and_cuts_from_the_left():
    tokenizer = tiny_tokenizer(bos=True)
    rows = [Row("b", "w1 w2 w3", [" w4", " w5 w6"], 1), Row("a", " ".join(["w7"] * 30 + ["w8"]), [" w9", " w9"], 0)]
    (short, long), cut = encode(tokenizer, rows, ["a", "b"], max_length=12)
    assert short.task == 1 and short.prompt == [1, 5, 6, 7] and short.continuations == [[8], [9, 10]]
    assert cut == 1 and len(long.prompt) == 11 and long.prompt[0] == 1 and long.prompt[-1] == 12 and long.prompt[1] == 11
    (gold,), _ = encode(tokenizer, rows[:1], ["a", "b"], choices="gold")
    assert gold.continuations == [[9, 10]]


def test_micro_batches_keep_the_budget_and_every_item():
    rows = [Row("t", " ".join(["w1"] * n), [" w2", " w3"], 0) for n in (3, 50, 9, 4, 4, 8, 30, 3)]
    items, _ = encode(tiny_tokenizer(), rows, ["t"])
    parts = micro_batches(items, 40)
    assert sorted(id(i) for part in parts for i in part) == sorted(map(id, items))
    for part in parts:
        assert len(part) == 1 or len(part) * max(i.length() for i in part) <= 40


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_are_the_cheapest_of_all_cuts(seed):
    """Against every way to cut nine sorted items: padded tokens plus what a pass costs."""
    rng = random.Random(seed)
    lengths = sorted((rng.randint(2, 200) for _ in range(9)), reverse=True)
    items = [Item(0, [1] * (n - 1), [[1]], None) for n in lengths]
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
        cycles.append(Cycle([Item(0, [1] * (n - 1), [[1]], None) for n in lengths], 4, task))
    parts = [part for _ in range(50) for part in micro_batches([i for c in cycles for i in c.next()], 4096)]
    used = sum(item.length() for part in parts for item in part)
    assert used / sum(len(part) * part[0].length() for part in parts) > 0.85


def test_collate_reads_the_prompts_last_position_once():
    items, _ = encode(tiny_tokenizer(), [Row("t", "w1 w2", [" w3", " w4 w5", " w6"], 0)], ["t"])
    batch = collate(items)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 10]] and batch.positions.tolist() == [[0, 1, 2, 2, 3, 2]]
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert batch.at[1].tolist() == [1, 3] and batch.source.tolist() == [0, 0, 1, 0] and batch.target.tolist() == [7, 8, 9, 10]


def test_cycle_passes_over_everything_before_it_repeats():
    cycle = Cycle(list(range(10)), 4, "seed")
    first = [cycle.next() for _ in range(3)]
    assert [len(b) for b in first] == [4, 4, 2] and sorted(sum(first, [])) == list(range(10))
    second = sum((cycle.next() for _ in range(3)), [])
    assert sorted(second) == list(range(10)) and second != sum(first, [])
