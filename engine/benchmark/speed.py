"""The speed of a loaded model on given prompts, and the record of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from engine.api import Model
from engine.architecture.layers import format_layers
from engine.artifacts import Artifact
from engine.benchmark import machine
from engine.generation import (
    Generation,
    Options,
    Prompt,
    Step,
    Timings,
    encode_prompt,
    generate,
    rate_tok_s,
)
from engine.runtime import Runtime

WARMUP_TOKENS = 8  # of a warm-up run; its prompt runs in full
LEAST_AGREEMENT = 0.5  # below it a peer runs another model, and its speed means nothing


class Peer(Protocol):
    """Another engine that can do the same work."""

    name: str
    version: str
    setting: dict[str, Any]

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[list[list[int]], Timings]:
        """Greedy ids of every prompt, and the times."""


@dataclass(frozen=True)
class Speed:
    """Medians over repeats and steps; with drafts `decode_tok_s` is the median over repeats of
    all tokens over all steps' time. Decode figures are None when only one token was asked for."""

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
        if any(run.drafted for run in runs):
            p50 = statistics.median(run.overall_tok_s for run in runs if run.overall_tok_s)
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
    compare: tuple[dict[str, Any], ...]  # a peer each
    versions: dict[str, str]
    commit: str | None
    breakdown: tuple[dict[str, Any], ...] = ()  # a part of the decode step each
    isa: str | None = None  # instruction set, of the backend cpu
    launches_per_token: int | None = None  # kernels of a decode step on a GPU
    speculate: str | None = None
    drafted: int | None = None  # tokens that it guessed in all repeats, and the right ones
    accepted: int | None = None


@dataclass(frozen=True)
class Runs:
    """What the measured runs of all engines gave; a list a peer of theirs."""

    prompts: list[list[int]]  # as the peers get them
    first: list[Generation]
    ours: list[Timings]
    theirs: list[list[Timings]]
    their_ids: list[list[int]]  # of the first sequence
    peak_rss_bytes: int
    peak_vram_bytes: int | None

    @property
    def new_tokens(self) -> int:
        return max(len(result.token_ids) for result in self.first)


def benchmark(
    model: Model,
    prompt: Prompt,
    options: Options,
    *,
    name: str,
    load_ms: float,
    batch: int = 1,
    repeats: int = 1,
    warmup: int = 1,
    peers: Sequence[Peer] = (),
    on_step: Callable[[Step], None] | None = None,
) -> RunRecord:
    """Runs `batch` copies of the prompt `repeats` times and records the speed.

    `name` and `load_ms` are recorded as they are. `warmup`
    short runs come first. `on_step` sees the first measured run. Runs of ours and of the peers
    take turns, so that a slow spell of the machine meets all.
    """
    runtime, config = model.runtime, model.runtime.config
    runs = run_alternating(model, [prompt] * batch, options, repeats, warmup, peers, on_step)
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
        **_surroundings(runtime, peers),
        launches_per_token=getattr(runtime, "launches_per_token", None),
        speculate=options.speculate,
        drafted=sum(run.drafted for run in runs.ours) if options.speculate else None,
        accepted=sum(run.accepted for run in runs.ours) if options.speculate else None,
        compare=tuple(compared(runtime, runs, index, peer) for index, peer in enumerate(peers)),
    )


def run_alternating(
    model: Model,
    prompts: Sequence[Prompt],
    options: Options,
    repeats: int,
    warmup: int,
    peers: Sequence[Peer],
    on_step: Callable[[Step], None] | None,
) -> Runs:
    """The warm-up runs, then the measured ones, every peer's in turn with ours."""
    short = replace(options, max_new_tokens=min(options.max_new_tokens, WARMUP_TOKENS))
    for _ in range(warmup):
        generate(model.runtime, model.text, prompts, short)
    first = generate(model.runtime, model.text, prompts, options, on_step)
    runs = Runs(
        prompts=[encode_prompt(model.text, prompt) for prompt in prompts] if peers else [],
        first=first,
        ours=[first[0].timings],
        theirs=[[] for _ in peers],
        their_ids=[[] for _ in peers],
        peak_rss_bytes=machine.peak_rss_bytes(),
        peak_vram_bytes=machine.peak_vram_bytes(model.runtime.device),
    )
    for peer in peers:
        for _ in range(warmup):
            peer.generate(runs.prompts, short.max_new_tokens)
    for repeat in range(repeats):
        if repeat:
            runs.ours.append(generate(model.runtime, model.text, prompts, options)[0].timings)
        for index, peer in enumerate(peers):
            ids, timings = peer.generate(runs.prompts, runs.new_tokens)
            runs.their_ids[index] = ids[0]
            runs.theirs[index].append(timings)
    return runs


def _weights(runtime: Runtime[Any], runs: Sequence[Timings]) -> dict[str, Any]:
    """Bytes of weights, and how fast a median decode step reads them beside a plain read of as
    many."""
    step_ns = [ns for run in runs for ns in run.step_ns]
    achieved = runtime.weight_bytes_per_token / statistics.median(step_ns) if step_ns else None
    nbytes = min(max(runtime.weight_bytes_per_token, 1 << 20), machine.CEILING_BYTES)
    ceiling = machine.ceiling_gb_s(runtime.device, runtime.threads, nbytes)
    return {
        "weight_bytes": runtime.weight_bytes,
        "weight_bytes_per_token": runtime.weight_bytes_per_token,
        "achieved_gb_s": achieved,
        "ceiling_gb_s": ceiling,
        "ceiling_share": achieved / ceiling if achieved and ceiling else None,
    }


def _surroundings(runtime: Runtime[Any], peers: Sequence[Peer]) -> dict[str, Any]:
    return {
        "device": str(runtime.device),
        "device_name": machine.device_name(runtime.device),
        "dtype": runtime.precision,
        "isa": getattr(runtime, "isa", None),
        "threads": runtime.threads,
        "versions": machine.versions() | {peer.name: peer.version for peer in peers},
        "commit": machine.commit(),
    }


def compared(runtime: Runtime[Any], runs: Runs, index: int, peer: Peer) -> dict[str, Any]:
    """How a peer's output agrees with ours; and where it does, its speed and ours over it."""
    ours, theirs = runs.first[0].token_ids, runs.their_ids[index]
    pairs = zip(ours, theirs, strict=False)  # one of them may have ended early
    found: dict[str, Any] = {
        "name": peer.name,
        "version": peer.version,
        "setting": peer.setting,
        "same_tokens": next(
            (at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))
        ),
        "agreement": agreement(runtime, runs.prompts[0], theirs),
    }
    if found["agreement"] < LEAST_AGREEMENT:
        return found | {"wrong": "its text is not this model's, so its speed means nothing"}
    speed, peer_speed = Speed.of(runs.ours), Speed.of(runs.theirs[index])
    rate, peer_rate = speed.decode_tok_s, peer_speed.decode_tok_s
    return found | {
        **asdict(peer_speed),
        "decode_ratio": rate / peer_rate if rate and peer_rate else None,
        "prefill_ratio": speed.prefill_tok_s / peer_speed.prefill_tok_s,
    }


def agreement(runtime: Runtime[Any], prompt: Sequence[int], ids: Sequence[int]) -> float:
    """The share of `ids` that `runtime` would choose greedily after the prompt and those before;
    none of none."""
    if not ids:
        return 0.0
    cache = runtime.new_cache(1, len(prompt) + len(ids))
    tokens = torch.tensor([[*prompt, *ids[:-1]]]).to(runtime.device)
    logits = [runtime.forward(tokens[:, : len(prompt)], cache, logits="last")]
    if len(ids) > 1:
        logits.append(runtime.forward(tokens[:, len(prompt) :], cache, logits="all"))
    chosen = torch.cat(logits, dim=1)[0].argmax(-1).tolist()
    return sum(a == b for a, b in zip(chosen, ids, strict=True)) / len(ids)
