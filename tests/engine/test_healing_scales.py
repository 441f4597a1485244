"""Training of the scales of a packed model: what it wins, what stays, what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support.close import assert_close
from support.healing import WINDOW, draw, killing, kl, logits

from engine.api import load
from engine.architecture.config import Rope
from engine.artifacts import HealRecord
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.packed import read_shard
from engine.healing import distil
from engine.healing.data import perplexity
from engine.healing.heal import _logits, heal
from engine.healing.settings import Settings
from engine.kernels.w4.format import Packed
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.reference.decoder import load_decoder

SETTINGS = Settings(
    ("distil",), train="scales", steps=60, lr=2e-3, window=WINDOW, batch_tokens=96, check_every=6,
    precision="float32", patience=100,
)  # fmt: skip
ROUGH = {
    "symmetric": Recipe("rtn", group=32, head=4),
    "minimum": Recipe("rtn", group=0, scheme="minimum", head=8),
    "zero": Recipe("rtn", group=0, scheme="zero", scale_dtype="bfloat16", head=16),
    "codebook": Recipe("nf4", group=0, scheme="codebook", head=None),
    "v in 8 bits": Recipe("nf4", group=16, scheme="codebook", head=8, v=8),
}


def packed(checkpoint, directory, recipe=ROUGH["symmetric"]):
    pack(checkpoint, checkpoint.config, directory, recipe)
    return open_checkpoint(directory)


def arrays(shard) -> dict[str, torch.Tensor]:
    """What a packed directory's file says, tiles as the arrays that they are."""
    found = {}
    for name, stored in read_shard(shard).items():
        parts = stored.tensors() if isinstance(stored, Packed) else {"values": stored}
        found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return found


@pytest.mark.parametrize(
    "case, scheme",
    [
        ("llama-biased-tied", "symmetric"),
        ("qwen3", "minimum"),
        ("phi3", "zero"),
        ("phi3", "symmetric"),
        ("gemma3", "symmetric"),
        ("phi2", "codebook"),
        ("qwen3", "v in 8 bits"),
    ],
)
def test_it_is_nearer_at_the_same_bytes(case, scheme, source, rng, tmp_path, monkeypatch):
    falling = iter(range(99, 0, -1))  # the last weights are the best
    monkeypatch.setattr(distil, "perplexity", lambda *_: float(next(falling)))
    teacher = source(case)
    data, given, out = draw(teacher, rng), tmp_path / "packed", tmp_path / "out"
    # Judged on what it learns: the scales of a model this small tell little of other windows.
    data = replace(data, held_out=data.windows[:12])
    pupil = packed(teacher, given, ROUGH[scheme])
    record = heal(pupil, pupil.config, data, out, SETTINGS, teacher=teacher)
    assert HealRecord.load(out / "heal.json") == record and record.steps == SETTINGS.steps
    assert not list(tmp_path.glob("out.*")), "expected nothing beside the result"
    changed = set()
    for file in given.iterdir():
        assert file.stat().st_size == (out / file.name).stat().st_size
        if file.suffix == ".safetensors":
            before, after = arrays(file), arrays(out / file.name)
            assert before.keys() == after.keys()
            changed |= {name for name in before if not torch.equal(before[name], after[name])}
        else:
            assert file.read_bytes() == (out / file.name).read_bytes()
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == ({"scales", "mins"} if scheme == "minimum" else {"scales"})
    assert any("down_proj" in name or "fc2" in name for name in changed)
    healed = open_checkpoint(out)
    whole = logits(teacher, teacher.config, data.held_out)
    found = logits(healed, healed.config, data.held_out)
    assert kl(whole, found) < 0.9 * kl(whole, logits(pupil, pupil.config, data.held_out))
    with load(out, backend="reference") as model:
        assert_close("reference", found, model(data.held_out), 1e-5)
    with load(out, backend="cpu", dtype="float32") as model:
        assert_close("cpu", found, model(data.held_out), 1e-3)


def test_the_rounded_scales_are_judged(source, rng, tmp_path):
    """The record's perplexity is that of the directory: in bfloat16 scales lose two digits."""
    teacher = source("llama")
    data = draw(teacher, rng)
    recipe = replace(ROUGH["symmetric"], scale_dtype="bfloat16", head=8)
    pupil = packed(teacher, tmp_path / "packed", recipe)
    settings = replace(SETTINGS, lr=3e-3, steps=8)
    record = heal(pupil, pupil.config, data, tmp_path / "out", settings, teacher=teacher)
    healed = open_checkpoint(tmp_path / "out")
    found = logits(healed, healed.config, data.held_out)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(found, data.held_out[:, 1:].flatten())
    assert record.perplexity_after == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_killed_run_comes_to_the_same_bits(source, rng, tmp_path):
    teacher = source("llama")
    data, pupil = draw(teacher, rng), packed(teacher, tmp_path / "packed")
    settings = replace(SETTINGS, steps=14)
    ways = [pupil, pupil.config, data]
    straight = heal(*ways, tmp_path / "a", settings, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        heal(*ways, tmp_path / "b", settings, teacher=teacher, reporting=killing)
    resumed = heal(*ways, tmp_path / "b", settings, teacher=teacher)
    assert (resumed.losses, resumed.checks) == (straight.losses, straight.checks)
    for file in tmp_path.joinpath("a").glob("*.safetensors"):
        first, second = load_file(file), load_file(tmp_path / "b" / file.name)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_before_and_after_are_the_reference_decoders(source, rng, tmp_path):
    """Whatever the student computes in."""
    teacher = source("llama")
    data, pupil = draw(teacher, rng), packed(teacher, tmp_path / "packed")
    settings = replace(SETTINGS, steps=6, precision="bfloat16")
    record = heal(pupil, pupil.config, data, tmp_path / "out", settings, teacher=teacher)
    healed = open_checkpoint(tmp_path / "out")
    for each, said in ((pupil, record.perplexity_before), (healed, record.perplexity_after)):
        decoder = load_decoder(each, each.config)
        assert said == perplexity(partial(_logits, decoder), data.held_out)


def test_refusals(source, rng, tmp_path):
    teacher = source("llama", num_hidden_layers=6)
    data, out = draw(teacher, rng), tmp_path / "out"
    pupil = packed(teacher, tmp_path / "packed")
    cut = pupil.config.keep([0, 1, 2, 4, 5])
    for sentence, model, config, options in (
        ("expected --teacher, the model before", pupil, pupil.config, {}),
        ("--drop: its layer numbers are the unpruned model's", pupil, cut, {"teacher": teacher}),
        ("expected a packed directory", teacher, teacher.config, {"teacher": pupil}),
    ):
        with pytest.raises(InputError, match=sentence):
            heal(model, config, data, out, SETTINGS, **options)
    assert not list(tmp_path.glob("out*"))
    dim = teacher.config.layers[0].rope.dim
    rope = Rope(10000.0, dim, "divisors", divisors=(1.5,) * (dim // 2))
    layers = [replace(each, rope=rope) for each in pupil.config.layers]
    with pytest.raises(InputError, match="no rule that transformers"):
        heal(pupil, replace(pupil.config, layers=layers), data, out, SETTINGS, teacher=teacher)
