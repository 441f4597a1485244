"""What drafts by the model itself without some of its layers would give: timed and counted.

    python benchmarks/layer_drafts.py [--model MODEL] [--isa ISA] [--threads N] [--skip 14-18]

A draft runs the same weights on the same cache but for the skipped layers; the prompt and what was
accepted have run through all of them. Three tables. The first has T(n), a step that verifies n
tokens at once, over T(1), a step without drafts. The second has, for each set of skipped layers: c,
a draft's step over a full one; c + b, above which the share of right tokens must be for drafts of
one to gain, b = T(2) / T(1) - 1; by prompt a, that share along the full model's greedy text, and
the best speed-up over the tokens g of a draft, tokens of a round / (g c + T(g + 1) / T(1)), with
the tokens counted round by round; last, the same were every token right. The third has, for the set
with the best of these, what a loop of such drafts reaches: time without over time with, in turns,
medians.

Without --skip, besides the sets that plans.md names, layers are chosen for this: one after the
other, the one without which most of the prompts' next tokens stay.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from ceiling import times_ns
from shapes import positive
from speculation import PROMPTS

import engine
from engine.architecture.layers import format_layers, kept_layers, parse_layers
from engine.commands.output import refuse
from engine.errors import InputError
from engine.kernels.w4.cpu import isas
from engine.runtime import Greedy, Runtime, Verifying
from engine.speculate import MOST

PLANNED = "17", "16-18", "14-18", "5,12-18", "8-22"
CHOSEN = 1, 3, 5, 8  # layers skipped
NAMES = "repeats", "edit", "plain"
NEW_TOKENS = 160
EVERY = 4  # of the text's tokens, where layers are chosen
TURNS = 5
ROUNDS = 60  # the least of them counts: what else the machine does only adds
HEADS = (
    (
        "| isa | T(1) ms | " + " | ".join(f"T({n})" for n in range(2, MOST + 2)) + " |",
        "|---|---:|" + "---:|" * MOST,
    ),
    (
        "| isa | skipped | c | c + b | " + ": a, S (g) | ".join(NAMES) + ": a, S (g) | all right |",
        "|---|---|---:|---:|" + "---:|" * (len(NAMES) + 1),
    ),
    ("| isa | skipped | g | " + " | ".join(NAMES) + " |", "|---|---|---:|" + "---:|" * len(NAMES)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--isa", action="append", choices=isas(), help="repeatable; all here")
    parser.add_argument("--threads", type=positive, help="as torch by default")
    parser.add_argument("--skip", action="append", help="layers, as 5,12-18; repeatable")
    try:
        report(parser.parse_args())
    except InputError as error:
        refuse(error)


def report(asked: argparse.Namespace) -> None:
    with engine.load(asked.model, backend="cpu", threads=asked.threads) as model:
        total = len(model.config.layers)
        texts = [Text(model, name) for name in NAMES]
        if asked.skip:
            sets = [skipped_layers(spec, total) for spec in asked.skip]
        else:
            sets = [parse_layers(spec, total) for spec in PLANNED]
            order = chosen(model.runtime, texts, max(CHOSEN))
            sets += [tuple(sorted(order[:count])) for count in CHOSEN]
        sets = list(dict.fromkeys(sets))
        runs = {
            skipped: [accepted(model.runtime, text, kept_layers(total, skipped)) for text in texts]
            for skipped in sets
        }
    steps_of, sets_of, loops = (list(head) for head in HEADS)
    for isa in asked.isa or [isa for isa in isas() if isa != "generic"]:
        with engine.load(asked.model, backend="cpu", isa=isa, threads=asked.threads) as model:
            slots = [kept_layers(total, each) for each in sets]
            steps, drafts = costs(model.runtime, texts[0], slots)
            ratios = [step / steps[0] for step in steps]
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios[1:])
            steps_of.append(f"| {isa} | {steps[0] / 1e6:.2f} | {shown} |")
            found = []
            for skipped, kept, c in zip(sets, slots, drafts, strict=True):
                best = [best_gain(c, ratios, run) for run in runs[skipped]]
                found.append((*max(best), format_layers(skipped), kept))
                sets_of.append(f"| {isa} | {row(skipped, c, ratios, runs[skipped], best)} |")
            _, g, name, kept = max(found)
            gains = " | ".join(f"{loop_gain(model.runtime, each, kept, g):.2f}x" for each in texts)
            loops.append(f"| {isa} | {name} | {g} | {gains} |")
    print("\n\n".join("\n".join(table) for table in (steps_of, sets_of, loops)))


def skipped_layers(spec: str, total: int) -> tuple[int, ...]:
    found = parse_layers(spec, total, "--skip")
    if len(found) == total:
        raise InputError(f"--skip names all {total} layers; at least one must stay")
    return found


class Text:
    """Greedy text of the full model after a prompt."""

    def __init__(self, model: engine.Model, name: str) -> None:
        prompt = PROMPTS.joinpath(f"{name}.txt").read_text().rstrip("\n")
        made = model.generate(prompt, max_new_tokens=NEW_TOKENS + MOST, ignore_eos=True)
        self.start = made.prompt_tokens
        self.ids = [*model.text.encode(prompt), *made.token_ids]


def accepted(
    runtime: Runtime[Any], text: Text, slots: Sequence[int], most: int = MOST, every: int = 1
) -> list[int]:
    """How many of `most` tokens drafted by `slots` are the text's, from every `every`-th of it."""
    cache, found = runtime.new_cache(1, len(text.ids)), list[int]()
    done = 0  # tokens that ran through all layers
    for at in range(text.start, len(text.ids) - MOST, every):
        runtime.forward(torch.tensor([text.ids[done:at]]), cache)
        done = at
        right = 0
        while right < most:
            logits = runtime.forward(torch.tensor([[text.ids[at + right]]]), cache, slots)
            if int(logits.argmax()) != text.ids[at + right + 1]:
                break
            right += 1
        found.append(right)
        cache.truncate(at)
    return found


def chosen(runtime: Runtime[Any], texts: Sequence[Text], count: int) -> list[int]:
    """Layers to skip, in the order in which they were found."""
    total, order = len(runtime.config.layers), list[int]()

    def right(layer: int) -> int:
        slots = kept_layers(total, [*order, layer])
        return sum(sum(accepted(runtime, text, slots, most=1, every=EVERY)) for text in texts)

    for _ in range(count):
        order.append(max(set(range(total)).difference(order), key=right))
    return order


def costs(
    runtime: Runtime[Any], text: Text, drafts: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    """(ns of steps of 1 .. MOST + 1 tokens, c of each of `drafts`), behind the prompt of `text`.

    c is that of steps that hand out logits: none of layers skipped does without yet.
    """
    assert isinstance(runtime, Greedy) and isinstance(runtime, Verifying)
    cache = runtime.new_cache(1, len(text.ids))
    runtime.forward(torch.tensor([text.ids[: text.start]]), cache)

    def step() -> None:
        runtime.greedy([text.ids[text.start]], cache)
        cache.truncate(text.start)

    def verify(count: int) -> None:
        runtime.likeliest(torch.tensor([text.ids[text.start : text.start + count]]), cache)
        cache.truncate(text.start)

    def draft(slots: Sequence[int] | None) -> None:
        runtime.forward(torch.tensor([text.ids[text.start : text.start + 1]]), cache, slots)
        cache.truncate(text.start)

    verifying = [partial(verify, count) for count in range(2, MOST + 2)]
    drafting = [partial(draft, slots) for slots in (None, *drafts)]
    found = [float(min(each)) for each in times_ns(step, *verifying, *drafting, rounds=ROUNDS)]
    whole, *skipping = found[MOST + 1 :]
    return found[: MOST + 1], [each / whole for each in skipping]


def row(
    skipped: Sequence[int],
    c: float,
    steps: Sequence[float],
    runs: Sequence[Sequence[int]],
    best: Sequence[tuple[float, int]],
) -> str:
    """`steps`: T(n) / T(1), n = 1 .. MOST + 1; by text, `runs` of `accepted` and `best_gain`."""
    cells = [
        f"{mean(right > 0 for right in run):.2f}, {gain:.2f} ({g})"
        for run, (gain, g) in zip(runs, best, strict=True)
    ]
    right, _ = best_gain(c, steps, [MOST] * NEW_TOKENS)
    shown = f"{format_layers(skipped)} | {c:.2f} | {c + steps[1] - 1:.2f}"
    return f"{shown} | {' | '.join(cells)} | {right:.2f}"


def best_gain(c: float, steps: Sequence[float], run: Sequence[int]) -> tuple[float, int]:
    """(S, g), of the g that gives most on a text where `accepted` found `run`."""
    return max((tokens_a_round(run, g) / (g * c + steps[g]), g) for g in range(1, MOST + 1))


def tokens_a_round(run: Sequence[int], g: int) -> float:
    """Of drafts of g tokens and the one that verifying adds, through the text from its start."""
    rounds, at = list[int](), 0
    while at < len(run):
        rounds.append(1 + min(run[at], g))
        at += rounds[-1]
    return mean(rounds)


def loop_gain(runtime: Runtime[Any], text: Text, slots: Sequence[int], g: int) -> float:
    """Time without drafts over the time with drafts of g tokens, for as many tokens."""
    ways = [partial(decode, runtime, text, slots, count) for count in (0, g)]
    plain, drafted = times_ns(*ways, rounds=TURNS)
    return median(without / with_ for without, with_ in zip(plain, drafted, strict=True))


def decode(runtime: Runtime[Any], text: Text, slots: Sequence[int], g: int) -> None:
    """Greedy text after the prompt of `text`, by rounds of g tokens that `slots` draft."""
    assert isinstance(runtime, Greedy) and isinstance(runtime, Verifying)
    cache, ids = runtime.new_cache(1, len(text.ids)), text.ids[: text.start]
    runtime.forward(torch.tensor([ids[:-1]]), cache)
    while len(ids) < text.start + NEW_TOKENS:
        if g == 0:
            ids += runtime.greedy(ids[-1:], cache)
            continue
        at, drafted = len(ids) - 1, ids[-1:]
        for _ in range(g):
            logits = runtime.forward(torch.tensor([drafted[-1:]]), cache, slots)
            drafted.append(int(logits.argmax()))
        cache.truncate(at)
        found = runtime.likeliest(torch.tensor([drafted]), cache)[0]
        right = next((i for i in range(g) if found[i] != drafted[i + 1]), g)
        ids += found[: right + 1]
        cache.truncate(len(ids) - 1)


if __name__ == "__main__":
    main()
