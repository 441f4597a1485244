"""`engine heal`: a pruned model that has learnt again what it lost, as a Hugging Face directory."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError
from engine.healing.place import check_cache, check_new
from engine.healing.recipe import STEPS, WINDOWS
from engine.healing.settings import RATES, Settings, check_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from engine.architecture.config import ModelConfig
    from engine.checkpoint import Checkpoint
    from engine.healing.heal import TeacherRuntime
    from engine.options import Options
    from engine.text import Text

_TRAINING = "Training of qlora and distil"
_RATES = ", ".join(f"{rate:g} for {train}" for train, rate in RATES.items())
PATCHED = "linear,distil"  # what --method is where the family can
USUAL = "check_every", "train", "precision", "seed"  # which have a value where nothing is asked for
PROBE = 2000  # characters that teacher and pupil must tokenise alike


def heal(
    model: common.ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, in order. Closed-form: linear, scale. Trained: qlora (LM loss "
            "on the text), distil (KL to the unpruned model). Default: linear,distil; distil in "
            "families with a norm behind the MLP (Gemma, OLMo-2)."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Training text, which has no default: file, directory, .jsonl, .parquet or "
            "hub:NAME; repeatable.",
        ),
    ] = None,
    column: common.Column = "text",
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Text to measure with. Default: the tail of the training text."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help=f"Tokens a window. Default: {Settings.window}; qlora: the paper's."),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="What distil trains. all; around: layers beside a cut, embedding and head; norms; "
            "lora; scales: those of a packed MODEL, with --teacher, at the same size.",
        ),
    ] = Settings.train,
    minutes: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Time limit of each trained method. distil also stops after "
            f"{Settings.patience} checks without improvement.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help=f"Step limit of each trained method. Default: none; {STEPS:,} for qlora alone "
            "without --minutes.",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help=f"Peak learning rate. Default: {_RATES}; qlora: the paper's for this model size.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help=f"LoRA rank. Default: {Settings.rank}; qlora: the paper's for this model size.",
        ),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            rich_help_panel=_TRAINING,
            help="Write qlora's adapter beside its 4-bit base instead of merged 16-bit weights.",
        ),
    ] = False,
    check_every: Annotated[
        int,
        typer.Option(
            rich_help_panel=_TRAINING, help="Steps between held-out checks, each a checkpoint."
        ),
    ] = Settings.check_every,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help=f"Tokens a step. Default: {Settings.batch_tokens}; qlora: {WINDOWS} windows.",
        ),
    ] = None,
    written: Annotated[
        int,
        typer.Option(
            "--self",
            metavar="N",
            rich_help_panel=_TRAINING,
            help="Also train on N tokens of text that the teacher generates.",
        ),
    ] = Settings.written,
    own: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=_TRAINING,
            help="Second round on N tokens of text that the healed model generates, so that it "
            "repeats itself less: at most a quarter as long, at half the rate and at most 5e-5.",
        ),
    ] = Settings.own,
    residual: Annotated[
        float,
        typer.Option(
            metavar="WEIGHT",
            rich_help_panel=_TRAINING,
            help="distil: weight of the squared error of the residual stream after every cut, "
            "added to the KL of the logits.",
        ),
    ] = Settings.residual,
    precision: Annotated[
        str,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Matmul precision in training: float32, bfloat16, or auto: bfloat16 where it is "
            "faster (a GPU, AMX, AVX512-BF16).",
        ),
    ] = Settings.precision,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Random seed: text order, LoRA initialisation, dropout, generated text.",
        ),
    ] = Settings.seed,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=_TRAINING,
            help="Unpruned model, when MODEL is pruned already.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_TRAINING,
            help="Keep the teacher's outputs here for other runs. Default: delete them.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of OUT. Default: the source's own 16-bit one, else float16."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Device to train on: cpu or cuda. Default: the GPU if there is one."),
    ] = None,
    threads: common.Threads = None,
) -> None:
    """Drop layers and heal what is left; an interrupted run resumes."""
    from engine.checkpoint import choose_layers
    from engine.healing.recipe import recipe_of
    from engine.runtime import check_backend
    from engine.text import load_text
    from engine.text.samples import check_column

    default, method = method is None, PATCHED if method is None else method
    methods = tuple(part.strip() for part in method.split(",") if part.strip())
    settings = Settings(
        methods,
        train=train,
        steps=STEPS if methods == ("qlora",) and steps is None and minutes is None else steps,
        minutes=minutes,
        lr=RATES.get(train, RATES["weights"]) if lr is None else lr,
        qlora_lr=Settings.qlora_lr if lr is None else lr,
        rank=Settings.rank if rank is None else rank,
        seed=seed,
        window=Settings.window if window is None else window,
        batch_tokens=Settings.batch_tokens if batch_tokens is None else batch_tokens,
        check_every=check_every,
        adapter=adapter,
        written=written,
        own=own,
        residual=residual,
        precision=precision,
    )
    asked: dict[str, object] = {
        "steps": steps, "minutes": minutes, "lr": lr, "rank": rank, "teacher": teacher,
        "cache": cache, "batch_tokens": batch_tokens, "check_every": check_every, "train": train,
        "precision": precision, "seed": seed,
    }  # fmt: skip
    refuse_idle(settings, method, asked)
    check_backend(None, dtype)
    if dtype is not None and (adapter or train == "scales"):
        kept = "--adapter" if adapter else "--train scales"
        raise InputError(f"dtype: a packed model keeps its own, so it excludes {kept}")
    check_files(out, text or [], held_out)
    check_column([*(text or []), *([held_out] if held_out else [])], column)
    if cache is not None:
        check_cache(cache, out)
    chosen = common.dropped(plan, drop)
    path, checkpoint = common.open_checkpoint(model)
    config = choose_layers(checkpoint, chosen)
    if default and config.post_norm:  # no patch can be folded into the down projection
        method = "distil"
        settings = replace(settings, methods=(method,))
    if "qlora" in methods:
        settings = recipe_of(config).fill(settings, lr, rank, window, batch_tokens)
    check_model(settings, config, teacher is not None)
    tokenizer = load_text(path)
    taught_by = None if teacher is None else open_teacher(teacher, checkpoint, tokenizer)

    common.set_threads(threads)
    from engine.api import choose_device
    from engine.healing import processes
    from engine.healing.data import read_data
    from engine.healing.heal import heal as run
    from engine.kernels.dtypes import dtype_of

    if not processes.is_first():
        output.hush()
    settings = settings.on(where := choose_device(device))
    if settings.trained:
        output.note(f"trains in {settings.precision} on {where}")
    record = run(
        checkpoint,
        config,
        read_data(text or [], held_out, tokenizer, settings.window, column),
        out,
        settings,
        teacher=taught_by,
        name=model,
        teacher_name=teacher or "",
        dtype=None if dtype is None else dtype_of(dtype),
        device=where,
        cache=cache,
        runtime=open_runtime(teacher or model, tokenizer, where)
        if "distil" in methods or settings.written
        else None,
        open_writer=lambda path: open_runtime(str(path), tokenizer, where).write,
        pack=pack_base,
        reporting=output.progress,
    )
    if record.stopped:
        output.say(f"stopped {record.stopped}; the weights are those of step {record.best_step}")
    before, after = record.perplexity_before, record.perplexity_after
    output.say(f"held-out perplexity {before:.4f} before, {after:.4f} after {method}")
    output.say(f"{out}: {len(config.layers)} of {config.total_layers} layers, healed")


def pack_base(checkpoint: "Checkpoint", config: "ModelConfig", out: Path) -> None:
    """What qlora learns on: a quantized model as it is, any other in NF4, as QLoRA's are."""
    from engine.checkpoint.weights import is_quantized
    from engine.quantize.packing import pack
    from engine.quantize.recipe import Recipe as Bits

    if is_quantized(checkpoint):
        bits = Bits("keep", head=None)
    else:
        bits = Bits("nf4", scheme="codebook", head=None)
    with output.progress("layers in 4 bits") as report:
        pack(checkpoint, config, out, bits, progress=report)


def open_runtime(ref: str, text: "Text", device: "torch.device") -> "TeacherRuntime":
    """The teacher by the fastest runtime here."""
    from engine.generation import generate
    from engine.healing.heal import TeacherRuntime

    model, _ = common.open_model(ref, None, device=device)
    runtime = model.runtime

    def logits(tokens: "torch.Tensor") -> "torch.Tensor":
        cache = runtime.new_cache(1, tokens.shape[1])
        return runtime.forward(tokens.to(runtime.device), cache, logits="all")

    def write(prompts: "Sequence[Sequence[int]]", options: "Options") -> "Sequence[Sequence[int]]":
        return [each.token_ids for each in generate(runtime, text, prompts, options)]

    return TeacherRuntime(f"{runtime.name} {runtime.precision}", logits, write, text.bos_id)


def refuse_idle(settings: Settings, method: str, asked: dict[str, object]) -> None:
    """InputError for an option that was given another value than its usual one, and is not read."""
    idle: dict[str, str] = {}  # name -> what is missing for it
    if not settings.trained:
        idle = dict.fromkeys(asked.keys() - {"teacher"}, "")
    elif "distil" not in settings.methods:
        idle = {"train": ""}
        if not settings.written:
            idle |= dict.fromkeys(("teacher", "cache"), " without --self")
    elif settings.train != "lora" and "qlora" not in settings.methods:
        idle = {"rank": " without --train lora"}
    usual = {name: getattr(Settings, name) for name in USUAL}
    for name, value in asked.items():
        if name in idle and value != usual.get(name):
            said = name.replace("_", "-")
            raise InputError(f"{said}: has no effect with --method {method}{idle[name]}")


def check_files(out: Path, text: list[str], held_out: str | None) -> None:
    """InputError, before anything is downloaded, for what is absent or in the way."""
    check_new(out)
    if not text:
        raise InputError("text: expected a text to learn from, found none; give --text")
    sources = [*text, *([held_out] if held_out else [])]
    common.check_once(sources)
    for source in sources:
        if not source.startswith("hub:") and not Path(source).exists():
            raise InputError(f"{source}: expected a text file, found none")
        common.check_outside(out, source)


def open_teacher(ref: str, pupil: "Checkpoint", text: "Text") -> "Checkpoint":
    """InputError where it does not read text as the pupil does."""
    from engine.text import default_text, load_text

    path, checkpoint = common.open_checkpoint(ref)
    probe = default_text()[:PROBE]
    same = load_text(path).encode(probe) == text.encode(probe)
    if not same or checkpoint.config.vocab_size != pupil.config.vocab_size:
        raise InputError(f"{ref}: its vocabulary differs from that of {pupil.path}")
    return checkpoint
