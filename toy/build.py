"""Builds the toy: sixteen tasks and five language models so small that a laptop pre-trains them.

    python toy/build.py                    # everything: tasks, tokenizers, five bases (about 50 minutes on two cores)
    python toy/build.py --only toy-gemma   # one base again (two shells can share the work)
    python toy/build.py --check            # only measure what is on disk

A skill is a function from a list of six words to one of them: the first, the largest number, the word after the colour.
Pre-training asks for skills by name ("largest: seven"), so every base can do all sixteen. A task shows the list and
"Answer:" without the name, so a base is near chance on it: it has the skill, and an adapter has to select it.

The toy shows whether adapters work on a frozen base, and on one of another width, depth, head count, tokenizer and
architecture. It shows nothing on language, knowledge or scale: the bases know 43 words and sixteen skills.
"""
import json, math, os, random, statistics, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bases import encode, load_base
from runtime.flags import parse, run_main
from score import evaluate
from tasks.rows import Row, read_rows

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread: every build gives the same tokenizer

COLOURS = "red blue green black white pink brown grey gold purple".split()
ANIMALS = "cat dog horse cow sheep pig fox bear duck goat".split()
FRUITS = "apple pear plum grape lemon peach mango cherry melon fig".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


# ---------------------------------------------------------------------------------------------- lists, skills, tasks
def word_at(kind, offset=0):
    """Returns the skill whose answer is `offset` words after the first word of `kind`."""
    return lambda words: words[next(i for i, word in enumerate(words) if word in kind) + offset]


SKILLS = {
    "first": lambda w: w[0], "second": lambda w: w[1], "third": lambda w: w[2], "fourth": lambda w: w[3],
    "second_last": lambda w: w[-2], "last": lambda w: w[-1],
    "colour": word_at(COLOURS), "animal": word_at(ANIMALS), "fruit": word_at(FRUITS),
    "largest": lambda w: max(filter(NUMBERS.__contains__, w), key=NUMBERS.index),
    "smallest": lambda w: min(filter(NUMBERS.__contains__, w), key=NUMBERS.index),
    "repeated": statistics.mode,
    "before_colour": word_at(COLOURS, -1), "after_colour": word_at(COLOURS, 1),
    "before_animal": word_at(ANIMALS, -1), "after_animal": word_at(ANIMALS, 1),
}
ASIDE = ("fourth", "after_animal")  # known to the bases; no experiment may train on their tasks before its last step


def make_list(rng):
    """Draws a list and returns its text and {skill: the one right answer}. The words are a colour, an animal, a fruit,
    two numbers, and a second copy of the fruit or of a number; colour and animal are never at an end."""
    colour, animal, fruit = rng.choice(COLOURS), rng.choice(ANIMALS), rng.choice(FRUITS)
    a, b = rng.sample(NUMBERS, 2)
    rest = [fruit, a, b, rng.choice([fruit, a, b])]
    rng.shuffle(rest)
    inner = [*rest[:2], colour, animal]
    rng.shuffle(inner)
    words = [rest[3], *inner, rest[2]]
    return ", ".join(words), {name: answer(words) for name, answer in SKILLS.items()}


def task_rows(task, n_train=1000, n_eval=200):
    """{"train": rows, "eval": rows} of a task, with four words of the list to choose from; no prompt twice, so none of
    eval is in train. A prompt names no skill; its form is not in pre-training, its tokens are, in sentences about no
    list (FILLER), to train their embeddings."""
    rng, rows = random.Random(f"task {task}"), {}
    while len(rows) < n_train + n_eval:
        text, answers = make_list(rng)
        others = sorted(set(answers.values()) - {answers[task]})  # sorted: a set's order differs between processes
        choices = [*rng.sample(others, 3), answers[task]]
        rng.shuffle(choices)
        rows.setdefault(text, {"task": task, "prompt": f"Words: {text}\nAnswer:",
                               "choices": [" " + word for word in choices], "gold_idx": choices.index(answers[task])})
    rows = list(rows.values())
    return {"train": rows[:n_train], "eval": rows[n_train:]}


def write_tasks(folders):
    """Writes the tasks of {task: folder}."""
    for task, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in task_rows(task).items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------- pre-training text
# A document is a list of (text, is_answer) pieces: the loss counts answers more, since the words of a list are random
# and no model can predict them. Each answer begins with its space.
LISTS = ("List: {}.", "List: {}", "Here we have {}.", "We see {}")
ASKS = ("\n{}:", "\n{}:", "\n{} is", "\n{}?")
FILLER = ["Words can be short.", "Words: we like them.", "Answer me.", "Answer: yes.", "Answer: no, not yet.",
          "We have words here.", "The answer is not here.", "Words and words."]
VAGUE = ("say", "pick", "reply", "speak", "write", "tell")  # names no skill, so any word of the list is right


def ask(rng, skill):
    """A question, with one token for the skill's name: to combine "after" with "colour" would be another skill."""
    return rng.choice(ASKS).format(skill.replace("_", ""))


def document(rng):
    if rng.random() < 0.2:  # the skill before the list: four lists, one question each
        pieces = []
        for skill in rng.sample(list(SKILLS), 4):
            text, answers = make_list(rng)
            pieces += [(skill.replace("_", "") + f" of {text}:", 0), (" " + answers[skill], 1), ("\n", 0)]
        return pieces
    text, answers = make_list(rng)  # the skill after the list: many answers for few tokens
    pieces = [(rng.choice(LISTS).format(text), 0)]
    for skill in rng.sample(list(SKILLS), len(SKILLS)):
        pieces += [(ask(rng, skill), 0), (" " + answers[skill], 1)]
        if rng.random() < 0.1:  # so that a base which is asked for nothing in particular prefers no skill
            pieces += [(ask(rng, rng.choice(VAGUE)), 0), (" " + rng.choice(sorted(set(answers.values()))), 0)]
        if rng.random() < 0.02:
            pieces.append(("\n" + rng.choice(FILLER), 0))
    if rng.random() < 0.5:  # the list again: copying trains attention to the previous word, as before_ and after_ need
        for start, word in zip(["\nAgain:"] + [","] * 5, text.split(", ")):
            pieces += [(start, 0), (" " + word, 1)]
    if rng.random() < 0.1:
        pieces.insert(0, (rng.choice(FILLER) + "\n", 0))
    return pieces


# ---------------------------------------------------------------------------------------------- tokenizers and bases
QUESTIONS = 200  # how often check() asks for each skill by name
TASKS = {task: HERE / ("data_aside" if task in ASIDE else "data") / task for task in SKILLS}  # their folders
VOCABULARY = {"qwen": 480, "gemma": 222}  # tokens: every word is one in "qwen"; too few for that in "gemma"
# Layers: F attends to all tokens, L (local) to the last `sliding_window` ones, without which before_ and after_ stayed
# near .5; D is Qwen3.5's linear attention. No two bases fit one set of LoRA matrices. Fewer k/v heads than q heads, and
# a head_dim that is not hidden / heads, expose code that derives a shape where it should read it from the layer. The
# weights start at about 1 / sqrt(width).
SHARED = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=20, intermediate_size=160, sliding_window=16,
              max_position_embeddings=512, initializer_range=0.12, pad_token_id=0)
BASES = {  # name: (family, layers, sizes other than SHARED, rounds of (steps, learning rate))
    "toy-qwen-s": ("qwen", "LFF", dict(hidden_size=48, head_dim=16, intermediate_size=128), [(2000, 7e-3)]),
    "toy-qwen-m": ("qwen", "LFLF", dict(hidden_size=64), [(2000, 6e-3)]),
    "toy-qwen-l": ("qwen", "LFLFF", dict(hidden_size=96), [(1600, 5e-3), (1200, 5e-3)]),
    "toy-gemma": ("gemma", "LFLF", dict(hidden_size=72, num_attention_heads=4), [(1000, 4e-3), (500, 4e-3)]),
    "toy-hybrid": ("qwen", "DDFDDF", dict(
        hidden_size=80, num_attention_heads=4, num_key_value_heads=1, head_dim=32, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16), [(2000, 5e-3)]),
}


def train_tokenizer(family):
    """Returns byte-level BPE without <bos>; for "gemma" BPE over characters, with a visible space and a <bos>."""
    rng = random.Random("tokenizer")
    corpus = ["".join(text for text, _ in document(rng)) for _ in range(4000)] + FILLER * 500
    if family == "qwen":
        special = dict.fromkeys(["eos_token", "pad_token"], "<|endoftext|>")
        tok, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
    else:
        special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
        tok, alphabet = Tokenizer(models.BPE(unk_token="<unk>")), []
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation(),
            pre_tokenizers.Metaspace(prepend_scheme="never")])
        tok.decoder = decoders.Metaspace(prepend_scheme="never")
        tok.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    tok.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCABULARY[family], show_progress=False, initial_alphabet=alphabet,
        special_tokens=list(dict.fromkeys(special.values()))))
    return PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=512, **special)


def new_model(family, layers, sizes, vocab_size):
    types = {"L": "sliding_attention", "F": "full_attention", "D": "linear_attention"}
    sizes = {**SHARED, **sizes, "vocab_size": vocab_size, "num_hidden_layers": len(layers),
             "layer_types": [types[layer] for layer in layers]}
    if family == "gemma":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "gemma3_text", **sizes, query_pre_attn_scalar=sizes["head_dim"], bos_token_id=2, eos_token_id=1))
    if "D" in layers:
        sizes.pop("sliding_window")            # its config has none, and would keep it as a stray value
    else:
        sizes["use_sliding_window"] = True
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen3_5_text" if "D" in layers else "qwen3", **sizes, tie_word_embeddings=True, eos_token_id=0))
    model.model.embed_tokens.weight.data *= 4  # at first the embeddings outweigh what layers add to the residual stream
    for name, p in model.named_parameters():   # (Gemma scales its embeddings up itself)
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            p.data *= 0.2
    return model


# ---------------------------------------------------------------------------------------------- pre-training
def make_batch(tok, documents):
    """Token ids [B, T] and their loss weights [B, T]: 1 in an answer, 0.1 elsewhere (syntax is learned too), 0 for
    <bos> and padding. Padding is on the right, so it needs no attention mask."""
    bos, rows = [] if tok.bos_token_id is None else [(tok.bos_token_id, 0.0)], []
    for pieces in documents:
        encoded = tok([text for text, _ in pieces], add_special_tokens=False).input_ids
        rows.append(bos + [(k, 1.0 if is_answer else 0.1) for ids, (_, is_answer) in zip(encoded, pieces) for k in ids])
    ids_and_weights = zip(*(zip(*row) for row in rows))                              # B lists each
    return [pad_sequence([torch.tensor(own) for own in both], batch_first=True) for both in ids_and_weights]


def pretrain(name):
    """Trains and saves the tokenizer and the model of a base: AdamW, a linear warm-up and cosine decay each round."""
    (family, layers, sizes, rounds), folder, warmup = BASES[name], HERE / name, 50
    tok = train_tokenizer(family)
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    model = new_model(family, layers, sizes, len(tok))
    for number, (steps, lr) in enumerate(rounds):
        if number:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        rng = random.Random(f"pretrain {name}" + f" {number}" * (number > 0))
        opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(
            (i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / (steps - warmup))))
        for step in range(1, steps + 1):
            ids, weights = make_batch(tok, [document(rng) for _ in range(16)])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]                                # [B, T-1, V]
            nll, w = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), weights[:, 1:]  # [B, T-1]
            opt.zero_grad()
            ((nll * w).sum() / w.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
            if step % 100 == 0:
                print(f"{name}  step {step}/{steps}  answer loss {nll[w == 1].mean():.3f}", flush=True)
        model.to(torch.bfloat16).save_pretrained(folder)  # rounded; check() measures what is on disk
    assert (folder / "model.safetensors").stat().st_size < 1_000_000


# ---------------------------------------------------------------------------------------------- measuring
def questions(skill, n):
    """n open rows that ask for a skill by name, in a form of pre-training, on lists made for this measurement."""
    rng = random.Random(f"measure {skill}")
    lists = [make_list(rng) for _ in range(n)]
    return [Row(skill, rng.choice(LISTS).format(text) + ask(rng, skill), [" " + answers[skill]])
            for text, answers in lists]


def accuracy(base, rows):
    """Returns {task: accuracy of the bare base}. Asserts that no choice or answer changes the tokens of its prompt, and
    that no prompt is cut."""
    tasks, tok = list(dict.fromkeys(row.task for row in rows)), base.tokenizer
    items, _ = encode(tok, rows, tasks)
    joined = tok([row.prompt + text for row in rows for text in row.choices]).input_ids
    eos = [tok.eos_token_id] * rows[0].open  # encode() ends an open row with it
    assert [item.prompt + ids for item in items for ids in item.continuations] == [ids + eos for ids in joined]
    return {tasks[t]: cell["acc_norm"] for t, cell in evaluate(base, None, items, 4096).items()}


def check(names):
    """Prints what the bases know; exits with an error if the accuracy of a skill by name is below .95."""
    rows = {"as a task": [row for task, path in TASKS.items() for row in read_rows(path / "eval.jsonl", task)],
            "by name": [row for skill in SKILLS for row in questions(skill, QUESTIONS)]}
    unfinished = []
    for name in names:
        base = load_base(str(HERE / name))
        for kind in rows:
            found = accuracy(base, rows[kind])
            worst = min(found, key=found.get)
            print(f"{name}, {kind}: mean {statistics.fmean(found.values()):.3f}, lowest {worst} {found[worst]:.3f}")
        unfinished += [name] * (found[worst] < 0.95)
    if unfinished:
        sys.exit(f"not finished, a skill is below .95: {', '.join(unfinished)}")


def main(argv=None):
    args = parse(__doc__, "only check", argv, only=dict(choices=BASES, help="rebuild this base alone"),
                 check=dict(action="store_true", help="measure what is on disk, build nothing"))
    names = [args.only] if args.only else list(BASES)
    if not args.check:
        write_tasks(TASKS)
        for name in names:
            pretrain(name)
    check(names)


if __name__ == "__main__":
    run_main(main)
