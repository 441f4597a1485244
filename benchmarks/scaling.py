"""What a decode step would cost on more threads than are at hand: a prediction from measured parts.

A step is weights streamed, attention, barriers, and what every thread does for itself. One and two
threads are measured, by the fastest quarter of several runs' steps, since a thread that others hold
up makes the rest wait as if at a barrier; beyond them the stream grows with the threads up to what
the memory gives, attention as its items divide, one of a kv head and a span of positions, and
waiting at barriers with every doubling of the threads. What memories give is assumed, and that a
page lies beside the thread that reads it: the engine itself says nothing of where pages lie.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from engine.api import Model, load
from engine.generation import Options, Step, generate
from engine.runtime import Timed

THREADS = 1, 2, 4, 8, 16, 32
SOCKETS = {  # GB/s that a socket's memory gives all of its cores: assumed, not measured
    "two channels of DDR5, 60 GB/s": 60.0,
    "eight channels, 240 GB/s": 240.0,
    "two such sockets, were each page beside its thread": 480.0,
}
STREAM = "qkv", "o", "up", "down", "head"
STEPS, RUNS = 65, 3
CONTEXT = 128
HELD_UP = 0.25  # of a step: quiet cores wait for 5-8 % (benchmarks/results/decoder.md)
PAGE, MOST_SPANS = 128, 8  # of a lone row's attention, as csrc/cpu/kv_cache.h and step.h say


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


def measured(ref: str, threads: int) -> tuple[Parts, int, int]:
    """(parts, bytes of weights, items of attention) on so many threads."""
    with load(ref, backend="cpu", threads=threads) as model:
        parts = fastest([step for _ in range(RUNS) for step in _steps(model)])
        spans = min(-(-(CONTEXT + STEPS // 2) // PAGE), MOST_SPANS)
        return parts, model.runtime.weight_bytes_per_token, spans * model.config.kv_heads


def _steps(model: Model) -> list[Parts]:
    steps: list[Parts] = []
    runtime = model.runtime
    assert isinstance(runtime, Timed)

    def after(step: Step) -> None:
        seconds = runtime.times().seconds
        if any(seconds.values()):  # not the prefill, before which nothing was measured
            steps.append(_parts(seconds, step.elapsed_ns / 1e6))
        runtime.measure(True)

    options = Options(max_new_tokens=STEPS, ignore_eos=True)
    generate(runtime, model.text, [[1] * CONTEXT], options, after)
    runtime.measure(False)
    return steps


def _parts(seconds: Mapping[str, float], step_ms: float) -> Parts:
    ms = {name: took * 1e3 for name, took in seconds.items()}
    stream = sum(ms[name] for name in STREAM)
    rest = step_ms - stream - ms["attention"] - ms["wait"]
    return Parts(stream, ms["attention"], ms["wait"], rest)


def fastest(steps: Sequence[Parts]) -> Parts:
    """The mean of the fastest quarter."""
    best = sorted(steps, key=lambda step: step.whole)[: max(len(steps) // 4, 1)]
    return Parts(*(fmean(getattr(step, field.name) for step in best) for field in fields(Parts)))


def predicted(one: Parts, two: Parts, nbytes: int, items: int, threads: int, gb_s: float) -> Parts:
    """On so many threads, where the memory gives so much to all of them; on one and two, what was
    measured."""
    if threads <= 2:
        return one if threads == 1 else two
    stream = max(two.stream * 2 / threads, nbytes / 1e6 / gb_s)
    share = -(-items // threads) / -(-items // 2)  # of the busiest thread, over two threads'
    barriers = two.barriers * math.log2(threads)
    return Parts(stream, two.attention * share, barriers, two.rest)


def parts_table(one: Parts, two: Parts) -> Sequence[str]:
    """What was measured, in Markdown."""
    names = [field.name for field in fields(Parts)]
    lines = [
        f"| threads | {' | '.join(names)} | ms a step |",
        "|---:|" + "---:|" * (len(names) + 1),
    ]
    for threads, parts in ((1, one), (2, two)):
        cells = [f"{getattr(parts, name):.2f}" for name in names]
        lines.append(f"| {threads} | {' | '.join(cells)} | {parts.whole:.2f} |")
    return lines


def remark(two: Parts) -> str | None:
    """What a prediction from these is worth where others held the threads up."""
    share = two.barriers / two.whole
    if share <= HELD_UP:
        return None
    return (
        f"Two threads wait for each other for {share:.0%} of a step: other programs use their "
        "cores, and what is predicted from that is too slow."
    )


def table(one: Parts, two: Parts, nbytes: int, items: int) -> Sequence[str]:
    """tok/s by threads and memory, in Markdown."""
    lines = [f"| threads | {' | '.join(SOCKETS)} |", "|---:|" + "---:|" * len(SOCKETS)]
    for threads in THREADS:
        cells = []
        for gb_s in SOCKETS.values():
            found = predicted(one, two, nbytes, items, threads, gb_s)
            cells.append(f"{1e3 / found.whole:.0f}")
        lines.append(f"| {threads} | {' | '.join(cells)} |")
    return lines
