"""acc_norm, exact match and log_loss against naive loops; ties; lift."""
import contextlib, itertools, json, unicodedata
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import lora_hooks, tiny_base, tiny_model, tiny_tokenizer
from helpers import make_portal, of_task, plain_greedy, random_adapters

from tokenizers import normalizers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

import score as scoring
from bases import Base, encode, load_base
from bases.tokens import prepare
from portal import MODULES, Adapters
from runtime.files import ROOT, BadInput
from runtime.job import Job
from score import decode, evaluate, lift, score, task_spread
from tasks.rows import NewWording, Row, load_tasks, read_line
from train import fit, portal_learner

EOS = "EOS"
ROWS = [Row("one", "w1 w2 w3", [" w4", " w5 w6", " w49"], 1), Row("two", "w9 w8", [" w7 w1 w2", " w7 w3"], 0),
        Row("one", "w4", [" w3", " w2"], 0), Row("two", "w30 w31 w32 w33 w34 w35 w36", [" w1", " w22", " w3", " w44 w5"], 2)] * 2


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_equals_a_naive_loop_over_choices(architecture, adapted):
    base, model = tiny_base(architecture, bos=True), tiny_model(architecture)
    adapters = random_adapters(base, tasks=2) if adapted else None
    items, _ = encode(base.tokenizer, ROWS, ["one", "two"])
    for max_tokens in (1, 60, 10_000):
        got = evaluate(base, adapters, items, max_tokens)
        for t, task in enumerate(["one", "two"]):
            handles = lora_hooks(model, *of_task(adapters, t)) if adapted else []
            correct, nll, tokens = [], 0.0, 0
            for row in (row for row in ROWS if row.task == task):
                scores = []
                for k, choice in enumerate(row.choices):
                    prompt = base.tokenizer(row.prompt).input_ids
                    ids = prompt + base.tokenizer(choice, add_special_tokens=False).input_ids
                    with torch.no_grad():
                        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                    total = sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
                    scores.append(total / len(choice))
                    if k == row.gold:
                        nll, tokens = nll - total, tokens + len(ids) - len(prompt)
                correct.append(max(range(len(scores)), key=scores.__getitem__) == row.gold)
            for h in handles:
                h.remove()
            assert got[t]["correct"] == correct and got[t]["acc_norm"] == sum(correct) / len(correct)
            assert got[t]["log_loss"] == pytest.approx(nll / tokens, rel=1e-5) and got[t]["rows"] == 4


def test_a_tie_never_favours_the_gold_choice():
    base = tiny_base()
    items, _ = encode(base.tokenizer, [Row("one", "w1 w2", [" w4", " w4"], gold) for gold in (0, 1)], ["one"])
    assert evaluate(base, None, items, 100)[0]["acc_norm"] == 0


def test_the_harness_counts_no_leading_space_and_the_first_of_a_tie():
    rows = [Row("one", f"w{k}", [" w5", " w6 w7"], k % 2) for k in range(40)]
    rows += [Row("tie", "w1 w2", [" w4", " w4"], gold) for gold in (0, 1)]
    base = tiny_base()
    items, _ = encode(base.tokenizer, rows, ["one", "tie"])
    items[:9] = [item._replace(row=item.row._replace(choices=["w5", "  w6 w7"])) for item in items[:9]]
    cells, correct = evaluate(base, None, items, 100), {}
    for item, log_p in zip(items, score(base, None, items, 100)):
        row = item.row
        lengths = np.array([len(choice) - choice.startswith(" ") for choice in row.choices])
        correct.setdefault(row.task, []).append(np.argmax(np.array(log_p) / lengths) == row.gold)
    assert [cell["acc_norm_harness"] for cell in cells.values()] == [np.mean(own) for own in correct.values()]
    assert cells[1]["acc_norm_harness"] == 0.5 and cells[1]["acc_norm"] == 0
    assert cells[0]["acc_norm_harness"] != cells[0]["acc_norm"]


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_that_are_not_finite_end_the_command(adapted):
    base = tiny_base()
    items, _ = encode(base.tokenizer, ROWS, ["one", "two"])
    evaluate(base, None, items, 100)
    adapters = random_adapters(base, tasks=2) if adapted else None
    if adapted:
        adapters.B["q"][1, 0] = float("inf")                                         # of task "two" alone
    else:
        base.model.lm_head.weight.data[base.tokenizer.convert_tokens_to_ids("w22")] = float("nan")
    with pytest.raises(BadInput, match="base tiny.* task .*two: scores are not finite; try --dtype float32 or bfloat16"):
        evaluate(base, adapters, items, 100)


def test_exact_match_is_compared_as_people_read_it(monkeypatch):
    """The tokenizer here makes small letters of all text; the prompt's last character and the first of "x5" are one word."""
    base = tiny_base()
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    golds = [" W5  w6", " W5", " cafe\u0301", " Ｗ7", " unknown", " w8\u200b"]
    says = ["w5 w6", "w6", " caf\u00e9 ", "w7", "<unk>", "w8"]
    items, _ = encode(base.tokenizer, [Row("t", "w1", [gold]) for gold in golds], ["t"])
    monkeypatch.setattr(base, "generate", lambda *args: says)
    monkeypatch.setattr(scoring, "settled", lambda *args: None)
    assert evaluate(base, None, items, 1000)[0]["correct"] == [True, False, True, True, False, True]
    joined = items[0]._replace(prompt=items[0].prompt[:0] + [4], continuations=[[6, 7, base.tokenizer.eos_token_id]])
    assert scoring.golds(base.tokenizer, joined) == [" W5  w6", "w2 w3"]             # what its tokens say counts, too


def test_a_decoded_text_has_as_many_lines_as_its_gold_completion_and_a_limit():
    """Prompts are single words here; the stand-in for a base says what its table holds."""
    says, calls = {5: " Paris\nQ: and then", 6: "\n Paris", 7: " one\ntwo\nthree", 8: " a"}, []
    def generate(prompts, adapters, tasks, limits, lines, stop):
        calls.extend(zip((prompt[0] for prompt in prompts), limits, lines, strict=True))
        return [says[prompt[0]] for prompt in prompts]
    base = SimpleNamespace(generate=generate, tokenizer=tiny_base().tokenizer, name="it")
    rows = [Row("t", f"w{i}", [gold]) for i, gold in enumerate([" Paris", " Paris", " one\ntwo\n", " a" * 10], 1)]
    items, _ = encode(base.tokenizer, rows, ["t"])
    assert decode(base, None, items, 1) == [" Paris", "", " one\ntwo", " a"]
    assert calls == [(5, 16, 1), (6, 16, 1), (7, 16, 2), (8, 22, 1)]                 # 2 (10 + EOS)
    calls.clear()
    assert decode(base, None, items[:3], 100, end=(9, 3)) == [says[k] for k in (5, 6, 7)]
    assert calls == [(k, 9, 3) for k in (5, 6, 7)]


@pytest.mark.parametrize("gold, best, right", [
    (" caf", [" c", "af", EOS], True), (" caf", [" c", "af", "\n"], True), (" caf", [" c", "af", " b"], False),
    (" caf", [" c", "a"], None), (" caf", [" ", "af"], None), (" caf", [" c", "\n"], False), (" caf", [EOS, "af", EOS], False),
    (" caf", [" b", "af", EOS], False), (" caf", [" c", "af", " "], None), (" caf", ["\n"], False),
    (" 1\n 2", [" ", "1", "\n", " ", "2", EOS], True), (" 1\n 2", [" ", "1", "\n", " ", "2", "\n"], True),
    (" 1\n 2", [" ", "1", EOS], False), (" 1\n 2", [" ", "1", "\n", " ", "1"], False),
    (" \u00e9", [" ", b"\xc3", b"\xa8"], None), (" \u00e9", [" ", b"\xc4"], None), (" \u00e9", [" ", b"\xc3", b"\xa9", EOS], True)])
def test_the_best_tokens_settle_whether_decoding_gives_the_completion(gold, best, right):
    """The tokens that follow each other may differ from the completion's once; what comes behind that does not count."""
    base = load_base("toy-qwen-s")
    vocabulary = {token: k for k, token in enumerate(base.tokenizer.convert_ids_to_tokens(range(len(base.tokenizer))))}
    def id_of(token):
        letter = bytes_to_unicode()
        return base.tokenizer.eos_token_id if token is EOS else vocabulary["".join(letter[b] for b in (token if isinstance(token, bytes) else token.encode()))]
    (item,), _ = encode(base.tokenizer, [Row("t", "a:", [gold])], ["t"])
    best = [id_of(token) for token in best]
    assert scoring.settled(base.tokenizer, item, (best + [0] * 9)[:len(item.continuations[0])]) is right


def test_the_start_of_a_text_has_the_letters_that_the_text_starts_with():
    """However it is spelled: marks in any order, characters whole, taken apart or with another one's first bytes at the end."""
    for text in ("Vi\u1ec7t", "\uac01 e", "a\u0323\u0302\u0301b \n c"):
        ways = {unicodedata.normalize(form, text) for form in ("NFC", "NFD")} | ({"Vi\u00ea\u0323t", "Vie\u0302\u0323t"} if text[0] == "V" else set())
        for way, other in itertools.product(ways, ways):
            for k in range(len(way) + 1):
                assert scoring.begins(way[:k] + "\ufffd", [other]), (way, other, k)
    assert not scoring.begins("\u00e8a", ["\u00e9a"]) and scoring.begins("e\ufffd \n", ["e\ufffd"]) and not scoring.begins("e\ufffd b", ["e\ufffd"])


@pytest.mark.parametrize("prompt, completion, joint", [("the answer i", "s", " is"), ("the answer", "s", None), ("a: ", "is", " is")])
def test_a_token_over_the_joint_of_prompt_and_completion_is_decoded_whole(prompt, completion, joint):
    """The item's prompt ends before it; what repeats the completion's part alone makes another text: "the answers"."""
    base = load_base("toy-qwen-s")
    (item,), _ = encode(base.tokenizer, [Row("t", prompt, [completion])], ["t"])
    texts = scoring.golds(base.tokenizer, item)
    assert all(scoring.reads_as(text, texts) for text in (joint or completion, f"  {joint or completion} "))
    other = joint and joint.strip() != completion
    assert scoring.reads_as(completion, texts) is (not other) and not scoring.reads_as("b" + completion, texts)
    best = base.tokenizer(completion, add_special_tokens=False).input_ids + [base.tokenizer.eos_token_id] * 3
    assert scoring.settled(base.tokenizer, item, best[:len(item.continuations[0])]) in ((False,) if other else (True, None))


def test_decoding_ends_where_the_models_positions_do():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)).eval()
    base = Base(model, prepare(tiny_tokenizer(), model.config), "gpt")
    items, _ = encode(base.tokenizer, [Row("t", "w1 " * 30, [" w2" * 40])], ["t"])
    found = []
    base.generate = lambda *args, f=base.generate: found.append(args[3]) or f(*args)
    assert decode(base, None, items, 999) and decode(base, None, items, 999, (500, 9)) and found == [(64 + 1 - len(items[0].prompt),)] * 2


@pytest.mark.parametrize("name", ["toy-qwen-s", "toy-gemma", "toy-hybrid"])
def test_exact_match_is_the_same_as_from_decoding_every_row(name):
    """Completions are what the base says, whole, cut, gone on with, changed by a letter, and spelled with other white space."""
    base, adapters = load_base(name), None
    prompts = [row.prompt for own in load_tasks(ROOT / "toy" / "data", None).values() for row in own["eval"][:6]]
    asked, _ = encode(base.tokenizer, [Row("t", prompt, [" a"]) for prompt in prompts], ["t"])
    def says():
        return decode(base, adapters, asked, 4096, (12, 1))
    often = Counter(token for ids in base.tokenizer(says(), add_special_tokens=False).input_ids for token in set(ids[2:]))
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(often.most_common(1)[0][0])  # many texts end there
    ways = [lambda t: t, lambda t: t[:-1], lambda t: t + " b", lambda t: t[:1] + "b" + t[2:], lambda t: t.replace(" ", "  "), lambda t: " ".join(t)]
    rows = [Row("t", prompt, [f" {ways[k % 6](text.strip()) or 'b'}"]) for k, (prompt, text) in enumerate(zip(prompts, says()))]
    items, _ = encode(base.tokenizer, [row for row in rows if base.tokenizer.eos_token not in row.choices[0]], ["t"])
    said = decode(base, adapters, items, 4096)
    want = [scoring.as_read(text) in map(scoring.as_read, scoring.golds(base.tokenizer, item)) for item, text in zip(items, said)]
    assert evaluate(base, adapters, items, 4096)[0]["correct"] == want
    told = [scoring.settled(base.tokenizer, item, best) for item, (_, best) in zip(items, scoring.score_and_best(base, adapters, items, 4096))]
    assert all(own in (None, right) for own, right in zip(told, want)) and told.count(None) < len(told) / 2
    assert True in want and False in told
    early = decode(base, adapters, items, 4096, early=True)                          # as far as a text may be right
    for item, text, short, right in zip(items, said, early, want):
        assert text.startswith(short) and (short == text if right else True)
        assert short == text or not scoring.begins(short, scoring.golds(base.tokenizer, item))
    assert name == "toy-qwen-s" or sum(map(len, early)) < sum(map(len, said))        # that one says a single word


def test_a_task_is_decoded_in_the_same_batches_whatever_else_is_evaluated():
    """Rounding depends on a batch's rows: the same batches give the same texts. Their memory is what max_tokens allows."""
    base, calls = tiny_base(), []
    generate = base.generate
    base.generate = lambda *args: calls.append(args) or generate(*args)
    golds = {"one": [" w5", " w6 w7", " w8 w9"], "two": [" w11" * 30, " w8"], "three": [" w1 w2"] * 9}
    rows = [Row(task, " ".join(["w3"] * (2 + 5 * i)), [gold]) for task, texts in golds.items() for i, gold in enumerate(texts)]
    rows = rows[::2] + rows[1::2]                                                    # tasks in any order
    items, _ = encode(base.tokenizer, rows, list(golds))
    adapters = random_adapters(base)
    def batches(t, others, max_tokens):
        calls.clear()
        texts = decode(base, adapters, [item for item in items if item.task == t or others], max_tokens)
        assert all(len(set(tasks)) == 1 for _, _, tasks, *_ in calls)
        assert all(len(prompts) == 1 or len(prompts) * (max(map(len, prompts)) + max(limits)) <= max_tokens
                   for prompts, _, _, limits, *_ in calls)
        assert all(len(prompts[-1]) == min(map(len, prompts)) for prompts, *_ in calls)
        own = [text for item, text in zip(items, texts) if item.task == t] if others else texts
        return own, [(prompts, limits, lines) for prompts, _, tasks, limits, lines, _ in calls if tasks[0] == t]
    for max_tokens in (1, 100, 10_000):
        for t in range(3):
            assert batches(t, True, max_tokens) == batches(t, False, max_tokens)
    assert len(batches(2, True, 100)[1]) > 2 and len(batches(2, True, 10_000)[1]) == 1


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_exact_match_and_log_loss_of_completions_equal_a_naive_loop(architecture):
    base, model = tiny_base(architecture), tiny_model(architecture)
    prompts = ["w1 w2 w3", "w9 w8", "w4", "w30 w31 w32 w33 w34 w35"]
    base.tokenizer.add_tokens([f"x{i}" for i in range(8)])                           # a word for each of the 64 logits
    adapters, said = random_adapters(base), {}
    def as_task(t):
        stack = contextlib.ExitStack()
        for handle in lora_hooks(model, *of_task(adapters, t)):
            stack.callback(handle.remove)
        return stack
    for t in (0, 1):
        with as_task(t):
            said.update({(t, prompt): plain_greedy(model, base.tokenizer(prompt).input_ids, 16) for prompt in prompts})
    eos = next(token for new in said.values() for token in new[1:7]                  # half of the rows or so end there
               if 2 <= sum(token in other[:7] for other in said.values()) <= 5
               and all(other[0] != token for other in said.values()))
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(eos)
    rows, correct, nll, tokens = [], {0: [], 1: []}, {0: 0.0, 1: 0.0}, {0: 0, 1: 0}
    for (t, prompt), new in said.items():
        gold = new[:new.index(eos)] if eos in new[:7] else new[:5]                   # the others go on behind their gold
        rows.append(Row(f"task {t}", prompt, [f" {base.tokenizer.decode(gold)} "]))
        correct[t].append(eos in new[:7])
        ids = base.tokenizer(prompt).input_ids
        with as_task(t), torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids + gold + [eos]])).logits[0].double().log_softmax(-1)
        nll[t] -= sum(log_p[i - 1, token].item() for i, token in enumerate(gold + [eos], len(ids)))
        tokens[t] += len(gold) + 1                                                   # EOS counts
    assert 0 < sum(map(sum, correct.values())) < len(rows)
    rows.insert(2, Row("task 2", "w1", [" w1", " w2"], 1))                           # a task of choices in between
    items, _ = encode(base.tokenizer, rows, ["task 0", "task 1", "task 2"])
    for max_tokens in (1, 10_000):
        cells = evaluate(base, adapters, items, max_tokens)
        assert "metric" not in cells[2] and cells[2]["rows"] == 1
        for t in (0, 1):
            assert cells[t]["correct"] == correct[t] and cells[t]["metric"] == "exact_match"
            assert cells[t]["acc_norm"] == sum(correct[t]) / 4
            assert cells[t]["log_loss"] == pytest.approx(nll[t] / tokens[t], rel=1e-4) and "held_out" not in cells[t]
    new = [row for row in rows if row.task == "task 1"][1:]                          # three of its four rows
    items, _ = encode(base.tokenizer, [NewWording(*row) if row in new else row for row in rows], ["task 0", "task 1", "task 2"])
    cells = evaluate(base, adapters, items, 10_000)
    assert cells[1]["held_out"] == {"acc_norm": sum(correct[1][1:]) / 3, "rows": 3} and "held_out" not in cells[0]


def test_what_tasks_share_and_how_many_directions_tell_them_apart():
    g = np.random.default_rng(0)
    shared, apart = g.normal(size=(1, 2, 5, 3)), np.zeros((4, 2, 5, 3))
    apart[0, 0, 0, 0], apart[1, 0, 0, 0], apart[2, 1, 4, 2], apart[3, 1, 4, 2] = 2, -2, 1, -1  # means 0; energies 8 and 2
    adapters = Adapters({}, {"q": torch.tensor(shared + apart), "v": torch.zeros(4, 2, 7, 3)}, 1.0)
    share, rank = task_spread(adapters)
    assert share == pytest.approx(4 * (shared ** 2).sum() / ((shared + apart) ** 2).sum())
    assert rank == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2)))
    assert task_spread(Adapters({}, {"q": torch.ones(4, 2, 5, 3)}, 1.0)) == (1, 0)


def test_a_row_says_that_its_wording_is_held_out():
    for said, held_out in ((True, True), (False, False), ("true", False), (None, False)):
        row, _ = read_line(json.dumps({"prompt": "w1", "completion": " w2", "held_out": said}).encode(), "t")
        assert row.held_out is held_out and row == Row("t", "w1", [" w2"]) and row._replace(prompt="w3").held_out is held_out


def test_training_on_completions_teaches_them_and_where_they_end(tmp_path):
    """Two tasks with the same prompts and other answers of one to three words."""
    base = tiny_base()
    portal = make_portal(base, modules=MODULES, tasks=("one", "two"), random=False)
    golds = {"one": [" w5", " w6 w7"], "two": [" w11 w12 w13", " w8 w9"]}
    rows = {task: [Row(task, f"w{i} w{i + 20}", [gold]) for i, gold in enumerate(texts)] for task, texts in golds.items()}
    both = {task: (r, r) for task, r in rows.items()}                                # to be learned by heart
    settings = dict(epochs=60, batch_size=2, lr=2e-2, least=1, max_tokens=100)
    learner = portal_learner(portal, both, settings)
    fit(Job("test", settings, 0, tmp_path / "log.jsonl"), [base], portal.adapters, [learner], both)
    learner.load_best()
    prompts = [row.prompt for r in rows.values() for row in r]
    texts = base.generate(prompts, portal.adapters("tiny"), [0, 0, 1, 1], 10)
    assert texts == [text.strip() for text in golds["one"] + golds["two"]]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["held_acc_norm"] < log[-1]["held_acc_norm"] == 1


def test_lift():
    assert lift(0.792, 0.667, 0.795) == pytest.approx(0.977, abs=1e-3)              # the write-up's 8B row
    assert lift(0.7, 0.6, 0.6) is None and lift(0.7, 0.6, 0.5) is None
