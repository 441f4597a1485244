"""Scores of sets of layers equal a plain run of those layers, wherever they start from."""

import math
import secrets

import pytest
import torch
from support import tiny

from engine.checkpoint import open_checkpoint
from engine.errors import InputError, NotFiniteError
from engine.pruning import score as module
from engine.pruning.remembered import Remembered
from engine.pruning.score import DecoderStreams, PrefixScorer
from engine.reference.decoder import Decoder
from engine.runtime.reference import ReferenceRuntime


@pytest.fixture(params=["llama", "gemma2", "phi2"])
def setting(request, tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    tiny.write(request.param, tmp_path, seed)
    checkpoint = open_checkpoint(tmp_path)
    runtime = ReferenceRuntime.load(checkpoint, checkpoint.config)
    return runtime, torch.randint(3, tiny.VOCAB, (5, 24))


def by_hand(runtime, windows: torch.Tensor, kept: tuple[int, ...], metric: str) -> float:
    """The same from the protocol: one forward call of everything, float64 from there."""
    total = 0.0
    for tokens in windows:
        tokens = tokens[None]
        cut = runtime.forward(tokens, runtime.new_cache(1), slots=kept, logits="all")
        log_q = cut[0, :-1].double().log_softmax(-1)
        if metric == "loss":
            total -= float(log_q.gather(-1, tokens[0, 1:, None]).sum())
            continue
        whole = runtime.forward(tokens, runtime.new_cache(1), logits="all")
        log_p = whole[0, :-1].double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / windows[:, 1:].numel()


@pytest.mark.parametrize("positions", [10, 10**6])
@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_scores_equal_plain_runs(setting, metric, positions, monkeypatch):
    """However many positions have their logits at once: of a large vocabulary they are few."""
    monkeypatch.setattr(module, "LOGITS", positions * tiny.VOCAB)
    monkeypatch.setattr(module, "ROWS", 4)
    runtime, windows = setting
    score = PrefixScorer(runtime.decoder, windows, metric, batch=2)
    everything = tuple(range(len(runtime.config.layers)))
    assert score(everything) == pytest.approx(
        by_hand(runtime, windows, everything, metric), abs=1e-6
    )
    sets = [everything[1:], everything[:-1], (0, 2, 3), (3,), (0, 1), (0, 3)]
    for kept in sets:
        assert score(kept) == pytest.approx(by_hand(runtime, windows, kept, metric), rel=1e-5)
    score.anchor((0, 2, 3))  # later scores start from here, and give the same
    for kept in [*sets, everything]:
        expected = by_hand(runtime, windows, kept, metric)
        assert score(kept) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_score_runs_only_what_differs(setting, monkeypatch):
    runtime, windows = setting
    score = PrefixScorer(runtime.decoder, windows, "loss", batch=5)
    ran = []
    original = score.streams.run
    monkeypatch.setattr(
        score.streams, "run", lambda slots, *rest: ran.extend(slots) or original(slots, *rest)
    )
    score((0, 1, 3))
    assert ran == [3]
    ran.clear()
    score.anchor((0, 1, 3))
    score((0, 3))
    assert ran == [3, 3]


def test_other_weights_are_run_from_the_first_slot_on(setting):
    """What is kept of the sets before came through the weights before."""
    runtime, windows = setting
    decoder = runtime.decoder
    layers = [{role: 1.1 * weight for role, weight in each.items()} for each in decoder.layers]
    other = ReferenceRuntime(Decoder(runtime.config, decoder.outer, layers))
    score = PrefixScorer(decoder, windows, "loss")
    score.anchor((0, 1, 3), DecoderStreams(other.decoder))
    for kept in [(0, 1, 3), (0, 1), (0, 3)]:
        assert score(kept) == pytest.approx(by_hand(other, windows, kept, "loss"), rel=1e-5)


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_a_score_that_is_no_number_is_refused(setting, metric):
    """NaN is neither more nor less than another."""
    runtime, windows = setting
    score = PrefixScorer(runtime.decoder, windows, metric)
    broken = runtime.decoder.layers[2]
    broken["down"] = broken["down"] * torch.nan
    assert math.isfinite(score((0, 1, 3)))
    with pytest.raises(NotFiniteError):
        score((0, 2))


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_a_score_is_given_up_once_it_is_too_large(setting, metric):
    runtime, windows = setting
    score = PrefixScorer(runtime.decoder, windows, metric)
    whole = score((0, 3))
    for share in (0.1, 0.5, 0.9):
        score.most = share * whole
        assert score.most < score((0, 3)) <= whole
    score.most = whole
    assert score((0, 3)) == whole


class GivingUp:
    """Scores of kept slots, each given up halfway beyond `most`; the sets asked for."""

    def __init__(self) -> None:
        self.most, self.whole = math.inf, True
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, kept: tuple[int, ...]) -> float:
        self.asked.append(kept)
        score = float(sum(kept))
        self.whole = score <= self.most
        return score if self.whole else (self.most + score) / 2


def test_what_was_given_up_is_scored_again_where_it_may_be_the_best(tmp_path):
    def remembered() -> tuple[Remembered, GivingUp]:
        scorer = GivingUp()
        return Remembered(scorer, lambda kept: None, tmp_path / "scores"), scorer

    score, scorer = remembered()
    assert score((1,)) == 1
    scorer.most = 1
    assert score((3,)) == score((3,)) == 2 and scorer.asked == [(1,), (3,)]
    score, scorer = remembered()
    scorer.most = 1  # as in the run before
    assert score((1,)) == 1 and score((3,)) == 2 and not scorer.asked
    scorer.most = 2  # in a run in which (1,) is protected, say
    assert score((3,)) == 2.5 and scorer.asked == [(3,)]
    scorer.most = math.inf
    assert score((3,)) == 3 and scorer.asked == [(3,), (3,)]
    score, scorer = remembered()
    assert score((3,)) == 3 and not scorer.asked


def test_an_unknown_metric_is_refused(setting):
    with pytest.raises(InputError, match="metric"):
        PrefixScorer(*[setting[0].decoder, setting[1]], metric="taste")
