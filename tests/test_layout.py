"""The layout: imports lead one way and in no circle, portal.py stands on nothing of ours, nothing is patched outside tests."""
import ast, re, subprocess

import pytest
from runtime.files import ROOT

FILES = [p for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"), *ROOT.glob("tasks/*/*.py")]) if p.relative_to(ROOT).parts[0] != "tests"]
NAMES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
TOP = ["data", "eval", "export", "port", "portal", "presets", "score", "train"]         # what is new goes into a room
ROOMS = {"baselines", "bases", "docs", "experiments", "exports", "kernels", "reports", "results", "runtime", "starts", "tasks", "tests", "toy"}
LINES = 9450                                                                          # of the product: growth shows here
ORDER = ["portal", "kernels.lora", "bases", "tasks.rows", "tasks.benchmarks", "tasks.check", "data", "presets", "score", "exports.portallib", "exports.hub", "exports.peft",
         "starts", "tasks.new_task", "train", "port", "baselines", "reports", "eval", "exports", "export", "experiments"]  # lower floors first; a file imports from
#                                                                                       lower floors and its own folder


def imports(path):
    """Every module that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


OURS = {name: {other for other in imports(path) if other in NAMES and other != name} for name, path in NAMES.items()}


def floor(name):
    return next((k for k, lower in enumerate(ORDER) if name == lower or name.startswith(lower + ".")), None)


def test_no_import_circle():
    seen, path = set(), []
    def visit(name):
        assert name not in path, f"import circle: {' -> '.join([*path[path.index(name):], name])}"
        if name not in seen:
            path.append(name)
            for other in OURS[name]:
                visit(other)
            path.pop()
            seen.add(name)
    for name in OURS:
        visit(name)
    assert len(seen) == len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_imports_lead_down(name):
    own = floor(name)
    for other in OURS[name]:
        if name.startswith("runtime"):
            assert other == "portal" or other.startswith("runtime"), f"{name} imports {other}"
        elif own is not None and floor(other) is not None:
            assert floor(other) <= own, f"{name} imports {other}, which stands above it"
    assert name != "portal" or not OURS[name]
    assert not any(module.startswith("unittest") for module in imports(NAMES[name]))


def test_nothing_is_imported_by_name():
    """Outside of experiments/, which look for packages that they compare with."""
    found = {name for name, path in NAMES.items() if re.search(r"import_module|run_module|__import__", path.read_text())}
    assert {name for name in found if not name.startswith("experiments")} == set()


def test_the_rest_knows_the_room_of_bases_by_its_door():
    inside = {f"{name} imports {other}" for name in NAMES for other in OURS[name] if other.startswith("bases.") and not name.startswith("bases")}
    assert {line for line in inside if line.rpartition(".")[2] in ("decoding", "files", "frozen", "heads", "load", "masks", "of_run", "sites", "tokens")} == set()


def test_what_stands_at_the_top_and_which_rooms_there_are():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == TOP
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.split("\n")
    assert {path.split("/")[0] for path in tracked if "/" in path} - {".ci"} == ROOMS


def test_a_file_is_one_sitting_and_the_whole_has_its_size():
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {path: n for path, n in lines.items() if n > 300} == {}
    assert LINES - 200 < sum(lines.values()) <= LINES, "growth is a decision: change LINES, and say why in the commit"


def test_no_line_is_longer_than_120():
    long = [f"{p.relative_to(ROOT)}:{k}" for p in FILES for k, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, long
