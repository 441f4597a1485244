"""Ctrl-C ends a command at any moment, with exit code 130 and without a traceback.

Python raises KeyboardInterrupt wherever it happens to be, and there it can be lost: in a
destructor, a callback of a library. So a thread of our own waits for the signal too, and ends the
process where the exception has not done it within GRACE_SECONDS. In an import it is not raised at
all: libraries swallow it there, and their C++ may abort. What a killed run leaves, the next one
takes up.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

GRACE_SECONDS = 2.0
SETTLED_SECONDS = 0.5  # one that comes so soon after another was forgotten is the same one
CODE = 128 + signal.SIGINT

_asked_at: float | None = None  # since when an interrupt waits to be obeyed
_forgotten_at = -math.inf
_deciding = threading.Lock()
_running = False  # a command, which has something to clear away


def watch() -> None:
    """From the first line of a program on; what is imported after it takes a second."""
    for standard in range(3):  # one that is closed would be the number of the next file opened
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # closed: print() would take that for standard output
        sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGINT, _stop)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    with suppress(RuntimeError):  # the user has as many as may be: then it is an exception alone
        threading.Thread(target=_wait, args=(reading,), daemon=True).start()
    sys.unraisablehook = _unraisable


def begin() -> None:
    """A command begins: from here on an interrupt is an exception first."""
    global _running
    _running = True


def asked() -> bool:
    """Whether an interrupt has come and was not forgotten."""
    return _asked_at is not None


def forget() -> None:
    """It ended an answer and not the program."""
    global _asked_at, _forgotten_at
    with _deciding:
        _asked_at, _forgotten_at = None, time.monotonic()


def leave() -> None:
    """Ends the process at once, its streams flushed where they take it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(CODE)


def _stop(number: int, frame: FrameType | None) -> None:
    if not _running:
        os._exit(CODE)
    if time.monotonic() - _forgotten_at < SETTLED_SECONDS:
        return  # pressed twice: the first has ended what both were meant for
    if _imports(frame):
        leave()
    _ask()
    raise KeyboardInterrupt


def _ask() -> None:
    global _asked_at
    if _asked_at is None:
        _asked_at = time.monotonic()


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _wait(reading: int) -> None:
    while True:
        since = _asked_at
        left = None if since is None else max(since + GRACE_SECONDS - time.monotonic(), 0)
        if not select.select([reading], [], [], left)[0]:
            if since == _asked_at:
                os._exit(CODE)
        elif signal.SIGINT in os.read(reading, 1):
            if not _running:
                os._exit(CODE)
            with _deciding:  # the main thread may have obeyed it and gone on
                if time.monotonic() - _forgotten_at > SETTLED_SECONDS:
                    _ask()


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """An exception in a destructor: an interrupt is asked for anew, instead of a trace.

    Behind this call, in which it would be lost as well.
    """
    if isinstance(found.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(found)
