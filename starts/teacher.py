"""A teacher's labels: the answers of a base that has adapters already, in place of labels that nobody has."""
import torch

from bases import encode
from runtime.files import BadInput
from runtime.saved import load_portal
from score import per_character, score
from tasks.rows import SoftRow, sample


@torch.no_grad()
def soft_rows(teacher, adapters, rows, tasks, max_tokens):
    """Returns {id of a row: its SoftRow}, in which the answers of a base with its adapters take the label's place:
    weights = softmax over the choices of log p(choice | prompt), gold = what acc_norm counts as its answer. Raises
    BadInput for completions, which have no choices."""
    if opened := [row.task for row in rows if row.open]:
        raise BadInput(f"--teacher: task {opened[0]} is of completions; a teacher is asked about choices")
    items, _ = encode(teacher.tokenizer, [row._replace(gold=0) for row in rows], tasks)
    found = {}
    for row, item, log_p in zip(rows, items, score(teacher, adapters, items, max_tokens)):
        weights, scores = torch.tensor(log_p, dtype=torch.float64).softmax(0), per_character(item, log_p)
        found[id(row)] = SoftRow(*row[:3], scores.index(max(scores)), tuple(round(float(w), 6) for w in weights))
    return found


def answers(run, tag, teacher, data, n, seed, max_tokens):
    """Returns soft_rows of the first n rows of every task's sample, with the adapters of a run's converter `tag`."""
    rows = [row for splits in data.values() for part in sample(splits["train"], n, seed) for row in part]
    portal = load_portal(run, [tag]).to(teacher.device)
    return soft_rows(teacher, portal.adapters(tag), rows, portal.cfg.tasks, max_tokens)
