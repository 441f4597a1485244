"""`engine ...` killed with SIGKILL at random moments, and begun again until it ends by itself.

    python -m support.killed SEED MOMENTS OUT ARGUMENT...

OUT is the directory that the command writes, the unkilled run's first with `.whole` behind its
name. What ended is moved to OUT.0, OUT.1, ... and the next moments begin anew, so that every
moment is drawn from the whole length of a run. Children are forked before a thread has started.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path


def main(seed: int, moments: int, out: Path, arguments: list[str]) -> None:
    import torch  # noqa: F401  once for all children
    import transformers  # noqa: F401

    import engine.cli  # noqa: F401

    begun = time.monotonic()
    whole = out.with_name(out.name + ".whole")
    assert run(arguments, whole, None) == 0
    length, ended = time.monotonic() - begun, 0
    draw = random.Random(seed)
    for _ in range(moments):
        stood = out.exists()  # killed behind its last rename: heal refuses what is there
        code = run(arguments, out, draw.uniform(0, length))
        if code is not None:
            assert code == 0 or stood, code
            ended = put_aside(out, ended)
    stood = out.exists()
    code = run(arguments, out, None)
    assert code == 0 or stood, code
    put_aside(out, ended)


def put_aside(out: Path, number: int) -> int:
    out.rename(out.with_name(f"{out.name}.{number}"))
    return number + 1


def run(arguments: list[str], out: Path, seconds: float | None) -> int | None:
    """The exit code; None where the child was killed."""
    child = os.fork()
    if not child:
        from engine.cli import app
        from engine.commands.output import execute

        filled = [str(out) if each == "OUT" else each for each in arguments]
        execute(lambda standalone_mode: app(filled, standalone_mode=standalone_mode))
    if seconds is not None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
