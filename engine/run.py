"""python -m engine.run: generates text from a model and reports the speed."""

from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.command import (
    DEFAULT_MODEL,
    Backend,
    Drop,
    Dtype,
    JsonFile,
    Keep,
    PlanFile,
    Threads,
    check_writable,
    execute,
    open_model,
    planned,
)
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.benchmark import RunRecord

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."

_SAMPLING, _MEASURE = "Sampling", "Measurement"


def run(
    model: Annotated[str, typer.Option(help="Directory, .gguf file or hub id.")] = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Option(help="Built in if not given.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 text.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="A prompt of exactly N tokens; implies --ignore-eos.")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Default: chat where there is a template.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="No stop token ends it.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None,
    plan: PlanFile = None,
    drop: Drop = None,
    keep: Keep = None,
    backend: Backend = None,
    dtype: Dtype = None,
    threads: Threads = None,
    temperature: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    batch: Annotated[
        int, typer.Option(min=1, rich_help_panel=_MEASURE, help="Copies of the prompt.")
    ] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, rich_help_panel=_MEASURE, help="Measured runs.")
    ] = 1,
    warmup: Annotated[
        int, typer.Option(min=0, rich_help_panel=_MEASURE, help="Short runs before.")
    ] = 1,
    compare: Annotated[
        str | None,
        typer.Option(rich_help_panel=_MEASURE, help="'transformers': the same work, alternating."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Generate text, then a table of the speed; the last line is the record as JSON."""
    check_writable(json_file)
    if compare not in (None, "transformers"):
        raise InputError(f"--compare knows transformers, not {compare!r}")
    if sum(given is not None for given in (prompt, prompt_file, prompt_tokens)) > 1:
        raise InputError("--prompt, --prompt-file and --prompt-tokens exclude each other")

    from engine.benchmark import benchmark
    from engine.text import read_text_file

    options = as_options(
        max_new_tokens=new_tokens,
        ignore_eos=ignore_eos or prompt_tokens is not None,
        stop=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if prompt_file is not None:
        prompt = read_text_file(prompt_file)
    if plan is not None:
        drop = planned(plan, drop, keep)
    opened, load_ms = open_model(model, threads, drop=drop, keep=keep, backend=backend, dtype=dtype)
    if prompt_tokens is not None:
        given = list(islice(cycle(opened.text.encode(PROMPT)), prompt_tokens))
    else:
        given = as_prompt(opened.text, PROMPT if prompt is None else prompt, chat)
    peer = open_peer(opened, given, options, batch) if compare else None
    record = benchmark(
        opened,
        given,
        options,
        name=model,
        load_ms=load_ms,
        batch=batch,
        repeats=repeats,
        warmup=warmup,
        peer=peer,
        on_step=lambda step: print(step.pieces[0], end="", flush=True),
    )
    print("\n")
    report(record, json_file)


def as_options(**given: Any):
    """`Options` with its own defaults where nothing is given."""
    from engine.generation import Options

    return Options(**{name: value for name, value in given.items() if value is not None})


def as_prompt(text, prompt: str, chat: bool | None) -> str | list[dict[str, str]]:
    """Raw text, or the user's message of a chat where asked for or where there is a template."""
    if not prompt:
        raise InputError("the prompt is empty")
    if chat or (chat is None and text.chat_template is not None):
        return [{"role": "user", "content": prompt}]
    return prompt


def open_peer(model, prompt: Any, options, batch: int):
    """transformers on the same ids and layers; greedy only, or outputs could not be compared."""
    from engine.generation import encode_prompt
    from engine.peer import TransformersPeer

    if options.temperature or options.repetition_penalty != 1:
        raise InputError("--compare needs greedy decoding: leave the sampling options out")
    prompts = [encode_prompt(model.text, prompt)] * batch
    layers = [entry.layer for entry in model.config.layers]
    return TransformersPeer(model.path, prompts, layers, model.runtime.device, model.runtime.dtype)


def report(record: "RunRecord", json_file: Path | None) -> None:
    """Prints the table and the JSON line; writes the file where one is asked for."""
    import json

    import torch
    from rich.console import Console

    from engine.machine import ceiling_missing

    Console().print(table(record))
    if record.ceiling_gb_s is None:
        print(f"no ceiling: {ceiling_missing(torch.device(record.device))}")
    if json_file is not None:
        record.save(json_file)
    print(json.dumps(record.to_json()), flush=True)


def table(record: "RunRecord"):
    """The record for people, as a rich table."""
    from rich.table import Table

    r, other = record, record.compare
    out = Table(show_header=other is not None, pad_edge=False)
    for name in ("", "engine", *((other["name"], "ratio") if other else ())):
        out.add_column(name, justify="right" if name else "left", overflow="fold")

    def row(name: str, value: str, theirs: str = "", ratio: float | None = None) -> None:
        extra = (theirs, "" if ratio is None else f"{ratio:.2f}x") if other else ()
        out.add_row(name, value, *extra)

    def speed(name: str, field: str, unit: str, ratio: float | None = None) -> None:
        mine, theirs = getattr(r, field), other and other[field]
        row(name, _figure(mine, unit), _figure(theirs, unit) if other else "", ratio)

    row("model", f"{r.model} ({r.layers_kept} of {r.layers_total} layers)")
    row("on", f"{r.device_name}, {r.threads} threads, {r.backend}, {r.dtype}")
    row("tokens", f"{r.batch} x ({r.prompt_tokens} prompt + {r.new_tokens} new)")
    row("load", _figure(r.load_ms, "ms"))
    speed("prefill", "prefill_tok_s", "tok/s", other and other["prefill_ratio"])
    speed("time to first token", "ttft_ms", "ms")
    speed("decode, median", "decode_tok_s", "tok/s", other and other["decode_ratio"])
    speed("decode, p5", "decode_tok_s_p5", "tok/s")
    speed("decode, p95", "decode_tok_s_p95", "tok/s")
    speed("a token", "ms_per_token", "ms")
    row("weights read a token", _figure(r.weight_bytes_per_token / 1e6, "MB"))
    share = "" if r.ceiling_share is None else f", {r.ceiling_share:.0%} of the ceiling"
    row("achieved", _figure(r.achieved_gb_s, "GB/s") + share)
    row("ceiling, measured", _figure(r.ceiling_gb_s, "GB/s"))
    row("weights", _figure(r.weight_bytes / 1e6, "MB"))
    row("KV cache", _figure(r.kv_bytes / 1e6, "MB"))
    row("peak RSS", _figure(r.peak_rss_bytes / 1e6, "MB"))
    if r.peak_vram_bytes is not None:
        row("peak VRAM", _figure(r.peak_vram_bytes / 1e6, "MB"))
    if other:
        row("same tokens", f"{other['same_tokens']} of {r.new_tokens}")
    return out


def _figure(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.2f} {unit}"


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    execute(app)


if __name__ == "__main__":
    main()
