"""The commands that the documents show are ones that there are."""

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


def commands(document: Path) -> list[list[str]]:
    """The arguments of `engine` in its blocks of shell, `python -m engine.run` among them."""
    found = []
    for block in BLOCK.findall(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == RUN:
                words = ["engine", "run", *words[3:]]
            if words[:1] == ["engine"]:
                found.append(words[1:])
    return found


def parsed(arguments: list[str]) -> None:
    """What reading them alone raises; nothing runs."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(click.Context(group), arguments)
    command.make_context(name, rest)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_can_be_pasted(document):
    for arguments in commands(document):
        if "--help" not in arguments:
            parsed(arguments)


def test_some_are_found_and_others_refused():
    assert len(commands(ROOT / "README.md")) > 12
    with pytest.raises(Exception, match="[Nn]o such option: --model"):
        parsed(["chat", "--model", "small"])
    with pytest.raises(Exception, match="[Nn]o such command"):
        parsed(["talk", "small"])
