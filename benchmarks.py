"""The 14 benchmarks of the write-up: their prompts, their download, and the check of a folder of tasks.

    python data.py --out data/                        builds the benchmarks from the hub
    python data.py --check data/ --bases qwen3-1.7b   lists what a folder holds and what is wrong with it
"""
import json, pathlib, random, re
from collections import Counter

from bases import load_tokenizer
from data import as_read, load_tasks, twins
from runtime.files import BadInput, first_line, write_whole
from runtime.flags import parse, run_main
from tokens import MAX_LENGTH, around, limits, odd_rows, to_items, tokenize


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


def note(what, examples, before=""):
    """Prints a count of examples and the end of the first."""
    example = f", such as {json.dumps(examples[0][-60:], ensure_ascii=False)}" if examples else ""
    print(f"  {before}{len(examples)} {what}{example}")


def describe(task, splits):
    """Print kind and number of a task's rows, the balance of the gold choice, duplicates, and the splits' overlap."""
    def shares(values):
        return ", ".join(f"{value} {n / len(values):.0%}" for value, n in sorted(Counter(values).items()))
    train, evaluation = splits.values()
    kind = "no good rows" if not train + evaluation else "completions" if (train + evaluation)[0].open else "choices"
    print(f"{task}: {kind}, train {len(train)}, eval {len(evaluation)}")
    for split, rows in splits.items():
        if rows and not rows[0].open:
            print(f"  {split} gold_idx: {shares([row.gold for row in rows])}")
            if len({tuple(sorted(row.choices)) for row in rows}) == 1:               # one set of labels in any order
                texts = shares([json.dumps(row.choices[row.gold], ensure_ascii=False) for row in rows])
                print(f"  {split} gold text: {texts}")
        counts = Counter((as_read(row.prompt), *map(as_read, row.choices), row.gold) for row in rows)
        note(f"duplicate rows in {split}", [row[0] for row, n in counts.items() for _ in range(n - 1)])
    seen = {as_read(row.prompt) for row in train}
    note("eval rows whose prompt is in train, too", [row.prompt for row in evaluation if as_read(row.prompt) in seen])


def odd_texts(rows):
    """Return {what: [example]} of rows that can be trained on but are seldom meant, an example a row."""
    gold, odd = {}, {}
    def count(what, example):
        odd.setdefault(what, []).append(example)
    for row in rows:
        if not row.open:
            same = gold.setdefault((as_read(row.prompt), *sorted(map(as_read, row.choices))), Counter())
            same[as_read(row.choices[row.gold])] += 1
        if not all(choice[0].isspace() for choice in row.choices):
            choice = next(choice for choice in row.choices if not choice[0].isspace())
            count("rows with a choice or completion that does not start with white space, so that it goes on with the "
                  "prompt's last word", row.prompt[-40:] + choice[:20])
        if len(set(map(as_read, row.choices))) < len(row.choices):
            count("rows in which two wrong choices read the same", row.prompt)
    for (prompt, *_), same in gold.items():
        for _ in range(same.total() if len(same) > 1 else 0):
            count("rows with the prompt and choices of another row, but another gold choice", prompt)
    return odd


def describe_tokens(folder, task, splits, spec, tokenizer, problems):
    """Print the lengths of a task's rows in a base's tokens, and three rows around the joint of prompt and choices.
    Return what odd_rows finds; append to `problems` what encode refuses."""
    rows = splits["train"] + splits["eval"]
    try:
        found = tokenize(tokenizer, rows)
        to_items(tokenizer, rows, found, [task])
        n = len(splits["train"])                                                     # the choices encoded in use
        cut = sum(to_items(tokenizer, rows[part], found[part], [task], choices)[1]
                  for part, choices in ((slice(n), "gold"), (slice(n, None), "all")))
    except BadInput as error:
        problems.append(f"{folder / task}: {spec}: {error}")
        return {}
    if not rows:
        return {}
    lengths = sorted(len(prompt) + max(map(len, continuations if k >= n else [continuations[rows[k].gold]]))
                     for k, (_, prompt, continuations) in enumerate(found))
    print(f"  tokens of {spec}: median {lengths[len(lengths) // 2]}, max {lengths[-1]}; {cut} of {len(rows)} prompts "
          f"would be cut to {min(MAX_LENGTH, limits(tokenizer).length or MAX_LENGTH)}")
    for tokens in found[:3]:
        print(f"    {around(tokenizer, tokens)}")
    return odd_rows(tokenizer, rows, found)


def check(folder, tasks=None, specs=()):
    """Print what a folder of tasks holds, with warnings; the rows' tokens for the bases `specs`; and its problems: what
    training would refuse. Raises BadInput at the end if there are any. Duplicates, an overlap and an odd balance are
    none, nor are they warnings."""
    problems, warnings = [], 0
    tokenizers = {spec: load_tokenizer(spec) for spec in specs}
    data = load_tasks(folder, tasks, problems.append)
    for task, splits in data.items():
        describe(task, splits)
        odd = [("", *found) for found in odd_texts(splits["train"] + splits["eval"]).items()]
        for spec, tokenizer in tokenizers.items():
            found = describe_tokens(folder, task, splits, spec, tokenizer, problems)
            odd += [(f"{spec}: ", *each) for each in found.items()]
        for whose, what, examples in odd:
            note(what, examples, f"warning: {whose}")
        warnings += len(odd)
    if problems:
        print(*problems, sep="\n")
        raise BadInput(f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}, named above")
    print("no problems" + (f"; {warnings} warning{'s' * (warnings > 1)}" if warnings else ""))


def main(argv=None):
    args = parse(__doc__, "out check bases tasks", argv,
                 out=dict(default=pathlib.Path("data"), help="build the benchmarks in this folder"),
                 check=dict(type=pathlib.Path, metavar="DIR", help="check this folder (exit code 2: problems)"),
                 bases=dict(help="--check: the bases whose tokens are counted"))
    if args.check:
        return check(args.check, args.tasks, args.bases or ())
    for task in args.tasks or ():
        if task not in BENCHMARKS:
            raise BadInput(f"unknown task {task!r}; accepted are {', '.join(BENCHMARKS)}")
    build(args.out, args.tasks or BENCHMARKS)


if __name__ == "__main__":
    run_main(main)
