"""`engine chat`: a conversation, streamed."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands import common, interrupt, output
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.api import Model

HELP = """/reset      start a new conversation
/system X   start a new conversation with the system message X; with none where X is left out
/undo       remove the last question and its answer
/help       show this
/exit       quit; so does Ctrl-D. Ctrl-C stops an answer."""
ANSWER = 512  # tokens
LINES = 1000  # of the history
Message = dict[str, str]


def chat(
    model: common.ModelArgument = common.DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Maximum tokens an answer. Default: {ANSWER}, or half the context."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling threshold; 1: off.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Against tokens seen before; 1: off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: random.")] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="ngram: draft tokens from the conversation so far. Faster where answers repeat "
            "it; the same answers except at near ties."
        ),
    ] = None,
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    backend: common.Backend = None,
    dtype: common.Dtype = None,
    threads: common.Threads = None,
    isa: common.Isa = None,
) -> None:
    """Chat with a model; answers are streamed. /help lists the commands."""
    asked: dict[str, Any] = {
        "max_new_tokens": ANSWER if new_tokens is None else new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "speculate": speculate,
    }
    common.as_options(**asked)  # refused before anything is opened
    chosen = common.dropped(plan, drop, keep)
    opened, _ = common.open_model(
        model, threads, drop=chosen, keep=keep, backend=backend, dtype=dtype, isa=isa
    )
    if opened.text.chat_template is None:
        raise InputError(f"{model}: has no chat template; `engine run --raw` completes plain text")
    context = opened.config.max_context
    if new_tokens is None:
        asked["max_new_tokens"] = max(1, min(ANSWER, context // 2))
    elif new_tokens >= context:
        raise InputError(f"--new-tokens: expected less than the context's {context}")
    talk(opened, {name: value for name, value in asked.items() if value is not None}, system)


def talk(model: "Model", options: dict[str, Any], system: str | None) -> None:
    """Questions from stdin, answers to stdout, until it ends."""
    first = [] if system is None else [{"role": "system", "content": system}]
    said = list(first)
    for line in lines():
        word, _, rest = line.partition(" ")
        if word == "/exit":
            break
        if word == "/help":
            output.say(HELP)
        elif word == "/reset":
            said = list(first)
        elif word == "/system":
            first = [{"role": "system", "content": rest}] if rest else []
            said = list(first)
        elif word == "/undo":
            said = said[: max(len(first), len(said) - 2)]
        elif line.startswith("/"):
            output.say(f"{word}: there is no such command; /help lists them")
        else:
            asked = [*said, {"role": "user", "content": line}]
            said = answered(model, options, asked, len(first))


def answered(
    model: "Model", options: dict[str, Any], said: list[Message], first: int
) -> list[Message]:
    """The conversation with the model's answer, printed as it comes; as it was before the question
    where there can be none. `first`: messages that /reset keeps."""
    pieces = []
    try:
        for piece in model.stream(said, **options):
            print(piece, end="", flush=True)
            pieces.append(piece)
    except InputError as error:
        if pieces:
            print()
        anew = len(said) > first + 1  # else /reset would change nothing
        print(f"engine: {error}{'; /reset begins anew' if anew else ''}", file=sys.stderr)
        return said[:-1]
    except KeyboardInterrupt:
        interrupt.forget()
    print()
    return [*said, {"role": "assistant", "content": "".join(pieces)}]


def lines() -> Iterator[str]:
    """What is typed, a line each, blank ones left out; with a history where there is a terminal."""
    if sys.stdin is None or sys.stdout is None:  # closed
        return
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a bad line spoils no other
    terminal = sys.stdin.isatty()
    history = _open_history() if terminal else None
    while True:
        try:
            line = input("> " if terminal else "").strip()
            line.encode()
        except EOFError:
            return
        except UnicodeEncodeError:
            print("engine: a line was not UTF-8 and is left out", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            interrupt.forget()
            print()
            continue
        if history is not None:
            history.keep()
        if line:
            yield line


class History:
    """What was typed, in a file that several conversations may add to, each line at once.

    Raises ImportError where Python lacks readline, InputError and OSError where the file cannot be.
    """

    def __init__(self) -> None:
        import readline

        from engine.checkpoint.fetch import cache_directory

        self.file = cache_directory() / "chat_history"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.file, os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK, 0o600))
        if not self.file.is_file():
            raise FileExistsError(self.file)
        if self.file.stat().st_size:  # libedit takes no empty one
            readline.read_history_file(self.file)
        readline.set_history_length(LINES)
        self._readline, self._kept = readline, readline.get_current_history_length()

    def keep(self) -> None:
        """Adds the latest line, unless readline has left it out."""
        length = self._readline.get_current_history_length()
        if length > self._kept:
            with suppress(AttributeError, OSError):  # of libedit; of a file to be read alone
                self._readline.append_history_file(length - self._kept, self.file)
        self._kept = length


def _open_history() -> History | None:
    try:
        return History()
    except (ImportError, InputError, OSError):
        return None
