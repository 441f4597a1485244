"""What greedy and search ask: how good a model is with some of its layers, on what can run it."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands import common, output
from engine.errors import InputError

if TYPE_CHECKING:
    import torch

    from engine.architecture.config import ModelConfig
    from engine.artifacts import Profile
    from engine.checkpoint import Checkpoint
    from engine.progress import Report
    from engine.pruning.plan import Choice
    from engine.pruning.score import Streams
    from engine.text import Text

WINDOW = 512  # tokens scored at once, fewer where the context is shorter
SCORES = "scores.jsonl"  # in the place beside the plan
PATCHED = 16  # windows that a patch is fitted on, beside those that are scored


@dataclass(frozen=True)
class Asked:
    """What to score, and how."""

    model: str
    text: str | None = None
    column: str = "text"
    windows: int = 8
    metric: str = "kl"
    backend: str | None = None
    patch: bool = False
    threads: int | None = None


class Scores:
    """Of sets of the profiled layers, as many as are asked for: a `place`, `work`, keeps them."""

    def __init__(self, found: "Profile", asked: Asked, protect: frozenset[int], work: Path) -> None:
        from engine.healing.settings import Settings, check_model
        from engine.text import load_text

        path, checkpoint = common.open_checkpoint(asked.model)
        check_same(found, checkpoint.config, asked.model)
        self.found, self.asked, self.protect, self.checkpoint = found, asked, protect, checkpoint
        self.config = checkpoint.config.keep(found.layers)
        if asked.patch:  # of the first layer that may go: what can mend it can mend the others
            first = min(slot for slot in range(len(found.layers)) if slot not in protect)
            if found.layers[first] == 0 and not self.config.post_norm:
                raise InputError(
                    "patch: layer 0 may be dropped, and no kept layer before it can mend that; "
                    "name it in --protect"
                )
            left = [layer for slot, layer in enumerate(found.layers) if slot != first]
            check_model(Settings(("linear",), window=2), checkpoint.config.keep(left), False)
        windows, self.others = read_windows(asked, checkpoint.config, load_text(path))
        self.text_hash = hashlib.sha256(repr(windows).encode()).hexdigest()
        self._open(windows, work)

    def _open(self, windows: list[list[int]], work: Path) -> None:
        import warnings

        import torch

        from engine.checkpoint.adapter import stamps
        from engine.checkpoint.weights import lineage_hash
        from engine.pruning.remembered import Remembered
        from engine.pruning.score import PrefixScorer
        from engine.scratch import Scratch

        asked = self.asked
        common.set_threads(asked.threads)
        lineage = lineage_hash(self.checkpoint, self.checkpoint.config)
        if lineage != self.found.lineage:
            model = f"{asked.model}: other weights than the profile's {self.found.model}"
            warnings.warn(model, stacklevel=2)
        streams, where = open_streams(self.checkpoint, self.config, asked)
        output.say(f"scored on {where}")
        self.scorer = PrefixScorer(streams, torch.tensor(windows), asked.metric)
        weights = stamps(self.checkpoint.path)
        known = [lineage, weights, self.found.architecture, self.found.layers, self.text_hash]
        others = hashlib.sha256(repr([each.tolist() for each in self.others]).encode()).hexdigest()
        key = json.dumps([*known, others, asked.metric, asked.patch, where])
        self.place = Scratch(work, key)
        self.scores = Remembered(self.scorer, self._prepare, self.place.path / SCORES)

    def greedy(self, count: int) -> "Choice":
        from engine.api import locating_nan
        from engine.pruning.plan import greedy, greedy_scores

        def dropped(kept: tuple[int, ...], score: float) -> None:
            self.scores.anchor, self.scorer.most = kept, math.inf

        total, influence = len(self.found.layers), self.found.influence
        with output.progress("scores") as report, locating_nan(self.checkpoint.path):
            heard = self._heard(report, greedy_scores(total, count, self.protect))
            return greedy(self.scores, total, count, self.protect, dropped, heard, influence)

    def search(
        self, start: "Choice", seed: int, evaluations: int | None, seconds: float | None
    ) -> "Choice":
        from engine.api import locating_nan
        from engine.pruning.plan import search

        with output.progress("scores of the search") as report, locating_nan(self.checkpoint.path):
            heard = self._heard(report, evaluations or 0)
            return search(
                self.scores, len(self.found.layers), start, self.protect,
                seed=seed, evaluations=evaluations, seconds=seconds, on_score=heard,
            )  # fmt: skip

    def _heard(self, report: "Report", total: int) -> Callable[[tuple[int, ...], float], None]:
        """Tells the best so far, and the scorer to give up on what exceeds it."""
        from engine.architecture.layers import format_layers

        done, layers = counting(1), self.found.layers

        def heard(kept: tuple[int, ...], best: float) -> None:
            self.scorer.most = best
            drop = [layer for slot, layer in enumerate(layers) if slot not in kept]
            number = next(done)
            report(number, max(total, number), f"best {best:.4f} without {format_layers(drop)}")

        return heard

    def _prepare(self, kept: tuple[int, ...]) -> None:
        """Scores start from what is kept; with --patch in a model whose cuts are mended."""
        if not self.asked.patch:
            self.scorer.anchor(kept)
            return
        from engine.healing.patch import patch
        from engine.healing.replaced import Replaced

        config = self.config.keep([self.found.layers[slot] for slot in kept])
        with output.progress("layers patched") as report:
            tensors = patch("linear", self.checkpoint, config, self.others, report)
        mended = Replaced(self.checkpoint, tensors)
        self.scorer.anchor(kept, open_streams(mended, self.config, self.asked)[0])


def check_same(found: "Profile", config: "ModelConfig", model: str) -> None:
    """InputError unless the model has the shapes of the profiled one."""
    if config.architecture_hash != found.architecture:
        raise InputError(f"{model}: its layers have other shapes than the profile's {found.model}")


def read_windows(
    asked: Asked, config: "ModelConfig", text: "Text"
) -> "tuple[list[list[int]], list[torch.Tensor]]":
    """(windows to score, others (1, T) to fit patches on: the same where the text has no more)."""
    from engine.text.samples import check_column, read_samples

    check_column([asked.text], asked.column)
    size = min(WINDOW, config.max_context)
    if size < 2:
        raise InputError(f"{asked.model}: a context of 1 token leaves none to predict and score")
    read = partial(read_samples, asked.text, text, size, column=asked.column, full=True)
    whole, _ = read(count=asked.windows)
    if not asked.patch:
        return whole, []
    samples, _ = read(most=asked.windows + PATCHED)
    others = [sample for sample in samples if sample not in whole] or whole
    import torch

    return whole, [torch.tensor([sample]) for sample in others]


def open_streams(
    checkpoint: "Checkpoint", config: "ModelConfig", asked: Asked
) -> "tuple[Streams, str]":
    """(the model by its residual stream, what it runs on): the CPU runtime, or the reference
    where there is a GPU or that runtime cannot run."""
    from engine.api import choose_backend, choose_device
    from engine.checkpoint.weights import is_quantized
    from engine.kernels.dispatch import why_not
    from engine.pruning.score import DecoderStreams

    device, reason = choose_device(None), why_not("cpu")
    if choose_backend(asked.backend, device) == "cpu":
        from engine.runtime.cpu import CpuRuntime, usual
        from engine.runtime.streams import CpuStreams

        mode, cache_dtype = usual(exact=not is_quantized(checkpoint))
        try:
            runtime = CpuRuntime.load(
                checkpoint, config, asked.threads, mode=mode, cache_dtype=cache_dtype
            )
            return CpuStreams(runtime), f"the CPU runtime ({runtime.precision})"
        except InputError:
            raise
        except ValueError as error:  # what the native decoder does not take
            if asked.backend is not None:
                raise InputError(f"backend cpu: cannot run {asked.model}: {error}") from error
            reason = str(error)
    decoder = common.open_decoder(checkpoint, config)
    where = f"the reference ({decoder.dtype}".replace("torch.", "") + f" on {decoder.device})"
    if asked.backend is None and device.type == "cpu":
        where += f", as the CPU runtime cannot run: {reason}"
    return DecoderStreams(decoder), where
