"""Where the time of a decode step goes, by part."""

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from engine.api import Model
from engine.errors import InputError
from engine.generation import Options, Prompt, Step, generate
from engine.runtime import Timed

LABELS = {  # as the decoders name their parts (csrc/cpu/decoder_bindings.cpp, runtime/gpu_step.py)
    "qkv": "q, k, v",
    "o": "output",
    "up": "gate, up",
    "down": "down",
    "head": "head",
    "attention": "attention",
    "combine": "attention, combined and rounded",
    "rope": "rotation, cache append",
    "norms": "norms, rounding",
    "activation": "activation",
    "embedding": "embedding",
    "wait": "waiting at barriers",
    "choice": "choice of the token",
}


@dataclass(frozen=True)
class Part:
    """Means over the steps measured; times are those of the thread that called."""

    name: str
    ms: float
    share: float  # of the step
    bytes: int | None  # read from memory: weights, or keys and values
    gb_s: float | None


def check(model: Model, options: Options) -> None:
    """InputError for a backend that cannot tell, and where there is no decode step."""
    if options.max_new_tokens < 2:
        raise InputError("--breakdown needs --new-tokens of at least 2: the first has no step")
    if not isinstance(model.runtime, Timed):
        raise InputError(
            f"--breakdown: the backend {model.runtime.name} cannot tell; cpu, triton and cuda can"
        )


def breakdown(
    model: Model, prompt: Prompt, options: Options, batch: int = 1
) -> list[dict[str, Any]]:
    """The decode steps of one run by part, slowest first, then what lies outside of them.

    On a GPU parts are kernels, launched one after another as no graph does. The last two are
    "threads" (the native call without its parts: starting and joining the team) and "Python" (the
    step without the native call: sampling, text, the binding). Raises
    `InputError` as `check`, and where the text ends before a decode step.
    """
    check(model, options)
    runtime = model.runtime
    assert isinstance(runtime, Timed)
    seen: list[Step] = []

    def after(step: Step) -> None:
        if not seen:
            runtime.measure(True)  # clears what the prompt took
        seen.append(step)

    generation = generate(runtime, model.text, [prompt] * batch, options, after)[0]
    times = runtime.times()
    runtime.measure(False)
    steps = len(seen) - 1
    if not steps:
        raise InputError("--breakdown: the text ended before the first decode step")
    step_ms = sum(step.elapsed_ns for step in seen[1:]) / 1e6 / steps

    def part(name: str, seconds: float, nbytes: int | None = None) -> Part:
        ms = seconds * 1e3 / steps
        return Part(name, ms, ms / step_ms, nbytes, nbytes and ms and nbytes / ms / 1e6)

    behind = list(accumulate(step.tokens for step in seen[:-1]))  # before each step, and its draft:
    read = sum(behind) + sum(step.drafted for step in seen[1:])
    context = generation.prompt_tokens + read / steps / batch  # of a step, on average
    nbytes = {**times.bytes, "attention": round(batch * runtime.kv_bytes(context))}
    seconds = times.seconds
    parts = [
        part(LABELS[name], seconds[name], nbytes.get(name)) for name in LABELS if name in seconds
    ]
    parts.sort(key=lambda found: -found.ms)
    parts.append(part("threads", times.whole - sum(seconds.values())))
    parts.append(part("Python", step_ms * steps / 1e3 - times.whole))
    return [asdict(found) for found in parts]
