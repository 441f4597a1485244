"""What n-gram drafts give: decode tokens a second with them over without, three prompts.

    python benchmarks/speculation.py [--model MODEL] [--isa ISA]

With and without take turns; medians. Greedy text, `benchmarks/prompts/`: one that repeats, an edit
of code, one that does not repeat. Where a text differs, the logits of the first different token
were closer than the runtime rounds: the margin is shown.
"""

import argparse
import statistics
from pathlib import Path

import engine
from engine.commands.output import refuse
from engine.errors import InputError
from engine.kernels.w4.cpu import isas

PROMPTS = Path(__file__).parent / "prompts"
NEW_TOKENS, TURNS = 160, 7


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
    head = (
        "| isa | prompt | tok/s | with drafts | ratio | tokens a step | same tokens |\n"
        "|---|---|---:|---:|---:|---:|---|"
    )
    for isa in asked.isa or [isa for isa in isas() if isa != "generic"]:
        with engine.load(asked.model, isa=isa) as model:
            if head:
                print(head)
            head = ""
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
    return (
        f"| {isa} | {name} | {plain:.0f} | {drafted:.0f} | {ratio:.2f}x "
        f"| {(NEW_TOKENS - 1) / steps:.2f} | {same(model, prompt, found)} |"
    )


def same(model: engine.Model, prompt: list[int], found: dict) -> str:
    """Up to where the two texts agree, and by how little they then do not."""
    pairs = zip(found[None].token_ids, found["ngram"].token_ids, strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return "all"
    ids = [*prompt, *found[None].token_ids[:at]]
    top = model([ids])[0, -1].topk(2).values
    return f"{at}, margin {float(top[0] - top[1]):.3f}"


if __name__ == "__main__":
    main()
