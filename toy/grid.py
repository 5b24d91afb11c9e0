"""Builds a second toy: 96 skills composed of parts, for what sixteen skills cannot show (experiments/carry_over.py).

    python toy/grid.py                       # three bases (about 7 minutes on one core)
    python toy/grid.py --only grid-gemma     # one base again
    python toy/grid.py --check               # only measure what is on disk
    python toy/grid.py --tasks DIR           # the 96 tasks as JSONL: train.py --data DIR

A list is three records, each a name and words of three of 8 kinds: "bob red dog four; ann pear blue saw; leo tea golf
cow". The skill (ann, colour) is the colour in ann's record: blue. 12 names by 8 kinds make 96 skills; each shares its
name with 7 others and its kind with 11, so a model can decode an unseen task from parts that it has seen in others.
All else is as in toy/build.py, whose code this uses: the bases know all skills by name ("ann colour: blue"), and a task
shows the list and "Answer:" alone.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy import build

NAMES = "ann bob carl dora emma fred gina hugo ida jack kate leo".split()
KINDS = {
    "colour": build.COLOURS[:8], "animal": build.ANIMALS[:8], "fruit": build.FRUITS[:8], "number": build.NUMBERS[1:9],
    "tool": "saw hammer drill axe rake file knife spade".split(),
    "drink": "tea coffee milk water wine beer juice cocoa".split(),
    "dress": "hat coat shirt sock shoe scarf glove belt".split(),
    "sport": "golf tennis chess rugby judo rowing polo darts".split(),
}
SKILLS = {f"{name}_{kind}": (name, kind) for kind in KINDS for name in NAMES}


def make_list(rng, skill=None):
    """Draws a list and returns its text and {skill: answer} of its nine words, in their order, `skill` among them."""
    names = rng.sample(NAMES, 3)
    kinds = [rng.sample(list(KINDS), 3) for _ in names]
    if skill:  # where they are missing, its name replaces one of the names and its kind one of that record's kinds
        name, kind = SKILLS[skill]
        at = names.index(name) if name in names else rng.randrange(3)
        names[at] = name
        if kind not in kinds[at]:
            kinds[at][rng.randrange(3)] = kind
    words = [[rng.choice(KINDS[kind]) for kind in own] for own in kinds]
    return ("; ".join(" ".join([name, *own]) for name, own in zip(names, words)),
            {f"{names[i]}_{kinds[i][j]}": words[i][j] for i in range(3) for j in range(3)})


def draw_choices(rng, task):
    """As build.draw_choices. The choices are the record's three words and one of the same kind from another record: who
    knows the name alone is right a third of the time, who knows the kind alone half of it."""
    name, kind = SKILLS[task]
    rivals = []
    while not rivals:
        text, answers = make_list(rng, task)
        rivals = sorted({word for skill, word in answers.items() if SKILLS[skill][1] == kind} - {answers[task]})
    record = [word for skill, word in answers.items() if SKILLS[skill][0] == name]
    return text, [*record, rng.choice(rivals)], answers[task]


def task_rows(task, n_train=300, n_eval=100):
    return build.task_rows(task, n_train, n_eval, draw_choices)


def ask(_, skill):
    return f"\n{skill.replace('_', ' ')}:"


def document(rng):
    text, answers = make_list(rng)
    return build.ask_all(rng, ask, text, answers, list(answers.values()))


# Two sources and a target of experiments/carry_over.py; the target has another architecture and tokenizer. Local layers
# attend to four tokens: every word of a record sees its name, and no word sees another name. With 16, as in build.py,
# the larger Qwen had not learned which record a word is in after 1,500 steps (.72 by name); with 4 it took 500.
SOURCES, TARGET = ("grid-qwen-s", "grid-qwen-m"), "grid-gemma"
LOCAL = dict(sliding_window=4)
BASES = {  # as in build.py: (family, layers, sizes, rounds)
    "grid-qwen-s": ("qwen", "LFF", dict(LOCAL, hidden_size=48, head_dim=16, intermediate_size=96), [(1000, 7e-3)]),
    "grid-qwen-m": ("qwen", "LFLF", dict(LOCAL, hidden_size=64, intermediate_size=128), [(1000, 6e-3)]),
    "grid-gemma": ("gemma", "LFLF", dict(LOCAL, hidden_size=60, intermediate_size=112), [(1000, 5e-3)]),
}
VOCABULARY = {"qwen": 600, "gemma": 420}  # enough for one token per word in both
FOLDER, TASKS, QUESTIONS = build.HERE / "grid", {}, 100  # as in build.py; the tasks are not kept on disk

if __name__ == "__main__":
    build.main(sys.modules[__name__])
