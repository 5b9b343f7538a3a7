"""The rules of the house (CONTRIBUTING.md), read off the syntax trees: who imports whom, and how long things may be."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from support import settings
from tiny import world

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ("model", "sampler", "reward", "lora", "data")
MAY_IMPORT = {name: set() for name in LEAVES} | {
    "generate": {"model", "sampler", "lora"},
    "evaluate": {"model", "sampler", "reward", "lora", "generate"},
    "train": {*LEAVES, "evaluate"}}
CORE = tuple(MAY_IMPORT)


def source(name):
    return (ROOT / f"{name}.py").read_text()


def imports(text):
    """First words of all imported modules, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if node.module and not node.level else "a relative import")
    return found


def modules(folder):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted((ROOT / folder).glob("**/*.py"))]


def functions(name):
    return [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def nesting(node, depth=0):
    """How deep blocks lie in each other; an elif is no deeper than its if."""
    blocks = ast.For | ast.While | ast.If | ast.With | ast.Try | ast.FunctionDef
    alone = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    inside = [nesting(child, depth + (isinstance(child, blocks) and not (alone and child is node.orelse[0])))
              for child in ast.iter_child_nodes(node)]
    return max([depth, *inside])


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_the_reading_of_imports_sees_them_everywhere():
    """Or the tests below would pass on anything."""
    text = "import model.x\ndef f():\n    from train import g\n    if f:\n        import data as d\nfrom . import h"
    assert imports(text) == {"model", "train", "data", "a relative import"}
    assert nesting(ast.parse("def f():\n for a in b:\n  if c:\n   pass\n  elif d:\n   pass")) == 3


@pytest.mark.parametrize("name", CORE)
def test_core_files_import_what_they_may_of_each_other(name):
    assert imports(source(name)) & set(CORE) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", CORE)
def test_core_files_import_the_tiny_world_inside_functions_only(name):
    top = "\n".join(ast.unparse(node) for node in ast.parse(source(name)).body
                    if isinstance(node, ast.Import | ast.ImportFrom))
    assert "tiny" not in imports(top)
    assert "tiny" not in imports(source(name)) or name in ("train", "evaluate")


@pytest.mark.parametrize("path", modules("support"))
def test_support_imports_no_core_file(path):
    assert not imports(path.read_text()) & {*CORE, "tiny", "methods", "rewards"}


@pytest.mark.parametrize("path", modules("rewards"))
def test_rewards_import_support_alone(path):
    assert not imports(path.read_text()) & {*CORE, "tiny", "methods", "rewards"}


@pytest.mark.parametrize("path", modules("rewards"))
def test_rewards_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 120 and not [line for line in lines if len(line) > 100]


@pytest.mark.parametrize("path", modules("methods"))
def test_methods_do_not_import_each_other(path):
    assert not imports(path.read_text()) & {"methods", *(p.stem for p in (ROOT / "methods").glob("*.py"))}


def test_the_core_is_short():
    lines = {name: len(source(name).splitlines()) for name in CORE}
    assert sum(lines.values()) <= 2500 and lines["model"] <= 720 and lines["train"] <= 360, lines


@pytest.mark.parametrize("name", CORE)
def test_lines_and_functions_of_the_core_fit_on_a_screen(name):
    assert not [line for line in source(name).splitlines() if len(line) > 100]
    assert not [f.name for f in functions(name) if f.end_lineno - f.lineno + 1 > 45]
    assert not [f.name for f in functions(name) if nesting(f) > 4]


def test_train_opens_with_the_step_and_the_loop():
    start = {f.name: f.lineno for f in functions("train")}
    assert start["edit_rewards"] < start["train"] <= 150 < start["check"] < start["main"]


def test_the_core_explains_itself():
    """Comments, shapes among them, at least one for every five lines of code; paragraphs; no comprehension in another."""
    comments = code = body = blank = 0
    comprehensions = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    for name in CORE:
        tree, lines = ast.parse(source(name)), source(name).splitlines()
        docs = docstring_lines(tree)
        tokens = tokenize.generate_tokens(io.StringIO(source(name)).readline)
        comments += sum(t.type == tokenize.COMMENT and not re.fullmatch(r"#\s*-+\s*", t.string) for t in tokens)
        code += sum(bool(line.strip()) and i not in docs and not line.strip().startswith("#") for i, line in enumerate(lines, 1))
        for f in functions(name):
            own = [i for i in range(f.lineno, f.end_lineno + 1) if i not in docs]
            body += len(own)
            blank += sum(not lines[i - 1].strip() for i in own)
        for node in ast.walk(tree):
            inner = [n for child in ast.iter_child_nodes(node) for n in ast.walk(child) if isinstance(n, comprehensions)]
            assert not (isinstance(node, comprehensions) and inner), f"{name}.py, line {node.lineno}"
    assert comments / code >= .2 and blank / body >= .06, (comments / code, blank / body)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_settings_know_the_tiny_worlds_clips():
    """Which support/ may not import."""
    assert settings.TINY_CLIPS == (world.FRAMES, world.SIZE)
