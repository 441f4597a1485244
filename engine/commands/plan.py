"""`engine plan`: which layers to drop."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.commands.budget import GROUP
from engine.commands.scores import WINDOW, Asked, Scores, check_same
from engine.errors import InputError, check_choice

if TYPE_CHECKING:
    from engine.artifacts import Profile
    from engine.pruning.plan import Choice

RULES = ("similarity", "simple", "influence", "greedy", "search", "manual")
METRICS = ("kl", "loss")
SEARCHED = ("seed", "evaluations", "seconds")
SCORED = ("text", "column", "windows", "metric", "backend", "threads")
FITTED = ("bits", "group")


def plan(
    profile_path: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A file that `engine profile` wrote.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file.")],
    count: Annotated[
        int | None, typer.Option(help="Number of layers to drop; or one of the next three.")
    ] = None,
    fraction: Annotated[
        str | None, typer.Option(metavar="25%", help="Share of the layers to drop.")
    ] = None,
    max_distance: Annotated[
        float | None,
        typer.Option(help="Drop the largest block whose distance is at most this, up to 1."),
    ] = None,
    target_memory: Annotated[
        str | None,
        typer.Option(metavar="8GB", help="Drop as few layers as needed for the weights to fit."),
    ] = None,
    bits: Annotated[int, typer.Option(help="With --target-memory: bits of the weights.")] = 4,
    group: Annotated[
        int, typer.Option(help="With --target-memory: weights that share a scale.")
    ] = GROUP,
    rule: Annotated[str, typer.Option(help=f"One of {', '.join(RULES)}.")] = "similarity",
    protect: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Layers never dropped; 'default': the first two and the last; 'none': the paper's "
            "rule.",
        ),
    ] = "default",
    drop: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers to drop, for --rule manual.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to score, or to fit into memory. Default: the profiled one."),
    ] = None,
    text: common.TextSource = None,
    column: common.Column = Asked.column,
    windows: Annotated[
        int, typer.Option(min=1, help=f"Windows of {WINDOW} tokens that greedy and search score.")
    ] = Asked.windows,
    metric: Annotated[
        str, typer.Option(help="Score: 'kl' to the unpruned model, or 'loss'.")
    ] = Asked.metric,
    seed: Annotated[int, typer.Option(help="Random seed of search.")] = 0,
    evaluations: Annotated[
        int | None,
        typer.Option(min=1, help="Budget of search. Default: 200, unless --seconds is given."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Budget of search.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of greedy and search. Default: the best here.")
    ] = None,
    patch: Annotated[
        bool, typer.Option("--patch", help="greedy: fit each cut in closed form before the next.")
    ] = False,
    threads: common.Threads = None,
    context: typer.Context = None,  # type: ignore[assignment]  # none from shrink
) -> None:
    """Choose the layers to drop."""
    from engine.architecture.layers import format_layers
    from engine.artifacts import Profile
    from engine.pruning import plan as rules
    from engine.runtime import check_backend
    from engine.scratch import partial_of
    from engine.text.samples import source_files

    check_choice("rule", rule, RULES)
    if rule != "search":
        output.leave_out(context, SEARCHED, f"goes with --rule search, found --rule {rule}")
    scored, fits = rule in ("greedy", "search"), target_memory is not None
    if not scored:
        output.leave_out(context, SCORED, f"goes with --rule greedy or search, found --rule {rule}")
    if not fits:
        output.leave_out(context, FITTED, "goes with --target-memory, found none")
    elif bits == 16:
        output.leave_out(context, ("group",), "has no effect with --bits 16, which has no groups")
    if not scored and not fits:
        why = f"goes with --target-memory or --rule greedy or search, found --rule {rule}"
        output.leave_out(context, ("model",), why)
    if metric not in METRICS:
        raise InputError(f"metric: expected {' or '.join(METRICS)}, found {metric!r}")
    check_backend(backend, None)
    if patch and rule != "greedy":
        raise InputError(f"patch: goes with --rule greedy, found --rule {rule}")
    found, place = Profile.load(profile_path), None
    total, text_hash, ref = len(found.layers), found.text_hash, model or found.model
    reads = profile_path, ref if scored or fits else None, *source_files(text)
    common.check_writable(out, reads=reads)
    protected = protected_slots(found, protect)
    asked = count, fraction, max_distance, target_memory
    if rule == "manual" or drop is not None:
        choice = by_hand(found, rule, drop, asked)
        protected = frozenset() if protect == "default" else protected  # the list is the user's
    else:
        fewest = None if target_memory is None else to_fit(found, ref, target_memory, bits, group)
        wanted = how_many(found, count, fraction, max_distance, fewest, protected)
        if rule == "simple":
            choice = rules.simple(total, wanted)
        elif rule in ("similarity", "influence"):
            choice = getattr(rules, rule)(found, wanted, protected)
        else:
            options = Asked(ref, text, column, windows, metric, backend, patch, threads)
            scores = Scores(found, options, protected, partial_of(out))
            place, text_hash, choice = scores.place, scores.text_hash, scores.greedy(wanted)
            if rule == "search":
                most = 200 if evaluations is None and seconds is None else evaluations
                choice = scores.search(choice, seed, most, seconds)
    if caught := [found.layers[slot] for slot in choice.drop if slot in protected]:
        raise InputError(f"rule {rule}: drops {format_layers(caught)}, which --protect keeps")
    made = rules.plan_from(found, choice, rule, protected, text_hash)
    made.save(out)
    if place is not None:
        place.remove()
    score = "" if choice.score is None else f", score {choice.score:.6f}"
    output.say(f"drop {format_layers(made.drop)} of {made.total_layers}{score}")
    if choice.note:
        output.say(choice.note)


def protected_slots(found: "Profile", protect: str) -> frozenset[int]:
    """ "default", "none", or layers of the checkpoint, as slots of the profile."""
    from engine.architecture.layers import parse_layers
    from engine.pruning.plan import default_protection

    if protect == "default":
        return default_protection(len(found.layers))
    if protect == "none":
        return frozenset()
    return frozenset(map(found.slot, parse_layers(protect, found.total_layers, "protect")))


def by_hand(found: "Profile", rule: str, drop: str | None, asked: tuple) -> "Choice":
    """The layers that --drop names."""
    from engine.architecture.layers import parse_layers
    from engine.pruning.plan import manual

    if rule != "manual" or drop is None:
        raise InputError(f"rule {rule}: --rule manual and --drop LAYERS go together")
    if any(value is not None for value in asked):
        raise InputError("rule manual: --drop says how many layers go; leave other counts out")
    layers = parse_layers(drop, found.total_layers, "drop")
    return manual([found.slot(layer) for layer in layers], len(found.layers))


def how_many(
    found: "Profile",
    count: int | None,
    fraction: str | None,
    max_distance: float | None,
    fewest: int | None,
    protected: frozenset[int],
) -> int:
    """Layers to drop, from the one of four options that is given."""
    from engine.pruning.plan import check_count, largest_count

    if sum(value is not None for value in (count, fraction, max_distance, fewest)) != 1:
        raise InputError(
            "plan: expected one of --count, --fraction, --target-memory and --max-distance"
        )
    total = len(found.layers)
    if max_distance is not None:
        return largest_count(found, max_distance, protected)
    if fraction is not None:
        match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%|(0?\.\d+)", fraction.strip())
        if not match:
            raise InputError(f"fraction: expected one like 25% or 0.25, found {fraction!r}")
        share = float(match[1]) / 100 if match[1] else float(match[2])
        count = round(share * total)
    count = fewest if count is None else count
    assert count is not None  # one of the four was given
    check_count(total, count, protected)
    return count


def to_fit(found: "Profile", model: str, target: str, bits: int, group: int) -> int:
    """The fewest of the profiled layers to drop so that the weights fit."""
    from engine.commands.budget import parse_bytes, read_model
    from engine.commands.quantize import as_recipe
    from engine.pruning.budget import Storage, smallest_drop

    config, _ = read_model(model)
    check_same(found, config, model)
    if bits == 16:
        storage = Storage()
    else:
        recipe = as_recipe({"bits": bits, "group": group}).of(config)
        storage = Storage.of(recipe.bits, recipe.group, recipe.scheme, recipe.head, recipe.v)
    count = smallest_drop(config.keep(found.layers), storage, parse_bytes(target))
    if not count:
        raise InputError(f"target-memory: {model} fits {target} with all its layers")
    return count
