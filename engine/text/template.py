"""Renders chat templates in a process of its own, which may take little time and memory.

A template is a program from the checkpoint. This file is run as a script, by chat.py: a line of
JSON {template, values} in, a line {text} or {error} out. It imports nothing of the engine. Its
arguments are where packages may lie, behind what is found without them.
"""

import json
import resource
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path += sys.argv[1:]

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20  # of address space, the interpreter's 100 MB included
CPU_SECONDS = 5  # of one chat; those of models in use take milliseconds
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


def render(template: str, values: dict[str, Any]) -> str:
    text, size = [], 0
    for part in _compile(template).generate(values, add_generation_prompt=True):
        text.append(part)
        size += len(part)
        if size > _MAX_CHARS:
            raise SecurityError(f"it prints more than {_MAX_CHARS} characters")
    return "".join(text)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": render(request["template"], request["values"])}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MB of memory"}
    except Exception as error:  # the template is a program: whatever it raises is its failure
        return {"error": " ".join(f"{error}".split()) or type(error).__name__}


def allow_seconds(seconds: int) -> None:
    """From now on; the system ends the process after them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (OSError, ValueError):  # macOS has none
        pass
    for line in sys.stdin:
        allow_seconds(CPU_SECONDS)
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
