"""The 14 benchmarks of the write-up: their prompts and their download."""
import json, pathlib, random, re
from collections import Counter

from runtime.files import BadInput, first_line, write_whole
from tasks.rows import as_read, twins


# A formatter takes a row of the hub's data set and returns (prompt, choices, gold_idx), each prompt in the form of
# lm-evaluation-harness. `format_row` puts one space before every choice: tokenizers join it to the word that follows.
def ask(question, *context):
    return "\n".join([*context, f"Question: {question}", "Answer:"])


def shuffled(choices, gold_idx, key):
    """Return the choices in an order seeded by `key`, a text of the row, and the gold one's index in it. For benchmarks
    that store the gold choice at one index in every row: a scorer's ties and NaNs favour one index, too."""
    order = list(range(len(choices)))
    random.Random(key).shuffle(order)
    return [choices[i] for i in order], order.index(gold_idx)


def truthfulqa(row):
    question, targets = row["question"], row["mc1_targets"]  # mc1: exactly one choice is labelled 1
    return f"Q: {question.strip()}\nA:", *shuffled(targets["choices"], targets["labels"].index(1), question)


def rte(row):  # label: entailment, not_entailment
    return ask(f"{row['hypothesis'].strip()} True or False?", row["premise"].strip()), ["True", "False"], row["label"]


def cb(row):  # label: entailment, contradiction, neutral
    question = f"{row['hypothesis'].strip()} True, False, or Neither?"
    return ask(question, row["premise"].strip()), ["True", "False", "Neither"], row["label"]


def copa(row):  # one sentence: the premise loses its full stop, the choice its capital
    because = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [c.strip()[:1].lower() + c.strip()[1:] for c in (row["choice1"], row["choice2"])]
    return f"{row['premise'].strip().rstrip('.!?')} {because}", choices, row["label"]


def wic(row):
    word = row["sentence1"][row["start1"]:row["end1"]]  # as inflected there, not the lemma in row["word"]
    prompt = ask(f"Is the word '{word}' used in the same way in the two sentences above?",
                 f"Sentence 1: {row['sentence1']}", f"Sentence 2: {row['sentence2']}")
    return prompt, ["no", "yes"], row["label"]


def wsc(row):  # the config is wsc, not wsc.fixed, and its spans stay as they are
    question = f'In the passage above, does the pronoun "{row["span2_text"]}" refer to "{row["span1_text"]}"?'
    return ask(question, row["text"]), ["no", "yes"], row["label"]


def boolq(row):  # SuperGLUE's passages start with "Title -- ", unlike google/boolq's; a question has no question mark
    return ask(f"{row['question'].strip()}?", row["passage"].strip()), ["no", "yes"], row["label"]


def arc(row):  # CommonsenseQA, too; 3 to 5 choices, labelled A, B, C, ... in some rows and 1, 2, 3, ... in others
    choices = row["choices"]
    return ask(row["question"].strip()), choices["text"], choices["label"].index(row["answerKey"])


def openbookqa(row):
    return arc({**row, "question": row["question_stem"], "answerKey": row["answerKey"].strip()})


def hellaswag(row):
    def clean(text):  # "[title]" and the like are left over from the WikiHow pages
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ").strip()
    prompt = clean(row["ctx_a"] + " " + row["ctx_b"].capitalize())
    return prompt, [clean(ending) for ending in row["endings"]], int(row["label"])  # label: "0" to "3"


def winogrande(row):
    before, after = row["sentence"].split("_", 1)  # the blank; `after` keeps its space, or its "'s"
    return before.strip(), [row[option].strip() + after for option in ("option1", "option2")], int(row["answer"]) - 1


def sciq(row):
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    prompt = ask(row["question"].strip(), row["support"].strip()).strip()  # some rows have no support and start with \n
    return prompt, *shuffled(choices, 3, row["question"])


# A commit of each hub repository, so that everyone builds the same rows; other public projects pin the same ones. All
# hold parquet files, because `datasets` 4 and later runs no loading script.
REVISIONS = {
    "truthfulqa/truthful_qa": "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "tau/commonsense_qa": "94630fe30dad47192a8546eb75f094926d47e155",
    "allenai/sciq": "2c94ad3e1aafab77146f384e23536f97a4849815"}
BENCHMARKS = {  # task: (hub repository, config, train split, evaluation split, formatter)
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation", "validation", truthfulqa),
    **{f.__name__: ("aps/super_glue", f.__name__, "train", "validation", f) for f in (rte, cb, copa, wic, wsc, boolq)},
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "train", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "train", "test", arc),
    "hellaswag": ("Rowan/hellaswag", None, "train", "validation", hellaswag),
    "openbookqa": ("allenai/openbookqa", "main", "train", "test", openbookqa),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "train", "validation", winogrande),
    "commonsenseqa": ("tau/commonsense_qa", None, "train", "validation", arc),
    "sciq": ("allenai/sciq", None, "train", "test", sciq)}
MAX_ROWS = {"train": 2000, "eval": 1000}


def format_row(task, upstream):
    """Return the JSONL form of one row of the hub's data set, or why it is left out: it lacks a prompt ("without a
    prompt"), choices or the gold one, or the gold one stands there twice ("malformed")."""
    try:
        prompt, choices, gold = BENCHMARKS[task][-1](upstream)
    except ValueError:  # no answer, an answer that is not among the choices, no blank
        return "malformed"
    choices = [" " + choice.strip() for choice in choices]
    if len(choices) < 2 or not all(map(as_read, choices)) or not 0 <= gold < len(choices) or twins(choices, gold):
        return "malformed"
    row = {"task": task, "prompt": prompt, "choices": choices, "gold_idx": gold}
    return row if as_read(prompt) else "without a prompt"


def build(out, tasks=tuple(BENCHMARKS)):
    """Download the tasks and write <out>/<task>/{train,eval}.jsonl: at most 2,000 and 1,000 rows, drawn with seed 0."""
    from datasets import load_dataset
    for task in tasks:
        repo, config, *splits, _ = BENCHMARKS[task]
        try:
            train, evaluation = (list(load_dataset(repo, config, split=s, revision=REVISIONS[repo])) for s in splits)
        except Exception as error:                                                   # any error of hub or network
            raise BadInput(f"{task}: {repo}@{REVISIONS[repo][:8]} did not load from the hub ({first_line(error)})")
        if splits[0] == splits[1]:  # truthfulqa has one split of 817 rows: mix its topics, then 417 train and 400 eval
            random.Random(0).shuffle(train)
            train, evaluation = train[400:], train[:400]
        found = {"train": [format_row(task, r) for r in train], "eval": [format_row(task, r) for r in evaluation]}
        rows = {split: [row for row in own if isinstance(row, dict)] for split, own in found.items()}
        dropped = Counter(why for own in found.values() for why in own if isinstance(why, str))
        seen = {row["prompt"] for row in rows["eval"]}                               # before eval is cut to its maximum
        unseen = [row for row in rows["train"] if row["prompt"] not in seen]
        leaked, rows["train"] = len(rows["train"]) - len(unseen), unseen
        for split, n in MAX_ROWS.items():
            if len(rows[split]) > n:
                rows[split] = random.Random(0).sample(rows[split], n)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
            write_whole(pathlib.Path(out, task, f"{split}.jsonl"), lambda path: path.write_text(text, encoding="utf-8"))
        print(f"{task:14s} train {len(rows['train']):5d}  eval {len(rows['eval']):5d}  "
              f"dropped: {dropped['without a prompt']} without a prompt, {dropped['malformed']} malformed, "
              f"{leaked} train rows also in eval")
