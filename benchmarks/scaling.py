"""What a decode step would cost on more threads than are at hand: a prediction from measured parts.

A step is weights streamed, attention, barriers, and what every thread does for itself. One and two
threads are measured; beyond them the stream grows with the threads up to what the memory gives,
attention as its heads divide, and waiting at barriers with every doubling of the threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.api import load
from engine.generation import Options, generate
from engine.runtime import Timed

THREADS = 1, 2, 4, 8, 16, 32
SOCKETS = {  # GB/s that a socket's memory gives all of its cores: assumed, not measured
    "two channels of DDR5": 60.0,
    "eight channels of DDR5": 240.0,
    "two such sockets, each page beside its thread": 480.0,
}
STREAM = "qkv", "o", "up", "down", "head"
STEPS = 65


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a decode step."""

    stream: float
    attention: float
    barriers: float
    rest: float  # norms, rounding and Python: what more threads do not share

    @property
    def whole(self) -> float:
        return self.stream + self.attention + self.barriers + self.rest


def measured(ref: str, threads: int, context: int = 128) -> tuple[Parts, int, int]:
    """(parts, bytes of weights, attention's heads) on so many threads."""
    with load(ref, backend="cpu", threads=threads) as model:
        took: list[int] = []
        runtime = model.runtime
        assert isinstance(runtime, Timed)

        def after(step) -> None:
            if not took:
                runtime.measure(True)
            took.append(step.elapsed_ns)

        generate(
            runtime, model.text, [[1] * context],
            Options(max_new_tokens=STEPS, ignore_eos=True), after,
        )  # fmt: skip
        times = runtime.times()
        runtime.measure(False)
        ms = {name: seconds * 1e3 / (STEPS - 1) for name, seconds in times.seconds.items()}
        step_ms = sum(took[1:]) / 1e6 / (STEPS - 1)
        stream = sum(ms[name] for name in STREAM)
        rest = step_ms - stream - ms["attention"] - ms["wait"]
        found = Parts(stream, ms["attention"], ms["wait"], rest)
        return found, runtime.weight_bytes_per_token, model.config.kv_heads


def predicted(one: Parts, two: Parts, nbytes: int, heads: int, threads: int, gb_s: float) -> Parts:
    """On so many threads, where the memory gives so much to all of them."""
    if threads == 1:
        return one
    alone = nbytes / one.stream / 1e6  # GB/s
    gain = one.stream / two.stream / 2  # of a thread that another one runs beside
    stream = nbytes / 1e6 / min(threads * alone * gain, gb_s)
    share = -(-heads // threads) / heads
    barriers = two.barriers * math.log2(threads)
    return Parts(stream, one.attention * share, barriers, two.rest)


def table(one: Parts, two: Parts, nbytes: int, heads: int) -> Sequence[str]:
    """tok/s by threads and memory, in Markdown."""
    lines = [f"| threads | {' | '.join(SOCKETS)} |", "|---:|" + "---:|" * len(SOCKETS)]
    for threads in THREADS:
        cells = []
        for gb_s in SOCKETS.values():
            found = predicted(one, two, nbytes, heads, threads, gb_s)
            cells.append(f"{1e3 / found.whole:.0f}")
        lines.append(f"| {threads} | {' | '.join(cells)} |")
    return lines
