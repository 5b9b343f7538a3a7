"""The rules of the house (CONTRIBUTING.md), read off the syntax trees: who imports whom, and how long things may be."""
import ast
import inspect
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ("model", "sampler", "reward", "lora", "data")
BELOW = {"formats", "support"}
CORE = (*LEAVES, "train", "generate", "evaluate")
MAY_IMPORT = {name: {*BELOW} for name in LEAVES} | {  # file at the top, or room: what it may import of ours
    "generate": {"model", "sampler", "lora", *BELOW}, "evaluate": {"model", "sampler", "reward", "lora", "generate", *BELOW},
    "train": {*LEAVES, "evaluate", *BELOW},
    "support": set(), "formats": {"support"}, "pages": {"support"}, "rewards": {*BELOW}, "bases": {"model", "sampler", *BELOW},
    "methods": {*CORE, "support"}, "tiny": {*CORE, "methods", "rewards", "bases", "pages", *BELOW}} | {
    script: {*CORE, "methods", "pages", *BELOW} for script in ("benchmark", "explain", "report")}
DOORS = {"model": {"bases", "tiny"}, "reward": {"rewards"}}  # opened inside a function, by load_base and load_reward
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FILES = sorted(path for name in MAY_IMPORT for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])


def room(path):
    """The file at the top, or the room that a file is in."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree):
    """Modules that a tree imports, those inside functions too; of `from package import name` both."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = "a relative import" if node.level else node.module
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module" and node.args:
            named = ast.unparse(node.args[0])
            found |= {word for word in MAY_IMPORT if re.search(rf"['\"]{word}\.", named)}
    return found


def ours(modules):
    """First words of the modules that are of this repository."""
    return {module.partition(".")[0] for module in modules} & {*MAY_IMPORT, "tests", "a relative import"}


def parse(path):
    return ast.parse(path.read_text())


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def core(name):
    return ROOT / f"{name}.py"


def lines(path):
    return len(path.read_text().splitlines())


def nesting(node, depth=0):
    """How deep blocks lie in each other; an elif is no deeper than its if."""
    blocks = ast.For | ast.While | ast.If | ast.With | ast.Try | ast.FunctionDef
    alone = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    inside = [nesting(child, depth + (isinstance(child, blocks) and not (alone and child is node.orelse[0])))
              for child in ast.iter_child_nodes(node)]
    return max([depth, *inside])


def has_inner(node):
    """Whether a comprehension holds another one."""
    return any(isinstance(inner, COMPREHENSIONS) for child in ast.iter_child_nodes(node) for inner in ast.walk(child))


def docstring_lines(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def test_the_readings_see_what_they_should():
    """Or the tests below would pass on anything."""
    text = ("import model.x\ndef f():\n    from train import g\n    if f:\n        import data as d\nfrom . import h\n"
            "importlib.import_module(f'rewards.{f}')")
    assert ours(imports(ast.parse(text))) == {"model", "train", "data", "a relative import", "rewards"}
    assert nesting(ast.parse("def f():\n for a in b:\n  if c:\n   pass\n  elif d:\n   pass")) == 3
    assert [has_inner(ast.parse(t).body[0].value) for t in ("[a for b in c for a in b]", "[[a for a in b] for b in c]")] == [
        False, True]


@pytest.mark.parametrize("path", named(FILES))
def test_files_import_what_their_room_may(path):
    name = room(path)
    if name == "methods":  # of each other they import what is common
        assert {module.split(".")[1] for module in imports(parse(path)) if module.startswith("methods.")} <= {"common"}
    assert ours(imports(parse(path))) <= MAY_IMPORT[name] | DOORS.get(name, set()) | {name}


@pytest.mark.parametrize("name", CORE)
def test_doors_are_opened_inside_functions(name):
    top = [node for node in parse(core(name)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert ours(imports(ast.Module(top, []))) <= MAY_IMPORT[name]


@pytest.mark.parametrize("path", named([*(path for path in FILES if path.parent == ROOT and "__main__" in path.read_text()),
                                        ROOT / "methods/__init__.py", ROOT / "tiny/__init__.py"]))
def test_scripts_first_choose_how_threads_wait(path):
    """Or torch would be loaded by then. A folder's __init__.py is imported before any script of it."""
    first = next(node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import support.threads"


def test_imports_go_round_in_no_circle():
    """Of files, by what they import when they are imported themselves."""
    known = {}
    for path in FILES:
        known[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    arrows = {}
    for module, path in known.items():
        top = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        arrows[module] = imports(ast.Module(top, [])) & known.keys() - {module}
    while arrows:
        free = [module for module, needs in arrows.items() if not needs & arrows.keys()]
        assert free, sorted(arrows)  # each of these waits for another one of them
        for module in free:
            del arrows[module]


@pytest.mark.parametrize("path", named(path for path in FILES if path.parent.name == "rewards"))
def test_rewards_are_short(path):
    assert lines(path) <= 120
    assert not [line for line in path.read_text().splitlines() if len(line) > 100]


def test_rooms_are_small():
    sizes = {name: lines(core(name)) for name in CORE}
    assert sum(sizes.values()) <= 2500 and sizes["model"] <= 720 and sizes["train"] <= 360, sizes
    assert len([path for path in ROOT.glob("support/*.py") if path.stem != "__init__"]) <= 9
    everything = {str(path.relative_to(ROOT)): lines(path) for path in FILES if room(path) != "bases"}
    assert sum(everything.values()) <= 11_000, sum(everything.values())
    for name, most in {"support": 2060, "formats": 1440, "rewards": 850, "benchmark": 460}.items():
        assert sum(lines(path) for path in FILES if room(path) == name) <= most, name
    assert sum(map(lines, ROOT.glob("tests/*.py"))) <= 10_650 and lines(ROOT / "README.md") <= 170


@pytest.mark.parametrize("path", named(path for path in FILES if room(path) not in CORE))
def test_behind_the_core_code_is_plain_too(path):
    tree = parse(path)
    assert not [node.name for node in functions(tree) if node.end_lineno - node.lineno + 1 > 60]
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS) and has_inner(node)]


@pytest.mark.parametrize("path", named([*map(core, CORE), *(p for p in ROOT.glob("methods/*.py") if p.stem != "common")]))
def test_lines_and_functions_of_the_core_and_the_methods_fit_on_a_screen(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 100]
    of_file = functions(parse(path))
    assert not [f.name for f in of_file if f.end_lineno - f.lineno + 1 > 45]
    assert not [f.name for f in of_file if nesting(f) > 4]
    if path == core("train"):  # it opens with the step and the loop
        start = {f.name: f.lineno for f in of_file}
        assert start["edit_rewards"] < start["train"] <= 150 < start["check"] < start["main"]


def test_the_core_explains_itself():
    """Comments, shapes among them, at least one for every five lines of code; paragraphs; no comprehension in another."""
    comments = code = body = blank = 0
    for name in CORE:
        text, tree = core(name).read_text(), parse(core(name))
        docs, rows = docstring_lines(tree), text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += sum(t.type == tokenize.COMMENT and not re.fullmatch(r"#\s*-+\s*", t.string) for t in tokens)
        code += sum(bool(row.strip()) and i not in docs and not row.strip().startswith("#") for i, row in enumerate(rows, 1))
        for f in functions(tree):
            own = [i for i in range(f.lineno, f.end_lineno + 1) if i not in docs]
            body += len(own)
            blank += sum(not rows[i - 1].strip() for i in own)
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS) and has_inner(node)], name
    assert comments / code >= .2 and blank / body >= .06, (comments / code, blank / body)


def test_little_runs_before_the_loop(tmp_path, few_clips, monkeypatch):
    """Functions of ours from main to load_base, and to the loop; no constructors, networks, names of tensors, tiny, bases."""
    seen = []

    def note(frame, event, argument):
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")  # else a class or a module
        if event == "call" and code.co_filename.startswith(f"{ROOT}/") and is_function:
            seen.append((Path(code.co_filename).relative_to(ROOT).as_posix(), code.co_qualname))
    # The loop itself is left out: it would take ten times as long.
    monkeypatch.setattr(train, "train", lambda *args: seen.append(("train.py", "train")) or True)
    sys.setprofile(note)
    try:
        assert train.main(["--steps", "1", "--eval-every", "0", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    finally:
        sys.setprofile(None)
    seen = [(file, name) for file, name in seen if not file.startswith((".venv", "venv", "tests"))]
    before = dict.fromkeys(seen[:seen.index(("model.py", "load_base")) + 1])
    assert ("train.py", "check") in before and len(before) <= 20, list(before)
    to_loop = dict.fromkeys(seen[:seen.index(("train.py", "train")) + 1])
    counted = [(file, name) for file, name in to_loop if not file.startswith(("tiny/", "bases/")) and file not in (
        "model.py", "formats/tensor_names.py") and not name.endswith(("__init__", "__post_init__"))]
    assert len(counted) <= 60, counted
