"""The `engine` command."""

import typer

from engine.commands.budget import budget
from engine.commands.common import execute
from engine.commands.doctor import doctor
from engine.commands.evaluate import evaluate
from engine.commands.fetch import fetch
from engine.commands.plan import plan
from engine.commands.plot import plot
from engine.commands.profile import profile
from engine.commands.prune import prune
from engine.commands.quantize import quantize
from engine.run import run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Shallow: large language models with fewer layers and 4-bit weights.",
)
for command in (run, budget, profile, plan, prune, quantize, evaluate, plot, doctor, fetch):
    app.command("eval" if command is evaluate else command.__name__)(command)


def main() -> None:
    execute(app)


if __name__ == "__main__":
    main()
