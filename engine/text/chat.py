"""Chat templates: Jinja from untrusted checkpoints, rendered as transformers renders them.

In a helper process (template.py) with limits of memory and time, which stays for the next chat.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import InputError

_REASONING = ("reasoning_content", "thinking", "reasoning")
SECONDS = 15.0  # by the clock, where the helper gets less of a processor than its own limit is of


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
    return [_reasoned({key: x for key, x in one.items() if x is not None}) for one in plain]


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """What a model thought goes by several names, of which a template reads one."""
    found = next((message[name] for name in _REASONING if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


class _Helper:
    """The process, started when it is needed and anew when it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Its answer; {"error"} where it gives none."""
        with self._lock:
            try:
                process = self._started()
                found = self._exchanged(process, json.dumps(request).encode() + b"\n")
            except OSError as error:
                found = {"error": f"its process: {error.strerror or error}"}
            except BaseException:  # an interrupt: what would come is no answer to the next request
                self.stop()
                raise
            if found is None:
                from engine.text.template import CPU_SECONDS

                self.stop()
                limits = f"{SECONDS:.0f} s, or {CPU_SECONDS} s of a processor"
                return {"error": f"it takes more than {limits}"}
            return found

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _forget(self) -> None:
        """The child of a fork must not speak with its parent's helper."""
        self._lock, self._process = threading.Lock(), None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            # As arguments: before the standard library a program's own resource.py would hide that
            # of the system. Whatever is no text is none to Python's imports either.
            paths = [path for path in sys.path if path and isinstance(path, str)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("template.py")), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                process_group=0,  # Ctrl-C is for us
                bufsize=0,
            )
        return self._process

    def _exchanged(self, process: "subprocess.Popen[bytes]", line: bytes) -> dict[str, str] | None:
        """None where the answer does not come in time, or the process ends."""
        assert process.stdin is not None and process.stdout is not None
        until, answer = time.monotonic() + SECONDS, bytearray()
        reads, writes = process.stdout.fileno(), process.stdin.fileno()
        os.set_blocking(writes, False)
        left = memoryview(line)
        waiting = select.poll()  # whatever numbers the files have; select() takes some below 1,024
        waiting.register(reads, select.POLLIN)
        waiting.register(writes, select.POLLOUT)
        while not answer.endswith(b"\n"):
            ready = dict(waiting.poll(1000 * max(0.0, until - time.monotonic())))
            if not ready:
                return None
            if writes in ready:
                left = left[os.write(writes, left) :]
                if not left:
                    waiting.unregister(writes)
            if reads in ready:
                part = os.read(reads, 1 << 20)
                if not part:
                    return None
                answer += part
        found: dict[str, str] = json.loads(bytes(answer))
        return found


_helper = _Helper()


def render(template: str, messages: Any, special: Mapping[str, str], where: str) -> str:
    """The prompt for the assistant's next words.

    `special` names the special tokens as templates know them (`bos_token`, ...). InputError for
    malformed messages and for a template that fails, refuses them, prints without end, or takes
    more than the helper's memory or time.
    """
    values = {**special, "messages": _check(messages), "tools": None, "documents": None}
    found = _helper.ask({"template": template, "values": values})
    if "error" in found:
        raise InputError(
            f"{where}: the chat template fails on these messages: {found['error']:.1000}"
        )
    return found["text"]
