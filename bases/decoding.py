"""Greedy decoding of rows that end at different times; those that have ended leave the batch.

transformers' own loop computes every row until the last one has ended. So the loop is ours, and its steps are
transformers': `generate` makes an architecture's cache and masks, prepare_inputs_for_generation the inputs of a step.
"""
import torch

from bases.tokens import text_ids


@torch.no_grad()
def greedy(base, prompts, limits, ended=lambda rows, new: [], leave=False, masked=True, logits=None):
    """Returns the new token ids, R lists, of R prompts (lists of token ids) under the adapters that are active.
    Row r gets at most limits[r] of them, and ends before if ended(rows, new ids of all) names it, a list of some of
    `rows`. Rows are padded on the left, so that every row's next token has the same column; the mask excludes the
    padding, unless not `masked`. leave: whether ended rows leave the batch. logits: a list that gets [rows of the
    batch, vocabulary] at every step."""
    width, new = max(map(len, prompts)), [[] for _ in prompts]
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=base.device)  # [R, S]
    mask = torch.tensor([[1 - masked] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)

    def loop(model, ids, logits_processor, stopping_criteria, generation_config, **state):
        """As transformers' `custom_generate`; state: cache, mask and whatever else goes from step to step."""
        rows, going, task = list(range(len(ids))), set(range(len(ids))), base.active.task
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **state)
        while True:
            last = torch.arange(len(rows), device=ids.device), torch.full((len(rows),), -1, device=ids.device)
            with base.activate(dict(at=last, task=task)):
                out = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(out, state)
            if logits is not None:
                logits.append(out.logits[0])                                         # [rows, vocabulary]
            token = out.logits[0].argmax(-1)                                         # [rows]
            ids = torch.cat([ids, token[:, None].to(ids)], 1)
            for r, k in zip(rows, token.tolist()):
                if r in going:
                    new[r].append(k)
            going -= {r for r in going if len(new[r]) >= limits[r]}
            going -= set(ended(sorted(going), new))
            if not going:
                return ids
            if leave and len(going) < len(rows):
                kept = torch.tensor([k for k, r in enumerate(rows) if r in going], device=ids.device)
                rows, ids, state = sorted(going), ids[kept], {key: rows_of(value, kept) for key, value in state.items()}
                task = task and {device: t[kept.to(device)] for device, t in task.items()}
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if state.get("use_cache") else None, **state)

    base.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(limits), eos_token_id=None,
                        pad_token_id=0, custom_generate=loop)
    return new


def rows_of(value, kept):
    """The rows `kept` of a cache, in place, or of a tensor [..., R, S]; anything else as it is."""
    if hasattr(value, "reorder_cache"):
        value.reorder_cache(kept)                                                    # an index_select of rows
    elif torch.is_tensor(value) and value.dim() > 1:
        return value.index_select(value.dim() - 2, kept)
    return value


def texts(base, prompts, adapters, tasks, limits, lines, stop=None):
    """Returns Base.generate's texts; limits, lines: [R], a number for each row; stop(r, text so far): whether row r
    ends there, too. Prompts of unequal length are padded if the base ignores padding, else decoded in groups of one
    length."""
    tokenizer, found = base.tokenizer, {}
    eos = tokenizer.eos_token_id
    prompts = [text_ids(tokenizer, [p])[0][0] if isinstance(p, str) else p for p in prompts]
    groups = {}
    for r, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(r)
    for own in [list(range(len(prompts)))] if len(groups) > 1 and base.pads else groups.values():
        def read(new):
            return tokenizer.batch_decode(new, clean_up_tokenization_spaces=False)
        def ended(rows, new):
            return [k for k, text in zip(rows, read([new[k] for k in rows]))
                    if new[k][-1] == eos or text.count("\n") >= lines[own[k]] or stop and stop(own[k], text)]
        task = None if tasks is None else torch.tensor([tasks[r] for r in own], device=base.device)
        with base.with_adapters(adapters, task):
            new = greedy(base, [prompts[r] for r in own], [limits[r] for r in own], ended, len(own) > 1 and base.drops)
        found.update(zip(own, read([ids[:-1] if ids[-1] == eos else ids for ids in new])))
    return [found[r] for r in range(len(prompts))]
