"""The check of a folder of tasks: what it holds, what training would refuse, and what is seldom meant."""
import json
from collections import Counter

from bases import around, load_tokenizer, most_tokens, odd_rows, to_items, tokenize
from runtime.files import BadInput
from tasks.rows import as_read, load_tasks


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
          f"would be cut to {most_tokens(tokenizer)}")
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
