"""`engine eval`: how well a model predicts a text."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import common, output


def evaluate(
    model: common.ModelArgument,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to predict; one ships with the engine.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    count: Annotated[int | None, typer.Option(help="Windows; all if not given.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with BOS.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also the divergence from this model.")
    ] = None,
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    backend: common.Backend = None,
    dtype: common.Dtype = None,
    threads: common.Threads = None,
    json_file: common.JsonFile = None,
) -> None:
    """Perplexity of a text in consecutive windows; the last line is the record as JSON."""
    import json

    from engine.text import heldout_text, read_text_file

    common.check_writable(json_file)
    content = heldout_text() if text is None else read_text_file(text)
    chosen = None if plan is None else common.planned(plan, drop, keep)
    options = {"backend": backend, "dtype": dtype}
    opened, _ = common.open_model(model, threads, drop=chosen or drop, keep=keep, **options)
    second = common.open_model(against, threads, **options)[0].runtime if against else None
    from engine.evaluate import evaluate as measure

    with output.progress("windows") as progress:
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
    output.say(
        f"perplexity {result.perplexity:.4f} (nll {result.nll:.5f}) over {result.windows} windows "
        f"of {result.window}, {'with' if result.bos else 'without'} BOS"
    )
    if result.kl is not None:
        output.say(f"KL({against} || {model}) {result.kl:.5f}, top-1 {result.top1_agreement:.2%}")
    if json_file is not None:
        result.save(json_file)
    print(json.dumps(result.to_json()))
