"""The commands that the documents show are ones that there are."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from engine.cli import app

typer = pytest.importorskip("typer")
ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = ["python", "-m", "engine.run"]


def lines(document: Path) -> list[list[str]]:
    """The words of every line in its blocks of shell."""
    blocks = (block.replace("\\\n", " ") for block in BLOCK.findall(document.read_text()))
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def commands(document: Path) -> list[list[str]]:
    """The arguments of `engine`, `python -m engine.run` among them."""
    found = []
    for words in lines(document):
        if words[:3] == RUN:
            words = ["engine", "run", *words[3:]]
        if words[:1] == ["engine"]:
            found.append(words[1:])
    return found


def scripts(document: Path) -> list[list[str]]:
    """Names of scripts of benchmarks/, each with its arguments."""
    found = []
    for words in lines(document):
        if words[:1] == ["python"] and Path(words[1]).parent.name == "benchmarks":
            found.append([Path(words[1]).stem, *words[2:]])
    return found


def parsed(arguments: list[str]) -> None:
    """What reading them alone raises; nothing runs."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(click.Context(group), arguments)
    command.make_context(name, rest)


class Read(Exception):
    """A script's arguments are."""


def read(monkeypatch, name: str, *arguments: str) -> None:
    """Raises Read where the script takes these arguments; nothing runs."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *given):
        raise Read(parse(self, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    importlib.import_module(name).main()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_can_be_pasted(document):
    for arguments in commands(document):
        if "--help" not in arguments:
            parsed(arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_can_be_pasted(document, monkeypatch):
    for words in scripts(document):
        with monkeypatch.context() as patched, pytest.raises(Read):
            read(patched, *words)


def test_scripts_are_found_and_others_refused(monkeypatch):
    assert len(scripts(ROOT / "benchmarks/README.md")) > 2
    with pytest.raises(SystemExit):
        read(monkeypatch, "compare", "--falls", "0.1")


def test_some_are_found_and_others_refused():
    assert len(commands(ROOT / "README.md")) > 12
    with pytest.raises(Exception, match="[Nn]o such option:? '?--model"):
        parsed(["chat", "--model", "small"])
    with pytest.raises(Exception, match="[Nn]o such command"):
        parsed(["talk", "small"])
