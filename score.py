"""The numbers: a choice's log-probability, acc_norm, log_loss, exact match, recovered lift.

    score(choice)  = log p(choice | prompt) / characters(choice)      the leading space counts
    acc_norm       = share of rows whose gold choice scores above every other (a tie is an error)
    log_loss       = NLL of the gold choices / their number of tokens (a completion's tokens include the EOS at its end)
    exact match    = share of open rows whose greedy decoding reads as the completion; it is reported as acc_norm.
                     Decoding ends at EOS, at the end of the last line that counts (as many as the completion has), or
                     after twice as many tokens as the row's own completion has, at least 16: the number of a task is
                     the same whatever else is evaluated. Scoring the completion tells what decoding would begin with,
                     which settles most rows (in half precision but for logits that round alike); the others are decoded
    acc_norm_harness = lm-evaluation-harness's acc_norm: without the leading space; of equal scores the first counts
    recovered lift = (acc - acc_base) / (acc_LoRA - acc_base)         retention = acc / acc_LoRA

Training selects its epoch by these numbers on rows held out of train; evaluation reports them on evaluation rows.
"""
import math, unicodedata

import torch
from tqdm import tqdm

from bases import decoding_limit, limits
from data import collate, micro_batches
from runtime.distributed import NO_BAR, map_sharded
from runtime.files import BadInput
from tasks.rows import as_read, visible


# ---------------------------------------------------------------------------------------------- the two numbers
def score(base, adapters, items, max_tokens):
    """Returns for every item, in order, the log-probability of each of its continuations, a list of floats. adapters
    None: the bare base. Raises BadInput for scores that are not finite."""
    return [log_p for log_p, _ in score_and_best(base, adapters, items, max_tokens)]


@torch.no_grad()
def score_and_best(base, adapters, items, max_tokens):
    """Returns for every item, in order, (what `score` says, the most probable token in the place of each token of its
    first continuation). A prompt is encoded once with its continuations behind it, where the base's layers can keep
    them apart (Base.packs); micro-batches mix tasks of choices."""
    split = [[item] if base.packs else item.rows() for item in items]
    def found_of(items):
        found, parts = {}, scoring_batches(items, max_tokens)
        for part in tqdm(parts, desc=f"scoring on {base.name}", unit="batch", delay=2, leave=False, disable=NO_BAR):
            batch = collate(part, base.device)
            _, nll, best = base.nll(batch, adapters)                                 # [M] each
            sums = torch.zeros(sum(len(item.continuations) for item in part), dtype=torch.float64, device=base.device)
            sums, best = iter((-sums.index_add_(0, batch.owner, nll.double())).tolist()), iter(best.tolist())
            for item in part:
                own = [[next(best) for _ in tokens] for tokens in item.continuations]
                found[id(item)] = [next(sums) for _ in own], own[0]
        return [found[id(item)] for item in items]
    rows = iter(map_sharded(found_of, [row for rows in split for row in rows]))
    found = [[next(rows) for _ in own] for own in split]                             # [(log_p of some, best)] an item
    found = [([value for log_p, _ in own for value in log_p], own[0][1]) for own in found]
    wrong = {item.row.task: None for item, (log_p, _) in zip(items, found) if not all(map(math.isfinite, log_p))}
    if wrong:                                                                        # they would count as wrong answers
        fit = " or a fit with a smaller --lr" if adapters else ""
        raise BadInput(f"base {base.name}{' with adapters' if adapters else ''}, task {', '.join(wrong)}: scores are "
                       f"not finite; try --dtype float32 or bfloat16{fit}")
    return found


def scoring_batches(items, max_tokens):
    """Returns micro-batches of `items`: those of choices mix tasks, those of completions do not. A batch's rounding
    depends on all of its rows, so that in half precision another task's rows would now and then change a token."""
    kinds = {}
    for item in items:
        kinds.setdefault(item.task if item.row.open else None, []).append(item)
    return [part for own in kinds.values() for part in micro_batches(own, max_tokens)]


@torch.no_grad()
def delta_ratio(base, adapters, items):
    """Returns how far the adapters move a projection's output: the mean over the adapted layers of
    |scale B A x| / |W x + bias|, norms over all tokens x that a forward pass of `items` gives the layer."""
    batch, found = collate(items, base.device), []
    length = torch.tensor([item.length() for item in items], device=base.device)
    real = torch.arange(batch.ids.shape[1], device=base.device) < length[:, None]    # [R, S] without the padding
    def measure(layer, inputs, y):
        if layer.path in base.active.factors:
            (x,), (A, B), mask = inputs, base.active.factors[layer.path], real.to(inputs[0].device)
            x, task = x.reshape(*mask.shape, -1), base.active.task[x.device]         # [R, S, d_in]
            delta = base.active.scale * x.float() @ A[task].float().mT @ B[task].float().mT  # [R, S, d_out]
            found.append(float(delta[mask].norm() / layer.linear(x)[mask].float().norm()))
    hooks = [base.model.get_submodule(path).register_forward_hook(measure) for path in base.linears]
    base.logits(batch, adapters)
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


@torch.no_grad()
def task_spread(adapters):
    """Returns (shared, rank): the share of the energy of B that all T tasks have in common, |mean_t B_t|^2 / mean_t
    |B_t|^2, and the effective rank of what tells them apart, at most T - 1: exp of the entropy of its squared singular
    values' shares. Of the first group of Adapters; (1, 0) where nothing tells them apart."""
    B = next(iter(adapters.B.values())).flatten(1).double()                          # [T, L d_out r]
    apart = B - B.mean(0)
    energies = torch.linalg.eigvalsh(apart @ apart.T).clamp(min=0)                   # [T]
    if not energies.sum() > 0:
        return 1.0, 0.0
    shares = energies / energies.sum()
    return float(1 - energies.sum() / B.square().sum()), float(torch.special.entr(shares).sum().exp())


def exact_matches(base, adapters, scored, max_tokens):
    """Returns {id of an item: whether greedy decoding gives its completion} of pairs (item with a completion, best).
    best: see score_and_best. Only rows that these tokens do not settle are decoded, as far as they may be right."""
    found = {id(item): settled(base.tokenizer, item, best) for item, best in scored}
    unsettled = [item for item, _ in scored if found[id(item)] is None]
    for item, text in zip(unsettled, decode(base, adapters, unsettled, max_tokens, early=True)):
        found[id(item)] = reads_as(text, golds(base.tokenizer, item))
    return found


def settled(tokenizer, item, best):
    """Returns whether greedy decoding gives an item's completion, or None where that cannot be told.

    best: the most probable token after the prompt, and after each token of the completion. Decoding begins with those,
    up to the first that differs from the completion's. The text so far is then whole, or the completion does not begin
    like that; or else other tokens spell the same, and may go on like it or not."""
    gold, texts, eos = item.continuations[0], golds(tokenizer, item), tokenizer.eos_token_id
    k = next((k for k, (own, token) in enumerate(zip(gold, best)) if own != token), len(gold) - 1)
    new, lines = best[:k + 1], lines_of(texts)
    text = tokenizer.decode(new[:-1] if new[-1] == eos else new, clean_up_tokenization_spaces=False)
    if new[-1] == eos or text.count("\n") >= lines:
        return reads_as(first_lines(text, lines), texts)
    return None if begins(text, texts) else False


def reads_as(text, texts):
    """Returns whether a person reads a text as one of `texts`."""
    return as_read(text) in map(as_read, texts)


def begins(text, texts):
    """Returns whether a text that goes on may become one of `texts`."""
    start = letters(text.rstrip("\ufffd"))                                           # a character's first bytes
    end = next((k for k in range(len(start), 0, -1) if not unicodedata.combining(start[k - 1])), 0)
    return any(letters(whole).startswith(start[:end]) for whole in texts)            # marks: others may come before


def letters(text):
    """Returns a text without white space, its characters taken apart from their marks."""
    return "".join(unicodedata.normalize("NFD", visible(text)).split())


def lines_of(texts):
    """Returns how many lines are decoded where any of `texts` would be right."""
    return 1 + max(text.rstrip().count("\n") for text in texts)


def first_lines(text, n):
    return "\n".join(text.split("\n")[:n])


def decode(base, adapters, items, max_tokens, end=None, early=False):
    """Returns for every item with a completion, in order, the greedily decoded text: as many lines as its gold
    completion has, a bare base does not stop there, and at most the tokens of bases.decoding_limit. end: (tokens,
    lines) instead, where a completion is not to be read; early: a text ends where it can no longer become the
    completion."""
    wanted = {} if end else {id(item): golds(base.tokenizer, item) for item in items}
    ends, reach = {}, limits(base.tokenizer).length or math.inf                      # the last token is not run through
    for item in items:
        most, lines = end or (decoding_limit(item.continuations[0]), lines_of(wanted[id(item)]))
        ends[id(item)] = min(most, reach + 1 - len(item.prompt)), lines
    def texts_of(items):
        found, parts = {}, decoding_batches(items, [ends[id(item)][0] for item in items], max_tokens)
        for part in tqdm(parts, desc=f"decoding on {base.name}", unit="batch", delay=2, leave=False, disable=NO_BAR):
            most, lines = zip(*(ends[id(item)] for item in part))
            def hopeless(r, text):
                return not begins(text, wanted[id(part[r])])
            texts = base.generate([item.prompt for item in part], adapters, [item.task for item in part], most, lines,
                                  hopeless if early else None)
            for item, text, n in zip(part, texts, lines):
                found[id(item)] = first_lines(text, n)
        return [found[id(item)] for item in items]
    return map_sharded(texts_of, items)


def decoding_batches(items, limits, max_tokens):
    """Returns `items` in lists of one task each, sorted by the length of their prompts, whose rows x (longest prompt +
    highest limit) is at most max_tokens; a longer item is a list of its own. A batch's rounding depends on all of its
    rows, so that in half precision another task's rows would now and then change a token."""
    parts, key = [], None
    for item, limit in sorted(zip(items, limits), key=lambda pair: (pair[0].task, -len(pair[0].prompt))):
        if key is None or item.task != key[0] or (len(parts[-1]) + 1) * (key[1] + max(key[2], limit)) > max_tokens:
            parts.append([])
            key = item.task, len(item.prompt), 0
        parts[-1].append(item)
        key = *key[:2], max(key[2], limit)
    return parts


def golds(tokenizer, item):
    """Returns the texts that are an item's completion: its own, and what its tokens are decoded to. These differ where
    a tokenizer changes texts (small letters, NFKC). Where one token begins in the prompt and ends in the completion,
    the item's prompt ends before it, and only the second is right."""
    text, ids = item.row.choices[0], [k for k in item.continuations[0] if k != tokenizer.eos_token_id]
    if tokenizer.unk_token_id in ids:                                                # any unknown word would do
        return [text]
    read = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    own, whole = letters(text), letters(read)
    return [read] if own != whole and whole.endswith(own) else [text, *filter(as_read, [read])]


def per_character(item, log_p):
    """Each choice's log-probability divided by its length in characters."""
    return [lp / len(choice) for lp, choice in zip(log_p, item.row.choices)]


def harness_choice(item, log_p):
    """Returns the choice that lm-evaluation-harness would count: the first with the highest log-probability a
    character, without the one space that joins it to the prompt."""
    scores = [lp / len(choice.removeprefix(" ")) for lp, choice in zip(log_p, item.row.choices)]
    return scores.index(max(scores))


def evaluate(base, adapters, items, max_tokens):
    """Returns {task index: {"acc_norm", "log_loss", "rows", "correct": [bool for each row], "acc_norm_harness"}} of
    the tasks in `items`. A task of completions has its exact match as "acc_norm", and "metric": "exact_match" in place
    of the last. Where rows have wordings that training rows lack, "held_out" is their {"acc_norm", "rows"}. Raises
    BadInput: see score."""
    cells, scored = {}, score_and_best(base, adapters, items, max_tokens)
    completed = [(item, best) for item, (_, best) in zip(items, scored) if item.row.open]
    right = exact_matches(base, adapters, completed, max_tokens)
    for item, (log_p, _) in zip(items, scored):
        gold, scores = item.row.gold, per_character(item, log_p)
        cell = cells.setdefault(item.task, {"correct": [], "nll": 0.0, "tokens": 0, "harness": [], "new": []})
        if item.row.open:
            cell["correct"].append(right[id(item)])
        else:
            cell["correct"].append(scores[gold] > max(s for k, s in enumerate(scores) if k != gold))
            cell["harness"].append(harness_choice(item, log_p) == gold)
        cell["new"] += cell["correct"][-1:] * item.row.held_out
        cell["nll"] -= log_p[gold]
        cell["tokens"] += len(item.continuations[gold])
    return {task: {"acc_norm": sum(c["correct"]) / len(c["correct"]), "log_loss": c["nll"] / c["tokens"],
                   "rows": len(c["correct"]), "correct": c["correct"],
                   **({"acc_norm_harness": sum(c["harness"]) / len(c["harness"])} if c["harness"] else
                      {"metric": "exact_match"}),
                   **({"held_out": {"acc_norm": sum(c["new"]) / len(c["new"]), "rows": len(c["new"])}}
                      if c["new"] else {})}
            for task, c in cells.items()}


def macro(cells):
    """The mean over tasks: the element-wise mean of tuples of numbers."""
    return tuple(sum(values) / len(cells) for values in zip(*cells))


def lift(acc, base, lora):
    """The recovered lift, or None where the LoRA gains nothing."""
    return (acc - base) / (lora - base) if lora > base else None
