"""The layout: imports lead one way and in no circle, portal.py stands on nothing of ours, nothing is patched outside tests."""
import ast, re

import pytest
from runtime.files import ROOT

FILES = [p for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]) if p.relative_to(ROOT).parts[0] != "tests"]
NAMES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
ORDER = ["portal", "kernels.lora", "kernels.cross_entropy", "sites", "masks", "heads", "tokens", "frozen", "checkpoints", "bases", "data", "benchmarks", "score", "learner", "train", "port",
         "baselines", "table", "eval", "merge", "export", "experiments"]  # lower floors first; a file imports from lower floors and its own folder


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


def test_what_a_higher_file_does_for_a_lower_one():
    """Three commands are carried out by a file above theirs, which is imported when they are called, by name."""
    handed_over = {"train": "experiments.add_task", "data": "benchmarks", "runtime.run_folder": "export"}
    found = {(name, module) for name, path in NAMES.items()
             for module in re.findall(r'(?:import_module|run_module|__import__)\("([\w.]+)"', path.read_text()) if module in NAMES}
    assert found == set(handed_over.items())


def test_no_line_is_longer_than_120():
    long = [f"{p.relative_to(ROOT)}:{k}" for p in FILES for k, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, long
