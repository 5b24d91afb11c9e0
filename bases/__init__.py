"""A frozen base model. What a Base promises to everything that trains, scores or exports adapters:

    base.groups_of(kinds)           {g: portal.Group}, the shapes that Adapters for it have
    base.logits(batch, adapters)    logits at a batch's answer positions, row r with the adapters of its task
    base.generate(prompts, ...)     greedy continuations, rows of any tasks and lengths
    base.packs                      whether a row may hold a prompt and several continuations
    base.tokenizer, base.device     for `encode`; where inputs, logits and adapters lie
    base.name, base.provenance      its short name in a run; where it came from and the fingerprint of its files

Its weights never change, and nothing here depends on an architecture's name.
"""
from bases.decoding import greedy
from bases.files import OTHER_WEIGHTS, refuse_twin, weight_files, weight_map
from bases.frozen import Base, same_depths
from bases.load import (HUB, TOY, TOY_SEEN, TOY_UNSEEN, auto_class, load_base, load_config, load_tokenizer, pretrained,
                        resolve, short_name, short_names, source_of, usual_dtype)
from bases.of_run import find_base, located, recorded, reload_base
from bases.tokens import (MAX_LENGTH, Item, around, decoding_limit, encode, limits, most_tokens, odd_rows, to_items,
                          tokenize)
