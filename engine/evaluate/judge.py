"""Everything that is asked of one model: checked before the first token runs, then judged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.evaluate.choices import encode_questions, judge_choices
from engine.evaluate.health import encode_prompts, judge_health
from engine.evaluate.perplexity import check_vocabularies, cut_windows, evaluate
from engine.judgement import BUILT_IN, NEW_TOKENS, WINDOW, Choices, Judgement
from engine.progress import Reporting, unheard
from engine.runtime import Runtime
from engine.text import Text
from engine.text.questions import Question
from engine.text.samples import bos_prefix


@dataclass(frozen=True)
class Asked:
    """What a model is to be judged by."""

    texts: Mapping[str | None, str]  # by the file it is from, None for the built-in one
    window: int = WINDOW
    count: int | None = None  # windows of each text; None: all
    bos: bool | None = None  # None: as the tokenizer does
    questions: tuple[Question, ...] = ()
    questions_file: str = ""
    prompts: int | None = None  # to generate from; None: no generation
    new_tokens: int = NEW_TOKENS


def judge(
    runtime: Runtime[Any],
    text: Text,
    asked: Asked,
    *,
    name: str = "",
    rule: str | None = None,
    second: Runtime[Any] | None = None,
    against: str | None = None,
    progress: Reporting = unheard,
) -> Judgement:
    """`second`, the whole model, named `against`, says what is left of it. `name` of the model and
    `rule` that chose its layers are recorded. Raises `InputError` before anything has run."""
    limits = [each.config.max_context for each in (runtime, second) if each is not None]
    if second is not None:
        check_vocabularies(runtime, second)
    check(text, asked, min(limits))
    texts = {}
    for source, content in asked.texts.items():
        with progress(f"positions of {source or BUILT_IN}") as report:
            texts[source or BUILT_IN] = evaluate(
                runtime, text, content, name=name, rule=rule, window=asked.window,
                count=asked.count, bos=asked.bos, source=source, second=second, progress=report,
            )  # fmt: skip
    choices = _choices(runtime, text, asked, second, progress) if asked.questions else None
    health = None
    if asked.prompts is not None:
        with progress("prompts") as report:
            health = judge_health(
                runtime, text, count=asked.prompts, new_tokens=asked.new_tokens, bos=asked.bos,
                second=second, progress=report,
            )  # fmt: skip
    return Judgement.of(texts, against, choices, health)


def check(text: Text, asked: Asked, limit: int) -> None:
    """InputError for whatever a model of this tokenizer and context could not be judged by."""
    bos = bool(bos_prefix(text, asked.bos))
    for source, content in asked.texts.items():
        where = source or BUILT_IN
        cut_windows(text, content, asked.window, asked.count, bos, limit, where)
    encode_questions(text, asked.questions, asked.bos, limit)
    if asked.prompts is not None:
        encode_prompts(text, asked.prompts, asked.new_tokens, asked.bos, limit)


def _choices(
    runtime: Runtime[Any],
    text: Text,
    asked: Asked,
    second: Runtime[Any] | None,
    progress: Reporting,
) -> Choices:
    """With what is left of the lead of `second`, where it is given."""

    def judged(each: Runtime[Any]) -> Choices:
        options: dict[str, Any] = {"source": asked.questions_file, "bos": asked.bos}
        with progress("questions") as report:
            return judge_choices(each, text, asked.questions, progress=report, **options)

    own = judged(runtime)
    return own if second is None else replace(own, against=own.beside(judged(second)))
