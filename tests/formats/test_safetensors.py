"""Hugging Face directories: safetensors read as stored, and what is wrong told in a sentence."""

import errno
import json
import mmap
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import tiny

from engine.checkpoint import open_checkpoint
from engine.checkpoint.files import ask_for_huge_pages
from engine.checkpoint.safetensors import TYPES, SafetensorsFile
from engine.errors import InputError
from engine.kernels.dtypes import dtype_of

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}
CONFIG |= {"num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 10}
INDEX = "model.safetensors.index.json"


def raw(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file whose header need not be true."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def floats(begin: int, end: int, shape: list[int], **changes) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]} | changes


def write_config(directory, **changes) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.fixture
def sharded(tmp_path):
    """A directory of three shards, and the tensors in them."""
    model = tiny.build("llama", 0)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path, model.state_dict()


def test_every_dtype_is_a_view_of_the_file(tmp_path, rng):
    stored = {
        name: torch.randint(0, 2, (3, 5), generator=rng).to(dtype_of(dtype))
        for name, (dtype, _) in TYPES.items()
    }
    stored |= {"scalar": torch.tensor(7.5), "none": torch.empty(0, 4)}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(stored, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.entries) == set(stored)
    assert all(file.entries[name].nbytes == tensor.nbytes for name, tensor in stored.items())
    for name, tensor in stored.items():
        got = file.read(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(got), as_bytes(tensor))
    storages = {file.read(name).untyped_storage().data_ptr() for name in stored}
    assert len(storages) == 1


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_an_unaligned_tensor_is_copied(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {"pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": floats(1, 9, [2])}
    path.write_bytes(raw(header, b"\0" + struct.pack("<2f", 1.5, -2)))
    assert SafetensorsFile(path).read("x").tolist() == [1.5, -2]


def test_reading_changes_no_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.ones(4)}, path)
    before = path.read_bytes()
    SafetensorsFile(path).read("x").zero_()  # forbidden, but it must not reach the disk
    assert path.read_bytes() == before


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no huge pages to ask for")
def test_huge_pages_are_asked_for(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.ones(4)}, path)
    file = SafetensorsFile(path)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    ours = next(i for i, mapping in enumerate(mappings) if str(path) in mapping)
    assert "hg" in mappings[ours + 1].splitlines()[0].split()
    assert file.read("x").tolist() == [1] * 4


def test_a_system_without_huge_pages():
    class Refusing(mmap.mmap):
        def madvise(self, *call):
            raise OSError(errno.EINVAL, "Invalid argument")

    ask_for_huge_pages(Refusing(-1, 4096))  # goes on


def test_shards(sharded):
    directory, stored = sharded
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.names()) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.nbytes(name) == tensor.nbytes
        assert checkpoint.packed(name) is None
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.nbytes, checkpoint.packed):
        with pytest.raises(InputError, match="no tensor 'absent'"):
            ask("absent")


def test_one_file_of_any_name(sharded):
    directory, stored = sharded
    for file in [*directory.glob("*.safetensors"), directory / INDEX]:
        file.unlink()
    safetensors.torch.save_file(stored, directory / "weights.safetensors")
    assert set(open_checkpoint(directory).names()) == set(stored)


def test_generation_config_says_what_ends_a_text(sharded):
    directory, _ = sharded
    assert open_checkpoint(directory).config.eos_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert open_checkpoint(directory).config.eos_ids == (2, 5)


def double(directory, name):
    """Puts a tensor of the name into a shard that has it not."""
    shards = map(safetensors.torch.load_file, files := sorted(directory.glob("*.safetensors")))
    file, tensors = next(pair for pair in zip(files, shards, strict=True) if name not in pair[1])
    safetensors.torch.save_file(tensors | {name: torch.ones(2)}, file)


def first_shard(directory):
    return sorted(directory.glob("model-*.safetensors"))[0]


def edit_index(directory, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


EMBEDDING = "model.embed_tokens.weight"
DIRECTORIES = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "malformed config": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid"),
    "config of bytes": (lambda d: (d / "config.json").write_bytes(b"\xff{}"), "not valid JSON"),
    "nested config": (lambda d: (d / "config.json").write_text("[" * 100000), "not valid JSON"),
    "listed config": (lambda d: (d / "config.json").write_text("[]"), "JSON object, found list"),
    "architecture": (lambda d: write_config(d, architectures=["Mamba"]), "'Mamba' is not supp"),
    "missing shard": (lambda d: first_shard(d).unlink(), "shard model-00001-.* is missing"),
    "truncated shard": (
        lambda d: first_shard(d).write_bytes(first_shard(d).read_bytes()[:-8]),
        "model-00001-.*tensor '.*truncated",
    ),
    "empty index": (lambda d: (d / INDEX).write_text("{}"), "expected an object 'weight_map'"),
    "shard elsewhere": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(x="../x.safetensors")),
        "tensor 'x': expected a file name",
    ),
    "shard that is no text": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(x=3)),
        "tensor 'x': expected a file name",
    ),
    "tensor in no shard": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(x=i["weight_map"][EMBEDDING])),
        "lacks tensor 'x', which the index names",
    ),
    "tensor in two shards": (
        lambda d: double(d, EMBEDDING),
        f"holds tensor '{EMBEDDING}', which the index says is in model-0000",
    ),
    "no index": (lambda d: (d / INDEX).unlink(), "several safetensors files and no"),
    "generation config": (
        lambda d: (d / "generation_config.json").write_text("nope"),
        "generation_config.json: not valid JSON",
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_what_is_wrong_with_a_directory(case, sharded):
    directory, _ = sharded
    change, words = DIRECTORIES[case]
    change(directory)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(directory)
    assert str(directory) in str(caught.value)


def test_pickles_and_nothing_are_refused(tmp_path):
    write_config(tmp_path)
    with pytest.raises(InputError, match="no safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match=r"pickles \(pytorch_model.bin\) are not read"):
        open_checkpoint(tmp_path)
    shutil.move(tmp_path / "pytorch_model.bin", tmp_path / "model.gguf")
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="no config.json; to open a GGUF.*model.gguf"):
        open_checkpoint(tmp_path)


def test_what_is_neither(tmp_path):
    with pytest.raises(InputError, match="No such file or directory"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="expected a Hugging Face directory or a .gguf file"):
        open_checkpoint(tmp_path / "model.onnx")


ZEROS = bytes(16)
FILES = {
    "empty": (b"", "is empty"),
    "short": (b"\1\2\3", "3 bytes are too few"),
    "long header": (raw({}, length=1000), "claims 1000 bytes of a 10-byte file"),
    "huge header": (raw({}, length=2**64 - 1), "claims 18446744073709551615 bytes"),
    "no JSON": (raw(b"hello"), "header: not valid JSON"),
    "a list": (raw(b"[]"), "expected a JSON object"),
    "nesting": (raw(b"[" * 100000), "not valid JSON"),
    "twice": (
        raw(b'{"x": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "x": 1}'),
        "'x' appears twice",
    ),
    "no object": (raw({"x": 3}), "'x': expected an object"),
    "dtype": (raw({"x": floats(0, 16, [4], dtype="F3")}, ZEROS), "'x': dtype 'F3' is not sup"),
    "no dtype": (raw({"x": {}}, ZEROS), "'x': dtype None is not"),
    "shape": (raw({"x": floats(0, 16, [-4])}, ZEROS), "'x': expected a shape"),
    "shape of reals": (raw({"x": floats(0, 16, [4.0])}, ZEROS), "'x': expected a shape"),
    "shape of truths": (raw({"x": floats(0, 4, [True])}, ZEROS), "'x': expected a shape"),
    "dimensions": (raw({"x": floats(0, 4, [1] * 9)}, ZEROS), "'x': expected a shape of at most"),
    "huge": (raw({"x": floats(0, 16, [2**62] * 8)}, ZEROS), "'x': F32 .* takes [0-9]+ bytes"),
    "offsets": (raw({"x": floats(16, 0, [4])}, ZEROS), "'x': expected data_offsets"),
    "three offsets": (raw({"x": floats(0, 16, [4], data_offsets=[0, 8, 16])}), "data_offsets"),
    "size": (raw({"x": floats(0, 16, [3])}, ZEROS), "'x': F32 .3. takes 12 bytes, .* span 16"),
    "past the end": (raw({"x": floats(0, 32, [8])}, ZEROS), "'x': its data ends .* truncated"),
    "overlap": (
        raw({"x": floats(0, 16, [4]), "y": floats(8, 16, [2])}, ZEROS),
        "'y' overlaps the tensor before",
    ),
    "gap": (raw({"x": floats(8, 16, [2])}, ZEROS), "'x' follows a gap"),
    "rest": (raw({"x": floats(0, 8, [2])}, ZEROS), "8 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_wrong_with_a_file(case, tmp_path):
    data, words = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
