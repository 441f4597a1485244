"""`engine ...` called in this process."""

import contextlib
import io

import pytest

from engine.cli import app
from engine.commands.output import execute


def call(*arguments) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `engine ...`, as `main` runs it."""

    def main(standalone_mode: bool):
        return app([str(argument) for argument in arguments], standalone_mode=standalone_mode)

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as stopped:
            execute(main)
    return stopped.value.code or 0, out.getvalue(), err.getvalue()


def refused(sentence: str, *arguments) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err and err.startswith("engine: ") and err.count("\n") == 1
