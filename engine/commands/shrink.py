"""`engine shrink`: profile, plan, heal, quantize and evaluate in one go, and one page of it all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.artifacts import HEAL, RECORDS
from engine.commands import common, output
from engine.commands.scores import Asked as Scored
from engine.commands.shrunk import RECORD, collect, table
from engine.errors import InputError, check_choice
from engine.scratch import (
    Scratch,
    check_name,
    check_parent,
    partial_of,
    write_errors,
    write_text,
)

if TYPE_CHECKING:
    from engine.evaluate import Asked as Judging
    from engine.progress import Joint

REPORT = "report.html"
TEXT, TAUGHT = "text.txt", "taught"  # in the work directory; what the teacher said
MINUTES = 40.0  # some 170 steps on two cores, the second round and the scales
SHARES = {"weights": 0.6, "scales": 0.25}  # of them; the second round takes what is left
WRITTEN = 200_000  # tokens, to four times what ships: that alone is learnt by heart in 20 steps
RATES = {"weights": 2e-4, "scales": 1e-3}  # of the weights twice heal's: benchmarks/results/heal.md
OWN = 60_000  # tokens that the healed model writes, to go round in circles less
SAMPLES = 64  # of the profile
WINDOW = 512  # tokens, fewer where the context is shorter
SPEED_TOKENS = 512, 128  # prompt and new ones, fewer where the context is shorter


@dataclass(frozen=True)
class Asked:
    """The options of a run."""

    model: str
    drop: str
    bits: int
    text: tuple[str, ...]
    minutes: float | None
    steps: int | None
    written: int
    own: int
    rule: str
    windows: int
    window: int | None
    judge_text: tuple[Path, ...]
    choices: Path | None
    prompts: int
    seed: int
    threads: int | None


def shrink(
    model: common.ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    drop: Annotated[
        str, typer.Option(metavar="N|LAYERS", help="Number of layers to drop, or which: 14-18.")
    ] = "5",
    bits: Annotated[int, typer.Option(help="Bits of the weights: 4 or 8.")] = 4,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text to train on; repeatable. Layers are chosen by the first, which also "
            "calibrates. Default: built-in prose.",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help=f"Minutes of healing. Default: {MINUTES:g}.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of healing instead, of the weights and of the scales each; the second "
            "round takes up to a quarter more."
        ),
    ] = None,
    written: Annotated[
        int | None,
        typer.Option(
            "--self",
            metavar="N",
            help="Also heal on N tokens of text that MODEL generates. Default: "
            f"{WRITTEN:,} without --text, 0 with it.",
        ),
    ] = None,
    own: Annotated[int, typer.Option(metavar="N", help="As in heal; 0: no second round.")] = OWN,
    rule: Annotated[str, typer.Option(help="As in plan.")] = "greedy",
    windows: Annotated[int, typer.Option(min=1, help="As in plan.")] = Scored.windows,
    window: Annotated[
        int | None, typer.Option(help=f"Tokens a window of text. Default: {WINDOW}.")
    ] = None,
    judge_text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Text to evaluate it on; repeatable. Default: a built-in one."
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Multiple choice to evaluate it on, as in eval."),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="Prompts to evaluate its text on, as in eval.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Random seed, as in heal and plan.")] = 0,
    threads: common.Threads = None,
    context: typer.Context = None,  # type: ignore[assignment]  # typer fills it in
) -> None:
    """Prune, heal, quantize and evaluate in one run; an interrupted run resumes."""
    from engine.artifacts import read_raw

    if written is None:
        written = 0 if text else WRITTEN
    drop = drop.strip()
    if not drop.isdecimal():
        output.leave_out(context, ("rule",), f"chooses no layers, --drop {drop} names them")
    asked = Asked(
        model, drop, bits, tuple(text or ()), minutes, steps, written, own, rule, windows, window,
        tuple(judge_text or ()), choices, prompts, seed, threads,
    )  # fmt: skip
    run = Run(asked, out)
    if os.path.lexists(out):
        record = out / RECORD
        said = read_raw(record) if record.is_file() else None
        if not isinstance(said, dict) or said.get("key") != run.key:
            raise InputError(f"{out}: exists already; name a new directory")
        shown = table(out)
        output.say(f"{out} is there already")
    else:
        run.check()
        if not drop.isdecimal():
            output.leave_out(context, ("windows",), f"scores no layers, --drop {drop} names them")
        elif rule not in ("greedy", "search"):
            why = f"goes with --rule greedy or search, found --rule {rule}"
            output.leave_out(context, ("windows",), why)
        if not asked.text:
            more = f" and {written:,} tokens that {model} writes" if written else ""
            output.say(f"heals on the built-in text{more}; more text (--text) heals more")
        try:
            with output.joint("shrink") as bar:
                run.all(bar)
        except InputError:
            if not any(stage.artefact.exists() for stage in run.stages):
                run.clear()
            raise
        shown = table(out)
    run.clear()
    output.show(shown)
    output.say(f"{out}: shrunk; {out / REPORT} has it all")


@dataclass(frozen=True)
class Stage:
    """A command of its own, run unless what it gives lies there: `artefact` comes to be whole."""

    name: str
    share: float  # of the time, about
    artefact: Path
    run: Callable[[Path], object]


class Run:
    """The stages of one run. What each gives is named by all that it depends on."""

    def __init__(self, asked: Asked, out: Path) -> None:
        self.asked, self.out = asked, out
        self.work = out.parent / f"{out.name}.shrink"  # of "." and "/" too, which have no name
        check_name(out)
        check_parent(out)
        self.path, checkpoint = common.open_checkpoint(asked.model)
        self.config = checkpoint.config
        self.window = min(WINDOW, self.config.max_context) if asked.window is None else asked.window
        self.texts = self._read_texts()
        self.stages = self._stages()

    @property
    def key(self) -> str:
        """What tells the result from others that may lie in the same place."""
        return self.stages[-1].artefact.stem.rpartition("-")[2]

    def _read_texts(self) -> list[str]:
        """What is learnt from; refuses what is absent before anything runs."""
        from engine.commands.heal import check_files

        for given in (*self.asked.text, *self.asked.judge_text, self.asked.choices or "."):
            source = Path(given)
            if source.exists() and not (source.is_file() or source.is_dir()):
                raise InputError(f"{source}: is read several times: expected a file, no pipe")
        if not self.asked.text:
            return [str(self.work / TEXT)]
        sources = list(self.asked.text)
        if not self.out.exists():
            check_files(self.out, sources, None)
        return sources

    @property
    def source(self) -> str:
        """The one text of the stages that take one."""
        return self.texts[0]

    def check(self) -> None:
        """Refuses what a later stage would refuse."""
        from engine.commands.plan import RULES
        from engine.commands.quantize import LENGTH, as_recipe
        from engine.commands.scores import read_windows
        from engine.evaluate.judge import check
        from engine.healing.data import read_data
        from engine.healing.settings import Settings
        from engine.pruning.plan import check_count, default_protection
        from engine.text import load_text
        from engine.text.samples import read_samples

        asked, context = self.asked, self.config.max_context
        as_recipe({"bits": asked.bits})
        if self.window > context:
            raise InputError(
                f"window: expected at most the context's {context}, found {self.window}"
            )
        check_choice("rule", asked.rule, RULES[:-1])
        options = self.heal_options("weights")
        if asked.minutes is not None:  # all of them, which the user knows
            options["minutes"] = asked.minutes
        Settings(("distil",), **options)
        total = self.config.total_layers
        if asked.drop.isdecimal():
            check_count(total, int(asked.drop), default_protection(total))
        else:
            self.config.keep(_kept(total, asked.drop))
        judged, text = judging(asked, context), load_text(self.path)
        sources = asked.text or (None,)
        if asked.drop.isdecimal() and asked.rule in ("greedy", "search"):
            scored = Scored(asked.model, sources[0], windows=asked.windows)
            read_windows(scored, self.config, text)
        read_data(sources, None, text, self.window)
        if asked.text:
            read_samples(sources[0], text, min(LENGTH, context), most=1)
        check(text, judged, context)

    def heal_options(self, trained: str) -> dict[str, Any]:
        """Of the two healings, of weights and of scales, which share the minutes."""
        asked = self.asked
        minutes = MINUTES if asked.minutes is None and asked.steps is None else asked.minutes
        return {
            "minutes": None if minutes is None else minutes * SHARES[trained],
            "steps": asked.steps,
            "written": asked.written if trained == "weights" else 0,
            "own": asked.own if trained == "weights" else 0,
            "window": self.window,
            "lr": RATES[trained],
            "seed": asked.seed,
        }

    def _stages(self) -> list[Stage]:
        from engine.checkpoint.adapter import stamps

        asked, digest = self.asked, hashlib.sha256()

        def named(kind: str, *options: object) -> Path:
            digest.update(repr(options).encode())
            return self.work / f"{kind}-{digest.hexdigest()[:12]}"

        texts = [_stamp(source) for source in asked.text]
        profile = named("profile", stamps(self.path), texts).with_suffix(".json")
        plan = named("plan", asked.rule, asked.drop, asked.windows, asked.seed).with_suffix(".json")
        healed = named("healed", self.heal_options("weights"))
        packed = named("packed", asked.bits)
        scaled = named("scaled", self.heal_options("scales"))
        judged = named("judged", [_stamp(str(file)) for file in asked.judge_text], asked.prompts,
                       None if asked.choices is None else _stamp(str(asked.choices)))  # fmt: skip
        self.profile, self.plan, self.healed = profile, plan, healed
        self.packed, self.scaled = packed, scaled
        return [
            Stage("profile", 0.03, profile, self._profile),
            Stage("plan", 0.2, plan, self._plan),
            Stage("heal", 0.4, healed, self._heal),
            Stage("quantize", 0.08, packed, self._quantize),
            Stage("scales", 0.14, scaled, self._scales),
            Stage("judge", 0.15, judged, self._judge),
        ]

    def all(self, bar: "Joint") -> None:
        """Every stage that is not done yet, then the result under its name."""
        Scratch(self.work, RECORD)
        if not self.asked.text:
            from engine.text import default_text

            write_text(self.work / TEXT, default_text())
        done = 0.0
        for stage in self.stages:
            done += stage.share
            bar.stage(stage.name, done)
            if not stage.artefact.exists():
                with output.hushed():
                    stage.run(stage.artefact)
        self._finish(self.stages[-1].artefact)

    def clear(self) -> None:
        """Removes what the stages have left; a kill may have left it behind a whole result."""
        if self.work.exists():
            Scratch(self.work, RECORD).remove()

    def _profile(self, out: Path) -> None:
        from engine.commands.profile import LENGTH, profile
        from engine.text import load_text
        from engine.text.samples import read_samples

        length = min(LENGTH, self.config.max_context)
        found, _ = read_samples(self.source, load_text(self.path), length, most=SAMPLES)
        profile(
            [self.asked.model], out, self.source, length, len(found), threads=self.asked.threads
        )

    def _plan(self, out: Path) -> None:
        from engine.commands.plan import plan

        asked = self.asked
        which: dict[str, Any] = {"rule": "manual", "drop": asked.drop}
        if asked.drop.isdecimal():
            which = {"rule": asked.rule, "count": int(asked.drop)}
        plan(
            self.profile, out, model=asked.model, text=self.source, windows=asked.windows,
            seed=asked.seed, threads=asked.threads, **which,
        )  # fmt: skip

    def _heal(self, out: Path) -> None:
        from engine.commands.heal import heal

        heal(
            self.asked.model, out, plan=self.plan, text=self.texts, cache=self.work / TAUGHT,
            threads=self.asked.threads, **self.heal_options("weights"),
        )  # fmt: skip

    def _quantize(self, out: Path) -> None:
        from engine.commands.quantize import LENGTH, quantize

        bits = None if self.asked.bits == 4 else self.asked.bits
        length = min(LENGTH, self.config.max_context)
        quantize(
            str(self.healed), out, bits=bits, text=self.source if self.asked.text else None,
            length=length, threads=self.asked.threads,
        )  # fmt: skip

    def _scales(self, out: Path) -> None:
        """Taught by the healed model: the whole one would teach circles anew (results/heal.md)."""
        from engine.commands.heal import heal

        heal(
            str(self.packed), out, method="distil", train="scales", teacher=str(self.healed),
            text=self.texts, cache=self.work / TAUGHT, threads=self.asked.threads,
            **self.heal_options("scales"),
        )  # fmt: skip

    def _judge(self, out: Path) -> None:
        """A directory with what both were judged by and how fast they ran."""
        beside = partial_of(out)
        beside.mkdir(exist_ok=True)
        model, becomes = self.asked.model, str(self.out)
        for name, label, ref in (("before", model, model), ("after", becomes, str(self.scaled))):
            if not (beside / f"{name}-speed.json").exists():
                judge_one(self.asked, name, label, ref, beside)
        beside.replace(out)

    def _finish(self, judged: Path) -> None:
        """The packed directory with the records and the page in it, renamed to OUT."""
        records = self.scaled / RECORDS
        records.mkdir(exist_ok=True)
        copies = {"profile": self.profile, "plan": self.plan, "heal": self.healed / HEAL}
        copies["scales"] = self.scaled / HEAL
        copies |= {file.stem: file for file in judged.iterdir()}
        for name, file in copies.items():
            _copy(file, records / f"{name}.json")
        found = collect(self.asked.model, self.path, self.scaled)
        from engine.export.packed import PLAN
        from engine.report.shrunk import quality_rows, save

        _copy(self.plan, self.scaled / PLAN)  # as beside any other packed model
        save(found, self.scaled / REPORT)
        rows = [*found.sizes, *quality_rows(found), *found.speeds]
        write_text(self.scaled / RECORD, json.dumps({"key": self.key, "rows": rows}, indent=1))
        self.scaled.replace(self.out)


def judging(asked: Asked, context: int) -> "Judging":
    """What a model of this context is to be judged by."""
    from engine.commands.evaluate import read_texts
    from engine.evaluate import Asked as Judging
    from engine.judgement import LAST, NEW_TOKENS
    from engine.text.questions import read_questions

    new_tokens = min(NEW_TOKENS, context - 64)
    return Judging(
        read_texts(list(asked.judge_text)),
        window=min(Judging.window, context),
        questions=() if asked.choices is None else tuple(read_questions(asked.choices)),
        questions_file=str(asked.choices),
        prompts=asked.prompts if asked.prompts and new_tokens >= LAST else None,
        new_tokens=new_tokens,
    )


def judge_one(asked: Asked, name: str, label: str, ref: str, directory: Path) -> None:
    """`name`.json, how well the model at `ref` speaks, and `name`-speed.json, how fast it runs.

    The records call it `label`: where it lies now is not where it will.
    """
    from engine.benchmark.speed import benchmark
    from engine.evaluate import judge
    from engine.options import Options
    from engine.text import default_text

    opened, load_ms = common.open_model(ref, asked.threads)
    context = opened.config.max_context
    judged = judging(asked, context)
    judge(opened.runtime, opened.text, judged, name=label, progress=output.progress).save(
        directory / f"{name}.json"
    )
    prompt, new = (min(size, context // 2) for size in SPEED_TOKENS)
    ids = opened.text.encode(default_text()[: 16 * prompt], add_special=False)[:prompt]
    options = Options(max_new_tokens=new, ignore_eos=True)
    record = benchmark(opened, ids, options, name=label, load_ms=load_ms, repeats=3)
    record.save(directory / f"{name}-speed.json")


def _copy(file: Path, target: Path) -> None:
    with write_errors(target):  # the system's own words name what is read
        shutil.copyfile(file, target)


def _kept(total: int, drop: str) -> list[int]:
    from engine.architecture.layers import kept_layers

    return list(kept_layers(total, drop, None))


def _stamp(source: str) -> object:
    """What tells one version of a text from another."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return source, [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
