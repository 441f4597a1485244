"""`engine profile`: from text to a profile, its tables and its report."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands import common, output
from engine.errors import InputError, NotFiniteError

if TYPE_CHECKING:
    from engine.artifacts import Profile
    from engine.pruning.profile import ProfilePart
    from engine.report.page import Shown

LENGTH = 256  # tokens a sample
MEASURED = (
    "text", "length", "samples", "tokens", "column", "split", "bos", "drop", "keep", "stream",
    "shard", "threads",
)  # fmt: skip


def profile(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Model; or profile files, with --show and --merge."),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Output file.")] = None,
    text: common.TextSource = None,
    length: Annotated[int, typer.Option(help="Tokens a sample.")] = LENGTH,
    samples: Annotated[int | None, typer.Option(help="Number of samples. Default: all.")] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens to compare: the 'last' of each sample, or 'all'.")
    ] = "last",
    column: common.Column = "text",
    split: Annotated[str, typer.Option(help="Split of a hub source.")] = "train",
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin samples with BOS. Default: as the tokenizer does."
        ),
    ] = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Hold one layer's weights at a time.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Process part I of N only. Default: a launcher's RANK and WORLD_SIZE; the output "
            "is then named out.I-of-N.json.",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the parts of a sharded run.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print a profile's tables.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="All figures and tables as one .html; with --show, of evaluations, budgets too.",
        ),
    ] = None,
    threads: common.Threads = None,
    context: typer.Context = None,  # type: ignore[assignment]  # none from shrink
) -> None:
    """Measure the angular distance across every block of layers (Gromov et al.)."""
    from engine.artifacts import Profile
    from engine.text.samples import check_column, source_files

    reads: list[str | Path] = [*paths, *source_files(text)]
    common.check_writable(out, reads=reads)
    common.check_writable(report, ".html", reads=reads)
    if out is not None and report is not None and out.resolve() == report.resolve():
        raise InputError(f"{out}: is also given as --report; name another file")
    if show or merge:
        why = "is of a model that is measured; leave it out with --show and --merge"
        output.leave_out(context, MEASURED, why)
    found: Sequence[Shown]
    part: ProfilePart | None = None
    if show:
        if merge or out is not None:
            raise InputError("profile: --show excludes --merge and --out")
        found = read_all(paths, report is not None)
    elif out is None:
        raise InputError("profile: --out FILE says where the profile goes")
    elif merge:
        found = [join(paths, out)]
    else:
        if len(paths) != 1:
            raise InputError(f"profile: expected one model, found {len(paths)}")
        check_column([text], column, split)
        part_of = parse_shard(shard)
        if shard is None and part_of[1] > 1:  # a launcher gives all its processes the same --out
            out = out.with_name(f"{out.stem}.{part_of[0]}-of-{part_of[1]}{out.suffix}")
            common.check_writable(out, reads=reads)
        if report is not None and part_of[1] > 1:
            raise InputError("profile: a part has no --report; give it to --merge")
        sampling = {"count": samples, "column": column, "split": split, "bos": bos}
        chosen = {"drop": drop, "keep": keep}
        try:
            part = run(
                paths[0], out, part_of, text, length, tokens, stream, threads, sampling, chosen
            )
            found = finish(part, out)
        except NotFiniteError:  # as it would be again
            from engine.scratch import Scratch

            Scratch.held(_work(out)).remove()
            raise
    if report is not None:  # it is there even where nothing can be printed
        from engine.report.page import save

        save(found, report)
    if part is not None and out is not None:
        say_part(part, out)
    for artefact in found:
        if isinstance(artefact, Profile):
            show_profile(artefact)


def read_all(paths: list[str], any_kind: bool) -> "list[Shown]":
    """Profiles, or with `any_kind` whatever a report can hold."""
    from engine.artifacts import Profile
    from engine.report.plot import read

    return [read(Path(path)) if any_kind else Profile.load(Path(path)) for path in paths]


def join(paths: list[str], out: Path) -> "Profile":
    """The profile of all parts of a run, saved."""
    from engine.pruning.profile import ProfilePart, merge

    found = merge([ProfilePart.load(Path(path)) for path in paths])
    found.save(out)
    return found


def run(
    model: str,
    out: Path,
    shard: tuple[int, int],
    text: str | None,
    length: int,
    tokens: str,
    stream: bool,
    threads: int | None,
    sampling: dict[str, Any],
    layers: dict[str, str | None],
) -> "ProfilePart":
    """Runs the model over its samples; a killed run is found again beside `out`."""
    from engine.architecture.layers import kept_layers
    from engine.checkpoint.adapter import stamps
    from engine.scratch import Scratch
    from engine.text import load_text
    from engine.text.samples import read_samples

    path, checkpoint = common.open_checkpoint(model)
    config = checkpoint.config.keep(kept_layers(checkpoint.config.total_layers, **layers))
    taken, has_bos = read_samples(text, load_text(path), length, **sampling)
    from engine.pruning.profile import describe, measure, measure_streamed

    common.set_threads(threads)
    source = describe(model, checkpoint, config, taken, tokens, has_bos, shard)
    work = Scratch(_work(out), repr(stamps(path))).path
    with output.progress("layers" if stream else "samples") as progress:
        if stream:
            part = measure_streamed(
                checkpoint, config, taken, source, directory=work, progress=progress
            )
        else:
            decoder = common.open_decoder(checkpoint, config)
            part = measure(decoder, taken, source, resume=work / "part.json", progress=progress)
    return part


def say_part(part: "ProfilePart", out: Path) -> None:
    from engine.benchmark.machine import peak_rss_bytes

    if part.source.shard[1] > 1:
        output.say(
            f"{out}: a part; join all of them with `engine profile --merge PARTS --out FILE`"
        )
    output.say(f"peak memory {peak_rss_bytes() / 1e6:,.0f} MB, {part.tokens_used:,} tokens")


def finish(part: "ProfilePart", out: Path) -> "list[Profile]":
    """Saves a part, or the profile where it is the only one; what a resumed run needs goes."""
    from engine.pruning.profile import merge
    from engine.scratch import Scratch

    if part.source.shard[1] > 1:
        part.save(out)
        found = []
    else:
        found = [merge([part])]
        found[0].save(out)
    Scratch.held(_work(out)).remove()
    return found


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def parse_shard(shard: str | None) -> tuple[int, int]:
    """ "2/8" -> (2, 8); by default what torchrun, accelerate or Slurm say, else (0, 1)."""
    if shard is None:
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and world in os.environ:
                shard = f"{os.environ[rank]}/{os.environ[world]}"
                break
        else:
            return 0, 1
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"shard: expected I/N with I from 0 to N - 1, found {shard!r}")
    return int(match[1]), int(match[2])


def show_profile(found: "Profile") -> None:
    """The best block of every size, and the table behind the heat map."""
    from rich.table import Table

    from engine.report.tables import BEST_COLUMNS, best_blocks

    best = Table(*BEST_COLUMNS, title=found.model)
    for row in best_blocks(found):
        best.add_row(*row)
    output.show(best)
    output.say("shifted rescaled distance in percent; rows: layers dropped, columns: start")
    for count in range(1, len(found.layers)):
        cells = (f"{100 * value:3.0f}" for value in found.rescaled(count))
        output.say(f"{count:3d} {' '.join(cells)}")
