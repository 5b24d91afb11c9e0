"""README and docs as they stand: their commands and python blocks run; links, files, names and flags exist."""
import argparse, contextlib, functools, importlib, io, re, runpy, shlex, shutil, sys
import xml.etree.ElementTree as xml

import pytest
import torch
from conftest import lora_hooks
from transformers import AutoModelForCausalLM

import presets, train
from bases import load_base
from portal import Config, Converter, Portal
from runtime.files import ROOT, write_json
from runtime.flags import run_main
from runtime.saved import save_portal
from tasks import rows

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("bases", "baselines", "experiments", "exports", "kernels", "reports", "runtime", "starts", "tasks", "toy")
SOURCES = [path for folder in (ROOT, *(ROOT / name for name in PACKAGES)) for path in sorted(folder.glob("*.py"))]
COMMANDS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES
            if 'if __name__ == "__main__"' in path.read_text() and path.name != "portal.py"]       # which takes no flags
RUN = ("train", "port", "eval", "export", "experiments.plots")  # on the toy; the others are parsed alone
NOT_THE_TOY = re.compile(r"qwen3|gemma-[34]|smollm2|bfloat16|\.\.\.|\b(DIR|BASE|RUN|TASK|org/name)\b")
NOT_OURS = {"pytest", "hf", "vllm"}                                                  # programs of fenced lines, not run
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


# ---------------------------------------------------------------------------------------------- what a page holds
def blocks(page):
    """[(language, text)] of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def code_spans(page):
    """The texts in single backticks of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))


def anchors(page):
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)", page.read_text().lower(), re.M)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def command_of(line):
    """A command line -> (module, arguments) if it starts one of this project's, else None."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("--") + 1:]]
    if words[0] != "python":
        if words[:2] == ["pip", "install"]:
            assert all((ROOT / file).is_file() for flag, file in zip(words, words[1:]) if flag == "-r"), line
        else:
            assert words[0] in NOT_OURS, f"{line}: what is {words[0]}?"
        return None
    if words[1] == "-m":
        return words[2], words[3:]
    assert (ROOT / words[1]).is_file(), line
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


# ---------------------------------------------------------------------------------------------- starting a command
class Parsed(BaseException):
    """Stops a command when its arguments are parsed."""


def parse(module, arguments, options):
    """Parse a command's arguments as it does, and do no more. Its option strings are added to `options`."""
    def parse_args(parser, *args, known=argparse.ArgumentParser.parse_args):
        options.update(option for action in parser._actions for option in action.option_strings)
        known(parser, *args)
        raise Parsed
    if module == "portal":                                                           # a tour, without flags
        assert not arguments
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *(word for word in arguments if word != "...")])
        runpy.run_path(ROOT / (module.replace(".", "/") + ".py"), run_name="__main__")


def run(module, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        run_main(importlib.import_module(module).main)


def follow(page):
    """Run the blocks of a page in the working folder, top to bottom: python blocks, and each of the toy's commands
    once; the other commands are parsed alone."""
    names, done = {}, []
    for language, text in blocks(page):
        assert language in ("bash", "python", "json", "text"), f"{page}: a block of language {language!r}"
        if language == "python":
            exec(text, names)
        for line in text.splitlines() if language in ("bash", "json") else ():
            if language == "json":
                row, wrong = rows.read_line(line.encode(), re.search(r'"task": "(\w+)"', line)[1])
                assert row and not wrong, line
            elif command := command_of(line):
                parse(*command, set())
                short = command[0] in RUN or command[0] == "data" and "--check" in command[1]
                if short and not NOT_THE_TOY.search(line) and command not in done:
                    run(*command)
                    done.append(command)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A working folder in which the README was followed, with five rows of four of the toy's tasks and one epoch."""
    few, folder, read = dict(n=5, epochs=1, batch_size=4, least=1), tmp_path_factory.mktemp("readme"), rows.read_rows
    (folder / "toy" / "data").mkdir(parents=True)
    for path in (ROOT / "toy").iterdir():
        if path.name != "data":
            (folder / "toy" / path.name).symlink_to(path)
    for task in ("largest", "first", "animal", "last"):
        (folder / "toy" / "data" / task).symlink_to(ROOT / "toy" / "data" / task)
    with pytest.MonkeyPatch.context() as patch:
        for settings in (presets.TOY, *(value for value in presets.TOY.values() if isinstance(value, dict))):
            for key in few.keys() & settings.keys():
                patch.setitem(settings, key, few[key])
        patch.setitem(presets.TOY, "sizes", dict(d_z=8, hidden=16, d_c=12))
        patch.setattr(train, "ROOT", folder)                                         # of toy/data
        patch.setattr(rows, "read_rows", lambda *args: read(*args)[:5])
        patch.chdir(folder)
        follow(ROOT / "README.md")
        yield folder


# ---------------------------------------------------------------------------------------------- the tests
def test_the_readme_as_it_stands(toy):
    assert {"results.md", "log.png", "results.jsonl"} <= {path.name for path in (toy / "out" / "toy").iterdir()}


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda path: path.stem)
def test_a_page_as_it_stands(page, toy, tmp_path, monkeypatch):
    shutil.copytree(toy, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    follow(page)


@torch.no_grad()
def test_inference_as_the_page_has_it(tmp_path, monkeypatch):
    """Its python blocks on a random core: every row as the plain model with its task's LoRA has it."""
    code = "\n".join(text for language, text in blocks(ROOT / "docs" / "inference.md") if language == "python")
    base, run, names, printed = load_base("toy-qwen-l"), tmp_path / "out" / "toy", {}, io.StringIO()
    torch.manual_seed(1)
    tasks = sorted(path.name for path in (ROOT / "toy" / "data").iterdir())
    portal = Portal(Config(tasks=tasks, d_z=8, d_e=4, hidden=16, d_c=12, rank=4, alpha=8))
    portal.converters[base.name] = Converter(portal.cfg, base.groups_of(portal.cfg.modules))
    for p in [portal.z, *portal.core.parameters(), *portal.converters[base.name].parameters()]:
        p.normal_(std=0.3)
    save_portal(run, portal)
    write_json(run / "portal.json", dict(config=vars(portal.cfg), bases=[], seed=0, data=""))
    monkeypatch.chdir(tmp_path)
    with torch.enable_grad(), contextlib.redirect_stdout(printed):
        exec(code, names)
    adapters = portal.adapters(base.name)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy" / base.name, dtype=torch.float32)
    def log_p_of(task, ids):
        t = tasks.index(task)
        handles = lora_hooks(model, *({m: x[t] for m, x in side.items()} for side in adapters[:2]), adapters.scale)
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return log_p
    prompt, = re.findall(r'\["(Words.*?)"\] \* 3', code)
    ids = base.tokenizer(prompt.replace("\\n", "\n")).input_ids
    texts = [base.tokenizer.decode(log_p_of(task, ids)[-1].argmax()) for task in ("largest", "first", "animal")]
    assert names["texts"] == texts and len(set(texts)) > 1
    picked = []
    for row, got in zip(names["rows"], names["log_p"]):
        ids, want = base.tokenizer(row.prompt).input_ids, []
        for choice in row.choices:
            new = base.tokenizer(choice).input_ids
            log_p = log_p_of(row.task, ids + new)
            want.append(sum(log_p[i - 1, token].item() for i, token in enumerate(new, len(ids))))
        assert got == pytest.approx(want, rel=1e-3)
        picked.append(row.choices[want.index(max(want))])
    assert printed.getvalue() == f"{texts}\n{picked}\n"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "results").glob("*.md"))], ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            path = page.parent / path if path else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@page
def test_files_and_names_exist(page):
    """`file.py`, `folder/...` and `module.function` in backticks."""
    for span in code_spans(page):
        name, folders = span.partition("(")[0], "|".join([*PACKAGES, "docs", "results", "tests", r"\.ci"])
        if re.fullmatch(rf"[\w/.-]+\.py|({folders})/[\w/.-]*", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"[a-z_]\w*(\.\w+)+", name) and not re.search(r"\.(jsonl?|safetensors|md|png|gguf)$", name):
            module, *rest = name.split(".")
            while rest and (ROOT / module.replace(".", "/")).is_dir():               # kernels.lora.lora_linear
                module = f"{module}.{rest.pop(0)}"
            if (ROOT / f"{module.replace('.', '/')}.py").exists():
                assert functools.reduce(getattr, rest, importlib.import_module(module)), span


def test_the_map_has_every_room_and_every_file_at_the_top():
    spans = set(code_spans(ROOT / "README.md"))
    rooms = {f"{path.parent.name}/" for path in SOURCES if path.parent != ROOT} | {"docs/", "results/", "tests/"}
    assert rooms | {path.name for path in SOURCES if path.parent == ROOT} <= spans


def test_flags_and_commands_in_the_text_exist():
    options, spans = {"--nproc-per-node"}, [span for page in PAGES for span in code_spans(page)]
    for module in COMMANDS:
        with contextlib.suppress(SystemExit):                                        # a required flag is missing
            parse(module, [], options)
    for span in spans:
        if span.startswith(("python ", "torchrun ", "pip ")):
            with contextlib.suppress(SystemExit):
                parse(*(command_of(span) or ("eval", [])), options)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) <= options, span


def test_the_picture_needs_nothing_else():
    """No script, image, style sheet or font from elsewhere, and an opaque ground under everything."""
    text = (ROOT / "docs" / "method.svg").read_text()
    elements = {element.tag.split("}")[1] for element in xml.fromstring(text).iter()}
    assert not {"script", "image", "foreignObject", "style"} & elements and {"title", "desc"} < elements
    assert not re.search(r"href|@import|url\((?!#)|currentColor", text)
    assert re.search(r'<rect x="1" y="1" width="998" height="638" rx="12" fill="#ffffff"', text)


def test_the_readme_is_read_by_people():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1900 and text.count("<!-- ") == 2
    prose = re.sub(r"^```.*?^```$|^\|.*?$|<!--.*?-->|\]\(.*?\)|`[^`\n]*`", "", text, flags=re.M | re.S)
    for paragraph in re.split(r"\n\n|\n(?=- )", prose):
        assert len(re.findall(r"(?<![\w.])\d[\d.,:]*", paragraph)) <= 3, paragraph
