"""`engine heal`: a pruned model that has learnt again what it lost, as a Hugging Face directory."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError
from engine.healing.place import check_new
from engine.healing.settings import RATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from engine.checkpoint import Checkpoint
    from engine.healing.heal import Spoken
    from engine.options import Options
    from engine.text import Text

_TRAINING = "Training of distil"
_RATES = ", ".join(f"{rate:g} for {train}" for train, rate in RATES.items())
PROBE = 2000  # characters that teacher and pupil must tokenise alike


def heal(
    model: Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    method: Annotated[
        str,
        typer.Option(
            help="linear or scale, fitted without training; distil; or both by a comma, in order."
        ),
    ] = "linear,distil",
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE", help="As of quantize; give it again for more. What it learns from."
        ),
    ] = None,
    column: common.Column = "text",
    held_out: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="To measure with; the tail of the text if not given."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    train: Annotated[
        str,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="all; around: layers beside a cut, embedding and head; norms; lora; scales: of a "
            "packed MODEL, with --teacher, its bytes as they are.",
        ),
    ] = "all",
    minutes: Annotated[
        float | None, typer.Option(rich_help_panel=_TRAINING, help="It ends after them.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(rich_help_panel=_TRAINING, help="Or after them.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(rich_help_panel=_TRAINING, help=f"Its peak; if not given {_RATES}."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(rich_help_panel=_TRAINING, help="Tokens a step.")
    ] = 2048,
    written: Annotated[
        int,
        typer.Option(
            "--self",
            metavar="N",
            rich_help_panel=_TRAINING,
            help="Tokens that the teacher writes itself, to learn from beside the text.",
        ),
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Of products: float32 or bfloat16; auto: bfloat16 where its products are faster: "
            "on a GPU, with AMX, with AVX512-BF16.",
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(rich_help_panel=_TRAINING, help="Of the text's order.")] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=_TRAINING,
            help="Where MODEL has lost its layers already.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_TRAINING,
            help="Keeps the teacher's logits for other runs; gone with this one if not given.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of OUT; the source's own 16-bit one if not given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="To train on: cpu, cuda; the GPU if there is one.")
    ] = None,
    threads: common.Threads = None,
) -> None:
    """Drop layers and heal what is left; a killed run goes on where it was."""
    from engine.checkpoint import choose_layers
    from engine.healing.settings import Settings, check_model
    from engine.runtime import check_backend
    from engine.text import load_text

    settings = Settings(
        tuple(part.strip() for part in method.split(",") if part.strip()),
        train=train,
        steps=steps,
        minutes=minutes,
        lr=RATES.get(train, RATES["weights"]) if lr is None else lr,
        seed=seed,
        window=window,
        batch_tokens=batch_tokens,
        written=written,
        precision=precision,
    )
    check_backend(None, dtype)
    if train == "scales" and dtype is not None:
        raise InputError("dtype: a packed model keeps its own, so it excludes --train scales")
    check_files(out, text or [], held_out)
    chosen = drop if plan is None else common.planned(plan, drop, None)
    path, checkpoint = common.open_checkpoint(model)
    config = choose_layers(checkpoint, chosen)
    check_model(settings, config, teacher is not None)
    tokenizer = load_text(path)
    taught_by = None if teacher is None else open_teacher(teacher, checkpoint, tokenizer)

    common.set_threads(threads)
    from engine.api import choose_device
    from engine.healing.data import read_data
    from engine.healing.heal import heal as run
    from engine.kernels.dtypes import dtype_of

    settings = settings.on(where := choose_device(device))
    if "distil" in settings.methods:
        output.note(f"trains in {settings.precision} on {where}")
    record = run(
        checkpoint,
        config,
        read_data(text or [], held_out, tokenizer, window, column),
        out,
        settings,
        teacher=taught_by,
        name=model,
        teacher_name=teacher or "",
        dtype=None if dtype is None else dtype_of(dtype),
        device=where,
        cache=cache,
        spoken=speak(teacher or model, tokenizer, where) if "distil" in settings.methods else None,
        reporting=output.progress,
    )
    if record.stopped:
        output.say(f"stopped {record.stopped}; the weights are those of step {record.best_step}")
    before, after = record.perplexity_before, record.perplexity_after
    output.say(f"held-out perplexity {before:.4f} before, {after:.4f} after {method}")
    output.say(f"{out}: {len(config.layers)} of {config.total_layers} layers, healed")


def speak(ref: str, text: "Text", device: "torch.device") -> "Spoken":
    """The teacher by the fastest runtime here."""
    from engine.generation import generate
    from engine.healing.heal import Spoken

    model, _ = common.open_model(ref, None, device=device)
    runtime = model.runtime

    def logits(tokens: "torch.Tensor") -> "torch.Tensor":
        cache = runtime.new_cache(1, tokens.shape[1])
        return runtime.forward(tokens.to(runtime.device), cache, logits="all")

    def write(prompts: "Sequence[Sequence[int]]", options: "Options") -> "Sequence[Sequence[int]]":
        return [each.token_ids for each in generate(runtime, text, prompts, options)]

    return Spoken(f"{runtime.name} {runtime.precision}", logits, write, text.bos_id)


def check_files(out: Path, text: list[str], held_out: str | None) -> None:
    """InputError, before anything is downloaded, for what is absent or in the way."""
    check_new(out)
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no directory {out.parent}")
    if not text:
        raise InputError("text: expected a text to learn from, found none; give --text")
    for source in (*text, *([held_out] if held_out else [])):
        if not source.startswith("hub:") and not Path(source).exists():
            raise InputError(f"{source}: expected a text file, found none")


def open_teacher(ref: str, pupil: "Checkpoint", text: "Text") -> "Checkpoint":
    """InputError where it does not read text as the pupil does."""
    from engine.text import default_text, load_text

    path, checkpoint = common.open_checkpoint(ref)
    probe = default_text()[:PROBE]
    same = load_text(path).encode(probe) == text.encode(probe)
    if not same or checkpoint.config.vocab_size != pupil.config.vocab_size:
        raise InputError(f"{ref}: its vocabulary is another one than that of {pupil.path}")
    return checkpoint
