"""`engine plan`: which layers to drop."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.architecture.config import ModelConfig
    from engine.artifacts import Profile
    from engine.pruning.plan import Choice
    from engine.pruning.score import PrefixScorer

RULES = ("similarity", "simple", "influence", "greedy", "search", "manual")
METRICS = ("kl", "loss")
WINDOW = 512  # tokens that greedy and search score at once, fewer where the context is shorter


def plan(
    profile_path: Annotated[Path, typer.Argument(metavar="PROFILE")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where it goes.")],
    count: Annotated[int | None, typer.Option(help="Layers to drop.")] = None,
    fraction: Annotated[str | None, typer.Option(metavar="25%", help="Of the layers.")] = None,
    max_distance: Annotated[
        float | None, typer.Option(help="The most layers whose best block stays below.")
    ] = None,
    target_memory: Annotated[
        str | None, typer.Option(metavar="8GB", help="The fewest, so that the weights fit.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of the weights that are to fit.")] = 4,
    group: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    rule: Annotated[str, typer.Option(help=", ".join(RULES))] = "similarity",
    protect: Annotated[
        str, typer.Option(metavar="LAYERS", help="Never dropped; 'none' is the paper's rule.")
    ] = "default",
    drop: Annotated[str | None, typer.Option(metavar="LAYERS", help="For --rule manual.")] = None,
    model: Annotated[
        str | None, typer.Option(help="That greedy and search run; the profiled one if not given.")
    ] = None,
    text: common.TextSource = None,
    column: common.Column = "text",
    windows: Annotated[
        int, typer.Option(help=f"Of {WINDOW} tokens, scored by greedy and search.")
    ] = 8,
    metric: Annotated[str, typer.Option(help="'kl' to the unpruned model, or 'loss'.")] = "kl",
    seed: Annotated[int, typer.Option(help="Of search.")] = 0,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Of search.")] = 200,
    seconds: Annotated[float | None, typer.Option(min=0, help="Of search.")] = None,
    threads: common.Threads = None,
) -> None:
    """Choose the layers to drop."""
    from engine.architecture.layers import format_layers
    from engine.artifacts import Profile
    from engine.pruning import plan as rules

    common.check_writable(out)
    if rule not in RULES:
        raise InputError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    if metric not in METRICS:
        raise InputError(f"metric: expected {' or '.join(METRICS)}, found {metric!r}")
    found = Profile.load(profile_path)
    total, text_hash, ref = len(found.layers), found.text_hash, model or found.model
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
            scorer, text_hash = open_scorer(found, ref, text, column, windows, metric, threads)
            choice = scored(rule, scorer, total, wanted, protected, seed, evaluations, seconds)
    if caught := [found.layers[slot] for slot in choice.drop if slot in protected]:
        raise InputError(f"rule {rule}: drops {format_layers(caught)}, which --protect keeps")
    made = rules.plan_from(found, choice, rule, protected, text_hash)
    made.save(out)
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
    count = fewest if fewest is not None else count
    if max_distance is not None:
        return largest_count(found, max_distance, protected)
    if fraction is not None:
        match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%|(0?\.\d+)", fraction.strip())
        if not match:
            raise InputError(f"fraction: expected one like 25% or 0.25, found {fraction!r}")
        share = float(match[1]) / 100 if match[1] else float(match[2])
        count = round(share * total)
    check_count(total, count, protected)
    return count


def to_fit(found: "Profile", model: str, target: str, bits: int, group: int) -> int:
    """The fewest of the profiled layers to drop so that the weights fit."""
    from engine.commands.budget import parse_bytes, read_model
    from engine.pruning.budget import Storage, smallest_drop

    config, _ = read_model(model)
    check_same(found, config, model)
    count = smallest_drop(config.keep(found.layers), Storage(bits, group), parse_bytes(target))
    if not count:
        raise InputError(f"target-memory: {model} fits {target} with all its layers")
    return count


def check_same(found: "Profile", config: "ModelConfig", model: str) -> None:
    """InputError unless the model has the shapes of the profiled one."""
    if config.architecture_hash != found.architecture:
        raise InputError(f"{model}: its layers have other shapes than the profile's {found.model}")


def open_scorer(
    found: "Profile",
    model: str,
    text: str | None,
    column: str,
    windows: int,
    metric: str,
    threads: int | None,
) -> "tuple[PrefixScorer, str]":
    """(scorer over the model's layers, hash of its text) for greedy and search."""
    import hashlib
    import warnings

    from engine.text import load_text
    from engine.text.samples import read_samples

    path, checkpoint = common.open_checkpoint(model)
    check_same(found, checkpoint.config, model)
    config, tokenizer = checkpoint.config.keep(found.layers), load_text(path)
    size = min(WINDOW, checkpoint.config.max_context)
    samples, _ = read_samples(text, tokenizer, size, count=windows, column=column, bos=False)
    whole = [sample for sample in samples if len(sample) == size]
    if not whole:
        raise InputError(f"{text}: expected samples of {size} tokens, found shorter ones")
    digest = hashlib.sha256(repr(whole).encode()).hexdigest()
    import torch

    from engine.checkpoint.weights import lineage_hash
    from engine.pruning.score import PrefixScorer

    common.set_threads(threads)
    if lineage_hash(checkpoint, checkpoint.config) != found.lineage:
        warnings.warn(f"{model}: other weights than the profile's {found.model}", stacklevel=2)
    decoder = common.open_decoder(checkpoint, config)
    return PrefixScorer(decoder, torch.tensor(whole), metric), digest


def scored(
    rule: str,
    scorer: "PrefixScorer",
    total: int,
    count: int,
    protected: frozenset[int],
    seed: int,
    evaluations: int | None,
    seconds: float | None,
) -> "Choice":
    """Greedy, and from there the search where that is the rule."""
    from engine.pruning.plan import greedy, search

    with output.progress("layers dropped") as progress:
        done = [0]

        def dropped(kept: tuple[int, ...], score: float) -> None:
            scorer.anchor(kept)
            done[0] += 1
            progress(done[0], count)

        choice = greedy(scorer, total, count, protected, dropped)
    if rule == "search":
        choice = search(
            scorer, total, choice, protected, seed=seed, evaluations=evaluations, seconds=seconds
        )
    return choice
