"""Greedy decoding of rows that end at different times: token by token that of a row alone, by whole forward passes."""
import pytest, torch
from conftest import tiny_base, tiny_tokenizer
from helpers import plain_greedy, random_adapters

from bases import Base, greedy, load_base
from bases.load import TOY
from experiments.tiny_models import tiny_model, tokens

LENGTHS, LIMITS, TASKS = [6, 11, 11, 9, 6, 11], [2, 7, 4, 7, 1, 5], [0, 1, 2, 0, 1, 2]
PROMPTS = [tokens(n, k) for k, n in enumerate(LENGTHS)]                              # six rows of three tasks


def decoded(base, adapters):
    """The rows' new tokens, from the batches that the base allows: one, or one for each length of prompt."""
    rows, found = range(len(PROMPTS)), {}
    for own in [rows] if base.pads else [[r for r in rows if LENGTHS[r] == n] for n in set(LENGTHS)]:
        steps, limits = [], [LIMITS[r] for r in own]
        with base.with_adapters(adapters, torch.tensor([TASKS[r] for r in own])):
            new = greedy(base, [PROMPTS[r] for r in own], limits, leave=base.drops, logits=steps)
        going = [sum(limit > step for limit in limits) for step in range(max(limits))]
        assert [len(step) for step in steps] == (going if base.drops else [len(own)] * len(going))  # who is done, leaves
        found.update(zip(own, new))
    return [found[r] for r in rows]


def equals_rows_alone(base, best):
    """Whether best(logits [vocabulary], token) for every new token, after the tokens before it, in a row alone."""
    adapters, moved = random_adapters(base, modules="qv", dtype=base.model.dtype), 0
    for prompt, limit, task, new in zip(PROMPTS, LIMITS, TASKS, decoded(base, adapters)):
        assert len(new) == limit
        with base.with_adapters(adapters, torch.tensor([task])), torch.no_grad():
            logits = base.model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1:-1]
        assert all(map(best, logits, new))
        moved += new != plain_greedy(base.model, prompt, limit)
    assert moved                                                                     # the adapters do something


@pytest.mark.parametrize("name", TOY)
def test_every_toy_base_decodes_as_whole_forward_passes_of_a_row_alone(name):
    base = load_base(name)
    equals_rows_alone(base, lambda logits, token: int(logits.argmax()) == token)
    assert base.pads and base.drops


@pytest.mark.parametrize("name,pads,drops", [("qwen3_5_text", True, True), ("recurrent_gemma", False, False),
                                             ("minimax", True, False), ("marian", False, True)])
def test_recurrent_layers_and_models_that_cannot_pad_or_drop_rows(name, pads, drops):
    base = Base(tiny_model(name), tiny_tokenizer(), name)
    assert (base.pads, base.drops) == (pads, drops)
    equals_rows_alone(base, lambda logits, token: int(logits.argmax()) == token)
    if name == "qwen3_5_text":                                                       # as a hybrid that cannot pad
        base.pads = False
        equals_rows_alone(base, lambda logits, token: int(logits.argmax()) == token)


@pytest.mark.parametrize("name", ["toy-gemma", "toy-hybrid"])
def test_in_bfloat16_a_token_is_the_best_of_a_row_alone_to_rounding(name):
    """A product of other rows is summed in another order: two logits that differ by rounding may change places. A logit
    here has 8 bits, and what a layer rounds comes to a few units of the last."""
    base, ties = load_base(name, dtype=torch.bfloat16), []
    def best(logits, token):
        ties.append(bool(logits[token] < logits.max()))
        return logits.max() - logits[token] <= 2 ** -6 * logits.abs().max()
    equals_rows_alone(base, best)
    assert base.pads and base.drops and sum(ties) <= len(ties) / 4


def test_rows_end_at_eos_at_a_new_line_and_at_their_limit(monkeypatch):
    base, adapters, n = tiny_base(), random_adapters(tiny_base()), 9
    said = []
    for prompt, task in zip(PROMPTS, TASKS):
        with base.with_adapters(adapters, torch.tensor([task])):
            said.append(plain_greedy(base.model, prompt, n))
    often = sorted({k for new in said for k in new}, key=lambda k: -sum(k in new for new in said))
    eos, newline = next((a, b) for a in often for b in often if a != b and {"eos", "line", "limit"} == {
        "eos" if a in new and b not in new[:new.index(a)] else "line" if b in new else "limit" for new in said})
    base.tokenizer.add_tokens([f"x{i}" for i in range(8)])                           # a word for each of the 64 logits
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(eos)
    monkeypatch.setattr(base.tokenizer, "batch_decode", lambda rows, **_: [
        " ".join("\n" if k == newline else str(k) for k in row) for row in rows])
    for lines, limits in ((1, n), (2, [9, 8, 7, 6, 5, 4])):
        want, steps = [], []
        for r, new in enumerate(said):
            new = new[:limits if limits == n else limits[r]]
            stops = [k for k, token in enumerate(new, 1) if token == eos or new[:k].count(newline) == lines]
            new = new[:min(stops, default=len(new))]
            steps.append(len(new))
            want += base.tokenizer.batch_decode([[k for k in new if k != eos]])
        assert base.pads and base.drops                                              # asked once, before
        rows, head = [], base.model.get_output_embeddings().register_forward_hook(lambda _, x, y: rows.append(y.shape[1]))
        assert base.generate(PROMPTS, adapters, TASKS, limits, lines) == want
        head.remove()
        assert rows == [sum(step > k for step in steps) for k in range(max(steps))]
