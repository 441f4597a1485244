"""The `engine` command."""

from pathlib import Path
from typing import Annotated

import typer

from engine import command
from engine.budget_command import budget
from engine.command import Backend, Drop, Dtype, JsonFile, Keep, PlanFile, Threads
from engine.doctor_command import doctor
from engine.layer_commands import plan, prune
from engine.plot_command import plot
from engine.profile_command import profile
from engine.quantize_command import quantize
from engine.run import run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Shallow: large language models with fewer layers and 4-bit weights.",
)
app.command("run")(run)
app.command("budget")(budget)
app.command("profile")(profile)
app.command("plan")(plan)
app.command("prune")(prune)
app.command("quantize")(quantize)
app.command("plot")(plot)
app.command("doctor")(doctor)

ModelArgument = Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")]


@app.command()
def fetch(model: ModelArgument = command.DEFAULT_MODEL) -> None:
    """Download a model, unless it is here already, and print where it lies."""
    from engine.checkpoint.locate import locate

    print(locate(model))


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to predict; one ships with the engine.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    count: Annotated[int | None, typer.Option(help="Windows; all if not given.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with BOS.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also the divergence from this model.")
    ] = None,
    plan: PlanFile = None,
    drop: Drop = None,
    keep: Keep = None,
    backend: Backend = None,
    dtype: Dtype = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Perplexity of a text in consecutive windows; the last line is the record as JSON."""
    import json

    from engine.evaluate import evaluate as measure
    from engine.text import heldout_text, read_text_file

    command.check_writable(json_file)
    content = heldout_text() if text is None else read_text_file(text)
    chosen = None if plan is None else command.planned(plan, drop, keep)
    options = {"backend": backend, "dtype": dtype}
    opened, _ = command.open_model(model, threads, drop=chosen or drop, keep=keep, **options)
    second = command.open_model(against, threads, **options)[0].runtime if against else None
    with command.progress("windows") as progress:
        result = measure(
            opened.runtime,
            opened.text,
            content,
            name=model,
            rule=chosen and chosen.rule,
            window=window,
            count=count,
            bos=bos,
            second=second,
            progress=progress,
        )
    print(
        f"perplexity {result.perplexity:.4f} (nll {result.nll:.5f}) over {result.windows} windows "
        f"of {result.window}, {'with' if result.bos else 'without'} BOS"
    )
    if result.kl is not None:
        print(f"KL({against} || {model}) {result.kl:.5f}, top-1 {result.top1_agreement:.2%}")
    if json_file is not None:
        result.save(json_file)
    print(json.dumps(result.to_json()))


def main() -> None:
    command.execute(app)


if __name__ == "__main__":
    main()
