"""Chat templates: Jinja from untrusted checkpoints, rendered as transformers renders them."""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InputError

_MAX_CHARS = 1 << 24  # of one rendered chat, far beyond any context


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are only printed."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller):
        return caller()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox bounds `range`; this one also bounds `*` and `**`, which can fill memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            too_large = max(abs(left), abs(right)) > 64
        else:
            repeats = [len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right)]
            too_large = repeats != [left, right] and repeats[0] * repeats[1] > _MAX_CHARS
        if too_large:
            raise SecurityError(f"{operator} makes too large a value")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)


def _check(messages: Any) -> list[dict]:
    """A deep copy of `messages` in plain JSON types, without keys whose value is None."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f"messages: expected a list of at least one message, found {messages!r}")
    try:
        plain = json.loads(json.dumps(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"messages: expected plain JSON values, found otherwise ({error})"
        ) from None
    for index, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"message {index}: expected a dict with a string under 'role', found {message!r}"
            )
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise InputError(
                f"message {index}: expected a string or a list of parts under 'content',"
                f" found {message['content']!r}"
            )
    return [{key: x for key, x in message.items() if x is not None} for message in plain]


def render(template: str, messages: Any, special: Mapping[str, str], where: str) -> str:
    """The prompt for the assistant's next words.

    `special` names the special tokens as templates know them (`bos_token`, ...). InputError for
    malformed messages and for a template that fails, refuses them, or prints without end.
    """
    messages = _check(messages)
    text, size = [], 0
    try:
        values = {**special, "messages": messages, "tools": None, "documents": None}
        for part in _compile(template).generate(values, add_generation_prompt=True):
            text.append(part)
            size += len(part)
            if size > _MAX_CHARS:
                raise SecurityError(f"it prints more than {_MAX_CHARS} characters")
    except Exception as error:  # the template is a program: whatever it raises is its failure
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise InputError(f"{where}: the chat template fails on these messages: {reason}") from error
    return "".join(text)
