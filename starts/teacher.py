"""A teacher's labels: the answers of a base that has adapters already, in place of labels that nobody has.

A teacher is asked about choices by their probabilities, for completions by greedy decoding."""
import torch

from bases import encode, load_base, to_items, tokenize
from exports.peft import load_peft
from runtime.files import BadInput
from runtime.saved import load_portal
from score import decode, per_character, score
from tasks.rows import SoftRow, as_read, sample

LIMIT = 64  # tokens of an answer in a completion's place


@torch.no_grad()
def soft_rows(teacher, adapters, rows, tasks, max_tokens):
    """Returns {id of a row: it with the answer of a base with its adapters in the label's place}; no label is read.

    Of choices it is a SoftRow: weights = softmax over the choices of log p(choice | prompt), gold = what acc_norm
    counts as its answer. For completions see there; a row without an answer is left out."""
    found = completions(teacher, adapters, [row for row in rows if row.open], tasks, max_tokens)
    rows = [row for row in rows if not row.open]
    items, _ = encode(teacher.tokenizer, [row._replace(gold=0) for row in rows], tasks)
    for row, item, log_p in zip(rows, items, score(teacher, adapters, items, max_tokens)):
        weights, scores = torch.tensor(log_p, dtype=torch.float64).softmax(0), per_character(item, log_p)
        found[id(row)] = SoftRow(*row[:3], scores.index(max(scores)), tuple(round(float(w), 6) for w in weights))
    return found


def completions(teacher, adapters, rows, tasks, max_tokens):
    """Returns {id of an open row: it with the first line of the decoded text as its completion}. Rows whose answer is
    empty, holds a special token, or has not ended within LIMIT tokens are left out; prints how many of a task. Where
    the tokenizer decodes a text without the space before it, one is put there."""
    found, tokenizer, left = {}, teacher.tokenizer, {}
    asked = [row._replace(choices=[" a"]) for row in rows]                           # in the place of an unread label
    parts = tokenize(tokenizer, asked)
    def ask(which, limit):
        # As many tokens as half the limit stand for the completion: score.decode goes on for twice as many.
        room = [[tokenizer.eos_token_id or 0] * (limit // 2)]
        own = [parts[k]._replace(continuations=room) for k in which]
        items, _ = to_items(tokenizer, [asked[k] for k in which], own, tasks)
        return dict(zip(which, decode(teacher, adapters, items, max_tokens)))
    texts = ask(range(len(rows)), LIMIT)
    # A token has at least a byte, so that a shorter text has ended. Of the others, those have that do not go on.
    again = ask([k for k, text in texts.items() if len(text.encode()) >= LIMIT // 2], LIMIT + 16)
    bare = rows and not tokenizer.decode(parts[0].continuations[0][:1])[:1].isspace()
    for k, row in enumerate(rows):
        text = texts[k].rstrip()
        if not as_read(text) or again.get(k, texts[k]) != texts[k] or any(
                token in text for token in tokenizer.all_special_tokens):
            left[row.task] = left.get(row.task, 0) + 1
        else:
            found[id(row)] = row._replace(choices=[" " * (bare and not text[0].isspace()) + text])
    for task, n in left.items():
        print(f"{task}: {n} of {sum(row.task == task for row in rows)} rows are left out: {teacher.name}'s answer is "
              f"empty, holds a special token, or has not ended after {LIMIT} tokens")
    return found


def of_run(run, tag, base):
    """Returns (base, its Adapters by a run's converter `tag`), for `answers`."""
    return base, load_portal(run, [tag]).to(base.device).adapters(tag)


def of_peft(args, tasks):
    """Returns (the base --teacher, the Adapters of the PEFT folders in --adapters), for `answers`. Raises BadInput."""
    base = load_base(args.teacher, args.device, args.dtype, device_map=args.device_map, quantize=args.quantize)
    return base, load_peft(args.adapters, base, tasks)


def answers(teacher, adapters, tasks, data, n, seed, max_tokens):
    """Returns soft_rows of the first n rows of every task's sample of `data` (tasks.rows.load_tasks)."""
    rows = [row for splits in data.values() for part in sample(splits["train"], n, seed) for row in part]
    return soft_rows(teacher, adapters, rows, tasks, max_tokens)


def taught(drawn, soft):
    """Returns {task: (train rows, held-out rows)} `drawn` with the answers `soft` in the place of labels, without the
    rows that have none. Raises BadInput for a task that has no row left to train on."""
    rows = {task: tuple([soft[id(row)] for row in part if id(row) in soft] for part in parts)
            for task, parts in drawn.items()}
    if none := [task for task, (train, _) in rows.items() if not train]:
        raise BadInput(f"--teacher: no training row of {', '.join(none)} has an answer that can be a completion, one "
                       f"that is not empty, holds no special token, and ends within {LIMIT} tokens")
    return rows
