"""What n-gram drafts give: decode tokens a second with them over without, three prompts.

    python benchmarks/speculation.py [--model MODEL] [--isa ISA]

With and without take turns; medians. Greedy text, `benchmarks/prompts/`: one that repeats, an edit
of code, one that does not repeat. Steps of several tokens round otherwise than steps of one, so
that a text may part from that without drafts where two tokens are nearly as likely. Every token
with drafts is held to what a step of its own finds behind the same text: the others are counted,
and how far below the likeliest one they lie, over the runtime's stated error there.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import engine
from engine.commands.output import refuse
from engine.errors import InputError
from engine.kernels.w4.cpu import isas

PROMPTS = Path(__file__).parent / "prompts"
NEW_TOKENS, TURNS = 160, 7
HEAD = (
    "| isa | prompt | tok/s | with drafts | ratio | tokens a step | other tokens |\n"
    "|---|---|---:|---:|---:|---:|---|"
)
# Of the logits' RMS: what int8 activations are held to (tests/cpu/test_cpu_accuracy.py).
ERROR = 3e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--isa", action="append", choices=isas(), help="repeatable; all here")
    asked = parser.parse_args()
    try:
        report(asked)
    except InputError as error:
        refuse(error)


def report(asked: argparse.Namespace) -> None:
    chosen = asked.isa or [isa for isa in isas() if isa != "generic"]
    for isa in chosen:
        with engine.load(asked.model, backend="cpu", isa=isa) as model:
            if isa == chosen[0]:  # behind what may be refused
                print(HEAD)
            for name in ("repeats", "edit", "plain"):
                print(row(model, isa, name), flush=True)


def row(model: engine.Model, isa: str, name: str) -> str:
    prompt = model.text.encode(PROMPTS.joinpath(f"{name}.txt").read_text().rstrip("\n"))
    rates: dict[str | None, list[float]] = {None: [], "ngram": []}
    found: dict[str | None, engine.Generation] = {}
    for _ in range(TURNS):
        for speculate, seen in rates.items():
            made = model.generate(
                prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, speculate=speculate
            )
            found[speculate] = made
            seen.append(made.timings.overall_tok_s or 0.0)
    plain, drafted = (statistics.median(seen) for seen in rates.values())
    ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    steps = len(found["ngram"].timings.step_ns)
    parted = told(others(model, prompt, found["ngram"].token_ids))
    return (
        f"| {isa} | {name} | {plain:.0f} | {drafted:.0f} | {ratio:.2f}x "
        f"| {(NEW_TOKENS - 1) / steps:.2f} | {parted} |"
    )


@torch.inference_mode()
def others(model: engine.Model, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Of each of `ids`, chosen after the prompt and those before, that is not the likeliest where a
    step is asked for it alone: how far its logit lies below the largest, over the stated error."""
    cache, found = model.runtime.new_cache(1, len(prompt) + len(ids)), []
    fed = list(prompt)
    for chosen in ids:
        logits = model.runtime.forward(torch.tensor([fed]), cache, logits="last")[0, -1]
        if (below := float(logits.max() - logits[chosen])) > 0:
            found.append(below / (ERROR * float(logits.square().mean().sqrt())))
        fed = [chosen]
    return found


def told(found: list[float]) -> str:
    return f"{len(found)}, by {max(found):.3f} of the error" if found else "none"


if __name__ == "__main__":
    main()
