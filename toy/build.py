"""
The toy: a world so small that four language models can be pre-trained for it on a laptop.

    python toy/build.py                    # everything: tasks, tokenizers, four bases (about 40 minutes on two cores)
    python toy/build.py --only toy-gemma   # one base again (two shells can share the work)
    python toy/build.py --check            # only measure what is on disk

A list of six words has one colour, one animal, one fruit, two numbers, and one word that is there twice.
A skill is a function from such a list to one of its words: the first, the largest number, the word
after the colour ... Sixteen of them, and for every list each has exactly one right answer.

Pre-training asks for skills BY NAME ("largest: seven"), so every base can do all sixteen. A task then
shows only the list and "Answer:", never the name, and so the base is near chance: it has the skill and
does not know that it is wanted. What an adapter (a LoRA) adds is the choice of the skill. It is what
adapters mostly do to real models, too: they bring out what is there more than they teach.

What the toy shows: whether an adapter, or a network that writes adapters, works at all on a frozen
base; whether it still does on a base of other width, depth, head count, tokenizer and architecture.
Real Hugging Face classes and files are used, so the same code then runs on a real base unchanged.
What it cannot show: anything on language, knowledge, or scale. The bases know 43 words and sixteen
skills, all seen in pre-training, and numbers measured here say nothing about a real model's numbers.
"""
import argparse, json, math, os, random, sys, time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread: the same tokenizer at each build
from functools import lru_cache
from pathlib import Path
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)
from transformers.utils import logging

logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------
# 1. The world: 43 words, lists of six of them

COLOURS = "red blue green black white pink brown grey gold purple".split()
ANIMALS = "cat dog horse cow sheep pig fox bear duck goat".split()
FRUITS = "apple pear plum grape lemon peach mango cherry melon fig".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

def make_list(rng):
    """Six words. The colour and the animal stand once each and never at an end, so that both always
    have a word before and a word after; the word that is there twice is the fruit or a number."""
    colour, animal, fruit = rng.choice(COLOURS), rng.choice(ANIMALS), rng.choice(FRUITS)
    a, b = rng.sample(NUMBERS, 2)
    rest = [fruit, a, b, rng.choice([fruit, a, b])]
    rng.shuffle(rest)
    words = [rest.pop(), None, None, None, None, rest.pop()]
    inner = rest + [colour, animal]
    rng.shuffle(inner)
    words[1:5] = inner
    return words

# ---------------------------------------------------------------------------------------------
# 2. The skills: list -> word

def where(words, kind):  # position of the first word of a kind
    return next(i for i, w in enumerate(words) if w in kind)

def numbers(words):
    return [w for w in words if w in NUMBERS]

SKILLS = {
    "first":         lambda w: w[0],
    "second":        lambda w: w[1],
    "third":         lambda w: w[2],
    "fourth":        lambda w: w[3],
    "second_last":   lambda w: w[-2],
    "last":          lambda w: w[-1],
    "colour":        lambda w: w[where(w, COLOURS)],
    "animal":        lambda w: w[where(w, ANIMALS)],
    "fruit":         lambda w: w[where(w, FRUITS)],
    "largest":       lambda w: max(numbers(w), key=NUMBERS.index),
    "smallest":      lambda w: min(numbers(w), key=NUMBERS.index),
    "repeated":      lambda w: next(x for x in w if w.count(x) == 2),
    "before_colour": lambda w: w[where(w, COLOURS) - 1],
    "after_colour":  lambda w: w[where(w, COLOURS) + 1],
    "before_animal": lambda w: w[where(w, ANIMALS) - 1],
    "after_animal":  lambda w: w[where(w, ANIMALS) + 1],
}
ASIDE = ("fourth", "after_animal")  # the bases know them, but no experiment may train on them before its last step

# ---------------------------------------------------------------------------------------------
# 3. The tasks: JSONL, one form for all of them

def task_prompt(words):
    # The name of the skill is not in it, and pre-training never shows this form. It does show the
    # form's tokens, in sentences that are about no list (FILLER below), lest their embeddings be noise.
    return f"Words: {', '.join(words)}\nAnswer:"

def task_row(rng, task):
    words = make_list(rng)
    gold = SKILLS[task](words)
    others = sorted(set(words) - {gold})  # four others; sorted, since the order of a set is not fixed
    choices = rng.sample(others, 3) + [gold]
    rng.shuffle(choices)
    return {"task": task, "prompt": task_prompt(words), "choices": [" " + c for c in choices],
            "gold_idx": choices.index(gold)}

def write_tasks(n_train=1000, n_eval=200):
    for task in SKILLS:
        rng, seen = random.Random(f"task {task}"), set()
        rows = []
        while len(rows) < n_train + n_eval:  # no prompt twice, so none of eval is in train
            row = task_row(rng, task)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row)
        folder = HERE / ("data_aside" if task in ASIDE else "data") / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", rows[:n_train]), ("eval", rows[n_train:])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))

def read_rows(task, split):
    folder = HERE / ("data_aside" if task in ASIDE else "data") / task
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]

# ---------------------------------------------------------------------------------------------
# 4. Pre-training text: skills asked by name
#
# A document is a list of (text, is_answer) pieces, since the loss must know which tokens are answers:
# the words of a list are random, and no model can predict them. Each answer begins with its space.

LISTS = ("List: {}.", "List: {}", "Here we have {}.", "We see {}")
ASKS = ("\n{}:", "\n{}:", "\n{} is", "\n{}?")
FILLER = ["Words can be short.", "Words: we like them.", "Answer me.", "Answer: yes.", "Answer: no, not yet.",
          "We have words here.", "The answer is not here.", "Words and words."]
VAGUE = ("say", "pick", "reply", "speak", "write", "tell")  # names no skill, so any word of the list is right

def ask(skill, form):
    # One word and one token each ("aftercolour"): to put "after" and "colour" together into one question
    # would be a skill of its own, on top of the sixteen.
    return form.format(skill.replace("_", ""))

def document(rng):
    if rng.random() < 0.2:  # the skill before the list: a few lists, one question each
        pieces = []
        for skill in rng.sample(list(SKILLS), 4):
            words = make_list(rng)
            pieces += [(ask(skill, "{} of ") + ", ".join(words) + ":", 0), (" " + SKILLS[skill](words), 1), ("\n", 0)]
        return pieces
    words = make_list(rng)  # the skill after the list: one list and all questions, in random order,
    pieces = [(rng.choice(LISTS).format(", ".join(words)), 0)]  # many answers for few tokens
    for skill in rng.sample(list(SKILLS), len(SKILLS)):
        pieces += [(ask(skill, rng.choice(ASKS)), 0), (" " + SKILLS[skill](words), 1)]
        if rng.random() < 0.1:  # so that a base asked for nothing in particular has no favourite skill
            pieces += [(ask(rng.choice(VAGUE), rng.choice(ASKS)), 0), (" " + rng.choice(sorted(set(words))), 0)]
        if rng.random() < 0.02:
            pieces.append(("\n" + rng.choice(FILLER), 0))
    if rng.random() < 0.5:  # the list once more: copying teaches a model to look at the word before,
        pieces += [("\nAgain:", 0), (" " + words[0], 1)]  # on which before_ and after_ then build
        for word in words[1:]:
            pieces += [(",", 0), (" " + word, 1)]
    if rng.random() < 0.1:
        pieces.insert(0, (rng.choice(FILLER) + "\n", 0))
    return pieces

# ---------------------------------------------------------------------------------------------
# 5. Two tokenizers, as unlike as those of two model families

def train_tokenizer(kind, document=document, sizes=dict(qwen=480, gemma=222)):
    rng = random.Random("tokenizer")
    corpus = ["".join(text for text, _ in document(rng)) for _ in range(4000)] + FILLER * 500
    if kind == "qwen":  # byte-level BPE: no unknown characters, no <bos>, each word here is one token
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        tok.train_from_iterator(corpus, trainers.BpeTrainer(
            vocab_size=sizes["qwen"], show_progress=False, special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                       model_max_length=512)
    # BPE over characters with a visible space, too few merges for every word, and a <bos> at the front
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation(),
                                                 pre_tokenizers.Metaspace(prepend_scheme="never")])
    tok.decoder = decoders.Metaspace(prepend_scheme="never")
    tok.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=sizes["gemma"], show_progress=False, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"]))
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B",
                                                       special_tokens=[("<bos>", tok.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                   unk_token="<unk>", model_max_length=512)

# ---------------------------------------------------------------------------------------------
# 6. Four bases, in real architectures: the numbers make no two of them fit one set of LoRA matrices
#
# Grouped queries (fewer k/v heads than q heads) and a head_dim that is not hidden / heads keep code honest
# that derives a shape where it should read it from the layer. Weights start wider than
# transformers' default of 0.02, which is meant for widths in the thousands: 1 / sqrt(width) is about 0.12.

def layer_types(layers, local):
    """Which layers see only the last few tokens. Real Gemmas alternate, real Qwens could and mostly do not.
    Here the first layer is local in each base, for it helps to learn "the word before": in trials with full
    layers alone before_ and after_ stayed near .5 (the right neighbourhood, the wrong word), as they did
    with four query heads and 1,200 steps. A window of 4 gave those skills and took "fourth" and "last"."""
    return ["sliding_attention" if i in local else "full_attention" for i in range(layers)]

def qwen(vocab, hidden, layers, heads, kv, head_dim, mlp, local, window):
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=head_dim, intermediate_size=mlp, tie_word_embeddings=True,
        max_position_embeddings=512, initializer_range=0.12, eos_token_id=0, pad_token_id=0,
        use_sliding_window=True, sliding_window=window, layer_types=layer_types(layers, local)))

def gemma(vocab, hidden, layers, heads, kv, head_dim, mlp, local, window):
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=head_dim, query_pre_attn_scalar=head_dim, intermediate_size=mlp,
        layer_types=layer_types(layers, local), sliding_window=window, max_position_embeddings=512, initializer_range=0.12,
        pad_token_id=0, eos_token_id=1, bos_token_id=2))

BASES = {  # name: (tokenizer, builder, sizes, rounds of (steps, learning rate))
    "toy-qwen-s": ("qwen", qwen, dict(hidden=48, layers=3, heads=6, kv=2, head_dim=16, mlp=128,
                                      local=[0], window=16), [(2000, 7e-3)]),
    "toy-qwen-m": ("qwen", qwen, dict(hidden=64, layers=4, heads=6, kv=2, head_dim=20, mlp=160,
                                      local=[0, 2], window=16), [(2000, 6e-3)]),
    "toy-qwen-l": ("qwen", qwen, dict(hidden=96, layers=5, heads=6, kv=2, head_dim=20, mlp=160,
                                      local=[0, 2], window=16), [(1600, 5e-3), (1200, 5e-3)]),
    "toy-gemma": ("gemma", gemma, dict(hidden=72, layers=4, heads=4, kv=2, head_dim=20, mlp=160,
                                       local=[0, 2], window=16), [(1000, 4e-3), (500, 4e-3)]),
}

def encode_document(tok, pieces):
    """ids and, for each, how much its loss counts: 1 in an answer, 0.1 elsewhere (syntax is learned too)."""
    ids = [tok.bos_token_id] if tok.bos_token_id is not None else []
    weights = [0.0] * len(ids)
    for text, is_answer in pieces:
        new = encode_piece(tok, text)
        ids += new
        weights += [1.0 if is_answer else 0.1] * len(new)
    return ids, weights

@lru_cache(maxsize=20000)  # questions and answers come again and again
def encode_piece(tok, text):
    return tok.encode(text, add_special_tokens=False)

def make_batch(tok, rng, size, document=document):
    rows = [encode_document(tok, document(rng)) for _ in range(size)]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(size, length, dtype=torch.long)
    weights = torch.zeros(size, length)  # padding is on the right and counts 0, so no mask is needed
    for i, (row, w) in enumerate(rows):
        ids[i, :len(row)], weights[i, :len(row)] = torch.tensor(row), torch.tensor(w)
    return ids, weights

def pretrain(name, recipe=None, document=document, vocabulary={}):
    """All rounds of a base. Each begins at a high rate and where the one before left off on disk: toy-qwen-l had learned
    all but the before_ and after_ skills when its first rate ran out."""
    kind, build, sizes, rounds = recipe or BASES[name]
    folder, tok = HERE / name, train_tokenizer(kind, document, **vocabulary)
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    model = build(len(tok), **sizes)
    if kind == "qwen":  # the words are to be heard at the start over what the layers add to the residual
        for key, p in model.named_parameters():  # stream (Gemma does so itself: it scales embeddings up)
            if "embed_tokens" in key:
                p.data *= 4
            if "o_proj" in key or "down_proj" in key:
                p.data *= 0.2
    for number, (steps, lr) in enumerate(rounds):
        if number:
            model = load(name)[1].train()
        pretrain_round(name, model, tok, random.Random(f"pretrain {name}" + f" {number}" * (number > 0)), steps, lr, document)
        model.to(torch.bfloat16).save_pretrained(folder)  # what is measured below is what is on disk: rounded
    assert (folder / "model.safetensors").stat().st_size < 1_000_000

def pretrain_round(name, model, tok, rng, steps, lr, document=document):
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(
        math.pi * min(1, max(0, i - warmup) / (steps - warmup)))))
    start = time.time()
    for step in range(steps):
        ids, weights = make_batch(tok, rng, 16, document)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]                     # (B, T-1, V)
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")      # (B, T-1)
        w = weights[:, 1:]
        answer = loss[w == 1].mean().item()
        loss = (loss * w).sum() / w.sum()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        if step % 100 == 99:
            seconds = time.time() - start
            print(f"{name}  step {step + 1}/{steps}  answer loss {answer:.3f}  {seconds:.0f}s", flush=True)

# ---------------------------------------------------------------------------------------------
# 7. Measure what is on disk

def load(name):
    folder = str(HERE / name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()

@torch.no_grad()
def continuations(tok, model, prompts, texts):
    """For each prompt + text: the text's log-probability, and whether greedy decoding would write it."""
    rows = [(tok(p).input_ids, tok(t, add_special_tokens=False).input_ids) for p, t in zip(prompts, texts)]
    for (p, t), prompt, text in zip(rows, prompts, texts):
        assert p + t == tok(prompt + text).input_ids, "a choice must not change the tokens of its prompt"
    length = max(len(p + t) for p, t in rows)
    ids = torch.tensor([p + t + [0] * (length - len(p + t)) for p, t in rows])            # (N, T)
    logp = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]                            # (N, T-1, V)
    got = logp.gather(2, ids[:, 1:, None])[..., 0]                                        # (N, T-1)
    best = logp.argmax(-1) == ids[:, 1:]                                                  # (N, T-1)
    spans = [slice(len(p) - 1, len(p + t) - 1) for p, t in rows]
    return [g[s].sum().item() for g, s in zip(got, spans)], [bool(b[s].all()) for b, s in zip(best, spans)]

def asked_by_name(tok, model, skill, n=200):
    """Greedy accuracy in pre-training's own form, on lists made for this measurement."""
    rng = random.Random(f"measure {skill}")
    lists = [make_list(rng) for _ in range(n)]
    prompts = [rng.choice(LISTS).format(", ".join(w)) + ask(skill, rng.choice(ASKS)) for w in lists]
    return sum(continuations(tok, model, prompts, [" " + SKILLS[skill](w) for w in lists])[1]) / n

def in_task_form(tok, model, task):
    """Accuracy over the four choices, log-probability per character: what an adapter starts from."""
    rows = read_rows(task, "eval")
    scores, _ = continuations(tok, model, [r["prompt"] for r in rows for _ in range(4)],
                              [c for r in rows for c in r["choices"]])
    right = 0
    for i, r in enumerate(rows):
        per_char = [s / len(c) for s, c in zip(scores[4 * i:4 * i + 4], r["choices"])]
        right += per_char.index(max(per_char)) == r["gold_idx"]
    return right / len(rows)

def check(names):
    print(f"\n{'':15}" + "".join(f"{n:>20}" for n in names) + f"\n{'':15}" + f"{'named   task':>20}" * len(names))
    bases = {n: load(n) for n in names}
    named, plain = {n: [] for n in names}, {n: [] for n in names}
    for skill in SKILLS:
        line = f"{skill:15}"
        for n, (tok, model) in bases.items():
            named[n].append(asked_by_name(tok, model, skill))
            plain[n].append(in_task_form(tok, model, skill))
            line += f"{named[n][-1]:13.3f}  {plain[n][-1]:.3f}"
        print(line + ("   (kept aside)" if skill in ASIDE else ""), flush=True)
    print(f"{'mean':15}" + "".join(f"{sum(named[n]) / 16:13.3f}  {sum(plain[n]) / 16:.3f}" for n in names))
    for n, (_, model) in bases.items():
        size = (HERE / n / "model.safetensors").stat().st_size
        print(f"{n}: {model.num_parameters():,} parameters, {size:,} bytes, worst skill by name {min(named[n]):.3f}")
    unfinished = [n for n in names if min(named[n]) < 0.95]
    if unfinished:
        sys.exit(f"not finished, a skill is below .95: {', '.join(unfinished)}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=BASES, help="rebuild this base alone")
    parser.add_argument("--check", action="store_true", help="measure what is on disk, build nothing")
    args = parser.parse_args()
    names = [args.only] if args.only else list(BASES)
    if not args.check:
        write_tasks()
        for name in names:
            pretrain(name)
    check(names)
