"""Which rule chooses best: perplexity on held-out text after dropping 3, 5 and 8 layers.

    python benchmarks/plans.py [--calibration FILE] [--heldout FILE] [--model MODEL]

Every rule chooses on the calibration text alone; `engine.evaluate` judges on the held-out text.
Writes benchmarks/results/plans.md, and prints a line for every plan as it is judged.
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import pages
import torch
from shapes import positive

from engine.api import choose_device
from engine.architecture.layers import format_layers
from engine.benchmark.machine import device_name
from engine.checkpoint import open_checkpoint
from engine.checkpoint.locate import locate
from engine.commands.output import refuse
from engine.errors import InputError
from engine.evaluate import evaluate
from engine.pruning import plan as rules
from engine.pruning.profile import describe, measure, merge
from engine.pruning.score import PrefixScorer
from engine.reference.decoder import load_decoder
from engine.runtime.reference import ReferenceRuntime
from engine.text import heldout_text, load_text, read_text_file
from engine.text.samples import read_samples

COUNTS = (3, 5, 8)
RESULT = Path(__file__).parent / "results" / "plans.md"
TITLE = "# Rules compared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", help="text file; the built-in prose if not given")
    parser.add_argument("--heldout", help="text file; the built-in handbook if not given")
    parser.add_argument(
        "--samples", type=positive, default=64, help="number of 256-token samples to profile"
    )
    parser.add_argument("--windows", type=positive, default=8, help="of 512 tokens, scored")
    parser.add_argument("--judged", type=positive, help="windows of held-out text; all by default")
    parser.add_argument("--evaluations", type=positive, default=150, help="of search")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: results/plans.md")
    options = parser.parse_args()
    try:
        Study(options).run()
    except InputError as error:
        refuse(error)


class Study:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        pages.check(options.out, TITLE)
        path, device = locate(options.model), choose_device(None)
        checkpoint = open_checkpoint(path)
        config, self.text = checkpoint.config, load_text(path)
        self.judge = ReferenceRuntime.load(checkpoint, config, device)
        self.total = len(config.layers)
        self.protect = rules.default_protection(self.total)
        self.heldout = read_text_file(options.heldout) if options.heldout else heldout_text()
        samples, bos = read_samples(
            options.calibration, self.text, 256, count=options.samples, bos=False
        )
        source = describe(options.model, checkpoint, config, samples, bos=bos)
        self.profile = merge([measure(self.judge.decoder, samples, source)])
        windows, _ = read_samples(
            options.calibration, self.text, 512, count=options.windows, bos=False
        )
        # Scores only rank sets of layers; bfloat16 is several times faster where it has hardware.
        scored = load_decoder(checkpoint, config, device, torch.bfloat16)
        self.scorer = PrefixScorer(scored, torch.tensor(windows), "kl")
        self.rows: list[str] = []

    def run(self) -> None:
        whole = self.perplexity(range(self.total))
        self.note("none", 0, (), whole, whole, 0.0)
        greedy: dict[int, rules.Choice] = {}
        start = time.monotonic()

        def dropped(kept: tuple[int, ...], score: float) -> None:
            self.scorer.anchor(kept)
            drop = tuple(slot for slot in range(self.total) if slot not in kept)
            greedy[len(drop)] = rules.Choice(drop, score)
            seconds[len(drop)] = time.monotonic() - start

        seconds: dict[int, float] = {}
        rules.greedy(self.scorer, self.total, max(COUNTS), self.protect, dropped)
        for count in COUNTS:
            instant = {
                "similarity": rules.similarity(self.profile, count, self.protect),
                "similarity, paper": rules.similarity(self.profile, count),
                "simple": rules.simple(self.total, count),
                "influence": rules.influence(self.profile, count, self.protect),
            }
            for name, choice in instant.items():
                self.note(name, count, choice.drop, self.without(choice.drop), whole, 0.0)
            drop = greedy[count].drop
            self.note("greedy", count, drop, self.without(drop), whole, seconds[count])
            begun = time.monotonic()
            found = rules.search(
                self.scorer, self.total, greedy[count], self.protect,
                evaluations=self.options.evaluations,
            )  # fmt: skip
            spent = seconds[count] + time.monotonic() - begun
            self.note("search", count, found.drop, self.without(found.drop), whole, spent)
        self.write()

    def without(self, drop: tuple[int, ...]) -> float:
        return self.perplexity([slot for slot in range(self.total) if slot not in drop])

    def perplexity(self, slots: Iterable[int]) -> float:
        found = evaluate(
            self.judge, self.text, self.heldout, count=self.options.judged, slots=list(slots)
        )
        return found.perplexity

    def note(self, name, count, drop, found, whole, seconds) -> None:
        spent = f"{seconds:.0f}" if seconds else ""
        self.rows.append(
            f"| {name} | {count} | {format_layers(drop) or '-'} | {found:.2f} | "
            f"{found / whole:.2f}x | {spent} |"
        )
        print(self.rows[-1], flush=True)

    def write(self) -> None:
        options = self.options
        head = [
            f"{options.model}, {self.total} layers. Chosen on "
            f"{Path(options.calibration).name if options.calibration else 'the built-in prose'}: "
            f"distances from the last token of {options.samples} samples of 256 tokens without "
            f"BOS; greedy and search by KL to the unpruned model over {options.windows} windows "
            f"of 512 (bfloat16), search with {options.evaluations} evaluations from greedy, seed "
            f"0. Layers 0, 1 and the last are protected but for the paper's own rules. Judged by "
            f"perplexity over {options.judged or 'all'} windows of 512 of "
            f"{Path(options.heldout).name if options.heldout else 'the held-out handbook'} in "
            f"float32. Seconds are of {device_name(self.judge.device)}, "
            f"{torch.get_num_threads()} threads.",
            "",
            "| rule | dropped | layers | perplexity | of the whole | seconds |",
            "|---|---|---|---|---|---|",
        ]
        made = "\n".join([*head, *self.rows])
        pages.put(options.out, TITLE, TITLE, made, f"{options.model}, ")


if __name__ == "__main__":
    main()
