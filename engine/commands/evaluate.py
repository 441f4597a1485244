"""`engine eval`: how good a model is at texts, questions and generation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands import common, output
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.api import Model
    from engine.artifacts import Evaluation
    from engine.judgement import Choices, Judgement
    from engine.runtime import Runtime
    from engine.text.questions import Question

BUILT_IN = "the built-in text"
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
    prompts: Annotated[int, typer.Option(help="So many.", rich_help_panel=_HEALTH)] = 200,
    new_tokens: Annotated[
        int, typer.Option(help="At most so many.", rich_help_panel=_HEALTH)
    ] = 256,
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
    common.check_writable(json_file)
    contents = read_texts(text or [])
    chosen = None if plan is None else common.planned(plan, drop, keep)
    from engine.text.questions import read_questions

    questions = None if choices is None else read_questions(choices)
    options = {"backend": backend, "dtype": dtype}
    opened, _ = common.open_model(model, threads, drop=chosen or drop, keep=keep, **options)
    second = common.open_model(against, threads, **options)[0].runtime if against else None
    from engine.evaluate import judge_health
    from engine.judgement import Judgement

    named = {"name": model, "rule": None if chosen is None else chosen.rule}
    texts = judge_texts(opened, second, contents, named, window=window, count=count, bos=bos)
    answered = None if questions is None else answer(opened, second, questions, str(choices), bos)
    generated = None
    if health:
        with output.progress("prompts") as progress:
            generated = judge_health(
                opened.runtime, opened.text, count=prompts, new_tokens=new_tokens, bos=bos,
                second=second, progress=progress,
            )  # fmt: skip
    judged = Judgement.of(texts, against, answered, generated)
    alone = len(texts) == 1 and questions is None and not health
    result = next(iter(texts.values())) if alone else judged
    show(judged)
    if json_file is not None:
        result.save(json_file)
    print(json.dumps(result.to_json()))


def read_texts(paths: list[Path]) -> dict[str | None, str]:
    """What to predict by the file it is in; the built-in text, of None, where there is no file."""
    from engine.text import heldout_text, read_text_file

    names = [str(path) for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{twice[0]}: the text is given twice")
    return {name: read_text_file(name) for name in names} or {None: heldout_text()}


def judge_texts(
    opened: "Model",
    second: "Runtime[Any] | None",
    contents: dict[str | None, str],
    named: dict[str, Any],
    **options: Any,
) -> "dict[str, Evaluation]":
    from engine.evaluate import evaluate as measure

    found = {}
    for source, content in contents.items():
        with output.progress(f"positions of {source or BUILT_IN}") as progress:
            found[source or BUILT_IN] = measure(
                opened.runtime,
                opened.text,
                content,
                source=source,
                second=second,
                progress=progress,
                **named,
                **options,
            )
    return found


def answer(
    opened: "Model",
    second: "Runtime[Any] | None",
    questions: "list[Question]",
    source: str,
    bos: bool | None,
) -> "Choices":
    """With what is left of the lead of `second`, where it is given."""
    from dataclasses import replace

    from engine.evaluate import judge_choices

    found = []
    for runtime in (opened.runtime, second):
        if runtime is not None:
            with output.progress("questions") as progress:
                found.append(
                    judge_choices(
                        runtime, opened.text, questions, source=source, bos=bos, progress=progress
                    )
                )
    own, *whole = found
    return replace(own, against=own.beside(whole[0])) if whole else own


def show(judged: "Judgement") -> None:
    from rich.table import Table

    from engine.report.records import measures

    table = Table(show_header=False, pad_edge=False)
    for name, value in measures(judged).items():
        table.add_row(name, value)
    output.show(table)
