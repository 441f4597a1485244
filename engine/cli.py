"""The `engine` command."""

if __name__ == "__main__":  # before the imports below, which take a second
    from engine.commands import interrupt

    interrupt.watch()


from typing import Annotated

import typer

from engine import __version__
from engine.commands.budget import budget
from engine.commands.chat import chat
from engine.commands.common import Quiet, Verbose
from engine.commands.compare import compare
from engine.commands.doctor import doctor
from engine.commands.evaluate import evaluate
from engine.commands.export import export
from engine.commands.fetch import fetch
from engine.commands.heal import heal
from engine.commands.output import execute
from engine.commands.plan import plan
from engine.commands.plot import plot
from engine.commands.profile import profile
from engine.commands.prune import prune
from engine.commands.push import push
from engine.commands.quantize import quantize
from engine.commands.shrink import shrink
from engine.run import run

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
COMMANDS = (
    run, chat, shrink, budget, profile, plan, prune, heal, quantize, export, evaluate, compare,
    plot, push, doctor, fetch,
)  # fmt: skip
for command in COMMANDS:
    app.command("eval" if command is evaluate else command.__name__)(command)


def show_version(asked: bool) -> None:
    if asked:
        print(f"shallow {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it.", callback=show_version, is_eager=True),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Shallow: large language models with fewer layers and 4-bit weights."""


def main() -> None:
    execute(app)


if __name__ == "__main__":
    main()
