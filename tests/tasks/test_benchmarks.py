"""The prompts of the 14 benchmarks, their download, and the form of the prepared rows."""
import json, os, re
from pathlib import Path

import pytest

from tasks import benchmarks
from tasks.benchmarks import BENCHMARKS, REVISIONS, build, format_row

# --- formatters: invented rows with the upstream columns, exact expected output ---
RTE = {"premise": "The bridge  opened in May. ", "hypothesis": "A bridge opened.", "idx": 0, "label": 1}
CB = {"premise": "Ann doubts that it rained.", "hypothesis": "it rained", "idx": 0, "label": 2}
COPA = {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "The cat pushed it.", "idx": 0, "label": 1}
WIC = {"word": "run", "sentence1": "She runs a shop.", "sentence2": "He went for a run.", "start1": 4, "end1": 8,
       "start2": 14, "end2": 17, "idx": 0, "label": 0}
WSC = {"text": "I set the jar on the shelf , so it cracked.", "span1_index": 2, "span1_text": "The jar",
       "span2_index": 8, "span2_text": "it", "idx": 0, "label": 1}
BOOLQ = {"question": "is oslo in norway", "passage": "Oslo -- Oslo is a city.", "idx": 0, "label": 1}
HELLASWAG = {"activity_label": "Diving", "ctx_a": "A man stands on a board.", "ctx_b": "the man", "label": "2",
             "ctx": "A man stands on a board. the man", "endings": ["sits.", "sleeps.", "dives in.", ", waving, eats."]}
BRACKETS = {"activity_label": "Home", "ctx_b": "", "label": "0", "ctx": "",
            "ctx_a": "[header] How to boil eggs [title] Fill a pot. [step] Use cold water.",
            "endings": ["[substeps] Add salt. Wait [title] Peel them.", "Stop.", "Go [now] on.", "[ Odd."]}
OPENBOOKQA = {"id": "x", "question_stem": "Plants need", "answerKey": "B",
              "choices": {"text": ["shoes", "light", "coins", "songs"], "label": ["A", "B", "C", "D"]}}
COMMONSENSEQA = {"id": "x", "question": "Where do boats sleep?", "question_concept": "boat", "answerKey": "D",
                 "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["moon", "oven", "bank", "harbor", "tree"]}}


def formatted(task, row):
    """(prompt, choices, gold_idx) of one upstream row."""
    return tuple(format_row(task, row).values())[1:]


@pytest.mark.parametrize("task, row, prompt, choices, gold", [
    ("rte", RTE, "The bridge  opened in May.\nQuestion: A bridge opened. True or False?\nAnswer:",
     [" True", " False"], 1),
    ("cb", CB, "Ann doubts that it rained.\nQuestion: it rained True, False, or Neither?\nAnswer:",
     [" True", " False", " Neither"], 2),
    ("copa", {**COPA, "question": "cause"}, "The cup fell because", [" it broke.", " the cat pushed it."], 1),
    ("copa", {**COPA, "question": "effect"}, "The cup fell therefore", [" it broke.", " the cat pushed it."], 1),
    ("wic", WIC, "Sentence 1: She runs a shop.\nSentence 2: He went for a run.\n"                # the word as inflected
     "Question: Is the word 'runs' used in the same way in the two sentences above?\nAnswer:", [" no", " yes"], 0),
    ("wsc", WSC, "I set the jar on the shelf , so it cracked.\n"                                 # the spans as they are
     'Question: In the passage above, does the pronoun "it" refer to "The jar"?\nAnswer:', [" no", " yes"], 1),
    ("boolq", BOOLQ, "Oslo -- Oslo is a city.\nQuestion: is oslo in norway?\nAnswer:", [" no", " yes"], 1),
    ("hellaswag", HELLASWAG, "A man stands on a board. The man",
     [" sits.", " sleeps.", " dives in.", " , waving, eats."], 2),
    ("hellaswag", BRACKETS, "How to boil eggs. Fill a pot. Use cold water.",
     [" Add salt. Wait. Peel them.", " Stop.", " Go on.", " [ Odd."], 0),
    ("openbookqa", OPENBOOKQA, "Question: Plants need\nAnswer:", [" shoes", " light", " coins", " songs"], 1),
    ("openbookqa", {**OPENBOOKQA, "answerKey": " B"}, "Question: Plants need\nAnswer:",
     [" shoes", " light", " coins", " songs"], 1),
    ("commonsenseqa", COMMONSENSEQA, "Question: Where do boats sleep?\nAnswer:",
     [" moon", " oven", " bank", " harbor", " tree"], 3),
])
def test_formatters(task, row, prompt, choices, gold):
    assert formatted(task, row) == (prompt, choices, gold)


@pytest.mark.parametrize("labels, key, gold", [("ABCD", "C", 2), ("1234", "4", 3), ("1234", "1", 0), ("123", "2", 1),
                                               ("ABC", "A", 0), ("ABCDE", "E", 4)])
def test_arc_letter_and_number_keys(labels, key, gold):
    texts = ["salt", "ice ", "iron", "wood", "air"][:len(labels)]
    row = {"id": "x", "question": "What melts at 0 C? ", "choices": {"text": texts, "label": list(labels)},
           "answerKey": key}
    expected = [" salt", " ice", " iron", " wood", " air"][:len(labels)]
    assert formatted("arc_easy", row) == ("Question: What melts at 0 C?\nAnswer:", expected, gold)


@pytest.mark.parametrize("sentence, prompt, choices", [
    ("Bo fed the cat but not the dog because the _ was hungry.", "Bo fed the cat but not the dog because the",
     [" cat was hungry.", " dog was hungry."]),
    ("It rained on the _'s bed.", "It rained on the", [" cat's bed.", " dog's bed."]),
    ("We saw it, so the _  ran.", "We saw it, so the", [" cat  ran.", " dog  ran."])])  # upstream's double space stays
def test_winogrande_splits_at_the_blank(sentence, prompt, choices):
    row = {"sentence": sentence, "option1": "cat", "option2": "dog", "answer": "2"}
    assert formatted("winogrande", row) == (prompt, choices, 1)


def sciq(question, support="Water freezes at 0 C."):
    return formatted("sciq", {"question": question, "distractor1": "steam", "distractor2": "fog", "distractor3": "dew",
                              "correct_answer": "ice", "support": support})


def test_sciq_shuffles_the_same_way_every_time():
    prompt, choices, gold = sciq("What is frozen water?")
    assert prompt == "Water freezes at 0 C.\nQuestion: What is frozen water?\nAnswer:"
    assert sorted(choices) == [" dew", " fog", " ice", " steam"] and choices[gold] == " ice"
    assert sciq("What is frozen water?") == (prompt, choices, gold)
    assert {sciq(f"Question {i}?")[2] for i in range(50)} == {0, 1, 2, 3}


def test_sciq_without_support():
    assert sciq("What is frozen water?", support="")[0] == "Question: What is frozen water?\nAnswer:"


def test_truthfulqa():
    row = {"question": "Can pigs fly?", "mc1_targets": {"choices": ["No", "Yes", "At night"], "labels": [1, 0, 0]},
           "mc2_targets": {"choices": [], "labels": []}}
    prompt, choices, gold = formatted("truthfulqa", row)
    assert prompt == "Q: Can pigs fly?\nA:"
    assert sorted(choices) == [" At night", " No", " Yes"] and choices[gold] == " No"

# --- build(): no network, load_dataset is replaced ---

def test_revisions_are_pinned():
    assert len(BENCHMARKS) == 14
    for repo, config, train, eval_, formatter in BENCHMARKS.values():
        assert re.fullmatch(r"[0-9a-f]{40}", REVISIONS[repo])
    assert BENCHMARKS["wsc"][1] == "wsc"  # not wsc.fixed: the prepared rows take the spans as they are


@pytest.fixture
def fake_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits, calls = {}, []

    def load_dataset(repo, config=None, split=None, revision=None):
        calls.append((repo, config, split, revision))
        return datasets.Dataset.from_list(splits[repo, config, split])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits, calls


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arc_row(question, key="A"):
    return {"id": question, "question": question, "choices": {"text": ["café", "b"], "label": ["A", "B"]},
            "answerKey": key}


def test_build_dedups_caps_and_drops(fake_hub, tmp_path, monkeypatch, capsys):
    splits, calls = fake_hub
    monkeypatch.setattr(benchmarks, "MAX_ROWS", {"train": 6, "eval": 3})
    splits["allenai/ai2_arc", "ARC-Easy", "test"] = [arc_row(f"q{i}") for i in range(10)]
    splits["allenai/ai2_arc", "ARC-Easy", "train"] = (
        [arc_row(f"q{i}") for i in range(20)] + [arc_row("no such answer", "E"), arc_row("no answer", "")])
    build(tmp_path, ["arc_easy"])
    train, evaluation = (read(tmp_path / "arc_easy" / f"{s}.jsonl") for s in ("train", "eval"))
    assert len(train) == 6 and len(evaluation) == 3
    # All ten evaluation questions left train, also the seven that the sample of three did not take.
    assert {r["prompt"] for r in train} <= {f"Question: q{i}\nAnswer:" for i in range(10, 20)}
    assert len({r["prompt"] for r in train}) == 6
    assert train[0].keys() == {"task", "prompt", "choices", "gold_idx"} and train[0]["task"] == "arc_easy"
    assert train[0]["choices"] == [" café", " b"]
    assert "café" in (tmp_path / "arc_easy" / "train.jsonl").read_text(encoding="utf-8")  # not \u00e9
    assert calls == [("allenai/ai2_arc", "ARC-Easy", s, REVISIONS["allenai/ai2_arc"]) for s in ("train", "test")]
    assert sorted(os.listdir(tmp_path / "arc_easy")) == ["eval.jsonl", "train.jsonl"]  # no temporary file
    assert "2 malformed, 10 train rows also in eval" in capsys.readouterr().out
    before = (tmp_path / "arc_easy" / "train.jsonl").read_bytes()
    build(tmp_path, ["arc_easy"])
    assert (tmp_path / "arc_easy" / "train.jsonl").read_bytes() == before


def test_build_drops_blank_and_unlabelled_rows(fake_hub, tmp_path, capsys):
    splits, _ = fake_hub
    rte = lambda label: {"premise": f"P{label}", "hypothesis": "H.", "idx": 0, "label": label}
    wino = lambda sentence, answer: {"sentence": sentence, "option1": "cat", "option2": "dog", "answer": answer}
    for split in ("train", "validation"):
        splits["aps/super_glue", "rte", split] = [rte(-1), rte(0 if split == "train" else 1)]
        splits["allenai/winogrande", "winogrande_xl", split] = [
            wino("_ begins.", "1"), wino("No blank.", "1"), wino("No _ answer.", ""), wino(f"My {split} _ ok.", "1"),
            {**wino("The _ is twice.", "1"), "option2": "cat "}]
    build(tmp_path, ["rte", "winogrande"])
    rte, winogrande = capsys.readouterr().out.splitlines()
    assert "0 without a prompt, 2 malformed," in rte and "2 without a prompt, 6 malformed," in winogrande
    assert [r["prompt"].split("\n")[0] for r in read(tmp_path / "rte" / "train.jsonl")] == ["P0"]
    assert [r["prompt"] for r in read(tmp_path / "winogrande" / "eval.jsonl")] == ["My validation"]


def test_build_cuts_truthfulqa_in_two(fake_hub, tmp_path):
    splits, _ = fake_hub
    splits["truthfulqa/truthful_qa", "multiple_choice", "validation"] = [
        {"question": f"q{i}?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}} for i in range(817)]
    build(tmp_path, ["truthfulqa"])
    train, evaluation = (read(tmp_path / "truthfulqa" / f"{s}.jsonl") for s in ("train", "eval"))
    assert (len(train), len(evaluation)) == (417, 400)
    assert len({r["prompt"] for r in train + evaluation}) == 817

# --- the prepared rows of nine tasks: undo each row, format it again, get the same row ---

TASKS = Path(os.environ.get("PORTAL_TASKS", Path(__file__).parents[2] / "../shared/data/tasks"))


def undo(pattern, *columns):
    def row(r):
        return {**dict(zip(columns, re.fullmatch(pattern, r["prompt"], re.DOTALL).groups())), "label": r["gold_idx"]}
    return row


def undo_options(column):
    def row(r):
        labels = list("ABCDE"[:len(r["choices"])])
        return {column: re.fullmatch(r"Question: (.*)\nAnswer:", r["prompt"])[1], "answerKey": labels[r["gold_idx"]],
                "choices": {"text": [c[1:] for c in r["choices"]], "label": labels}}
    return row


def undo_winogrande(r):
    one, two = (c[1:] for c in r["choices"])
    rest = os.path.commonprefix([one[::-1], two[::-1]])[::-1]
    rest = rest[rest.index(" "):]  # "bedroom is" and "living room is" also share "room"
    return {"sentence": r["prompt"] + " _" + rest, "answer": str(r["gold_idx"] + 1),
            "option1": one.removesuffix(rest), "option2": two.removesuffix(rest)}


UNDO = {
    "rte": undo(r"(.*)\nQuestion: (.*) True or False\?\nAnswer:", "premise", "hypothesis"),
    "cb": undo(r"(.*)\nQuestion: (.*) True, False, or Neither\?\nAnswer:", "premise", "hypothesis"),
    "wsc": undo(r'(.*)\nQuestion: In the passage above, does the pronoun "(.*?)" refer to "(.*)"\?\nAnswer:',
                "text", "span2_text", "span1_text"),
    "boolq": undo(r"(.* -- .*)\nQuestion: ([^\n]*[^\n?])\?\nAnswer:", "passage", "question"),
    "arc_easy": undo_options("question"), "arc_challenge": undo_options("question"),
    "openbookqa": undo_options("question_stem"),
    "hellaswag": lambda r: {"ctx_a": r["prompt"], "ctx_b": "", "endings": r["choices"], "label": str(r["gold_idx"])},
    "winogrande": undo_winogrande,
}


@pytest.mark.skipif(not TASKS.is_dir(), reason="no prepared rows: set PORTAL_TASKS")
@pytest.mark.parametrize("task", UNDO)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_prepared_rows_have_the_form_of_the_formatter(task, split):
    path = TASKS / task / f"{split}.jsonl"
    for r in read(path):
        prompt, choices, gold = formatted(task, UNDO[task](r))
        if task == "hellaswag":  # cleaning a second time halves a double space that the first time left
            r["prompt"], r["choices"] = r["prompt"].replace("  ", " "), [c.replace("  ", " ") for c in r["choices"]]
        assert r == {"task": task, "prompt": prompt, "choices": choices, "gold_idx": gold}
        assert prompt == prompt.strip() and all(re.match(r" \S", c) and c == c.rstrip() for c in choices)
