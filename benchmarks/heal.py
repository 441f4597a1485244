"""What healing gives: a model's perplexity and answers against the layers that it has lost.

    python benchmarks/heal.py WORK --train FILE --text FILE [--text FILE] --choices FILE

For every count of dropped layers, chosen by `engine plan --rule greedy`, each way of healing is run
as a user would run it and judged by `engine eval`; the first text is of the kind that it learnt
from. Everything made is kept in WORK, where a run that was killed goes on; a finished cell is an
entry of benchmarks/results/heal.json, from which heal.md's table and two figures beside it are
drawn. `--only 5:distil` runs some cells alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import positive
from work import begin, clocked, seconds

from engine.architecture.layers import format_layers
from engine.artifacts import Plan
from engine.benchmark.machine import device_name
from engine.commands.common import check_writable
from engine.commands.output import refuse
from engine.errors import InputError
from engine.report.drawing import DASHES, LINES, new_figure, style
from engine.scratch import replacing, write_text

RESULT = Path(__file__).parent / "results" / "heal.json"
COUNTS = 0, 3, 5, 8, 10
METHODS = "no healing", "linear", "qlora", "distil", "distil, 4 bits, scales"
CELLS = {
    f"{count}:{method}": (count, method)
    for count in COUNTS
    for method in (METHODS if count else METHODS[:1])
}


@dataclass(frozen=True)
class Cell:
    """One model of the study."""

    model: str
    dropped: int
    layers: str  # dropped
    method: str
    perplexities: dict[str, float]  # by text
    perplexity: float  # their geometric mean
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    probability: float  # of the right choice
    nbytes: int
    decode_tok_s: float | None
    minutes: float  # of healing alone: the plan, and a cell that it begins with, are left out
    machine: str


FIGURES: dict[str, tuple[str, Callable[[Cell], float]]] = {
    "perplexity": ("perplexity over the whole model's", lambda cell: cell.perplexity),
    "choices": ("probability of the right choice", lambda cell: cell.probability),
}


class Study:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.work, self.file = asked, Path(asked.work), asked.out
        self.cells = {(cell.dropped, cell.method): cell for cell in read(self.file)}
        ours = asked.model, [Path(text).name for text in asked.text]
        if any((cell.model, list(cell.perplexities)) != ours for cell in self.cells.values()):
            raise InputError(f"{self.file}: holds cells of another model or texts; move it away")
        for file in (self.file, *map(self.figure_file, FIGURES)):
            check_writable(file)
        for source in (asked.train, *asked.text, asked.choices):
            if not source.startswith("hub:") and not Path(source).exists():
                raise InputError(f"{source}: there is no such file")
        others = "only", "out", "work"
        options = {name: value for name, value in vars(asked).items() if name not in others}
        begin(self.work, asked.model, options)

    def run(self) -> None:
        for name, key in CELLS.items():
            if key not in self.cells and name in (self.asked.only or CELLS):
                self.cells[key] = self.measure(*key)
                self.keep()
        self.draw()

    def measure(self, count: int, method: str) -> Cell:
        model, drop = self.made(count, method)
        judged = self.judged(model, drop, f"{count}-{method}")
        speed = self.engine(
            "run", "--model", model, *drop, "--new-tokens", 128, "--repeats", 3, "--quiet"
        )
        choices = judged["choices"]
        return Cell(
            model=self.asked.model,
            dropped=count,
            layers=format_layers(Plan.load(self.plan(count)).drop) if count else "",
            method=method,
            perplexities={Path(k).name: v["perplexity"] for k, v in judged["texts"].items()},
            perplexity=judged["perplexity"],
            accuracy=choices["accuracy"],
            accuracy_low=choices["accuracy_low"],
            accuracy_high=choices["accuracy_high"],
            probability=choices["probability"],
            nbytes=self.nbytes(model) if not drop else 0,
            decode_tok_s=speed.get("decode_tok_s"),
            minutes=seconds(self.clock(model)) / 60,
            machine=device_name(torch.device("cpu")),
        )

    def made(self, count: int, method: str) -> tuple[str, list[str]]:
        """(model, options that drop its layers): healed where it is not there already."""
        if method == METHODS[0]:
            return self.asked.model, ["--plan", str(self.plan(count))] if count else []
        if method == METHODS[-1]:
            return str(self.small(count)), []
        out = self.work / f"{count}-{method}"
        if not out.exists():
            train = ["--method", "linear"]
            if method == "distil":
                train = ["--method", "linear,distil", *self.length]
                train += ["--cache", str(self.work / "cache"), "--self", str(self.asked.self)]
            if method == "qlora":  # the paper's rate and rank; its batch would be a step a minute
                train = ["--method", "qlora", *self.length]
                train += ["--window", "512", "--batch-tokens", "2048"]
            self.heal(self.asked.model, out, "--plan", self.plan(count), *train)
        return str(out), []

    def small(self, count: int) -> Path:
        """The distilled model in 4 bits, whose scales have learnt too."""
        packed, out = self.work / f"{count}-packed", self.work / f"{count}-scales"
        if not packed.exists():
            self.engine("quantize", self.made(count, "distil")[0], packed)
        if not out.exists():
            teacher = self.made(count, "distil")[0]
            train = "--method", "distil", "--train", "scales", "--teacher", teacher
            self.heal(packed, out, *train, *self.length)
        return out

    def heal(self, model: str | Path, out: Path, *how: object) -> None:
        with clocked(self.clock(out), time.monotonic):  # an interrupted one goes on where it was
            self.engine("heal", model, out, *how, "--text", self.asked.train, "--seed", 0)

    def clock(self, out: str | Path) -> Path:
        """The file of the seconds that it took to heal `out`."""
        return self.work / f"{Path(out).name}.seconds"

    @property
    def length(self) -> list[str]:
        """Of a training."""
        if self.asked.steps:
            return ["--steps", str(self.asked.steps)]
        return ["--minutes", str(self.asked.minutes)]

    def plan(self, count: int) -> Path:
        profile, out = self.work / "profile.json", self.work / f"plan-{count}.json"
        if not profile.exists():
            self.engine("profile", self.asked.model, "--out", profile)
        if not out.exists():
            self.engine("plan", profile, "--rule", "greedy", "--count", count, "--out", out)
        return out

    def judged(self, model: str, drop: list[str], name: str) -> dict[str, Any]:
        out = self.work / f"{name}.json"
        if not out.exists():
            texts = [each for text in self.asked.text for each in ("--text", text)]
            self.engine(
                "eval", model, *drop, *texts, "--count", self.asked.windows, "--dtype", "float32",
                "--choices", self.asked.choices, "--json", out,
            )  # fmt: skip
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    def engine(self, *words: object) -> dict[str, Any]:
        """Runs `engine` with these words; the JSON of its last line, where there is one."""
        module = ["engine.run"] if words[0] == "run" else ["engine.cli", str(words[0])]
        command = [sys.executable, "-m", *module, *map(str, words[1:])]
        print(" ".join(command[2:]), file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise InputError(f"engine {words[0]}: ended with exit code {done.returncode}")
        last = (done.stdout.splitlines() or [""])[-1]
        return json.loads(last) if last.startswith("{") else {}

    @staticmethod
    def nbytes(model: str) -> int:
        path = Path(model)
        return (
            sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.exists() else 0
        )

    def keep(self) -> None:
        rows = [asdict(self.cells[key]) for key in sorted(self.cells, key=str)]
        write_text(self.file, json.dumps(rows, indent=1) + "\n")

    def draw(self) -> None:
        for name, (label, value) in FIGURES.items():
            with style():
                self.figure(name, label, value)
        print("\n".join(self.table()))

    def figure(self, name: str, label: str, value: Any) -> None:
        whole = self.cells.get((0, METHODS[0]))
        if whole is None:
            return
        figure, axes = new_figure(3.4)
        divisor = value(whole) if name == "perplexity" else 1.0
        for index, method in enumerate(METHODS):
            cells = [self.cells[key] for key in sorted(self.cells) if key[1] == method and key[0]]
            if not cells:
                continue
            points = [(0, value(whole)), *((cell.dropped, value(cell)) for cell in cells)]
            colour, marker = LINES[index]
            axes.plot(
                [x for x, _ in points], [y / divisor for _, y in points], color=colour,
                marker=marker, linestyle=DASHES[index % len(DASHES)], label=method,
            )  # fmt: skip
        axes.set(xlabel="layers dropped", ylabel=label)
        axes.grid(axis="y")
        axes.legend()
        with replacing(self.figure_file(name)) as file:
            figure.savefig(file, metadata={"Date": None})

    def figure_file(self, name: str) -> Path:
        return self.file.with_name(f"{self.file.stem}-{name}.svg")

    def table(self) -> list[str]:
        """Of what is finished, for heal.md."""
        rows = [
            "| dropped | method | perplexity | by text | right choice | bytes | tok/s | minutes |",
            "|---|---|---:|---|---:|---:|---:|---:|",
        ]
        whole = self.cells.get((0, METHODS[0]))
        for key in sorted(self.cells):
            cell = self.cells[key]
            over = f" ({cell.perplexity / whole.perplexity:.2f}x)" if whole else ""
            by_text = " ".join(f"{each:.2f}" for each in cell.perplexities.values())
            speed = "" if cell.decode_tok_s is None else f"{cell.decode_tok_s:.0f}"
            size = f"{cell.nbytes / 1e6:.1f} MB" if cell.nbytes else ""
            rows.append(
                f"| {cell.layers or '-'} | {cell.method} | {cell.perplexity:.2f}{over} | {by_text} "
                f"| {cell.probability:.3f} | {size} | {speed} | {cell.minutes:.1f} |"
            )
        return rows


def read(file: Path) -> list[Cell]:
    """The cells of a record that is there."""
    if not file.is_file():
        return []
    try:
        return [Cell(**cell) for cell in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: is no record of healing ({error}); move it away") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", help="a directory, made where it is not there")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True, help="text to learn from")
    parser.add_argument("--text", action="append", required=True, help="to judge by; repeatable")
    parser.add_argument("--choices", required=True, help="JSONL of questions")
    parser.add_argument("--minutes", type=float, default=15.0, help="minutes of training per cell")
    parser.add_argument("--steps", type=positive, help="of 2,048 tokens, in the place of minutes")
    parser.add_argument("--self", type=int, default=200_000, help="tokens the teacher writes")
    parser.add_argument("--windows", type=positive, default=16, help="of 512 tokens, of each text")
    parser.add_argument(
        "--only", action="append", choices=CELLS, metavar="CELL", help="as 5:distil; repeatable"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="default: results/heal.json")
    try:
        Study(parser.parse_args()).run()
    except InputError as error:
        refuse(error)


if __name__ == "__main__":
    main()
