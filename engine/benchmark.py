"""The speed of a loaded model on given prompts, and the record of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from engine import machine
from engine.artifacts import Artifact
from engine.generation import Generation, Options, Step, Timings, generate, rate_tok_s
from engine.layers import format_layers

WARMUP_TOKENS = 8  # of a warm-up run; its prompt runs in full


class Peer(Protocol):
    """Another engine that can do the same work."""

    name: str
    version: str

    def generate(self, new_tokens: int) -> tuple[list[list[int]], Timings]:
        """Greedy ids of every prompt and the times; loads the model when first called."""


@dataclass(frozen=True)
class Speed:
    """Medians over repeats and steps. Decode figures are None when only one token was asked for."""

    prefill_tok_s: float
    ttft_ms: float
    decode_tok_s: float | None
    decode_tok_s_p5: float | None
    decode_tok_s_p95: float | None
    ms_per_token: float | None

    @classmethod
    def of(cls, runs: Sequence[Timings]) -> "Speed":
        step_ns = [ns for run in runs for ns in run.step_ns]
        step_tokens = [tokens for run in runs for tokens in run.step_tokens]
        p5, p50, p95 = (rate_tok_s(step_tokens, step_ns, q) for q in (0.05, 0.5, 0.95))
        return cls(
            prefill_tok_s=statistics.median(run.prefill_tok_s for run in runs),
            ttft_ms=statistics.median(run.ttft_ms for run in runs),
            decode_tok_s=p50,
            decode_tok_s_p5=p5,
            decode_tok_s_p95=p95,
            ms_per_token=None if p50 is None else 1e3 / p50,
        )


@dataclass(frozen=True)
class RunRecord(Artifact):
    """One measured run with everything it depends on. GB = 1e9 bytes."""

    kind: ClassVar[str] = "run"

    model: str
    family: str
    backend: str
    device: str
    device_name: str
    dtype: str
    threads: int
    layers: str  # kept, as the checkpoint numbers them: "0-19,25-29"
    layers_kept: int
    layers_total: int
    batch: int
    prompt_tokens: int  # of one sequence
    new_tokens: int  # of the longest sequence
    finish_reason: str  # of the first sequence
    repeats: int
    warmup: int
    load_ms: float
    prefill_tok_s: float
    ttft_ms: float
    decode_tok_s: float | None  # of the whole batch
    decode_tok_s_p5: float | None
    decode_tok_s_p95: float | None
    ms_per_token: float | None
    weight_bytes: int
    weight_bytes_per_token: int  # read by one decode step
    kv_bytes: int
    peak_rss_bytes: int
    peak_vram_bytes: int | None
    achieved_gb_s: float | None  # weight bytes of a median step / its time
    ceiling_gb_s: float | None
    ceiling_share: float | None
    compare: dict[str, Any] | None
    versions: dict[str, str]
    commit: str | None


@dataclass(frozen=True)
class Runs:
    """What the measured runs of both engines gave."""

    first: list[Generation]
    ours: list[Timings]
    theirs: list[Timings]
    their_ids: list[list[int]]
    peak_rss_bytes: int
    peak_vram_bytes: int | None

    @property
    def new_tokens(self) -> int:
        return max(len(result.token_ids) for result in self.first)


def benchmark(
    model,
    prompt,
    options: Options,
    *,
    name: str,
    load_ms: float,
    batch: int = 1,
    repeats: int = 1,
    warmup: int = 1,
    peer: Peer | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> RunRecord:
    """Runs `batch` copies of the prompt `repeats` times and records the speed.

    `model` offers `runtime` and `text`; `name` and `load_ms` are recorded as they are. `warmup`
    short runs come first. `on_step` sees the first measured run. With a peer, runs of both
    alternate, so that a slow spell of the machine meets both.
    """
    runtime, config = model.runtime, model.runtime.config
    runs = run_alternating(model, [prompt] * batch, options, repeats, warmup, peer, on_step)
    speed, first = Speed.of(runs.ours), runs.first[0]
    return RunRecord(
        model=name,
        family=config.family,
        backend=runtime.name,
        layers=format_layers([entry.layer for entry in config.layers]),
        layers_kept=len(config.layers),
        layers_total=config.total_layers,
        batch=batch,
        prompt_tokens=first.prompt_tokens,
        new_tokens=runs.new_tokens,
        finish_reason=first.finish_reason,
        repeats=repeats,
        warmup=warmup,
        load_ms=load_ms,
        **asdict(speed),
        kv_bytes=runtime.new_cache(batch, first.prompt_tokens + runs.new_tokens).nbytes,
        peak_rss_bytes=runs.peak_rss_bytes,
        peak_vram_bytes=runs.peak_vram_bytes,
        **_weights(runtime, runs.ours),
        **_surroundings(runtime, peer),
        compare=_comparison(speed, runs, peer) if peer else None,
    )


def run_alternating(
    model,
    prompts: Sequence,
    options: Options,
    repeats: int,
    warmup: int,
    peer: Peer | None,
    on_step: Callable[[Step], None] | None,
) -> Runs:
    """The warm-up runs, then the measured ones, the peer's in turn with ours."""
    short = replace(options, max_new_tokens=min(options.max_new_tokens, WARMUP_TOKENS))
    for _ in range(warmup):
        generate(model.runtime, model.text, prompts, short)
    first = generate(model.runtime, model.text, prompts, options, on_step)
    runs = Runs(
        first=first,
        ours=[first[0].timings],
        theirs=[],
        their_ids=[],
        peak_rss_bytes=machine.peak_rss_bytes(),  # before the peer loads its copy of the model
        peak_vram_bytes=machine.peak_vram_bytes(model.runtime.device),
    )
    for _ in range(warmup if peer else 0):
        peer.generate(short.max_new_tokens)
    for repeat in range(repeats):
        if repeat:
            runs.ours.append(generate(model.runtime, model.text, prompts, options)[0].timings)
        if peer:
            runs.their_ids[:], timings = peer.generate(runs.new_tokens)
            runs.theirs.append(timings)
    return runs


def _weights(runtime, runs: Sequence[Timings]) -> dict[str, Any]:
    """Bytes of weights, and how fast a median decode step read them beside what memory can do."""
    step_ns = [ns for run in runs for ns in run.step_ns]
    achieved = runtime.weight_bytes_per_token / statistics.median(step_ns) if step_ns else None
    ceiling = machine.ceiling_gb_s(runtime.device, torch.get_num_threads())
    return {
        "weight_bytes": runtime.weight_bytes,
        "weight_bytes_per_token": runtime.weight_bytes_per_token,
        "achieved_gb_s": achieved,
        "ceiling_gb_s": ceiling,
        "ceiling_share": achieved / ceiling if achieved and ceiling else None,
    }


def _surroundings(runtime, peer: Peer | None) -> dict[str, Any]:
    return {
        "device": str(runtime.device),
        "device_name": machine.device_name(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": machine.versions() | ({peer.name: peer.version} if peer else {}),
        "commit": machine.commit(),
    }


def _comparison(speed: Speed, runs: Runs, peer: Peer) -> dict[str, Any]:
    """The peer's speed, ours over theirs, and for how many leading tokens the outputs agree."""
    theirs, ours = Speed.of(runs.theirs), runs.first[0].token_ids
    pairs = zip(ours, runs.their_ids[0], strict=False)
    same_tokens = next((at for at, (a, b) in enumerate(pairs) if a != b), len(ours))
    decoded = speed.decode_tok_s and theirs.decode_tok_s
    return {
        "name": peer.name,
        **asdict(theirs),
        "decode_ratio": speed.decode_tok_s / theirs.decode_tok_s if decoded else None,
        "prefill_ratio": speed.prefill_tok_s / theirs.prefill_tok_s,
        "same_tokens": same_tokens,
    }
