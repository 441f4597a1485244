"""benchmarks/shapes.py: random weights in the shape of a model."""

import pytest
import shapes
import torch
from cases import Model
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from shapes import blocks

from engine.api import load
from engine.export.gguf_file import Place


@pytest.fixture
def ended(default_model, monkeypatch):
    """What `shapes.py Small`, a model of two layers, ends with; arguments follow."""
    monkeypatch.setattr(shapes, "MODELS", {"Small": Model(2, 256, 128, 512)})
    monkeypatch.setattr(shapes, "SHAPES", {"Small": ("Llama", 64, 50_000, False)})
    monkeypatch.setattr(shapes, "FILES", ["Small"])

    def ended(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["shapes.py", "Small", *map(str, arguments)])
        try:
            shapes.main()
        except SystemExit as end:
            return end.code
        return 0

    return ended


def dies_after(count: int, monkeypatch, module, name: str) -> None:
    """`module.name` fails at the call after so many."""
    real, calls = getattr(module, name), iter(range(count + 1))

    def once(*arguments):
        if next(calls) == count:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, name, once)


def test_a_killed_run_goes_on_to_the_same_bits(ended, tmp_path, monkeypatch):
    assert ended(tmp_path / "whole") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_after(4, patch, shapes, "blocks")
        ended(tmp_path / "killed")
    assert ended(tmp_path / "killed") == 0
    whole, killed = (tmp_path / name / "Small.gguf" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_a_directory_of_a_file_that_is_there(ended, tmp_path, monkeypatch, capsys):
    """As after a run that was killed while it packed. Its logits are the file's to the bit."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_after(0, patch, shapes, "pack")
        ended(tmp_path, "--packed")
    file, directory = tmp_path / "Small.gguf", tmp_path / "Small-packed"
    written = file.stat().st_mtime_ns
    capsys.readouterr()
    assert ended(tmp_path, "--packed") == 0
    assert capsys.readouterr().out.split() == [str(file), str(directory)]
    assert file.stat().st_mtime_ns == written
    assert torch.equal(*(load(path, backend="cpu")([[5, 6, 7]]) for path in (file, directory)))
    for arguments, name in ((["--packed"], directory), ([], file)):
        assert ended(tmp_path, *arguments) == 2
        assert f"{name}: exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name, layers, spared", [
    ("Llama-3.2-1B", None, [0, 1, 4, 7, 10, 13, 14, 15]), ("Llama-3-8B", 8, [0, 3, 6, 7]),
])  # fmt: skip
def test_what_has_six_bits_in_a_file_of_q4_k_m(name, layers, spared):
    """As llama.cpp's `use_more_bits` has it; and the head, be it the embedding or not."""
    kinds = {place.name: place.type for place in shapes.places(name, layers, "Q4_K_M")}
    sixes = [f"blk.{layer}.{role}.weight" for layer in spared for role in ("attn_v", "ffn_down")]
    head = "token_embd.weight" if shapes.SHAPES[name][3] else "output.weight"
    assert {part for part, kind in kinds.items() if kind == "Q6_K"} == {head, *sixes}


@pytest.mark.parametrize(("layers", "named"), [(None, ""), (16, ""), (4, "-4-layers")])
def test_a_file_of_fewer_layers_is_named_so(layers, named, tmp_path):
    for name in ("Llama-3.2-1B", "Llama-3.2-1B-Q4_K_M"):
        assert shapes.place_of(name, tmp_path, layers) == tmp_path / f"{name}{named}.gguf"


def test_a_norm_has_a_few_large_weights():
    """As a trained one: they make blocks of its output coarse."""
    norm, bias = (
        shapes.vector(Place(f"blk.0.{name}", "F32", (2048,))).view(torch.float32)
        for name in ("attn_norm.weight", "attn_q.bias")
    )
    assert norm.unique().tolist() == [1, 16] and 0 < (norm > 1).sum() < 20
    assert not bias.any()


@pytest.mark.parametrize(("kind", "codes"), [("Q4_0", 2), ("Q4_K", 16)])
def test_all_codes_are_equally_frequent(kind, codes, rng):
    place = Place("w", kind, (256, 1024))
    data = blocks(place, rng).view(-1, place.tensor.type.nbytes)[:, codes:]
    for nibbles in (data & 15, data >> 4):
        found = nibbles.flatten().bincount(minlength=16) / data.numel()
        assert (found - 1 / 16).abs().max() < 4e-3  # six standard deviations


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_weights_have_no_mean(kind, rng):
    """It would grow from layer to layer until every token has the same logits."""
    place = Place("w", kind, (256, 1024))
    data = blocks(place, rng).view(256, -1).numpy()
    values = dequantize(data, GGMLQuantizationType[kind])
    assert abs(values.mean()) < 0.03 * values.std()
    assert values.std() * 1024**0.5 == pytest.approx(1.04, rel=0.1)
