"""The way through: patch, distil, write; what is unfinished lies beside and is found again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import ModelConfig
from engine.artifacts import HealRecord
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.weights import lineage_hash
from engine.errors import InputError
from engine.export import hf
from engine.healing.data import Data, perplexity
from engine.healing.distil import distil
from engine.healing.patch import patch
from engine.healing.replaced import Replaced
from engine.healing.settings import Settings, check_model
from engine.healing.state import Standing
from engine.healing.student import Student
from engine.healing.teacher import Teacher
from engine.reference.cache import KVCache
from engine.reference.decoder import Decoder, load_decoder

RECORD = "heal.json"

Reporting = Callable[[str], AbstractContextManager[Callable[..., None]]]  # label -> report


def heal(
    pupil: Checkpoint,
    config: ModelConfig,
    data: Data,
    out: Path,
    settings: Settings,
    *,
    teacher: Checkpoint | None = None,
    name: str = "",
    teacher_name: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    reporting: Reporting = lambda label: nullcontext(_unheard),
) -> HealRecord:
    """Writes the layers of `pupil` that `config` keeps, healed, to the new directory `out`.

    The teacher is `pupil` with all its layers, or `teacher` where that has lost some already.
    `dtype` is that of `out`, the pupil's own 16 bits by default. Until it is finished a run lies
    in `out` + ".healing"; the teacher's logits lie in `cache` instead, and stay, where it is given.
    """
    check_model(settings, config, teacher is not None)
    source = teacher or pupil
    if source.config.vocab_size != config.vocab_size:
        raise InputError(
            f"{source.path}: a teacher of {source.config.vocab_size} tokens cannot teach a model "
            f"of {config.vocab_size}"
        )
    if out.exists():
        raise InputError(f"{out}: exists already; name a new directory")
    lineage = lineage_hash(source, source.config)
    work = out.with_name(out.name + ".healing")
    run = work / _key(pupil, source, config, data, settings, lineage)
    run.mkdir(parents=True, exist_ok=True)
    before = _perplexity(load_decoder(pupil, config, device), data)
    healed, standing = _patched(pupil, config, data, settings, run, reporting), Standing()
    if "distil" in settings.methods:
        known = f"{data.hash} {lineage} {source.path.resolve()}"
        taught = Teacher(data.windows, settings.top, config.vocab_size, cache or work, known)
        oracle = load_decoder(source, source.config, device)
        student = Student(run / "student", config, settings, device)
        with reporting("seconds" if settings.steps is None else "steps") as report:
            standing = distil(
                student,
                lambda window: taught(window, lambda tokens: _logits(oracle, tokens)),
                data,
                settings,
                run,
                report,
            )
        healed = Replaced(healed, student.tensors())
        written, after = healed.config, standing.best
    else:
        written, after = config, _perplexity(load_decoder(healed, config, device), data)
    record = HealRecord(
        model=name,
        teacher=teacher_name or name,
        lineage=lineage,
        total_layers=config.total_layers,
        keep=tuple(entry.layer for entry in config.layers),
        methods=settings.methods,
        settings=settings.to_json(),
        steps=standing.step,
        best_step=standing.best_step,
        minutes=standing.seconds / 60,
        stopped=standing.stopped,
        losses=tuple(standing.losses),
        checks=tuple(standing.checks),
        perplexity_before=before,
        perplexity_after=after,
        text_hash=data.hash,
        seed=settings.seed,
    )
    _write(healed, written, out, record, dtype or hf.stored_dtype(pupil, config))
    shutil.rmtree(work)
    return record


def _patched(
    pupil: Checkpoint,
    config: ModelConfig,
    data: Data,
    settings: Settings,
    run: Path,
    reporting: Reporting,
) -> Checkpoint:
    """The pupil with its patches; for distillation the student's directory, written but once."""
    student = run / "student"
    if student.exists():
        return open_checkpoint(student)
    patched = pupil
    for method in settings.methods:
        if method != "distil":
            with reporting("layers") as report:
                patched = Replaced(pupil, patch(method, pupil, config, data.spread(), report))
    if "distil" not in settings.methods:
        return patched
    hf.prune(patched, config, student, dtype=torch.float32)
    return open_checkpoint(student)


def _write(
    healed: Checkpoint, config: ModelConfig, out: Path, record: HealRecord, dtype: torch.dtype
) -> None:
    # What an earlier run left there may be shards of other weights under the same names.
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    text = json.dumps(record.to_json(), indent=1) + "\n"
    hf.prune(healed, config, out, dtype=dtype, beside={RECORD: text})


def _key(
    pupil: Checkpoint,
    source: Checkpoint,
    config: ModelConfig,
    data: Data,
    settings: Settings,
    lineage: str,
) -> str:
    """What tells this run from others that may lie in the same place."""
    identity: list[Any] = [str(pupil.path.resolve()), str(source.path.resolve()), lineage]
    identity += [[entry.layer for entry in config.layers], settings.to_json()]
    identity += [data.hash, data.held_out_hash]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (1, W) -> (1, W, V) float32."""
    cache = KVCache(decoder.config, 1, decoder.device, decoder.dtype, capacity=tokens.shape[1])
    return decoder.forward(tokens.to(decoder.device), cache, logits="all")


def _perplexity(decoder: Decoder, data: Data) -> float:
    return perplexity(lambda tokens: _logits(decoder, tokens), data.held_out)


def _unheard(done: int, total: int, note: str = "") -> None:
    pass
