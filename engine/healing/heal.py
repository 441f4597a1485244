"""The way through: patch, qlora, distil, write; what is unfinished lies beside, found again."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.artifacts import HEAL, HealRecord
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.adapter import AdaptedCheckpoint, stamps
from engine.checkpoint.weights import half_dtype, lineage_hash
from engine.errors import InputError
from engine.export import hf, packed
from engine.healing import adapters, processes
from engine.healing.data import Data, perplexity
from engine.healing.distil import distil, unit
from engine.healing.own import avoiding, digest, mixed, own_windows, second
from engine.healing.patch import patch
from engine.healing.place import check_cache, check_new, place_of
from engine.healing.qlora import check_gpu, check_installed, qlora
from engine.healing.replaced import Replaced, Rounded
from engine.healing.scales import ScaleStudent, check_packed
from engine.healing.settings import TRAINED, Settings, check_model, find_cuts
from engine.healing.state import Standing, joined
from engine.healing.streams import Streams
from engine.healing.student import Student, check_peft
from engine.healing.teacher import Logits, Teacher
from engine.healing.written import Write, written
from engine.kernels.dtypes import dtype_of
from engine.kernels.w4.format import Packed, unpack
from engine.progress import Reporting, unheard
from engine.reference.decoder import Decoder, load_decoder
from engine.scratch import Scratch, partial_of, write_text

# (what is to become a 4-bit base, its layers, a new directory)
Pack = Callable[[Checkpoint, ModelConfig, Path], object]
OpenWriter = Callable[[Path], Write]  # a directory -> what its model writes


@dataclass(frozen=True)
class TeacherRuntime:
    """A faster way to the teacher's words than the reference decoder: a runtime's."""

    name: str  # with its precision: tells cached logits apart
    logits: Logits
    write: Write
    bos: int | None = None  # what a text can begin with


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
    runtime: TeacherRuntime | None = None,
    open_writer: OpenWriter | None = None,
    pack: Pack | None = None,
    reporting: Reporting = unheard,
) -> HealRecord:
    """Writes the layers of `pupil` that `config` keeps, healed, to the new directory `out`.

    The teacher is `pupil` with all its layers, or `teacher` where that has lost some already.
    `dtype` is that of `out`, the pupil's own 16 bits by default; a packed directory whose scales
    are trained stays one. Until it is finished a run lies in `out` + ".healing"; what the teacher
    says lies in `cache` instead, and stays, where it is given. `runtime` is asked for that in the
    place of the reference decoder; `settings.written`, tokens that the teacher writes, needs it,
    and `settings.own`, which the student writes, `open_writer`.
    `pack` writes the packed directory that qlora learns on; with `settings.adapter` `out` is that
    and the adapter beside it.
    """
    source = teacher or pupil
    processes.check(settings.methods)
    if "qlora" in settings.methods:
        check_installed()
    if "distil" in settings.methods and settings.train == "lora":
        check_peft()
    check_model(settings, config, teacher is not None)
    check_place(source, config, out)
    if cache is not None:
        check_cache(cache, out)
    if settings.train == "scales":
        check_packed(pupil)
    settings = settings.on(device)
    if "qlora" in settings.methods:
        check_gpu(torch.device(device), settings.precision)
    healing = Healing(
        pupil, source, config, data, settings, device, reporting, runtime, open_writer
    )
    work = place_of(out)
    run = work / healing.key
    if not processes.is_first():
        return healing.follow(run, cache or work, out)
    scratch = Scratch(work)
    run.mkdir(parents=True, exist_ok=True)
    if settings.written:
        healing = replace(healing, data=healing.extended(cache or work))
    before = healing.perplexity(pupil, config)
    dtype = dtype or half_dtype(pupil)
    write: Callable[..., None]
    healed: Checkpoint
    if settings.train == "scales":
        changed, standing = healing.rescaled(run, cache or work)
        healed, kept = Replaced(pupil, {name: unpack(m) for name, m in changed.items()}), config
        write = partial(packed.rewrite, pupil.path, out, changed)
    else:
        healed, kept, standing = healing.healed(run, cache or work, pack)
        if settings.adapter and isinstance(healed, AdaptedCheckpoint):
            write = partial(adapters.write, healed, settings, out)
        else:
            if dtype != torch.float32:
                healed = Rounded(healed, dtype)
            write = partial(hf.prune, healed, kept, out, dtype=dtype)
    after = standing.best
    exact = settings.precision == "float32" and not isinstance(healed, Rounded)
    if settings.methods[-1] != "distil" or not exact:  # in float32 as before it, of what is written
        after = healing.perplexity(healed, kept)
    record = healing.record((name, teacher_name or name), standing, (before, after))
    # What an earlier run left there may be shards of other weights under the same names.
    Scratch(partial_of(out)).remove()
    beside = {HEAL: json.dumps(record.to_json(), indent=1) + "\n"}
    write_text(work / HEAL, beside[HEAL])
    write(beside=beside)
    processes.wait(device)
    scratch.remove(HEAL)
    return record


def check_place(source: Checkpoint, config: ModelConfig, out: Path) -> None:
    """InputError for a teacher of another vocabulary, and where `out` is there already."""
    if source.config.vocab_size != config.vocab_size:
        raise InputError(
            f"{source.path}: a teacher of {source.config.vocab_size} tokens cannot teach a model "
            f"of {config.vocab_size}"
        )
    check_new(out)


@dataclass(frozen=True)
class Healing:
    """What a run starts from, and its stages."""

    pupil: Checkpoint
    source: Checkpoint  # the teacher
    config: ModelConfig  # of the layers that the pupil keeps
    data: Data
    settings: Settings
    device: torch.device | str
    reporting: Reporting
    runtime: TeacherRuntime | None
    open_writer: OpenWriter | None

    @cached_property
    def lineage(self) -> str:
        return lineage_hash(self.source, self.source.config)

    @property
    def key(self) -> str:
        """What tells this run from others that may lie in the same place."""
        weights = [stamps(checkpoint.path) for checkpoint in (self.pupil, self.source)]
        layers = [entry.layer for entry in self.config.layers]
        text = [self.data.hash, self.data.held_out_hash]
        identity = [weights, self.lineage, layers, text, self.settings.to_json()]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def healed(
        self, run: Path, cache: Path, pack: Pack | None
    ) -> tuple[Checkpoint, ModelConfig, Standing]:
        """The result, the layers of it that are kept, and how the trainings went."""
        (checkpoint, config), standing = self.patched(run), Standing()
        if "qlora" in self.settings.methods:
            assert pack is not None, "qlora needs a base"
            base = run / "base"
            if not base.exists():
                pack(checkpoint, config, base)
            processes.wait(self.device)
            with self.reporting(unit(self.settings)) as report:
                standing, pairs = qlora(base, self.data, self.settings, run, self.device, report)
            if self.settings.adapter:
                checkpoint = AdaptedCheckpoint(open_checkpoint(base), pairs, 1.0)
                config = checkpoint.config
            else:
                checkpoint = adapters.merged(checkpoint, config, pairs)
        if "distil" in self.settings.methods:
            checkpoint, later = self.distilled(checkpoint, config, run, cache)
            config, standing = checkpoint.config, joined(standing, later)
        return checkpoint, config, standing

    def follow(self, run: Path, cache: Path, out: Path) -> HealRecord:
        """What a process does that is not the first: learns along, and writes nothing."""
        processes.wait(self.device)
        data = self.extended(cache) if self.settings.written else self.data
        qlora(run / "base", data, self.settings, run, self.device)
        processes.wait(self.device)
        return HealRecord.load(out / HEAL)

    def patched(self, run: Path) -> tuple[Checkpoint, ModelConfig]:
        """The pupil, or what the method without training makes of it, which lies in `run`."""
        (method, *_) = self.settings.methods
        if method in TRAINED:
            return self.pupil, self.config
        out = run / "patched"
        if not out.exists():
            with self.reporting("layers") as report:
                tensors = patch(method, self.pupil, self.config, self.data.spread(), report)
            changed = Replaced(self.pupil, tensors)
            if len(self.settings.methods) == 1:
                return changed, self.config
            hf.prune(changed, self.config, out, dtype=torch.float32)
        patched = open_checkpoint(out)
        return patched, patched.config

    @property
    def known(self) -> str:
        """What tells text and teacher apart."""
        told = self.runtime.name if self.runtime else "reference"
        return f"{self.data.hash} {self.lineage} {stamps(self.source.path)} {told}"

    def extended(self, directory: Path) -> Data:
        """The text, and what the teacher writes."""
        assert self.runtime is not None, "written text needs a runtime"
        with self.reporting("tokens written") as report:
            rows = written(
                self.data.windows,
                self.settings.written,
                self.runtime.bos,
                self.runtime.write,
                directory,
                name=self.known,
                seed=self.settings.seed,
                most=self.source.config.max_context,
                report=report,
            )
        return self.data.extended(rows)

    def distilled(
        self, checkpoint: Checkpoint, config: ModelConfig, run: Path, cache: Path
    ) -> tuple[Checkpoint, Standing]:
        """The student with what it has learnt, layers numbered from 0, and how that went."""
        start = checkpoint.path if checkpoint.path == run / "patched" else run / "student"
        if not start.exists():
            hf.prune(checkpoint, config, start, dtype=torch.float32)
        student = Student(start, self.config, self.settings, self.device)
        standing = self._taught(student, run, cache)
        if self.settings.own:
            standing = joined(standing, self._second(student, start, run, cache))
        return Replaced(open_checkpoint(start), student.tensors()), standing

    def rescaled(self, run: Path, cache: Path) -> tuple[dict[str, Packed], Standing]:
        """The pupil's matrices by name, with the scales that were learnt, and how that went."""
        student = ScaleStudent(self.pupil, self.config, self.settings, self.device)
        standing = self._taught(student, run, cache)
        return student.packed(), standing

    def _taught(self, student: Student, run: Path, cache: Path) -> Standing:
        ask = partial(self._teacher(cache), logits=self._teacher_logits())
        streams = self._streams(cache) if self.settings.residual else None
        with self.reporting(unit(self.settings)) as report:
            return distil(student, ask, self.data, self.settings, run, report, streams=streams)

    def _streams(self, cache: Path) -> Streams:
        ends = [cut.stop for cut in find_cuts(self.config)]
        return Streams(
            self.source, ends, self.data.windows, cache, self.known,
            dtype=dtype_of(self.settings.precision), device=self.device,
        )  # fmt: skip

    def _teacher(self, cache: Path) -> Teacher:
        size = self.config.vocab_size
        return Teacher(self.data.windows, self.settings.top, size, cache, self.known)

    def _teacher_logits(self) -> Logits:
        return self.runtime.logits if self.runtime else self._decoder()

    def _second(self, student: Student, start: Path, run: Path, cache: Path) -> Standing:
        """A round on what the student writes as it stands; how that went."""
        assert self.open_writer is not None, "text of its own needs a runtime"
        place = run / "own"
        place.mkdir(exist_ok=True)
        base, weights = open_checkpoint(start), student.tensors()
        name, writer = digest(weights), place / "model"
        if not writer.exists():
            dtype = half_dtype(self.pupil)
            hf.prune(Replaced(base, weights), base.config, writer, dtype=dtype)
        with self.reporting("tokens of its own") as report:
            own = own_windows(
                self.data, self.settings.own, self.open_writer(writer), place,
                name=name, seed=self.settings.seed, most=self.config.max_context, report=report,
            )  # fmt: skip
        texts, width = len(self.data.windows), own.shape[1]
        order = mixed(texts, len(own))
        settings = second(self.settings, len(order))
        windows = torch.cat((self.data.windows[:, :width], own))
        data = Data(windows[order], self.data.held_out[:, :width])
        logits = self._teacher_logits()
        of_text = self._teacher(cache)
        of_own = Teacher(own, settings.top, self.config.vocab_size, place, name)

        def ask(window: int) -> tuple[torch.Tensor, torch.Tensor]:
            at = int(order[window])
            if at < texts:
                values, indices = of_text(at, logits)
                return values[:width], indices[:width]
            return of_own(at - texts, lambda tokens: avoiding(logits(tokens), tokens))

        with self.reporting(unit(settings)) as report:
            found = distil(student, ask, data, settings, place, report, keep_last=True)
        # As before the first round: the checks of this one are of windows of an even length.
        last = perplexity(student.logits, self.data.held_out)
        return replace(found, best=last, best_step=found.step)

    def _decoder(self) -> Logits:
        return partial(_logits, load_decoder(self.source, self.source.config, self.device))

    def perplexity(self, checkpoint: Checkpoint, config: ModelConfig) -> float:
        decoder = load_decoder(checkpoint, config, self.device)
        return perplexity(partial(_logits, decoder), self.data.held_out)

    def record(
        self, names: tuple[str, str], standing: Standing, perplexities: tuple[float, float]
    ) -> HealRecord:
        """`names` of model and teacher, `perplexities` before and after."""
        return HealRecord(
            model=names[0],
            teacher=names[1],
            lineage=self.lineage,
            total_layers=self.config.total_layers,
            keep=tuple(entry.layer for entry in self.config.layers),
            methods=self.settings.methods,
            settings=self.settings.to_json(),
            steps=standing.step,
            best_step=standing.best_step,
            minutes=standing.seconds / 60,
            stopped=standing.stopped,
            losses=tuple(standing.losses),
            checks=tuple(standing.checks),
            check_steps=standing.check_steps,
            perplexity_before=perplexities[0],
            perplexity_after=perplexities[1],
            text_hash=self.data.hash,
            seed=self.settings.seed,
        )


def _logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (1, W) -> (1, W, V) float32."""
    cache = decoder.new_cache(*tokens.shape)
    return decoder.forward(tokens.to(decoder.device), cache, logits="all")
