"""The speed of a loaded model on given prompts, and the record of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from engine import machine
from engine.artifacts import Artifact
from engine.generate import Generation, Options, Step, Timings, generate, rate_tok_s
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

    `warmup` short runs come first. `on_step` sees the first measured run. With a peer, runs of
    both alternate, so that a slow spell of the machine meets both.
    """
    runtime, prompts = model.runtime, [prompt] * batch
    short = replace(options, max_new_tokens=min(options.max_new_tokens, WARMUP_TOKENS))
    for _ in range(warmup):
        generate(runtime, model.text, prompts, short)
    first = generate(runtime, model.text, prompts, options, on_step)
    rss_bytes = machine.peak_rss_bytes()  # before a peer loads its copy of the model
    vram_bytes = machine.peak_vram_bytes(runtime.device)
    new_tokens = max(len(result.token_ids) for result in first)
    runs, peer_runs, peer_ids = [first[0].timings], [], []
    if peer:
        for _ in range(warmup):
            peer.generate(short.max_new_tokens)
    for repeat in range(repeats):
        if repeat:
            runs.append(generate(runtime, model.text, prompts, options)[0].timings)
        if peer:
            peer_ids, timings = peer.generate(new_tokens)
            peer_runs.append(timings)
    config, speed, threads = runtime.config, Speed.of(runs), torch.get_num_threads()
    cache = runtime.new_cache(batch, first[0].prompt_tokens + new_tokens)
    achieved = achieved_gb_s(runtime.weight_bytes_per_token, runs)
    ceiling = machine.ceiling_gb_s(runtime.device, threads)
    return RunRecord(
        model=name,
        family=config.family,
        backend=runtime.name,
        device=str(runtime.device),
        device_name=machine.device_name(runtime.device),
        dtype=str(runtime.dtype).removeprefix("torch."),
        threads=threads,
        layers=format_layers([entry.layer for entry in config.layers]),
        layers_kept=len(config.layers),
        layers_total=config.total_layers,
        batch=batch,
        prompt_tokens=first[0].prompt_tokens,
        new_tokens=new_tokens,
        finish_reason=first[0].finish_reason,
        repeats=repeats,
        warmup=warmup,
        load_ms=load_ms,
        **asdict(speed),
        weight_bytes=runtime.weight_bytes,
        weight_bytes_per_token=runtime.weight_bytes_per_token,
        kv_bytes=cache.nbytes,
        peak_rss_bytes=rss_bytes,
        peak_vram_bytes=vram_bytes,
        achieved_gb_s=achieved,
        ceiling_gb_s=ceiling,
        ceiling_share=achieved / ceiling if achieved and ceiling else None,
        compare=comparison(speed, first, peer, peer_runs, peer_ids) if peer else None,
        versions=machine.versions() | ({peer.name: peer.version} if peer else {}),
        commit=machine.commit(),
    )


def achieved_gb_s(bytes_per_step: int, runs: Sequence[Timings]) -> float | None:
    """Weight bytes read a second at the median decode step; None without decode steps."""
    step_ns = [ns for run in runs for ns in run.step_ns]
    return bytes_per_step / statistics.median(step_ns) if step_ns else None


def comparison(
    speed: Speed,
    ours: Sequence[Generation],
    peer: Peer,
    runs: Sequence[Timings],
    ids: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """The peer's speed, ours over theirs, and for how many leading tokens the outputs agree."""
    theirs = Speed.of(runs)
    pairs = zip(ours[0].token_ids, ids[0], strict=False)
    differs = next((at for at, (a, b) in enumerate(pairs) if a != b), len(ours[0].token_ids))
    decode = speed.decode_tok_s and theirs.decode_tok_s
    return {
        "name": peer.name,
        **asdict(theirs),
        "decode_ratio": speed.decode_tok_s / theirs.decode_tok_s if decode else None,
        "prefill_ratio": speed.prefill_tok_s / theirs.prefill_tok_s,
        "same_tokens": differs,
    }
