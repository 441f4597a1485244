"""Measures tokens a second of the GPU runtime on synthetic 4-bit weights in the shapes of models.

Run by `gpu.sh tokens`; writes benchmarks/results/<gpu>-tokens.json and -tokens.md. A share of the
limit is the bytes of codes, scales, head, keys and values over the time of a step, over the read
bandwidth that the same run measures. `--small` tries the script, interpreted where there is no GPU.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu import gpu_name, output, save
from roofline import G128, JOINED, llama, shapes_of

import engine
from engine.architecture.config import ModelConfig
from engine.benchmark.machine import gpu_read_gb_s
from engine.checkpoint.fetch import DEFAULT, cached
from engine.commands.output import refuse
from engine.errors import InputError
from engine.kernels.dispatch import why_not
from engine.kernels.w4.format import Packed
from engine.kernels.w4.layout_gpu import to_gpu
from engine.runtime import GPU_RUNTIMES
from engine.runtime.gpu import GpuRuntime
from engine.runtime.gpu_weights import Layer, Outer, Part, Placement, Projection
from engine.scratch import check_target, write_text

MODELS = {
    "Llama-3.2-1B": llama(2048, 8192, 32, 8, 16, 128256),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": llama(4096, 14336, 32, 8, 32, 128256),
    "Llama-3-8B, 16 layers": llama(4096, 14336, 32, 8, 16, 128256),
    "Llama-2-70B, 40 layers": llama(8192, 28672, 64, 8, 40, 32000),
    "Llama-2-70B": llama(8192, 28672, 64, 8, 80, 32000),
}
SMALL = {"small": llama(64, 128, 4, 2, 2, 96)}
CONTEXTS, BATCHES, STEPS = (128, 2048, 8192), (1, 8), 32
ROOM = 64  # positions beyond the longest context
PROMPT = 2048
BESIDE = 4  # layers whose matrices torch multiplies, in turns, so that no L2 holds them
NEW_TOKENS, SMALL_PROMPT = 128, 8
PROMPTS = Path(__file__).parent / "prompts" / "plain.txt"
TEXT = (
    "{model}, {backend}, real text: {tok_s:,.0f} tok/s, a prompt of {prompt_tokens} tokens at "
    "{prefill_tok_s:,.0f}"
)
HEAD = (
    "| model | batch | context | tok/s | of the limit | torch bfloat16 | torch int4 |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """One model at one batch and context."""

    model: str
    batch: int
    context: int
    step_ms: float
    tok_s: float
    share: float | None  # of the read bandwidth; None without a GPU
    bfloat16_tok_s: float | None  # of torch's products of the same shapes alone
    int4_tok_s: float | None

    def __str__(self) -> str:
        cells = (self.share, self.bfloat16_tok_s, self.int4_tok_s)
        share, *others = ("-" if cell is None else cell for cell in cells)
        shown = f"{share:.0%}" if isinstance(share, float) else share
        beside = [f"{o:,.0f}" if isinstance(o, float) else o for o in others]
        name = f"{self.model} | {self.batch} | {self.context:,} | {self.tok_s:,.0f}"
        return f"| {name} | {shown} | {' | '.join(beside)} |"


def random_part(n: int, k: int, device: torch.device) -> Part:
    """4 bits in groups of 128, such that outputs are about as large as inputs."""
    groups = G128.groups(k)
    codes = torch.randint(0, 256, (n, G128.row_bytes(k)), dtype=torch.uint8, device=device)
    scales = torch.full((n, groups), k**-0.5 / 5, dtype=torch.float16, device=device)
    return Part(to_gpu(Packed(G128, (n, k), codes, scales)))


def random_runtime(
    config: ModelConfig, device: torch.device, backend: str = "triton"
) -> GpuRuntime:
    shapes = shapes_of(config)
    width = config.hidden_size
    norm = torch.ones(width, device=device)

    def projection(*roles: str) -> Projection:
        rows = sum(shapes[role][0] for role in roles)
        return Projection((random_part(rows, shapes[roles[0]][1], device),), backend)

    def layer() -> Layer:
        joined = {name: projection(*roles) for name, roles in JOINED.items()}
        alone = {role: projection(role) for role in ("o", "down")}
        return Layer(joined | alone, {"attn_norm": norm, "mlp_norm": norm})

    head = Projection((random_part(config.vocab_size, width, device),), backend)
    embedding = torch.randn(config.vocab_size, width, dtype=torch.bfloat16, device=device)
    outer = Outer({"head": head}, {"norm": norm}, embedding)
    placement = Placement(device, torch.bfloat16, backend)
    return GpuRuntime(config, placement, outer, [layer() for _ in config.layers])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a call, with all that it left to the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def step_s(runtime: GpuRuntime, batch: int, context: int, steps: int) -> float:
    """Of one token of every sequence; keys and values before it are zeros, which take as long."""
    cache = runtime.new_cache(batch)
    cache.reserve(context + steps + 2)
    cache.lengths.fill_(context)
    ids = [1] * batch
    for _ in range(2):  # loads, compiles, captures
        ids = runtime.greedy(ids, cache)

    def decode() -> None:
        found = ids
        for _ in range(steps):
            found = runtime.greedy(found, cache)

    return seconds(decode, runtime.device) / steps


def products(config: ModelConfig) -> list[tuple[int, ...]]:
    """(N, K) of a layer's, as they are stacked."""
    shapes = shapes_of(config)
    joined: list[tuple[int, ...]] = [
        (sum(shapes[role][0] for role in roles), config.hidden_size) for roles in JOINED.values()
    ]
    return [*joined, shapes["o"], shapes["down"]]


def torch_s(config: ModelConfig, rows: int, multiply: Callable[..., Callable[[], object]]) -> float:
    """Of torch's products of a step, head included, in a CUDA graph; `multiply` makes one."""
    device = torch.device("cuda")
    calls = [multiply(rows, n, k, device) for _ in range(BESIDE) for n, k in products(config)]
    head = multiply(rows, config.vocab_size, config.hidden_size, device)

    def graph_s(run: Callable[[], object]) -> float:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        return min(seconds(graph.replay, device) for _ in range(10))

    layers = graph_s(lambda: [call() for call in calls]) / BESIDE
    return layers * len(config.layers) + graph_s(head)


def bfloat16(rows: int, n: int, k: int, device: torch.device) -> Callable[[], object]:
    w = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
    return lambda: torch.nn.functional.linear(x, w)


def int4(rows: int, n: int, k: int, device: torch.device) -> Callable[[], object]:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.ones(k // 128, n, 2, dtype=torch.bfloat16, device=device)
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
    return lambda: torch._weight_int4pack_mm(x, packed, 128, scales)


def measure(
    name: str,
    config: ModelConfig,
    device: torch.device,
    backend: str,
    read_gb_s: float | None,
    small: bool,
) -> Iterator[Case]:
    beside = {}
    for batch in BATCHES if read_gb_s else ():
        beside[batch] = [batch / torch_s(config, batch, each) for each in (bfloat16, int4)]
        torch.cuda.empty_cache()
    runtime = random_runtime(replace(config, max_context=max(CONTEXTS) + ROOM), device, backend)
    for batch in BATCHES:
        for context in CONTEXTS if not small else (70,):
            found = step_s(runtime, batch, context, 1 if small else STEPS)
            moved = runtime.weight_bytes_per_token + batch * runtime.kv_bytes(context)
            share = moved / found / 1e9 / read_gb_s if read_gb_s else None
            times = beside.get(batch, (None, None))
            yield Case(name, batch, context, found * 1e3, batch / found, share, *times)


def prefill(config: ModelConfig, device: torch.device, backend: str, length: int) -> float:
    """Tokens a second of a prompt."""
    runtime, tokens = (
        random_runtime(config, device, backend),
        torch.ones(1, length, dtype=torch.int64),
    )
    runtime.forward(tokens, runtime.new_cache(1, length))
    cache = runtime.new_cache(1, length)
    return length / seconds(lambda: runtime.forward(tokens, cache), device)


def on_text(path: Path, device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """A model's greedy text from a prompt of real text, by each back end that runs here."""
    prompt, count = PROMPTS.read_text(), 2 if small else NEW_TOKENS
    for backend in GPU_RUNTIMES:
        if reason := why_not(backend):
            yield {"model": path.name, "backend": backend, "left_out": reason}
            continue
        with engine.load(path, device=str(device), backend=backend) as model:
            ids = model.text.encode(prompt)[: SMALL_PROMPT if small else None]
            for _ in range(1 if small else 2):  # loads, compiles, captures
                found = model.generate(ids, max_new_tokens=count, ignore_eos=True)
            yield {
                "model": path.name, "backend": backend, "prompt_tokens": len(ids),
                "prefill_tok_s": found.timings.prefill_tok_s,
                "tok_s": found.timings.decode_tok_s(), "text": found.text,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one tiny model: tries the script")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>-tokens.json")
    parser.add_argument("--backend", choices=GPU_RUNTIMES, default="triton")
    parser.add_argument("--model", type=Path, help="for real text; default: the default model")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    kind = ("" if given.backend == "triton" else f"-{given.backend}") + "-small" * given.small
    try:
        gpu = gpu_name() if on_gpu or not given.small else "interpreted"
        out = output(gpu, given.out, f"-tokens{kind}")
        check_target(out.with_suffix(".md"))
    except InputError as error:
        refuse(error)
    device = torch.device("cuda" if on_gpu else "cpu")
    read_gb_s = gpu_read_gb_s(device) if on_gpu else None
    record: dict[str, Any] = {
        "gpu": gpu, "torch": torch.__version__, "backend": given.backend, "read_gb_s": read_gb_s,
    }  # fmt: skip
    cases = record["tokens"] = []
    left_out = record["left_out"] = {}
    lines = [HEAD]
    print(HEAD)

    @contextmanager
    def fitting(name: str) -> Iterator[None]:
        """Models that do not fit are skipped and recorded; what was measured before is kept."""
        try:
            yield
        except (torch.OutOfMemoryError, InputError) as error:
            left_out[name] = str(error).splitlines()[0]
            print(f"{name}: {left_out[name]}", flush=True)
        save(record, out)
        if on_gpu:
            torch.cuda.empty_cache()

    for name, config in (SMALL if given.small else MODELS).items():
        with fitting(name):
            for case in measure(name, config, device, given.backend, read_gb_s, given.small):
                cases.append(asdict(case))
                lines.append(str(case))
                print(lines[-1], flush=True)
                save(record, out)
    config, length = (SMALL["small"], 8) if given.small else (MODELS["Llama-3-8B"], PROMPT)
    with fitting("prefill"):
        found = record["prefill"] = {"length": length}
        found["tok_s"] = prefill(config, device, given.backend, length)
        if on_gpu:
            found["torch_bfloat16_tok_s"] = length / torch_s(config, length, bfloat16)
    if path := given.model or (None if given.small else cached(DEFAULT)):
        record["text"] = []
        for text in on_text(path, device, given.small):
            record["text"].append(text)
            lines.append("\n" + (TEXT if "text" in text else "{left_out}").format(**text))
            print(lines[-1], flush=True)
            save(record, out)
    else:
        print("The default model is not here: no real text.")
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")
    print(out)


if __name__ == "__main__":
    main()
