"""`engine eval`: how good a model is at texts, questions and generation."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.judgement import Judgement

_TEXT, _CHOICES, _HEALTH = "Texts", "Multiple choice", "Generation"


def evaluate(
    model: common.ModelArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to predict, repeatable; one ships with the engine.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=_TEXT)] = 512,
    count: Annotated[
        int | None, typer.Option(help="Windows; all if not given.", rich_help_panel=_TEXT)
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin every window, question and prompt with BOS; by default as the tokenizer.",
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSONL with "question", "choices" and the index "answer".',
            rich_help_panel=_CHOICES,
        ),
    ] = None,
    health: Annotated[
        bool,
        typer.Option(
            "--health",
            help="Does greedy text from fixed prompts go in circles?",
            rich_help_panel=_HEALTH,
        ),
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(help="200 if not given.", rich_help_panel=_HEALTH)
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help="At most so many a prompt, 64 or more; 256 if not given.", rich_help_panel=_HEALTH
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The whole model: also what is left of it."),
    ] = None,
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    backend: common.Backend = None,
    dtype: common.Dtype = None,
    threads: common.Threads = None,
    json_file: common.JsonFile = None,
) -> None:
    """How good a model is: perplexity, multiple choice, generation; the last line is JSON.

    One text alone gives an evaluation, anything more a judgement that holds an evaluation a text.
    """
    common.check_writable(json_file, reads=(model, against, plan, choices, *(text or ())))
    if not health and (prompts is not None or new_tokens is not None):
        raise InputError("--prompts and --new-tokens are of --health, which is not asked for")
    contents = read_texts(text or [])
    chosen = None if plan is None else common.planned(plan, drop, keep)
    from engine.text.questions import read_questions

    questions = () if choices is None else tuple(read_questions(choices))
    options = {"backend": backend, "dtype": dtype}
    opened, _ = common.open_model(model, threads, drop=chosen or drop, keep=keep, **options)
    second = common.open_model(against, threads, **options)[0] if against else None
    from engine.evaluate import Asked, judge
    from engine.evaluate import health as generation

    asked = Asked(
        contents, window, count, bos, questions, str(choices),
        prompts=(prompts if prompts is not None else generation.PROMPTS) if health else None,
        new_tokens=new_tokens if new_tokens is not None else generation.NEW_TOKENS,
    )  # fmt: skip
    with opened.naming(), nullcontext() if second is None else second.naming():
        judged = judge(
            opened.runtime,
            opened.text,
            asked,
            name=model,
            rule=None if chosen is None else chosen.rule,
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
