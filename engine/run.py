"""python -m engine.run: generates text from a model and reports the speed."""

if __name__ == "__main__":  # before the imports below, which take a second
    from engine.commands import interrupt

    interrupt.watch()


import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.benchmark.peers.known import chosen
from engine.commands import output
from engine.commands.common import (
    DEFAULT_MODEL,
    Backend,
    Drop,
    Dtype,
    Isa,
    JsonFile,
    Keep,
    PlanFile,
    Quiet,
    Threads,
    Verbose,
    as_options,
    check_writable,
    dropped,
    hand_out,
    open_model,
)
from engine.errors import InputError
from engine.options import Options

if TYPE_CHECKING:
    from engine.api import Model
    from engine.benchmark.peers.process import Peer
    from engine.benchmark.speed import RunRecord
    from engine.generation import Prompt
    from engine.text import Text

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."

_SAMPLING, _MEASURE = "Sampling", "Measurement"
MOST_BATCH = 4096


def run(
    named: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", show_default=DEFAULT_MODEL, help="Directory, .gguf file or hub id."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue. Default: a built-in prompt.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt (UTF-8).")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="A prompt of exactly N tokens; implies --ignore-eos.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Use the chat template or not. Default: if there is one."
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens to generate.")
    ] = Options.max_new_tokens,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ignore the model's EOS tokens.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; repeatable.")] = None,
    plan: PlanFile = None,
    drop: Drop = None,
    keep: Keep = None,
    backend: Backend = None,
    dtype: Dtype = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="KV cache of the cpu backend: float32, float16 or int8. Default: float16 with "
            "int8 activations, float32 with exact ones."
        ),
    ] = None,
    threads: Threads = None,
    isa: Isa = None,
    temperature: Annotated[
        float | None, typer.Option(rich_help_panel=_SAMPLING, help="0 is greedy, the default.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(rich_help_panel=_SAMPLING, help="Keep the K likeliest; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING, help="Keep a nucleus of this probability; 1: all."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_SAMPLING,
            help="Keep tokens of at least this share of the likeliest one's probability; 0: all.",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING, help="Against tokens seen before; 1: off."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=_SAMPLING, help="Random seed. Default: random.")
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SAMPLING,
            help="ngram: draft tokens from the text so far. Faster where text repeats; the same "
            "output except at near ties.",
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(min=1, max=MOST_BATCH, rich_help_panel=_MEASURE, help="Copies of the prompt."),
    ] = 1,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_MEASURE, help="Measured runs. Default: 1, or 5 with --compare."
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, rich_help_panel=_MEASURE, help="Short unmeasured runs first.")
    ] = 1,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="PEERS",
            rich_help_panel=_MEASURE,
            help="Any of llama.cpp,ik,openvino,transformers: run the same work there, in turns.",
        ),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            rich_help_panel=_MEASURE,
            help="Python interpreter that has a peer installed, if not this one; repeatable.",
        ),
    ] = None,
    breakdown: Annotated[
        bool,
        typer.Option(
            "--breakdown", rich_help_panel=_MEASURE, help="Time a decode step by component."
        ),
    ] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate text and report the speed; the last line is the record as JSON."""
    if named is not None and model is not None:
        raise InputError("MODEL and --model exclude each other")
    model = named if named is not None else model
    if model is None:
        model = DEFAULT_MODEL
    check_writable(json_file, reads=(model, prompt_file, plan))
    asked = chosen(compare, peer_python or ()) if compare is not None else {}
    if sum(given is not None for given in (prompt, prompt_file, prompt_tokens)) > 1:
        raise InputError("--prompt, --prompt-file and --prompt-tokens exclude each other")
    if prompt_tokens is not None and chat:
        raise InputError("--chat: has no effect with --prompt-tokens, whose prompt is plain text")
    if peer_python and compare is None:
        raise InputError("--peer-python: has no effect without --compare")

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
        speculate=speculate,
    )
    if prompt_file is not None:
        prompt = read_text_file(prompt_file)
    layers = dropped(plan, drop, keep)
    opened, load_ms = open_model(
        model, threads, drop=layers, keep=keep, backend=backend, dtype=dtype,
        cache_dtype=cache_dtype, isa=isa,
    )  # fmt: skip
    from engine.benchmark.breakdown import breakdown as by_part
    from engine.benchmark.breakdown import check as check_breakdown
    from engine.benchmark.speed import benchmark
    from engine.generation import check_length

    given: Prompt
    if breakdown:
        check_breakdown(opened, options)
    if prompt_tokens is not None:
        check_length(prompt_tokens, options.max_new_tokens, opened.config)
        given = list(islice(cycle(opened.text.encode(PROMPT)), prompt_tokens))
    else:
        given = as_prompt(opened.text, PROMPT if prompt is None else prompt, chat)
    with opened.locating_nan(), opened_peers(asked, opened, given, options, batch) as peers:
        record = benchmark(
            opened,
            given,
            options,
            name=model,
            load_ms=load_ms,
            batch=batch,
            repeats=repeats or (5 if asked else 1),
            warmup=warmup,
            peers=peers,
            on_step=lambda step: output.say(step.pieces[0], end=""),
        )
    output.say("\n")
    if breakdown:
        record = replace(record, breakdown=tuple(by_part(opened, given, options, batch)))
    hand_out(record, json_file, partial(show, record))


def show(record: "RunRecord") -> None:
    from engine.benchmark.tables import remarks, tables

    output.show(*tables(record))
    for remark in remarks(record):
        output.say(remark)


def as_prompt(text: "Text", prompt: str, chat: bool | None) -> str | list[dict[str, str]]:
    """Raw text, or the user's message of a chat where asked for or where there is a template."""
    if not prompt:
        raise InputError("the prompt is empty")
    if chat or (chat is None and text.chat_template is not None):
        return [{"role": "user", "content": prompt}]
    return prompt


@contextmanager
def opened_peers(
    asked: dict[str, str | None], model: "Model", prompt: "Prompt", options: Options, batch: int
) -> Iterator[list["Peer"]]:
    """Yields the peers that are installed, on the same work, each in its fastest setting.

    What is not installed is said, unless its interpreter was named: then it is an InputError.
    """
    if not asked:
        yield []
        return
    from engine.benchmark.peers.process import PeerMissing, fastest, work_of
    from engine.generation import encode_prompt

    if options.temperature or options.repetition_penalty != 1:
        raise InputError("--compare needs greedy decoding: leave the sampling options out")
    ids = encode_prompt(model.text, prompt)
    peers = []
    with ExitStack() as stack:
        for name, python in asked.items():
            work = work_of(name, model, batch, len(ids) + options.max_new_tokens)
            try:
                peers.append(stack.enter_context(fastest(name, python, work, ids)))
            except PeerMissing as missing:
                if python is not None:
                    raise
                print(f"engine: {missing}", file=sys.stderr)
        yield peers


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    output.execute(app)


if __name__ == "__main__":
    main()
