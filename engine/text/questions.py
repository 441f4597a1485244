"""Multiple-choice questions from JSONL."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.text.corpus import read_jsonl


@dataclass(frozen=True)
class Question:
    """One row of a file."""

    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    where: str  # file and line, for messages


def read_questions(path: Path) -> list[Question]:
    """{"question", "choices", "answer"} a line; InputError names the line that is none."""
    return [_question(row, f"{path}: line {number}") for number, row in read_jsonl(path)]


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    for field in ("question", "choices", "answer"):
        if field not in row:
            raise InputError(f"{where}: {field!r} is missing")
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: question: expected text, found {question!r:.80}")
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{where}: choices: expected two or more, found {choices!r:.80}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise InputError(f"{where}: choices: expected text, found {choice!r:.80}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"{where}: answer: expected a number from 0 to {len(choices) - 1}, found {answer!r:.80}"
        )
    return Question(question, tuple(choices), answer, where)
