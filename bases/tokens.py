"""Tokens: a row's texts as the token ids that a base is trained and scored on.

Prompt and choice have the tokens of the two encoded as one text. The item's prompt is what all of these encodings and
that of the prompt alone begin with; a continuation is the rest of one. Where a tokenizer merges the prompt's last
character with a choice's first ones, the prompt ends before them. Encoding the two apart would give other tokens:
SentencePiece marks the start of every text, and merges over the joint would be lost.
"""
import json, os, re, sys, unicodedata
from collections import Counter
from typing import NamedTuple

from runtime.distributed import RANK
from runtime.files import BadInput, first_line

MAX_LENGTH = 1024  # tokens of a prompt with its longest choice
WHOLE = dict(padding=False, truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
TWIN = "the gold choice has the same tokens as another"


class Limits(NamedTuple):
    """What a model can take: see prepare. None: not known."""
    vocabulary: int = None  # rows of the embedding
    length: int = None      # positions
    stops: list = []        # the token ids at which transformers' generate stops


class Tokens(NamedTuple):
    """The tokens of a row, whole."""
    head: int           # how many of the prompt's first tokens are special ones, such as BOS
    prompt: list
    continuations: list  # of all choices; a completion's ends with EOS


class Item(NamedTuple):
    """A tokenised row: one prompt and the continuations to be scored after it."""
    task: int
    prompt: list
    continuations: list
    row: tuple  # the data.Row
    weights: tuple = None  # of the continuations in training; None: of a single one, 1

    def length(self):
        """Return how many tokens go into the model: all but the last of each continuation, which predicts nothing."""
        return len(self.prompt) + sum(len(tokens) - 1 for tokens in self.continuations)

    def single(self):
        """Return whether at most one continuation puts tokens behind the prompt."""
        return sum(len(tokens) > 1 for tokens in self.continuations) <= 1

    def rows(self):
        """Return the items, with one continuation each unless that is no need, for layers that would mix several."""
        if self.single():
            return [self]
        return [self._replace(continuations=[tokens], weights=self.weights and self.weights[k:k + 1])
                for k, tokens in enumerate(self.continuations)]


# ---------------------------------------------------------------------------------------------- the tokenizer
def prepare(tokenizer, config, eos=None):
    """Return the tokenizer with the Limits of the model that `config` describes and with an EOS token: its own, else
    the first that config or `eos` (generation_config's: an id or a list) names. Raises BadInput for an EOS token that
    the model cannot embed."""
    text = config.get_text_config()
    length, rows = getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)
    named = [eos, getattr(text, "eos_token_id", None), getattr(config, "eos_token_id", None)]
    named = [[k for k in (own if isinstance(own, (list, tuple)) else [own]) if isinstance(k, int)] for own in named]
    tokenizer.limits = Limits(rows, length if isinstance(length, int) and length > 0 else None,
                              list(dict.fromkeys(named[0] or named[1] + named[2])))
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):                                              # merges skipped at random
        model.dropout = None
    if tokenizer.eos_token_id is None:
        ids = [*named[1], *named[2], *named[0]]
        tokenizer.eos_token = next((tokenizer.convert_ids_to_tokens(k) for k in ids if is_marker(tokenizer, k)), None)
    own = tokenizer.eos_token_id
    if rows and own is not None and own >= rows:
        raise BadInput(f"{name(tokenizer)}: the tokenizer's EOS {tokenizer.eos_token!r} has id {own}, but the model's "
                       f"embedding has {rows} rows (ids 0 to {rows - 1}): this is another model's tokenizer, or the "
                       "model was saved before its embedding was resized")
    return tokenizer


def is_marker(tokenizer, k):
    """Whether id k is a special token. A config's EOS may be its class's default, here an ordinary word or <unk>."""
    token = tokenizer.convert_ids_to_tokens(k) if k >= 0 else None
    return token is not None and k != tokenizer.unk_token_id and (
        k in tokenizer.added_tokens_decoder or re.fullmatch(r"<(?!0x).+>|\[.+\]", token) is not None)


def name(tokenizer):
    return tokenizer.name_or_path or "this base"


def limits(tokenizer):
    return getattr(tokenizer, "limits", Limits())


def most_tokens(tokenizer):
    """Return how many tokens of a text are read at most."""
    return min(MAX_LENGTH, limits(tokenizer).length or MAX_LENGTH)


# ---------------------------------------------------------------------------------------------- texts to tokens
def text_ids(tokenizer, texts):
    """Return ([token ids of each text], the ids that they begin with): what the tokenizer puts before a text (BOS),
    once even if the text spells it. What it puts behind (EOS) is left out; nothing is cut or padded. Raises BadInput if
    the tokenizer fails."""
    try:
        ids = tokenizer(texts, add_special_tokens=False, **WHOLE).input_ids
        own, text = max(zip(ids, texts), key=lambda pair: len(pair[0]))              # a short one may be EOS alone
        whole = tokenizer(text, **WHOLE).input_ids
    except Exception as error:                                                       # such as a word, but no <unk>
        raise BadInput(f"{name(tokenizer)}: the tokenizer fails on these rows ({first_line(error)})")
    starts = [k for k in range(len(whole) - len(own) + 1) if whole[k:k + len(own)] == own]
    if not starts:
        raise BadInput(f"{name(tokenizer)}: the tokenizer does not put its special tokens before and behind a text")
    before = whole[:starts[-1]]
    return [own if own[:len(before)] == before else before + own for own in ids], before


def tokenize(tokenizer, rows):
    """Return the Tokens of each of `rows`. Raises BadInput for a text without tokens, a token that the model cannot
    embed, and a completion that spells the EOS token: it is added, and decoding ends there."""
    if not rows:
        return []
    ids, before = text_ids(tokenizer, [row.prompt + end for row in rows for end in ("", *row.choices)])
    ids, eos, bos, found = iter(ids), tokenizer.eos_token_id, tokenizer.bos_token_id, []
    for row in rows:
        texts = [next(ids) for _ in ("", *row.choices)]
        prompt = os.path.commonprefix(texts)
        continuations = [text[len(prompt):] for text in texts[1:]]
        if not prompt or not all(continuations):
            raise BadInput(f"task {row.task!r}: {row.prompt!r} or one of {row.choices} has no tokens of its own in "
                           f"the tokenizer of {name(tokenizer)}")
        check_embedded(tokenizer, row, texts)
        if row.open and eos is not None:
            if eos in continuations[0]:
                raise BadInput(f"task {row.task!r}: the completion {row.choices[0]!r} spells the EOS token "
                               f"{tokenizer.eos_token!r}, which is added to every completion; remove it from the text")
            continuations = [continuations[0] + [eos]]
        found.append(Tokens(len(before) or int(prompt[0] == bos), prompt, continuations))
    return found


def check_embedded(tokenizer, row, texts):
    """Raises BadInput if the ids in `texts`, of one row, go beyond the model's embedding."""
    limit, highest = limits(tokenizer).vocabulary, max(map(max, texts))
    if limit and highest >= limit:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise BadInput(f"task {row.task!r}: the token {token!r} has id {highest} in {name(tokenizer)}'s tokenizer, "
                       f"but the model's embedding has {limit} rows (ids 0 to {limit - 1})")


def to_items(tokenizer, rows, found, tasks, choices="all", max_length=MAX_LENGTH):
    """Return (items, how many prompts were cut) of rows and their Tokens `found`. A prompt that would pass
    `max_length`, or the model's positions, with its longest continuation is cut from the left, after BOS. Behind a
    completion's prompt decoding needs positions, too. Raises BadInput if an answer leaves its prompt fewer than 8.
    """
    positions = limits(tokenizer).length
    answers = [[t.continuations[row.gold]] if choices == "gold" and not row.weights else t.continuations
               for row, t in zip(rows, found)]
    items, cut = [], 0
    for row, (head, prompt, _), continuations in zip(rows, found, answers):
        longest = max(map(len, continuations))
        room = max(8, max_length - longest)
        if positions:
            if positions - longest < min(8, len(prompt)):
                raise BadInput(f"task {row.task!r}: an answer has {longest} tokens, but {name(tokenizer)} has "
                               f"{positions} positions for prompt and answer")
            room = min(room, positions - longest, max(8, positions - row.open * decoding_limit(continuations[0])))
        if len(prompt) > room:
            head = min(head, room - 1)
            prompt, cut = prompt[:head] + prompt[len(prompt) - room + head:], cut + 1
        items.append(Item(tasks.index(row.task), prompt, continuations, row, row.weights))
    return items, cut


def decoding_limit(completion):
    """Return how many tokens may be decoded where the tokens `completion` would be right: other tokens may spell the
    same text, seldom more than twice as many."""
    return max(16, 2 * len(completion))


def encode(tokenizer, rows, tasks, choices="all", max_length=MAX_LENGTH):
    """Return (items, how many prompts were cut) of rows. `choices`: "all", or "gold" for training, which of a row with
    weights takes all, too; an item's prompt is the same either way. Raises BadInput: see tokenize and to_items.

    A completion ends with the EOS token, where decoding stops; it is trained on and counted in log_loss like the other
    answer tokens. Choices are only compared with each other and have none."""
    found = tokenize(tokenizer, rows)
    for task, total in Counter(row.task for row in rows).items():
        same = sum(is_twin(row, t.continuations) for row, t in zip(rows, found) if row.task == task)
        if same:
            say(tokenizer, task, f"in {same} of {total} rows {TWIN}; the model cannot tell them apart")
    for task in {row.task: None for row in rows if row.open and wrong_end(tokenizer)}:
        say(tokenizer, task, f"its rows are completions, but {wrong_end(tokenizer)}")
    return to_items(tokenizer, rows, found, tasks, choices, max_length)


def wrong_end(tokenizer):
    """Return why a completion's end is not learned, or not heeded by a merged model; None if all is well."""
    eos, stops = tokenizer.eos_token_id, limits(tokenizer).stops
    if eos is None:
        return "neither tokenizer nor config names an EOS token, so that no end is learned"
    if stops and eos not in stops:
        named = ", ".join(str(tokenizer.convert_ids_to_tokens(k) if 0 <= k < len(tokenizer) else k) for k in stops)
        return f"they end with the tokenizer's EOS {tokenizer.eos_token!r} and its config stops generation at {named}"
    return None


def say(tokenizer, task, what):
    """Prints a warning on stderr, once a tokenizer and task, however many rows it counts."""
    said, key = vars(tokenizer).setdefault("said", set()), (task, re.sub(r"\d+", "", what))
    if key not in said and RANK == 0:
        print(f"warning: {name(tokenizer)}, task {task!r}: {what}", file=sys.stderr)
    said.add(key)


def is_twin(row, continuations):
    return continuations.count(continuations[row.gold]) > 1


# ---------------------------------------------------------------------------------------------- what a person checks
def odd_rows(tokenizer, rows, found):
    """Return {what: [example]} of the rows whose Tokens `found` are not what their author meant, an example a row."""
    named = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = None if tokenizer.unk_token_id in named else tokenizer.unk_token_id    # a byte-level one has no other
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = sorted({*tokenizer.all_special_tokens, *added})
    special = re.compile("|".join(map(re.escape, special)) or "(?!)")
    end = wrong_end(tokenizer)
    odd = {f"completions, but {end}": [], f"rows in which {TWIN}": [], "rows with unknown tokens": [],
           "rows whose text spells a special token": [], "rows that the tokenizer changes": []}
    ends, twin, unknowns, spelled, changed = odd.values()
    for row, (head, prompt, continuations) in zip(rows, found):
        texts = [row.prompt + choice for choice in row.choices]
        ids = [prompt[head:] + own for own in continuations]
        if row.open and end:
            ends.append(texts[0])
        if row.open and tokenizer.eos_token_id is not None:
            ids = [ids[0][:-1]]
        if is_twin(row, continuations):
            twin.append(row.choices[row.gold])
        if any(unknown in own for own in ids):
            unknowns.append(texts[0])
        elif match := next(filter(None, map(special.search, texts)), None):
            spelled.append(match[0])
        else:
            read = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
            changed += [difference(*pair) for pair in zip(texts, read) if difference(*pair)][:1]
    return {what: examples for what, examples in odd.items() if examples}


def difference(text, read):
    """Return where a decoded text is first another than `text`, or None. White space and NFC do not matter."""
    a, b = ("".join(unicodedata.normalize("NFC", t).split()) for t in (text, read))
    k = len(os.path.commonprefix([a, b]))
    return None if a == b else f"{a[max(0, k - 8):k + 8]} -> {b[max(0, k - 8):k + 8]}"


def around(tokenizer, tokens, n=6):
    """Return one line with the tokens around the joint of a row: BOS, the prompt's last n, and those of each choice."""
    def names(ids):
        return " ".join(json.dumps(str(t), ensure_ascii=False)[1:-1] for t in tokenizer.convert_ids_to_tokens(ids))
    def ends(ids):                                                                   # a choice's last token may be EOS
        return names(ids) if len(ids) <= 2 * n else f"{names(ids[:n])} ... {names(ids[-2:])}"
    head, prompt, continuations = tokens
    start = (names(prompt[:head]) if head else "(no BOS)") + " ..." * (len(prompt) - head > n)
    return " | ".join([f"{start} {names(prompt[head:][-n:])}", *map(ends, continuations)])
