"""`engine eval`: how good a model is at texts, questions and generation."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError
from engine.judgement import LAST, NEW_TOKENS, PROMPTS, WINDOW

if TYPE_CHECKING:
    from engine.judgement import Judgement

_TEXT, _CHOICES, _HEALTH = "Texts", "Multiple choice", "Generation"


def evaluate(
    model: common.ModelArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to predict; repeatable. Default: a built-in one.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=_TEXT)] = WINDOW,
    count: Annotated[
        int | None, typer.Option(help="Number of windows. Default: all.", rich_help_panel=_TEXT)
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin windows, questions and prompts with BOS. Default: as the tokenizer does.",
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Multiple choice: JSONL with "question", "choices" and the index "answer".',
            rich_help_panel=_CHOICES,
        ),
    ] = None,
    health: Annotated[
        bool,
        typer.Option(
            "--health",
            help="Measure repetition in greedy text from fixed prompts.",
            rich_help_panel=_HEALTH,
        ),
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(help=f"Number of prompts. Default: {PROMPTS}.", rich_help_panel=_HEALTH),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens to generate from each prompt, {LAST} or more. Default: {NEW_TOKENS}.",
            rich_help_panel=_HEALTH,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Unpruned model to compare with: KL, top-1 agreement, accuracy kept.",
        ),
    ] = None,
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    backend: common.Backend = None,
    dtype: common.Dtype = None,
    threads: common.Threads = None,
    isa: common.Isa = None,
    json_file: common.JsonFile = None,
) -> None:
    """Evaluate a model: perplexity, multiple choice, repetition; the last line is JSON.

    A single text gives an "evaluation" record, anything more a "judgement" with one for each text.
    """
    common.check_writable(json_file, reads=(model, against, plan, choices, *(text or ())))
    if not health and (prompts is not None or new_tokens is not None):
        raise InputError("--prompts and --new-tokens are of --health, which is not asked for")
    contents = read_texts(text or [])
    chosen = common.dropped(plan, drop, keep)
    from engine.text.questions import read_questions

    questions = () if choices is None else tuple(read_questions(choices))
    options = {"backend": backend, "dtype": dtype, "isa": isa}
    opened, _ = common.open_model(model, threads, drop=chosen, keep=keep, **options)
    second = common.open_model(against, threads, **options)[0] if against else None
    from engine.evaluate import Asked, judge
    from engine.evaluate import health as generation

    asked = Asked(
        contents, window, count, bos, questions, str(choices),
        prompts=(prompts if prompts is not None else generation.PROMPTS) if health else None,
        new_tokens=new_tokens if new_tokens is not None else generation.NEW_TOKENS,
    )  # fmt: skip
    with opened.locating_nan(), nullcontext() if second is None else second.locating_nan():
        judged = judge(
            opened.runtime,
            opened.text,
            asked,
            name=model,
            rule=None if chosen is None or isinstance(chosen, str) else chosen.rule,
            second=None if second is None else second.runtime,
            against=against,
            progress=output.progress,
        )
    alone = len(contents) == 1 and judged.choices is judged.health is None
    result = next(iter(judged.texts.values())) if alone else judged
    common.hand_out(result, json_file, partial(show, judged))


def read_texts(paths: list[Path]) -> dict[str | None, str]:
    """What to predict by the file it is in; the built-in text, of None, where there is no file."""
    from engine.text import heldout_text, read_text_file

    common.check_once(paths)
    return {str(path): read_text_file(path) for path in paths} or {None: heldout_text()}


def show(judged: "Judgement") -> None:
    from rich.table import Table

    from engine.report.records import measures

    table = Table(show_header=False, pad_edge=False)
    for name, value in measures(judged).items():
        table.add_row(name, value)
    output.show(table)
