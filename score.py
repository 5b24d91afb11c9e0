"""The numbers: a choice's log-probability, acc_norm, log_loss, exact match, recovered lift.

    score(choice)  = log p(choice | prompt) / characters(choice)      the leading space counts
    acc_norm       = share of rows whose gold choice scores above every other (a tie is an error)
    log_loss       = NLL of the gold choices / their number of tokens (a completion's tokens include the EOS at its end)
    exact match    = share of open rows whose greedy decoding is the completion; it is reported as acc_norm
    recovered lift = (acc - acc_base) / (acc_LoRA - acc_base)         retention = acc / acc_LoRA

Training selects its epoch by these numbers on rows held out of train; evaluation reports them on evaluation rows.
"""
import torch
from tqdm import tqdm

from data import collate, micro_batches
from runtime.distributed import NO_BAR, map_sharded


# ---------------------------------------------------------------------------------------------- the two numbers
@torch.no_grad()
def score(base, adapters, items, max_tokens):
    """Returns for every item, in order, the log-probability of each of its continuations, a list of floats. adapters
    None: the bare base. A prompt is encoded once with its continuations behind it, where the base's layers can keep
    them apart (Base.packs); micro-batches mix tasks."""
    split = [[item] if base.packs else item.rows() for item in items]
    def log_p_of(items):
        found, parts = {}, micro_batches(items, max_tokens)
        for part in tqdm(parts, desc=f"scoring on {base.name}", unit="batch", delay=2, leave=False, disable=NO_BAR):
            batch = collate(part, base.device)
            logits = full_precision(base.logits(batch, adapters))                    # [N, vocabulary]
            log_p = logits[batch.source, batch.target] - logits.logsumexp(-1)[batch.source]  # [M]
            sums = torch.zeros(sum(len(item.continuations) for item in part), dtype=torch.float64, device=base.device)
            sums = iter(sums.index_add_(0, batch.owner, log_p.double()).tolist())
            found.update({id(item): [next(sums) for _ in item.continuations] for item in part})
        return [found[id(item)] for item in items]
    log_p = iter(map_sharded(log_p_of, [row for rows in split for row in rows]))
    return [[value for _ in rows for value in next(log_p)] for rows in split]


def full_precision(logits):
    """Returns half-precision logits as float32, for a softmax over a vocabulary; float32 and float64 as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def decode(base, adapters, items, max_tokens):
    """Returns for every item with a completion, in order, the greedily decoded text. Decoding stops at EOS or after
    twice as many tokens as the longest gold completion of `items` has, at least 16. Only the first line counts (as
    many lines as the gold completion has): a bare base does not stop there."""
    limit = max(16, 2 * max((len(item.continuations[0]) for item in items), default=0))
    def texts_of(items):
        found = {}
        for part in micro_batches(items, max_tokens):
            texts = base.generate([item.prompt for item in part], adapters, [item.task for item in part], limit)
            for item, text in zip(part, texts):
                lines = 1 + item.row.choices[0].rstrip().count("\n")
                found[id(item)] = "\n".join(text.split("\n")[:lines])
        return [found[id(item)] for item in items]
    return map_sharded(texts_of, items)


def per_character(item, log_p):
    """Each choice's log-probability divided by its length in characters."""
    return [lp / len(choice) for lp, choice in zip(log_p, item.row.choices)]


def evaluate(base, adapters, items, max_tokens):
    """Returns {task index: {"acc_norm", "log_loss", "rows", "correct": [bool for each row]}} of the tasks in `items`.
    A task of completions has its exact match as "acc_norm", and "metric": "exact_match"."""
    cells, texts = {}, iter(decode(base, adapters, [item for item in items if item.row.open], max_tokens))
    for item, log_p in zip(items, score(base, adapters, items, max_tokens)):
        gold, scores = item.row.gold, per_character(item, log_p)
        cell = cells.setdefault(item.task, {"correct": [], "nll": 0.0, "tokens": 0, "open": item.row.open})
        cell["correct"].append(next(texts).strip() == item.row.choices[0].strip() if item.row.open
                               else scores[gold] > max(s for k, s in enumerate(scores) if k != gold))
        cell["nll"] -= log_p[gold]
        cell["tokens"] += len(item.continuations[gold])
    return {task: {"acc_norm": sum(c["correct"]) / len(c["correct"]), "log_loss": c["nll"] / c["tokens"],
                   "rows": len(c["correct"]), "correct": c["correct"],
                   **({"metric": "exact_match"} if c["open"] else {})}
            for task, c in cells.items()}


def macro(cells):
    """The mean over tasks: the element-wise mean of tuples of numbers."""
    return tuple(sum(values) / len(cells) for values in zip(*cells))


def lift(acc, base, lora):
    """The recovered lift, or None where the LoRA gains nothing."""
    return (acc - base) / (lora - base) if lora > base else None
