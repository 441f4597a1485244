"""The second round of healing: what circles are, how the teacher leaves them, a kill in it."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support.close import assert_close
from support.healing import WINDOW, draw, logits, shortened

from engine.checkpoint import open_checkpoint
from engine.evaluate.health import loops
from engine.healing import distil
from engine.healing.data import Data, perplexity
from engine.healing.heal import heal
from engine.healing.own import LEAST, LONGEST, PENALTY, avoiding, mixed, repeating, second
from engine.healing.settings import Settings
from engine.healing.state import Standing, joined
from engine.healing.teacher import bins
from engine.options import Options
from engine.report.figures import healing
from engine.runtime.reference import ReferenceRuntime

SETTINGS = Settings(
    ("distil",), steps=8, lr=3e-3, window=WINDOW, batch_tokens=96, check_every=4, own=6 * WINDOW
)


def by_definition(row: list[int]) -> list[int]:
    found = []
    for at in range(1, len(row)):
        for p in range(1, LONGEST + 1):
            need = max(p, LEAST) + 1
            if (
                at + 1 - need - p >= 0
                and row[at + 1 - need : at + 1] == row[at + 1 - need - p : at + 1 - p]
            ):
                found.append(at - 1)
                break
    return found


def test_circles_are_found(rng):
    """Of every period, behind other text, against the definition; and health's loops are full of
    them."""
    for period in (1, 2, 7, LEAST, LEAST + 1, LONGEST, LONGEST + 1):
        before = torch.randint(100, 200, (5,), generator=rng).tolist()
        cycle = torch.randperm(90, generator=rng)[:period].tolist()
        row = before + (cycle * 70)[:140]
        assert repeating(row) == by_definition(row)
        first = len(before) + period + max(period, LEAST)  # the first token that may not go on
        expected = list(range(first - 1, len(row) - 1)) if period <= LONGEST else []
        assert repeating(row) == expected
        assert loops(row) == bool(expected)
    row = torch.randint(3, (400,), generator=rng).tolist()
    assert repeating(row) == by_definition(row)
    assert repeating([]) == repeating([1]) == []


def test_the_teacher_lowers_what_goes_on_in_a_circle(rng):
    tokens = torch.tensor([[5, 6] * 12])
    logits = torch.randn(1, 24, 9, generator=rng)
    found = avoiding(logits, tokens)
    changed = (logits - found).nonzero()
    at = torch.tensor(repeating(tokens[0].tolist()))
    assert torch.equal(changed, torch.stack((torch.zeros_like(at), at, tokens[0, at + 1]), 1))
    assert torch.allclose((logits - found)[0, at, tokens[0, at + 1]], torch.tensor(PENALTY))


@pytest.mark.parametrize(("texts", "own"), [(1, 1), (7, 3), (3, 7), (8, 4), (1801, 59)])
def test_a_round_is_half_text_and_half_its_own(texts, own):
    """All of its own once, and text from everywhere as often."""
    order = mixed(texts, own)
    of_text = order[order < texts]
    assert order[own:].tolist() == list(range(texts, texts + own)) and len(of_text) == own
    gaps = of_text.diff(prepend=torch.tensor([-1]), append=torch.tensor([texts]))
    assert len(of_text.unique()) == min(texts, own)
    assert gaps.max() <= -(-texts // own) + 1


@pytest.mark.parametrize(("lr", "expected"), [(3e-5, 1.5e-5), (1e-4, 5e-5), (3e-4, 5e-5)])
def test_a_second_round_is_shorter_and_slower(lr, expected):
    asked = second(replace(SETTINGS, lr=lr, steps=40), 1000)
    assert asked.lr == pytest.approx(expected) and asked.steps == 10 and asked.minutes is None
    asked = second(replace(SETTINGS, lr=lr, steps=None, minutes=20.0), 1000)
    assert asked.steps == 250 and asked.minutes == 5


@pytest.mark.parametrize(("windows", "batch", "steps"), [(118, 4, 30), (7, 1, 7), (2, 4, 1)])
def test_a_second_round_goes_once_through_its_windows(windows, batch, steps):
    settings = replace(SETTINGS, steps=1000, batch_tokens=batch * WINDOW)
    assert second(settings, windows).steps == steps
    assert second(replace(settings, steps=8), windows).steps == min(2, steps)


def test_two_trainings_are_told_as_one():
    one = Standing(8, 30.0, [3.0], [9.0, 8.0], 4, 8.0, 1, "after 8 steps", (0, 8))
    two = Standing(2, 4.0, [2.0], [8.0, 7.0], 2, 7.0, 0, "after 2 steps", (0, 2))
    told = joined(one, two)
    assert (told.step, told.seconds, told.best_step, told.best) == (10, 34.0, 10, 7.0)
    assert (told.losses, told.checks) == ([3.0, 2.0], [9.0, 8.0, 8.0, 7.0])
    assert (told.check_steps, told.stopped) == ((0, 8, 8, 10), "after 8 steps, then after 2 steps")
    assert joined(one, replace(two, best_step=0)).best_step == 4  # the first one's weights
    assert joined(Standing(), two) == two


def writer(path):
    """A directory's model by the reference runtime, greedily."""
    checkpoint = open_checkpoint(path)
    runtime = ReferenceRuntime.load(checkpoint, checkpoint.config)

    def write(prompts, options: Options):
        assert options.temperature == 0 and options.ignore_eos
        cache, tokens = runtime.new_cache(len(prompts)), torch.tensor(prompts)
        rows = []
        for _ in range(options.max_new_tokens):
            tokens = runtime.forward(tokens, cache)[:, -1:].argmax(-1)
            rows.append(tokens)
        return torch.cat(rows, 1).tolist()

    return write


def test_what_the_second_round_is_taught(source, rng, tmp_path, monkeypatch):
    """The whole model's words, at the places of its shorter windows; what it is to avoid it avoids
    in text of its own alone. Its last weights are written, however much worse they are."""
    checkpoint, taught = source("llama"), []
    drawn = draw(checkpoint, rng, windows=16)
    data = Data(drawn.windows.view(-1, 2 * WINDOW)[:, :-1], drawn.held_out[:, :-1])

    def spied(student, ask, round_of, *given, **options):
        taught.append((ask, round_of))
        return distil.distil(student, ask, round_of, *given, **options)

    monkeypatch.setattr("engine.healing.heal.distil", spied)
    monkeypatch.setattr("engine.healing.heal.avoiding", lambda logits, tokens: -logits)
    rising = iter(range(1, 99))
    monkeypatch.setattr(distil, "perplexity", lambda *_: float(next(rising)))
    record = heal(
        checkpoint, shortened(checkpoint), data, tmp_path / "out",
        replace(SETTINGS, window=2 * WINDOW - 1, steps=2),
        open_writer=lambda _: lambda rows, options: [[7] * options.max_new_tokens for _ in rows],
    )  # fmt: skip
    (ask, second_of) = taught[1]
    own = len(second_of.windows) // 2
    for at, window in enumerate(second_of.windows):
        said, indices = ask(at)
        expected = logits(checkpoint, checkpoint.config, window[None])
        found = bins(-expected if at >= own else expected, indices[None])[0]
        assert_close(str(at), found.exp(), said.exp(), 1e-2)
    assert record.best_step == record.steps == 3


def test_windows_of_an_odd_length(source, rng, tmp_path):
    """Two texts of its own lie in one, so that the text is one token shorter there."""
    checkpoint = source("llama")
    data = draw(checkpoint, rng)
    data = Data(data.windows[:, :-1], data.held_out[:, :-1])
    settings = replace(SETTINGS, window=WINDOW - 1, precision="float32")
    record = heal(
        checkpoint, shortened(checkpoint), data, tmp_path / "odd", settings,
        open_writer=writer, dtype=torch.float32,
    )  # fmt: skip
    assert WINDOW % 2 == 0 and record.steps == 10
    healed = open_checkpoint(tmp_path / "odd")
    found = perplexity(partial(logits, healed, healed.config), data.held_out)
    assert record.perplexity_after == pytest.approx(found, rel=1e-4)  # of whole windows
    assert record.checks[-1] > 1


def test_a_killed_second_round_comes_to_the_same_bits(source, rng, tmp_path):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    given = {"open_writer": writer, "dtype": torch.float32}
    settings = replace(SETTINGS, precision="float32")
    plain = heal(
        checkpoint, config, data, tmp_path / "plain", replace(settings, own=0), dtype=torch.float32
    )
    straight = heal(checkpoint, config, data, tmp_path / "a", settings, **given)
    assert straight.steps == plain.steps + 2 and straight.losses[:8] == plain.losses
    assert straight.perplexity_after == straight.checks[-1]
    first = len(plain.checks)
    assert straight.check_steps[:first] == plain.check_steps and plain.check_steps[-1] == 8
    assert straight.check_steps[first:] == (8, 10) and len(straight.checks) == first + 2
    axes = healing(straight).axes[1]
    assert tuple(axes.lines[0].get_xdata()) == straight.check_steps

    @contextmanager
    def second_killed(label):
        def report(done, total, note=""):
            if label == "steps" and total == 2 and done == 1:
                raise KeyboardInterrupt

        yield report

    with pytest.raises(KeyboardInterrupt):
        heal(checkpoint, config, data, tmp_path / "b", settings, reporting=second_killed, **given)
    assert not (tmp_path / "b").exists()
    resumed = heal(checkpoint, config, data, tmp_path / "b", settings, **given)
    assert resumed.losses == straight.losses and resumed.checks == straight.checks
    assert resumed.check_steps == straight.check_steps
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
