"""The process of a peer: a line of JSON in, a line of JSON out, nothing in between.

It runs under the peer's own interpreter, where neither torch nor the rest of this engine need be.
"""

import json
import os
import sys
import threading
import time
from importlib import import_module

POLL_S = 1.0


def main(adapter: str) -> None:
    """The first request opens the engine of `adapter`; the others name one of its methods."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                engine = import_module(f".{adapter}", __package__).Engine(**request)
                reply = {"version": engine.version, "wide": getattr(engine, "wide", None)}
            else:
                reply = getattr(engine, request.pop("do"))(**request)
        except ImportError as error:
            reply = {"missing": str(error)}
        except Exception as error:  # of a foreign library: any, and this process must go on
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _end_with(parent: int) -> None:
    """Nobody waits for what is being computed once the parent has been killed."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
