"""Tokens: prompt and choice encoded as one text, special tokens, what a model can take, and what is warned of."""
import json, re, types

import pytest
from conftest import SMALL, command, one_line, tiny_tokenizer
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AddedToken, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

from bases import Base, Item, around, encode, odd_rows, tokenize
from bases.tokens import Limits, difference, prepare
from runtime.files import ROOT, BadInput
from score import score
import data
from tasks import check
from tasks.rows import Row, load_tasks

TEXTS = ["The cat sat on the mat.\nAnswer: yes", "Question: who is it? Answer: no, the other one", "aa: bb: cc: ab: ba:"] * 9
ROWS = [Row("t", "The cat sat on the mat.\nAnswer:", [" yes", " no", " the other cat"], 1),
        Row("t", "Question: aa", [" bb", ": cc", "b ab"], 0), Row("t", "who", [" is it?", " sat"], 0)]
SPECIAL = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
NAMED = list(SPECIAL.values())
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


def byte_level(pre=pre_tokenizers.ByteLevel(add_prefix_space=False), size=320, **options):
    t = Tokenizer(models.BPE(**options))
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=NAMED, initial_alphabet=alphabet))
    return t


def over_the_joint():
    """Merges with no regard to words, as "Answer:" with the " y" that follows it."""
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), 290)


def sentencepiece():
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=NAMED))
    t.pre_tokenizer = None
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t


def unigram():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=90, special_tokens=NAMED, unk_token="<unk>"))
    return t


def word_piece():
    t = Tokenizer(models.WordPiece(unk_token="<unk>"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=NAMED))
    return t


KINDS = [byte_level, over_the_joint, sentencepiece, unigram, word_piece]


def fast(backend, post=None, **options):
    if post:
        backend.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**SPECIAL, **options})


def saved(folder, tokenizer, **changes):
    """The tokenizer that a folder of `tokenizer` (of the tokenizers package) and these settings gives."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def expect_joint(tokenizer, rows, items, before, eos=[]):
    """Each prompt + continuation is the text encoded as one, behind `before`; the prompt is as long as it can be
    without a token that another choice, or the prompt alone, does not have there."""
    def joint(text):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids if text.startswith("<s>") else before + ids
    for row, item in zip(rows, items, strict=True):
        texts = [joint(row.prompt + choice) + eos for choice in row.choices]
        assert [item.prompt + tokens for tokens in item.continuations] == texts
        n = len(item.prompt)
        assert len({tuple(ids[:n + 1]) for ids in [*texts, joint(row.prompt)]}) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post, before", [(None, []), (BOS, [1]), (BOTH, [1])])
def test_prompt_and_choice_have_the_tokens_of_the_joint_text(kind, post, before):
    tokenizer = fast(kind(), post)
    items, cut = encode(tokenizer, ROWS, ["t"])
    assert cut == 0
    expect_joint(tokenizer, ROWS, items, before)
    gold, _ = encode(tokenizer, ROWS, ["t"], "gold")
    assert [(g.prompt, g.continuations) for g in gold] == [
        (item.prompt, [item.continuations[item.row.gold]]) for item in items]


def test_a_merge_over_the_joint_shortens_the_prompt():
    tokenizer = fast(over_the_joint())
    item = encode(tokenizer, ROWS[:1], ["t"])[0][0]
    alone = tokenizer(ROWS[0].prompt).input_ids
    assert len(item.prompt) < len(alone) and item.prompt == alone[:len(item.prompt)]
    assert tokenizer.decode(item.prompt + item.continuations[0]) == ROWS[0].prompt + " yes"


@pytest.mark.parametrize("legacy", [False, True])
def test_the_class_that_loads_a_sentencepiece_tokenizer_is_no_matter(tmp_path, legacy):
    options = dict(add_bos_token=True, add_eos_token=False, legacy=legacy)
    backend = sentencepiece()
    backend.post_processor = BOS
    llama = saved(tmp_path / "a", backend, tokenizer_class="LlamaTokenizer", **options)
    plain = saved(tmp_path / "b", backend, **options)
    (a, _), (b, _) = (encode(t, ROWS, ["t"]) for t in (llama, plain))
    assert type(llama) is not type(plain)
    expect_joint(llama, ROWS, a, [1])
    expect_joint(plain, ROWS, b, [1])
    mark = plain.convert_tokens_to_ids("▁")                                          # what separate encoding would add
    assert plain(" yes", add_special_tokens=False).input_ids[0] == mark != b[0].continuations[0][0]


@pytest.fixture(scope="module")
def toy():
    tasks = load_tasks(ROOT / "toy" / "data", ["largest", "before_animal"])
    return [row for splits in tasks.values() for row in splits["eval"][:50]]


@pytest.mark.parametrize("name", ["toy-qwen-s", "toy-qwen-m", "toy-qwen-l", "toy-gemma", "toy-hybrid"])
def test_on_the_toy_the_parts_encoded_apart_are_the_same(name, toy):
    tokenizer, rows = AutoTokenizer.from_pretrained(ROOT / "toy" / name), toy
    items, _ = encode(tokenizer, rows, ["largest", "before_animal"])
    for row, item in zip(rows, items, strict=True):
        assert item.prompt == tokenizer(row.prompt).input_ids
        assert item.continuations == [tokenizer(c, add_special_tokens=False).input_ids for c in row.choices]


def test_a_tokenizer_file_that_cuts_or_pads_does_neither_here(tmp_path):
    plain, backend = byte_level(), byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=40, pad_id=1, pad_token="<s>")
    tokenizer = saved(tmp_path, backend, model_max_length=4)
    for row, item in zip(ROWS, encode(tokenizer, ROWS, ["t"])[0], strict=True):
        assert item.prompt + item.continuations[0] == plain.encode(row.prompt + row.choices[0]).ids


def test_a_tokenizer_without_a_backend_in_rust():
    """ByT5's tokens are a text's bytes, 3 higher; its EOS is 1."""
    tokenizer, row = prepare(ByT5Tokenizer(), config(vocab_size=384)), Row("t", "Who é", [" cat", " mät"], 1)
    rows = [row, Row("u", "who", [" é"])]
    def ids(text):
        return [3 + byte for byte in text.encode()]
    (item, open), _ = encode(tokenizer, rows, ["t", "u"])
    assert item.prompt == ids(row.prompt) and item.continuations == [ids(choice) for choice in row.choices]
    assert open.prompt == ids("who") and open.continuations == [[*ids(" é"), 1]]
    assert odd_rows(tokenizer, rows, tokenize(tokenizer, rows)) == {}


def test_merges_that_a_file_skips_at_random_are_all_made():
    tokenizer = prepare(fast(byte_level(dropout=0.5)), config())
    assert encode(tokenizer, ROWS, ["t"]) == encode(tokenizer, ROWS, ["t"])
    expect_joint(fast(byte_level()), ROWS, encode(tokenizer, ROWS, ["t"])[0], [])


# ---------------------------------------------------------------------------------------------- special tokens
@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_a_bos_in_the_text_is_not_doubled(kind):
    tokenizer = fast(kind(), BOS)
    plain, _ = encode(tokenizer, ROWS, ["t"])
    spelled, _ = encode(tokenizer, [row._replace(prompt="<s>" + row.prompt) for row in ROWS], ["t"])
    assert [item.prompt for item in spelled] == [item.prompt for item in plain]
    assert [item.continuations for item in spelled] == [item.continuations for item in plain]


@pytest.mark.parametrize("before, max_length", [([1, 0], 20), ([1] * 5 + [0] * 5, 8)])
def test_several_special_tokens_before_a_text_stay_when_a_prompt_is_cut(before, max_length):
    """All but one of the tokens may be special ones, then the prompt's last token is left."""
    names = " ".join(NAMED[k] for k in before)
    post = processors.TemplateProcessing(single=f"{names} $A </s>", special_tokens=list(zip(NAMED, range(3))))
    row = Row("t", "cat " * 50 + "mat", [" yes", " no"], 0)
    (item,), cut = encode(fast(byte_level(), post), [row], ["t"], max_length=max_length)
    whole = tokenize(fast(byte_level(), post), [row])[0]
    room = max(8, max_length - max(map(len, whole.continuations)))
    kept = before[:room - 1]
    assert cut == 1 and whole.head == len(before) and item.prompt == kept + whole.prompt[len(kept) - room:]


@pytest.mark.parametrize("kind, prompt, own", [
    (word_piece, "\x00", []), (byte_level, "</s>", [2]), (byte_level, "<s>", [])])
def test_a_first_prompt_of_special_tokens_or_none_is_no_matter(kind, prompt, own):
    """What the tokenizer puts before a text is told by a text with tokens of its own."""
    tokenizer = fast(kind(), BOTH)
    cat, who = (tokenizer(text, add_special_tokens=False).input_ids for text in (" cat", "who"))
    rows = [Row("t", prompt, [" cat", " mat"], 0), Row("t", "who", [" cat", " mat"], 0)]
    for tokens, start in zip(tokenize(tokenizer, rows), ([1, *own], [1, *who])):
        assert tokens.head == 1 and tokens.prompt == start and tokens.continuations[0] == cat
    (single,) = tokenize(tokenizer, [Row("t", prompt, ["cat", "mat"], 0)])
    assert single.head == 1 and single.prompt == [1, *own]


def test_special_tokens_within_a_text_are_refused():
    class Reversing(PreTrainedTokenizerFast):
        def __call__(self, text, add_special_tokens=True, **options):
            found = super().__call__(text, add_special_tokens=False, **options)
            if add_special_tokens:
                found["input_ids"].reverse()
            return found
    with pytest.raises(BadInput, match="this base: the tokenizer does not put its special tokens before and behind"):
        encode(Reversing(tokenizer_object=byte_level(), **SPECIAL), ROWS, ["t"])


def test_no_rows_have_no_items():
    assert encode(tiny_tokenizer(), [], ["t"]) == ([], 0)


def test_a_bos_that_only_the_text_has_stays_when_a_prompt_is_cut():
    row = Row("t", "<bos> " + "w1 " * 30 + "w2", [" w3", " w4"], 0)
    (item,), cut = encode(tiny_tokenizer(), [row], ["t"], max_length=10)
    assert cut == 1 and item.prompt == [1, *[5] * 7, 6]


@pytest.mark.parametrize("post", [None, BOTH])
def test_a_completion_has_one_eos(post):
    tokenizer = fast(byte_level(), post)
    tokens = encode(tokenizer, [Row("t", "who", [" is it?"])], ["t"])[0][0].continuations[0]
    assert tokens.count(2) == 1 and tokens[-1] == 2 and tokenizer.decode(tokens[:-1]) == " is it?"
    with pytest.raises(BadInput, match="task 't'.*' it</s>' spells the EOS token '</s>'"):
        encode(tokenizer, [Row("t", "who", [" it</s>"])], ["t"])


def test_texts_without_tokens_are_refused():
    tokenizer = fast(word_piece())
    with pytest.raises(BadInput, match="has no tokens"):
        encode(tokenizer, [Row("t", "who", [" \x00", " cat"], 1)], ["t"])            # BERT removes control characters
    with pytest.raises(BadInput, match="has no tokens of its own"):                  # prompt and choice are one word
        encode(tiny_tokenizer(), [Row("t", "w1", ["w2", " w3"], 1)], ["t"])
    bare = Tokenizer(models.WordLevel({"w": 0}))
    with pytest.raises(BadInput, match="the tokenizer fails on these rows"):         # an unknown word, and no <unk>
        encode(PreTrainedTokenizerFast(tokenizer_object=bare), [Row("t", "w", [" x", " w"], 1)], ["t"])


# ---------------------------------------------------------------------------------------------- what a model can take
def config(**values):
    own = types.SimpleNamespace(**values)
    own.get_text_config = lambda: own
    return own


@pytest.mark.parametrize("named, eos", [
    (dict(eos_token_id=2), None), (dict(eos_token_id=[2, 1]), None), (dict(eos_token_id=None), [2, 1]), ({}, 2),
    (dict(eos_token_id=99999), 2), (dict(eos_token_id=40), 2),  # no such token; an ordinary one: the class's default
    (dict(eos_token_id=-1), 2)])
def test_the_models_eos_is_used_where_the_tokenizer_names_none(named, eos):
    tokenizer = prepare(fast(byte_level(), eos_token=None), config(**named), eos)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert encode(tokenizer, [Row("t", "who", [" cat"])], ["t"])[0][0].continuations[0][-1] == 2


@pytest.mark.parametrize("text, whole, generation, eos, stops", [
    (1, 2, None, "<s>", [1, 2]), (None, 2, 1, "</s>", [1]), (2, None, 1, "</s>", [1]),
    ([2, 1], [1], None, "</s>", [2, 1]), (None, [2], None, "</s>", [2]), (1, None, None, "<s>", [1])])
def test_the_eos_of_a_model_in_a_wrapper(text, whole, generation, eos, stops):
    """The text model's own config comes first, then the wrapper's; generation stops where generation_config says."""
    whole = types.SimpleNamespace(eos_token_id=whole, get_text_config=lambda: config(eos_token_id=text))
    tokenizer = prepare(fast(byte_level(), eos_token=None), whole, generation)
    assert tokenizer.eos_token == eos and tokenizer.limits.stops == stops


def test_a_special_token_of_any_form_may_be_the_eos():
    tokenizer = fast(byte_level(), eos_token=None, extra_special_tokens=["endoftext"])
    top = tokenizer.convert_tokens_to_ids("endoftext")
    assert prepare(tokenizer, config(eos_token_id=top)).eos_token == "endoftext"
    for word, eos in (("<0x0A>", None), ("w", None), ("[X]", "[X]")):                # a byte's token, and a word's
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({word: 0})))
        assert prepare(words, config(eos_token_id=0)).eos_token == eos


def test_without_any_eos_completions_are_warned_of_once(capsys):
    tokenizer = prepare(fast(byte_level(), eos_token=None), config(vocab_size=400))
    for _ in range(2):
        items, _ = encode(tokenizer, [Row("t", "who", [" cat"])] * 3, ["t"])
    one_line(capsys, ["warning", "task 't'", "EOS"])
    assert tokenizer.eos_token_id is None and items[0].continuations == [tokenizer(" cat").input_ids]
    encode(tokenizer, ROWS, ["t"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("settings, eos, stops", [(dict(eos_token_id=7), None, "w3"), (dict(eos_token_id=[7, 8]), None, "w3, w4"),
                                                  (dict(eos_token_id=3), [7, 0, 56, -1], "w3, <pad>, 56, -1"),
                                                  (dict(eos_token_id=7), 3, None),
                                                  (dict(eos_token_id=[7, 3]), None, None), ({}, None, None)])
def test_an_eos_at_which_the_model_will_not_stop_is_warned_of(capsys, settings, eos, stops):
    """The tokenizer's is 3. generation_config's ids, if it has some, are those at which generation stops."""
    tokenizer = prepare(tiny_tokenizer(), config(**{"eos_token_id": None, **settings}), eos)
    assert encode(tokenizer, [Row("t", "w1", [" w2"])], ["t"])[0][0].continuations == [[6, 3]]
    if stops:
        one_line(capsys, ["warning", "task 't'", f"end with the tokenizer's EOS '<eos>' and its config stops generation at {stops}\n"])
    encode(tokenizer, [Row("u", "w1", [" w2", " w3"])], ["u"])                       # choices do not end
    assert not capsys.readouterr().err


def test_an_unknown_words_token_is_no_eos():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "w": 1, "</s>": 2}, unk_token="<unk>")), unk_token="<unk>")
    assert prepare(tokenizer, config(eos_token_id=0)).eos_token is None
    assert prepare(tokenizer, config(eos_token_id=[0, 2])).eos_token == "</s>"


def test_tokens_beyond_the_embedding_are_refused():
    tokenizer = fast(byte_level(), eos_token="<|im_end|>")
    top = tokenizer.eos_token_id
    with pytest.raises(BadInput, match=rf"^this base: .* EOS '<\|im_end\|>' has id {top}, but .* has {top} rows"):
        prepare(tokenizer, config(vocab_size=top))
    assert encode(prepare(tokenizer, config(vocab_size=top + 1)), ROWS, ["t"])[1] == 0
    tokenizer = prepare(fast(byte_level(), extra_special_tokens=["<image>"]), config(vocab_size=top))
    encode(tokenizer, ROWS, ["t"])                                                   # an unused token is no matter
    for row in (Row("t", "who<image>", [" a", " b"], 0), Row("t", "who", [" a", " <image>"], 0)):
        with pytest.raises(BadInput, match=rf"task 't': the token '<image>' has id {top} .* {top} rows"):
            encode(tokenizer, [*ROWS, row], ["t"])


def test_no_row_is_longer_than_the_models_positions():
    tokenizer = prepare(tiny_tokenizer(bos=True), config(max_position_embeddings=40, vocab_size=64))
    assert tokenizer.limits == Limits(64, 40)
    long = "w1 " * 60 + "w2"
    (choices, open), cut = encode(tokenizer, [Row("t", long, [" w3", " w4 w5"], 0), Row("t", long, [" w3"])], ["t"])
    assert cut == 2 and len(choices.prompt) == 38 and choices.prompt[:2] == [1, 5] and choices.prompt[-1] == 6
    assert len(open.prompt) == 24                                                    # 16 tokens may be decoded after it
    assert len(encode(tokenizer, [Row("t", long, [" w3", " w4"], 0)], ["t"], max_length=20)[0][0].prompt) == 19
    with pytest.raises(BadInput, match="an answer has 38 tokens, but .* 40 positions"):
        encode(tokenizer, [Row("t", long, [" w3" * 38, " w4"], 0)], ["t"])
    assert encode(tokenizer, [Row("t", "w1", [" w3" * 38, " w4"], 0)], ["t"])[1] == 0  # a short prompt has its place
    (item, open), _ = encode(tokenizer, [Row("t", long, [" w3" * 32, " w4"], 0), Row("t", long, [" w3" * 17])], ["t"])
    assert len(item.prompt) == len(open.prompt) == 8                                 # all but eight are cut
    for n, length in ((-1, None), (0, None), (1, 1)):
        assert prepare(tiny_tokenizer(), config(max_position_embeddings=n)).limits == Limits(None, length)


def test_a_completion_leaves_room_to_decode_twice_as_many_tokens():
    tokenizer, long = prepare(tiny_tokenizer(), config(max_position_embeddings=100)), "w1 " * 200 + "w2"
    rows = [Row("t", long, [" w3" * 12]), Row("u", long, [" w3" * 30, " w4"], 0), Row("t", long, [" w3"])]
    assert [len(item.prompt) for item in encode(tokenizer, rows, ["t", "u"])[0]] == [100 - 2 * 13, 70, 100 - 16]


@pytest.mark.parametrize("lengths, parts", [([2, 1, 3], 3), ([1, 1, 2], 1), ([1, 1], 1)])
def test_continuations_stand_alone_where_more_than_one_has_inner_tokens(lengths, parts):
    item = Item(0, [5, 6], [[7 + k] * n for k, n in enumerate(lengths)], None)
    whole = [[tokens] for tokens in item.continuations] if parts > 1 else [item.continuations]
    assert item.rows() == [Item(0, [5, 6], own, None) for own in whole]


# ---------------------------------------------------------------------------------------------- warnings
def test_a_gold_choice_with_the_tokens_of_another_is_warned_of_once(capsys):
    tokenizer = tiny_tokenizer()
    rows = [Row("t", "w1", [" 日本", " 中国"], 0), Row("t", "w1", [" 日", " 本", " w2"], 2), Row("u", "w1", [" w2", " w3"], 0)]
    for choices, times in (("gold", 1), ("all", 1), ("all", 2)):
        encode(tokenizer, rows * times, ["t", "u"], choices)
    one_line(capsys, ["warning", "task 't'", "in 1 of 2 rows", "same tokens"])


def test_odd_rows():
    """What each tokenizer makes of five rows, counted by hand."""
    rows = [Row("t", "Who", [" cat", " mat"], 0), Row("t", "who", [" Cat", " cat"], 0), Row("t", "who", [" 日", " cat"], 1),
            Row("t", "who<s>", [" cat", " mat"], 0), Row("t", "who", [" cat", " mat"], 0)]
    def odd(tokenizer):
        return [(re.search("changes|same|unknown|spells", what)[0], examples)
                for what, examples in odd_rows(tokenizer, rows, tokenize(tokenizer, rows)).items()]
    assert odd(fast(byte_level(), BOTH)) == [("spells", ["<s>"])]
    assert odd(fast(word_piece(), BOS)) == [
        ("same", [" Cat"]), ("unknown", ["who 日"]), ("spells", ["<s>"]), ("changes", ["Whocat -> whocat", "whoCat -> whocat"])]
    assert odd(fast(byte_level(), unk_token="<s>")) == [("spells", ["<s>"])]         # <unk> is but another name here
    bare = Tokenizer(models.BPE(vocab={c: k for k, c in enumerate("whocatm Ct")}, merges=[]))  # drops the others
    assert odd(PreTrainedTokenizerFast(tokenizer_object=bare)) == [
        ("changes", ["Whocat -> hocat", "who日 -> who", "who<s>cat -> whocat"])]


def test_odd_rows_of_completions_and_of_tokens_added_later():
    def odd(tokenizer, *rows):
        return odd_rows(tokenizer, rows, tokenize(tokenizer, rows))
    row = Row("t", "who", [" cat"])
    assert odd(prepare(fast(byte_level()), config(eos_token_id=2)), row) == {}
    ((what, examples),) = odd(fast(byte_level(), eos_token=None), row, row).items()
    assert what.startswith("completions, but neither tokenizer nor config names an EOS") and examples == ["who cat"] * 2
    ((what, examples),) = odd(prepare(fast(byte_level()), config(eos_token_id=1)), row).items()
    assert what.startswith("completions, but they end with the tokenizer's EOS '</s>'") and examples == ["who cat"]
    tokenizer = fast(byte_level())
    tokenizer.add_tokens([AddedToken("<sep>", special=True), AddedToken("<think>", special=False)])
    assert odd(tokenizer, Row("t", "who<think>", [" cat"]), Row("t", "who", [" <sep>cat"])) == {
        "rows whose text spells a special token": ["<sep>"]}


def test_the_place_of_a_change_is_shown():
    text, read = "abcdefghij klmnopqrstuvwxyz", "abcdefghijkl mnOpqrstuvwxyz"
    assert difference(text, read) == "ghijklmnopqrstuv -> ghijklmnOpqrstuv" and difference(text, text + " ") is None


def test_around_shows_the_tokens_at_the_joint():
    rows = [Row("t", " ".join(f"w{k}" for k in range(9)), [" w3", " w4 w5"], 0), Row("t", "w1", [" w2" * 20])]
    with_bos, without = (tiny_tokenizer(bos) for bos in (True, False))
    assert around(with_bos, tokenize(with_bos, rows)[0]) == "<bos> ... w3 w4 w5 w6 w7 w8 | w3 | w4 w5"
    assert around(with_bos, tokenize(with_bos, [rows[1]._replace(prompt="w1 w2 w3 w4 w5 w6")])[0]).startswith(
        "<bos> w1 w2 w3 w4 w5 w6 | ")
    assert around(with_bos, tokenize(with_bos, [rows[1]])[0]).startswith("<bos> w1 | ")
    for n, end in ((11, " ".join(["w2"] * 11)), (12, "w2 w2 w2 w2 w2 w2 ... w2"), (20, "w2 w2 w2 w2 w2 w2 ... w2")):
        (tokens,) = tokenize(without, [Row("t", "w1", [" w2" * n])])
        assert around(without, tokens) == f"(no BOS) w1 | {end} <eos>"
    tokenizer = fast(byte_level())
    assert around(tokenizer, tokenize(tokenizer, ROWS[2:])[0]).endswith(" | Ġsat")


# ---------------------------------------------------------------------------------------------- any text
WORDS = st.sampled_from(["cat", "é", "e\u0301", "مرحبا", "שלום", "日本語", "한국어", "👩‍👩‍👧", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "ﬁ", "İ", "x" * 90, "▁", "##a", "\u200d", "a\n\nb",
                         "\u0000", "<s>", "Answer:", "1234567"])
TEXT = st.lists(st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)), min_size=1,
                max_size=5).map(" ".join)


@pytest.fixture(scope="module")
def three():
    """Three tokenizers, what each puts before a text, and a model with rows and positions for all of them."""
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 400}))
    tokenizers = [prepare(fast(kind(), post), model.config) for kind, post in
                  ((byte_level, BOTH), (sentencepiece, BOS), (word_piece, None))]
    return Base(model, tokenizers[0]), list(zip(tokenizers, ([1], [1], [])))


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, choices=st.lists(TEXT, min_size=1, max_size=3), which=st.integers(0, 2))
def test_any_text_is_encoded_checked_and_scored(three, tmp_path, monkeypatch, prompt, choices, which):
    """Against the joint encoding. BadInput is for what the format excludes and for texts without tokens."""
    base, (tokenizer, before) = three[0], three[1][which]
    answer = {"choices": choices, "gold_idx": 0} if len(choices) > 1 else {"completion": choices[0]}
    for split in ("train", "eval"):
        path = tmp_path / "t" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"prompt": prompt, **answer}, ensure_ascii=False) + "\n", encoding="utf-8")
    monkeypatch.setattr(check, "load_tokenizer", lambda spec: tokenizer)
    code = command(data, "--check", tmp_path, "--bases", "any")
    try:
        rows = load_tasks(tmp_path)["t"]["eval"]
        items, cut = encode(tokenizer, rows, ["t"])
    except BadInput as error:
        assert code == 2 and re.search("empty|white space|reads the same|no tokens|an answer has", str(error)), error
        return
    assert code == 0
    if not cut:
        eos = [tokenizer.eos_token_id] * rows[0].open
        expect_joint(tokenizer, rows, items, before, eos)
    assert all(value < 0 for value in score(base, None, items, 4096)[0])
