"""Streams at the ends of cuts: the teacher's against transformers', and what learning them does."""

from dataclasses import replace

import pytest
import torch
from support.close import assert_close
from support.healing import WINDOW, draw, logits, same_after_a_kill, shortened

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.hf import prune
from engine.healing.heal import heal
from engine.healing.settings import Settings, find_cuts
from engine.healing.streams import Streams, relative_error
from engine.healing.student import Student
from engine.reference.cache import KVCache
from engine.reference.decoder import load_decoder

SETTINGS = Settings(
    ("distil",), steps=14, lr=3e-3, window=WINDOW, batch_tokens=96, check_every=4, residual=1.0
)


def of_teacher(checkpoint, ends, windows, directory, name="text and teacher"):
    return Streams(checkpoint, ends, windows, directory, name, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi2", "olmo2"])
def test_streams_are_transformers_hidden_states(case, source, rng, tmp_path):
    """Of the teacher before layers and at its end, and of the student where its cuts end."""
    import transformers

    checkpoint = source(case)
    total = checkpoint.config.total_layers
    config = checkpoint.config.keep([1, 2])  # cuts at the beginning and at the end
    ends = [cut.stop for cut in find_cuts(config)]
    assert ends == [1, total]
    windows = draw(checkpoint, rng).windows
    prune(checkpoint, checkpoint.config, tmp_path / "whole", dtype=torch.float32)
    prune(checkpoint, config, tmp_path / "pruned", dtype=torch.float32)
    streams = of_teacher(checkpoint, ends, windows, tmp_path)
    student = Student(tmp_path / "pruned", config, replace(SETTINGS, precision="float32"), "cpu")
    with torch.no_grad():
        student.logits(windows[:5])
        student.logits(windows[5:7])
    found = torch.stack([streams(5), streams(6)], 1)
    for name, of_ours, kept, slots in (
        ("teacher", found.to(torch.bfloat16).float(), "whole", ends),
        ("student", torch.stack(student.streams), "pruned", [0, 2]),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / kept, dtype=torch.float32
        ).eval()
        states = entering(model, windows[5:7])
        expected = torch.stack([states[slot] for slot in slots])
        assert_close(name, expected, of_ours, 3e-3 if name == "teacher" else 1e-5)


@torch.no_grad()
def entering(model, tokens) -> list[torch.Tensor]:
    """What every layer of transformers' model is given, and the final norm."""
    base, found = model.get_decoder(), []
    norm = getattr(base, "norm", None) or base.final_layernorm
    for module in (*base.layers, norm):
        module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    model(tokens, use_cache=False)
    return found


def test_a_window_is_asked_once_ever(source, rng, tmp_path, monkeypatch):
    checkpoint = source("llama")
    windows, asked = draw(checkpoint, rng).windows, []
    first = of_teacher(checkpoint, [2], windows, tmp_path)
    expected = first(3)
    second = of_teacher(checkpoint, [2], windows, tmp_path)
    monkeypatch.setattr(second.decoder, "forward", lambda *a, **b: asked.append(a))
    assert torch.equal(second(3), expected) and not asked
    second(4)
    assert len(asked) == 1
    other = of_teacher(checkpoint, [2], windows, tmp_path, "another text")
    assert not other.done.any() and first.done.tolist()[:5] == [0, 0, 0, 1, 1]
    halves = of_teacher(checkpoint, [2], windows.reshape(-1, WINDOW // 2), tmp_path)
    assert not halves.done.any(), "the same text in shorter windows was taken for the same"


def test_the_error_is_relative_to_every_token(rng):
    expected = torch.randn(2, 3, 5, 7, generator=rng) * torch.rand(2, 3, 5, 1, generator=rng) * 100
    found = expected + torch.randn(expected.shape, generator=rng)
    by_token = [
        float(((f.double() - e.double()) ** 2).sum() / (e.double() ** 2).sum())
        for f, e in zip(found.view(-1, 7), expected.view(-1, 7), strict=True)
    ]
    assert_close("error", torch.tensor(by_token).mean(), relative_error(found, expected), 1e-5)
    assert float(relative_error(expected, expected)) == 0


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_what_has_learnt_them_is_nearer_to_them(case, source, rng, tmp_path):
    checkpoint = source(case)
    config = shortened(checkpoint)
    # With 48 windows, seen three times, 2 of 20 gemma3 missed the bound (0.90 and 0.96); with 180
    # all of 17 had 0.77 to 0.83.
    data = draw(checkpoint, rng, windows=180, held_out=48)
    (cut,) = find_cuts(config)
    strays = []
    for weight in (0.0, 30.0):
        out = tmp_path / str(weight)
        settings = replace(SETTINGS, steps=40, lr=3e-3, residual=weight, patience=100)
        heal(checkpoint, config, data, out, settings, dtype=torch.float32)
        healed = open_checkpoint(out)
        wanted = stream(checkpoint, cut.stop, data.held_out)
        strays.append(float(relative_error(stream(healed, cut.start, data.held_out), wanted)))
    assert strays[1] < 0.9 * strays[0]


def stream(checkpoint, boundary, tokens) -> torch.Tensor:
    """(B, W, D) before a layer."""
    found = {}
    decoder = load_decoder(checkpoint, checkpoint.config)
    decoder.forward(tokens, KVCache(checkpoint.config, len(tokens)), tap=found.__setitem__)
    return found[boundary]


def test_a_killed_run_comes_to_the_same_bits(source, rng, tmp_path):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    settings = replace(SETTINGS, methods=("linear", "distil"))
    straight = same_after_a_kill(checkpoint, config, data, tmp_path, settings)
    without = heal(checkpoint, config, data, tmp_path / "c", replace(settings, residual=0.0))
    assert without.losses[0] < straight.losses[0]


def test_a_named_teacher_leaves_no_cut(source, rng, tmp_path):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    prune(checkpoint, config, tmp_path / "pruned", dtype=torch.float32)
    pupil = open_checkpoint(tmp_path / "pruned")
    with pytest.raises(InputError, match="--residual: its layer numbers are the unpruned"):
        heal(pupil, pupil.config, data, tmp_path / "out", SETTINGS, teacher=checkpoint)
    assert logits(pupil, pupil.config, data.held_out).isfinite().all()
