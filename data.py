"""Tasks: the JSONL format, tokens, and micro-batches that mix the rows of all tasks.

A task is a folder, <data>/<task>/train.jsonl and eval.jsonl. Its rows are all choices or all open completions:

    {"task": "rte", "prompt": "...\\nAnswer:", "choices": [" True", " False"], "gold_idx": 0}
    {"task": "capital", "prompt": "France's capital is", "completion": " Paris"}

    python data.py --out data/                        builds the 14 benchmarks of the write-up from the hub, in this form
    python data.py --check data/ --bases qwen3-1.7b   what is wrong with a folder, and what is in it

No white space ends a prompt and one space starts a choice or completion, so that the two can be encoded separately and
joined.
"""
import json, pathlib, random, re
from collections import Counter
from typing import NamedTuple

import torch

from cli import BadInput, Parser, commas, first_sentence, run_main, write_whole

MAX_LENGTH = 1024  # tokens of a prompt with its longest choice


class Row(NamedTuple):
    """A completion is the gold one of a single choice: training never sees the others, so to it the kinds are one."""
    task: str
    prompt: str
    choices: list
    gold: int = 0

    @property
    def open(self):
        return len(self.choices) == 1

    @property
    def kind(self):
        return "a completion" if self.open else "choices"


# ---------------------------------------------------------------------------------------------- reading a folder
def stop(problem):
    raise BadInput(problem)


def read_line(line, task):
    """One line of a task's file (bytes) -> (Row, []), or (None, everything that is wrong with it)."""
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode()                                 # half a surrogate pair is not text
    except (ValueError, RecursionError):
        return None, ['not JSON in UTF-8; a line is {"task": ..., "prompt": ..., "choices": [...], "gold_idx": ...} '
                      'or {"task": ..., "prompt": ..., "completion": ...}']
    if not isinstance(row, dict) or "prompt" not in row or not ("completion" in row or {"choices", "gold_idx"} <= set(row)):
        return None, ["task, prompt, choices and gold_idx are needed, or task, prompt and completion"]
    wrong, prompt, choices, gold = [], row["prompt"], row.get("choices"), row.get("gold_idx")
    if row.get("task", task) != task:
        wrong.append(f"task is {row['task']!r} in the folder of {task!r}")
    if not isinstance(prompt, str) or not prompt.strip():
        wrong.append("the prompt is empty")
    elif prompt != prompt.rstrip():
        wrong.append("the prompt ends in white space; the space belongs to the start of what follows it")
    if "completion" in row:
        choices, gold = [row["completion"]], 0
        if "choices" in row or "gold_idx" in row:
            wrong.append("a row has choices and gold_idx or a completion, not both")
        if not isinstance(choices[0], str) or not choices[0].strip():
            wrong.append("the completion is empty or blank")
    elif not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        wrong.append("choices must be a list of two or more strings")
    else:
        wrong += [f"choice {k} is empty or blank" for k, choice in enumerate(choices) if not choice.strip()]
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            wrong.append(f"gold_idx is {gold!r}; 0 to {len(choices) - 1} is accepted")
    return (None if wrong else Row(task, prompt, choices, gold)), wrong


def read_rows(path, task, report=stop):
    """The rows of one JSONL file. report("file:line: why") is called for all that is wrong: to train is to stop at the
    first, to --check is to collect them and go on with the good rows."""
    try:
        lines = path.read_bytes().split(b"\n")                                       # splitlines() would split at \r, too
    except OSError as error:
        report(f"{path}: not readable ({error})")
        return []
    rows = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        row, wrong = read_line(line, task)
        if row and rows and row.open != rows[0].open:
            row, wrong = None, [f"{row.kind} in a file that starts with {rows[0].kind}; a task is all one or all the other"]
        for why in wrong:
            report(f"{path}:{number}: {why}")
        if row:
            rows.append(row)
    return rows


def load_tasks(folder, tasks=None, report=stop):
    """{task: {"train": [Row], "eval": [Row]}} of a data folder, all tasks in it (sorted) or those named."""
    found = sorted({p.parent.name for split in ("train", "eval") for p in folder.glob(f"*/{split}.jsonl")})
    if not found:
        raise BadInput(f"{folder}: no tasks here; a task is a folder <task>/ with train.jsonl and eval.jsonl")
    for task in tasks or ():
        if task not in found:
            raise BadInput(f"unknown task {task!r}; {folder} holds {', '.join(found)}")
    data = {}
    for task in tasks or found:
        data[task] = {split: read_rows(folder / task / f"{split}.jsonl", task, report) for split in ("train", "eval")}
        train, evaluation = data[task].values()
        for split, rows, kind in (("train", train, "training"), ("eval", evaluation, "evaluation")):
            if not rows:
                report(f"{folder / task / split}.jsonl: task {task!r} has no {kind} rows")
        if train and evaluation and train[0].open != evaluation[0].open:
            report(f"{folder / task}/eval.jsonl:1: {evaluation[0].kind} here, {train[0].kind} in train.jsonl; "
                   "a task is all one or all the other")
    return data


def load_run_tasks(saved, folder):
    """The tasks of a run (`saved`: its portal.json), in its order: those that the core was trained with from `folder`, and
    those added later (train.py --add-task) each from where it was."""
    added = saved.get("added", {})
    data = load_tasks(folder, [task for task in saved["config"]["tasks"] if task not in added])
    for task, how in added.items():
        data |= load_tasks(pathlib.Path(how["folder"]).parent, [task])
    return data


def sample(rows, n, seed):
    """A seeded random sample of n rows: (rows to fit on, rows held out of it to choose the epoch by).

    One permutation a task and seed, cut at n, so that the samples of a sweep are nested. A tenth is held out, at most
    100 rows and at least one; with a single row nothing is, and the last epoch is the one selected.
    """
    order = list(rows)
    random.Random(f"{seed}/{order[0].task}").shuffle(order)
    order = order[:n]
    held = min(100, max(len(order) // 10, len(order) > 1))
    return order[held:], order[:held]


# ---------------------------------------------------------------------------------------------- tokens
class Item(NamedTuple):
    """A tokenised row: one prompt and the continuations to be scored after it."""
    task: int
    prompt: list
    continuations: list
    row: Row

    def length(self):
        """Tokens that go into the model: nothing is predicted from the last one of a continuation, so it stays out."""
        return len(self.prompt) + sum(len(tokens) - 1 for tokens in self.continuations)


def encode(tokenizer, rows, tasks, choices="all", max_length=MAX_LENGTH):
    """Tokenise rows -> (items, how many prompts were cut). `choices`: "all", or "gold" for training.

    Prompt and choice are encoded separately and joined, so that no choice changes the prompt's tokens. A prompt that
    would pass `max_length` with its longest choice is cut from the left, behind the BOS token where there is one.

    A completion ends with the EOS token: nothing else tells the model where an open answer ends, and decoding stops
    there. It is an answer token like the others, trained on and counted in log_loss. Choices have none: they are only
    compared with each other.
    """
    if not rows:
        return [], 0
    prompts = tokenizer([row.prompt for row in rows]).input_ids
    texts = [row.choices if choices == "all" else [row.choices[row.gold]] for row in rows]
    flat = iter(tokenizer([text for row in texts for text in row], add_special_tokens=False).input_ids)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    items, cut = [], 0
    for row, ids, text in zip(rows, prompts, texts):
        continuations = [next(flat) for _ in text]
        if not ids or not all(continuations):
            raise BadInput(f"task {row.task!r}: {row.prompt!r} or one of {text} has no tokens in this base's tokenizer")
        if row.open:
            continuations = [continuations[0] + eos]
        room = max(8, max_length - max(map(len, continuations)))
        if len(ids) > room:
            bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            ids, cut = bos + ids[len(ids) - room + len(bos):], cut + 1
        items.append(Item(tasks.index(row.task), ids, continuations, row))
    return items, cut


class Batch(NamedTuple):
    """Rows of any tasks, padded on the right, and where their continuations are predicted. N positions, M tokens."""
    items: list
    task: torch.Tensor        # [R] the task of each row
    ids: torch.Tensor         # [R, S]
    positions: torch.Tensor   # [R, S] position ids: every continuation starts where the prompt ends
    segments: torch.Tensor    # [R, S] 0 prompt, 1, 2, ... continuations, -1 padding; None where no row has two of them
    at: tuple                 # (rows [N], columns [N]) of the positions whose logits are needed
    source: torch.Tensor      # [M] which of the N positions predicts continuation token m
    target: torch.Tensor      # [M] that token
    owner: torch.Tensor       # [M] the continuation it belongs to, counted over the batch
    row: torch.Tensor         # [M] the row it belongs to


def collate(items, device="cpu"):
    """Items -> Batch. A row is its prompt, once, then every continuation behind it; a mask (Base.tree) keeps
    them apart. The prompt's last position predicts the first token of all of them, so its logits are read once."""
    S = max(item.length() for item in items)
    ids, positions, segments = [], [], []                                            # [R][S] each
    rows, columns, source, target, owner, row_of, count = [], [], [], [], [], [], 0
    for r, item in enumerate(items):
        P = end = len(item.prompt)
        padding, own_ids, own_positions, own_segments = S - item.length(), [*item.prompt], [*range(P)], [0] * P
        fork = len(rows)
        rows.append(r), columns.append(P - 1)
        for k, tokens in enumerate(item.continuations, 1):
            start, end = end, end + len(tokens) - 1
            own_ids += tokens[:-1]
            own_positions += range(P, P + len(tokens) - 1)
            own_segments += [k] * (len(tokens) - 1)
            source += [fork, *range(len(rows), len(rows) + len(tokens) - 1)]
            rows += [r] * (len(tokens) - 1)
            columns += range(start, end)
            target += tokens
            owner += [count] * len(tokens)
            row_of += [r] * len(tokens)
            count += 1
        ids.append(own_ids + [0] * padding)
        positions.append(own_positions + [0] * padding)
        segments.append(own_segments + [-1] * padding)
    def tensor(values):
        return to_device(torch.tensor(values), device)
    single = all(sum(len(tokens) > 1 for tokens in item.continuations) <= 1 for item in items)  # nothing to keep apart
    return Batch(items, tensor([item.task for item in items]), tensor(ids), tensor(positions),
                 None if single else tensor(segments), (tensor(rows), tensor(columns)),
                 tensor(source), tensor(target), tensor(owner), tensor(row_of))


def to_device(tensor, device):
    """A copy that the host does not wait for: a round must never make it wait for the GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


PASS = 64  # what one more forward and backward pass costs, in tokens


def micro_batches(items, max_tokens):
    """Cut items, sorted by length whatever their task, into lists of at most max_tokens tokens, padding included
    (an item longer than that stands alone).

    Where to cut: few passes pad much, no padding takes a pass for every length. The cheapest cut of the first j items
    ends in some last list i..j, so best(j) = min over i of best(i) + (j - i) * length(i) + PASS.
    """
    items = sorted(items, key=Item.length, reverse=True)
    lengths = [item.length() for item in items]
    best, start = [0] + [float("inf")] * len(items), [0] * (len(items) + 1)          # cost of the first j; their last list
    for i, length in enumerate(lengths):
        for j in range(i + 1, min(len(items), i + max(1, max_tokens // length)) + 1):
            cost = best[i] + (j - i) * length + PASS
            if cost < best[j]:
                best[j], start[j] = cost, i
    parts, j = [], len(items)
    while j:
        parts.append(items[start[j]:j])
        j = start[j]
    return parts[::-1]                                                               # the longest first: memory fails early


class Cycle:
    """Endless batches of one task: passes over its items, each in a new seeded order; a small task starts anew while
    a large one is still in its first pass."""

    def __init__(self, items, size, seed):
        self.items, self.size, self.random, self.left = items, size, random.Random(seed), []

    def next(self):
        if not self.left:
            self.left = self.random.sample(self.items, len(self.items))
        batch, self.left = self.left[:self.size], self.left[self.size:]
        return batch


# ---------------------------------------------------------------------------------------------- the 14 benchmarks
# A formatter turns one row of the hub's data set into (prompt, choices, gold_idx). The prompts follow
# lm-evaluation-harness. The space between prompt and answer belongs to the choice (tokenizers glue it to the word
# that follows), so a prompt never ends in white space and a choice starts with one space.
def spaced(texts):
    return [" " + text.strip() for text in texts]


def shuffled(choices, gold_idx, key):
    # Some benchmarks always store the right answer in the same place, and a scorer that breaks
    # (ties, NaNs) tends to answer that place. The row's own text is the seed: same row, same order.
    order = list(range(len(choices)))
    random.Random(key).shuffle(order)
    return [choices[i] for i in order], order.index(gold_idx)


def fmt_truthfulqa(row):
    targets = row["mc1_targets"]  # mc1: exactly one choice is labelled 1
    choices, gold = shuffled(targets["choices"], targets["labels"].index(1), row["question"])
    return f"Q: {row['question'].strip()}\nA:", spaced(choices), gold


def fmt_rte(row):
    prompt = f"{row['premise'].strip()}\nQuestion: {row['hypothesis'].strip()} True or False?\nAnswer:"
    return prompt, [" True", " False"], row["label"]  # entailment, not_entailment


def fmt_cb(row):
    prompt = f"{row['premise'].strip()}\nQuestion: {row['hypothesis'].strip()} True, False, or Neither?\nAnswer:"
    return prompt, [" True", " False", " Neither"], row["label"]  # entailment, contradiction, neutral


def fmt_copa(row):
    # One running sentence: the premise loses its full stop, the choice its capital.
    because = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [c.strip()[:1].lower() + c.strip()[1:] for c in (row["choice1"], row["choice2"])]
    return f"{row['premise'].strip().rstrip('.!?')} {because}", spaced(choices), row["label"]


def fmt_wic(row):
    word = row["sentence1"][row["start1"]:row["end1"]]  # as inflected there, not the lemma in row["word"]
    prompt = (f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
              f"Question: Is the word '{word}' used in the same way in the two sentences above?\nAnswer:")
    return prompt, [" no", " yes"], row["label"]


def fmt_wsc(row):
    prompt = (f"{row['text']}\nQuestion: In the passage above, does the pronoun \"{row['span2_text']}\" "
              f"refer to \"{row['span1_text']}\"?\nAnswer:")
    return prompt, [" no", " yes"], row["label"]


def fmt_boolq(row):
    # SuperGLUE's passages start with "Title -- " and its questions come without a question mark.
    return f"{row['passage'].strip()}\nQuestion: {row['question'].strip()}?\nAnswer:", [" no", " yes"], row["label"]


def fmt_arc(row):
    # CommonsenseQA, too. Choices are labelled A, B, C, ... in some rows and 1, 2, 3, ... in others; there are 3 to 5.
    gold = row["choices"]["label"].index(row["answerKey"])
    return f"Question: {row['question'].strip()}\nAnswer:", spaced(row["choices"]["text"]), gold


def fmt_hellaswag(row):
    def clean(text):  # "[title]" and friends are leftovers of the WikiHow pages
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ").strip()
    prompt = clean(row["ctx_a"] + " " + row["ctx_b"].capitalize())
    return prompt, spaced(clean(ending) for ending in row["endings"]), int(row["label"])  # label: "0" to "3"


def fmt_openbookqa(row):
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return f"Question: {row['question_stem'].strip()}\nAnswer:", spaced(row["choices"]["text"]), gold


def fmt_winogrande(row):
    before, after = row["sentence"].split("_", 1)  # the blank; `after` keeps its space, or its "'s"
    choices = spaced(row[option].strip() + after for option in ("option1", "option2"))
    return before.strip(), choices, int(row["answer"]) - 1  # answer: "1" or "2"


def fmt_sciq(row):
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    choices, gold = shuffled(choices, 3, row["question"])
    # Some rows have no supporting paragraph: the last strip() then takes its newline away too.
    return f"{row['support'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:".strip(), spaced(choices), gold


# A commit of each hub repository, so that everyone builds the same rows; each is pinned by other public projects
# too. All hold parquet files: `datasets` 4 and later no longer runs a repository's loading script.
SUPER_GLUE = ("aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646")
ARC = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
# name: (hub repository, config, train split, evaluation split, revision, formatter)
BENCHMARKS = {
    # One split only, 817 rows: build() shuffles it and cuts it into 417 train / 400 eval.
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation", "validation",
                   "741b8276f2d1982aa3d5b832d3ee81ed3b896490", fmt_truthfulqa),
    "rte": (SUPER_GLUE[0], "rte", "train", "validation", SUPER_GLUE[1], fmt_rte),
    "cb": (SUPER_GLUE[0], "cb", "train", "validation", SUPER_GLUE[1], fmt_cb),
    "copa": (SUPER_GLUE[0], "copa", "train", "validation", SUPER_GLUE[1], fmt_copa),
    "wic": (SUPER_GLUE[0], "wic", "train", "validation", SUPER_GLUE[1], fmt_wic),
    "wsc": (SUPER_GLUE[0], "wsc", "train", "validation", SUPER_GLUE[1], fmt_wsc),  # not wsc.fixed
    "boolq": (SUPER_GLUE[0], "boolq", "train", "validation", SUPER_GLUE[1], fmt_boolq),  # google/boolq has no titles
    "arc_easy": (ARC[0], "ARC-Easy", "train", "test", ARC[1], fmt_arc),
    "arc_challenge": (ARC[0], "ARC-Challenge", "train", "test", ARC[1], fmt_arc),
    "hellaswag": ("Rowan/hellaswag", None, "train", "validation",
                  "218ec52e09a7e7462a5400043bb9a69a41d06b76", fmt_hellaswag),
    "openbookqa": ("allenai/openbookqa", "main", "train", "test",
                   "388097ea7776314e93a529163e0fea805b8a6454", fmt_openbookqa),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "train", "validation",
                   "01e74176c63542e6b0bcb004dcdea22d94fb67b5", fmt_winogrande),
    "commonsenseqa": ("tau/commonsense_qa", None, "train", "validation",
                      "94630fe30dad47192a8546eb75f094926d47e155", fmt_arc),
    "sciq": ("allenai/sciq", None, "train", "test",
             "2c94ad3e1aafab77146f384e23536f97a4849815", fmt_sciq),
}
MAX_ROWS = {"train": 2000, "eval": 1000}


def format_rows(task, upstream):
    rows = []
    for row in upstream:
        try:
            prompt, choices, gold = BENCHMARKS[task][-1](row)
        except ValueError:  # no answer, an answer that is not among the choices, no blank
            continue
        if prompt and len(choices) > 1 and all(c.strip() for c in choices) and 0 <= gold < len(choices):
            rows.append({"task": task, "prompt": prompt, "choices": choices, "gold_idx": gold})
    return rows


def build(out, tasks=tuple(BENCHMARKS)):
    """Download the tasks and write <out>/<task>/{train,eval}.jsonl: at most 2,000 and 1,000 rows, drawn with seed 0."""
    from datasets import load_dataset
    for task in tasks:
        repo, config, train_split, eval_split, revision, _ = BENCHMARKS[task]
        splits = {"train": train_split, "eval": eval_split}
        try:
            splits = {name: list(load_dataset(repo, config, split=split, revision=revision))
                      for name, split in splits.items()}
        except Exception as error:                                                   # whatever the hub or the network says
            raise BadInput(f"{task}: {repo}@{revision[:8]} could not be loaded from the hub ({first_sentence(error)})")
        if train_split == eval_split:  # truthfulqa: cut its one split in two, after mixing the topics
            random.Random(0).shuffle(splits["train"])
            splits = {"eval": splits["train"][:400], "train": splits["train"][400:]}
        rows = {split: format_rows(task, upstream) for split, upstream in splits.items()}
        malformed = sum(map(len, splits.values())) - sum(map(len, rows.values()))
        # A question that is also an evaluation question, sampled or not, leaves train.
        seen = {row["prompt"] for row in rows["eval"]}
        fresh = [row for row in rows["train"] if row["prompt"] not in seen]
        leaked, rows["train"] = len(rows["train"]) - len(fresh), fresh
        for split, n in MAX_ROWS.items():
            if len(rows[split]) > n:
                rows[split] = random.Random(0).sample(rows[split], n)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
            write_whole(pathlib.Path(out, task, f"{split}.jsonl"), lambda path: path.write_text(text, encoding="utf-8"))
        print(f"{task:14s} train {len(rows['train']):5d}  eval {len(rows['eval']):5d}  "
              f"dropped: {malformed} malformed, {leaked} train rows also in eval")


# ---------------------------------------------------------------------------------------------- checking a folder
def shares(values):
    return ", ".join(f"{value} {n / len(values):.0%}" for value, n in sorted(Counter(values).items()))


def check(folder, tasks=None, specs=()):
    """Print what a folder of tasks holds, and every problem; BadInput at the end if there was one. A problem is what
    training would refuse. Duplicates, an overlap and an odd balance are allowed, and worth knowing before."""
    from transformers import AutoTokenizer
    from bases import pretrained
    def note(what, prompts):
        example = f", such as {json.dumps(prompts[0][-60:], ensure_ascii=False)}" if prompts else ""
        print(f"  {len(prompts)} {what}{example}")
    problems = []
    data = load_tasks(folder, tasks, problems.append)
    tokenizers = {spec: pretrained(AutoTokenizer, spec) for spec in specs}
    for task, splits in data.items():
        kind = next(("completions" if row.open else "choices" for rows in splits.values() for row in rows), "no good rows")
        print(f"{task}: {kind}, train {len(splits['train'])}, eval {len(splits['eval'])}")
        for split, rows in splits.items():
            if rows and not rows[0].open:
                print(f"  {split} gold_idx: {shares([row.gold for row in rows])}")
                if len({tuple(sorted(row.choices)) for row in rows}) == 1:           # one set of labels, in whatever order
                    texts = shares([json.dumps(row.choices[row.gold], ensure_ascii=False) for row in rows])
                    print(f"  {split} gold text: {texts}")
            counts = Counter((row.prompt, tuple(row.choices), row.gold) for row in rows)
            note(f"duplicate rows in {split}", [row[0] for row, n in counts.items() for _ in range(n - 1)])
        seen = {row.prompt for row in splits["train"]}
        note("eval rows whose prompt is in train, too", [row.prompt for row in splits["eval"] if row.prompt in seen])
        for spec, tokenizer in tokenizers.items():
            try:                                                                     # as training and evaluation do
                parts = [(rows, choices) for rows, choices in zip(splits.values(), ("gold", "all"))]
                items = [item for rows, choices in parts for item in encode(tokenizer, rows, [task], choices, 10 ** 9)[0]]
                cut = sum(encode(tokenizer, rows, [task], choices)[1] for rows, choices in parts)
            except BadInput as error:
                problems.append(f"{folder / task}: {spec}: {error}")
                continue
            lengths = sorted(len(item.prompt) + max(map(len, item.continuations)) for item in items)
            if lengths:
                print(f"  tokens of {spec}: median {lengths[len(lengths) // 2]}, max {lengths[-1]}; "
                      f"{cut} of {len(items)} prompts would be cut to {MAX_LENGTH}")
    for problem in problems:
        print(problem)
    if problems:
        raise BadInput(f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}, named above")
    print("no problems")


def main(argv=None):
    parser = Parser(description="Build the 14 benchmarks from the Hugging Face hub, or check a folder of tasks.",
                    allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default="data", metavar="DIR", help="build them there (default: data/)")
    parser.add_argument("--check", type=pathlib.Path, metavar="DIR", help="check this folder (exit code 2: problems)")
    parser.add_argument("--bases", type=commas(), default=(), metavar="A,B", help="--check: whose tokens are counted")
    parser.add_argument("--tasks", "--task", type=commas(), metavar="A,B", help="some of them (default: all)")
    args = parser.parse_args(argv)
    if args.check:
        return check(args.check, args.tasks, args.bases)
    for task in args.tasks or ():
        if task not in BENCHMARKS:
            raise BadInput(f"unknown task {task!r}; accepted are {', '.join(BENCHMARKS)}")
    build(args.out, args.tasks or BENCHMARKS)


if __name__ == "__main__":
    run_main(main)
