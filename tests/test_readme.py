"""Every command of the README and of the scripts' own first lines is one that its script understands."""
import ast
import json
import re
import runpy
import shlex
import sys
from itertools import groupby
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

import train
from support import settings


def commands():
    """(file, words) of each python and torchrun command, in ```bash blocks of .md files and in the docstrings of scripts."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("tiny/*.md"), *ROOT.glob("tiny/*.py"),
                        *ROOT.glob("methods/*.py"), ROOT / "docs/methods.md"]):
        text = path.read_text()
        blocks = [ast.get_docstring(ast.parse(text)) or ""] if path.suffix == ".py" else \
            re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if path.suffix == ".py" and not line.startswith(("python ", "torchrun ")):
                continue  # a docstring's prose
            for is_end, words in groupby(shlex.split(line, comments=True), lambda word: word in ("&&", ";", "|")):
                words = list(words)
                if not is_end and words[0] in ("python", "python3", "torchrun") and any(w.endswith(".py") for w in words):
                    yield pytest.param(words, id=f"{path.name}: {' '.join(words)}"[:120])


class Parsed(BaseException):
    """Ends a script as soon as its command line is read; no `except` of its own stops it."""


@pytest.mark.parametrize("words", commands())
def test_every_command_parses(words, tmp_path, monkeypatch, capfd):
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = words[at], words[at + 1:]
    assert (ROOT / script).is_file(), f"{script}: no such script"
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        get_args_parser().parse_args(words[1:])

    monkeypatch.chdir(tmp_path)
    if "--resume" in argv:  # which reads the run's own settings
        folder = Path(argv[argv.index("--resume") + 1])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(settings.to_record(train.Config())))

    def read_and_stop(read):
        def stop(*args, **kwargs):
            raise Parsed(read(*args, **kwargs))
        return stop
    cli, parse = tyro.cli, settings.parse

    def parse_and_stop(*args):  # it asks tyro twice
        monkeypatch.setattr(tyro, "cli", cli)
        raise Parsed(parse(*args))
    monkeypatch.setattr(settings, "parse", parse_and_stop)
    monkeypatch.setattr(tyro, "cli", read_and_stop(tyro.cli))
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", read_and_stop(tyro.extras.subcommand_cli_from_dict))
    monkeypatch.setattr(sys, "argv", [script, *argv])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed as done:
        cfg = done.args[0]
    except SystemExit as end:
        pytest.fail(f"exit status {end.code}: {capfd.readouterr().err}")
    if Path(script).name == "train.py" and not cfg.resume:  # and the values are allowed, given the files that it names
        if cfg.data:
            cfg.data.write_text("a.mp4|||a clip\n")
        for argument in cfg.prompts:
            Path(argument.partition("=")[2]).write_text("a prompt\n")
        train.check(cfg)


def test_there_are_commands_of_every_script():
    """If the README's form changes, the test above must not pass by finding nothing."""
    found = {word for p in commands() if p.id.startswith("README.md") for word in p.values[0] if word.endswith(".py")}
    assert found >= {"train.py", "generate.py", "evaluate.py", "lora.py"}
