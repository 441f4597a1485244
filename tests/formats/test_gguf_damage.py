"""GGUF files that are damaged, or sound but not what they must be: one sentence each."""

import struct
from functools import partial

import pytest
from support import llama_files
from support.runtimes import HERE

import engine
from engine.checkpoint import open_checkpoint
from engine.errors import InputError


def at(data: bytes, name: str) -> int:
    """Where the bytes after a key or tensor name begin."""
    return data.index(name.encode()) + len(name)


def put(data: bytes, where: int, layout: str, value) -> bytes:
    return data[:where] + struct.pack(layout, value) + data[where + struct.calcsize(layout) :]


NORM = "output_norm.weight"  # u32 dimensions, u64 size, u32 type, u64 offset follow
TOKENS = "tokenizer.ggml.tokens"  # u32 array, u32 string, u64 count, then u64 length + bytes
CONTEXT = b"llama.context_length"  # as long as general.architecture
# What takes the bytes of a sound file to those of a damaged one -> words of the error.
DAMAGES = {
    "empty": (lambda d: b"", "is empty"),
    "not a GGUF": (lambda d: b"GGML" + d[4:], "not a GGUF"),
    "magic only": (lambda d: d[:4], "past the end"),
    "version 1": (lambda d: put(d, 4, "<I", 1), "found version 1"),
    "big-endian": (lambda d: put(d, 4, ">I", 3), "big-endian"),
    "tensor count": (lambda d: put(d, 8, "<Q", 2**40), "claims 1099511627776 tensors"),
    "pair count": (lambda d: put(d, 16, "<Q", 2**63), "metadata pairs"),
    "key length": (lambda d: put(d, 24, "<Q", 2**64 - 1), "past the end"),
    "key text": (lambda d: put(d, 32, "<B", 255), "not UTF-8"),
    "value type": (lambda d: put(d, at(d, "llama.block_count"), "<I", 13), "value type 13"),
    "array type": (lambda d: put(d, at(d, TOKENS) + 4, "<I", 9), "value type 9"),
    "array count": (lambda d: put(d, at(d, TOKENS) + 8, "<Q", 2**33), "items in"),
    "string length": (lambda d: put(d, at(d, TOKENS) + 16, "<Q", 2**63), "past the end"),
    "string text": (lambda d: put(d, at(d, TOKENS) + 24, "<B", 255), "not UTF-8"),
    "dimensions": (lambda d: put(d, at(d, NORM), "<I", 5), "expected 1 to 4 dimensions"),
    "size 0": (lambda d: put(d, at(d, NORM) + 4, "<Q", 0), "does not fit"),
    "size": (lambda d: put(d, at(d, NORM) + 4, "<Q", 2**62), "ends at byte"),
    "tensor type": (lambda d: put(d, at(d, NORM) + 12, "<I", 99), "type 99"),
    "IQ type": (lambda d: put(d, at(d, NORM) + 12, "<I", 23), "type IQ4_XS"),
    "ik's type": (lambda d: put(d, at(d, NORM) + 12, "<I", 144), "type IQ4_KS of ik_llama.cpp is"),
    "Q4_0 of ik's": (lambda d: put(d, at(d, NORM) + 12, "<I", 202), "Q4_0 as ik_llama.cpp inter"),
    "ik's of ik's": (lambda d: put(d, at(d, NORM) + 12, "<I", 339), "IQ4_K as ik_llama.cpp inter"),
    "offset": (lambda d: put(d, at(d, NORM) + 16, "<Q", 2**50), "truncated"),
    "offset of another": (lambda d: put(d, at(d, NORM) + 16, "<Q", 0), "overlaps"),
    "unaligned": (lambda d: put(d, at(d, NORM) + 16, "<Q", 8), "aligned"),
    "same key twice": (lambda d: d.replace(CONTEXT, b"general.architecture"), "appears twice"),
    "same tensor twice": (lambda d: d.replace(b"blk.0.attn_q.w", b"blk.0.attn_k.w"), "twice"),
    "cut in the data": (lambda d: d[:-200], "truncated"),
}

# Every way a file is opened.
OPENED = (open_checkpoint, *(partial(engine.load, backend=backend) for backend in HERE))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence(damage, tmp_path):
    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path)
    change, words = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    for opened in OPENED:
        with pytest.raises(InputError, match=words) as caught:
            opened(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 400


def test_an_embedding_without_a_row_for_every_token(tmp_path):
    def halved(fields, tensors):
        tensors["token_embd.weight"] = tensors["token_embd.weight"][:4]

    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path, halved)
    words = r"model.gguf: tensor 'token_embd.weight': expected a row for each of 8 tokens, found 4"
    for opened in OPENED:
        with pytest.raises(InputError, match=words):
            opened(path)


def test_a_file_cut_anywhere_in_its_header(tmp_path):
    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path)
    whole = path.read_bytes()
    for length in range(1, at(whole, NORM), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.gguf"):
            open_checkpoint(path)


# What edits a sound file's metadata and tensors before they are written -> words of the error.
MISFITS = {
    "architecture": (lambda f, t: f.update({"general.architecture": "mamba"}), "'mamba'.*phi3"),
    "adapter": (lambda f, t: f.update({"general.type": "adapter"}), "a model, .* type 'adapter'"),
    "parts": (lambda f, t: f.update({"split.count": 3}), "one of 3 parts"),
    "no heads": (lambda f, t: f.pop("llama.attention.head_count"), "attention.head_count: expect"),
    "heads": (lambda f, t: f.update({"llama.attention.head_count": 7}), "do not divide"),
    "text for a number": (lambda f, t: f.update({"llama.block_count": "1"}), "block_count: expect"),
    "more layers": (lambda f, t: f.update({"llama.block_count": 2**31}), "2147483648 layers"),
    "fewer layers": (
        lambda f, t: t.update({"blk.1.attn_norm.weight": t["output_norm.weight"]}),
        "metadata says 1 layers, but it has tensors of 2",
    ),
    "no embedding": (lambda f, t: t.pop("token_embd.weight"), "no tensor 'token_embd.weight'"),
    "experts": (
        lambda f, t: t.update({"blk.0.ffn_gate_inp.weight": t["blk.0.ffn_gate.weight"]}),
        "'blk.0.ffn_gate_inp.weight': a llama model has no such tensor",
    ),
    "a bias": (
        lambda f, t: t.update({"blk.0.attn_q.bias": t["output_norm.weight"]}),
        "'blk.0.attn_q.bias': this llama model has no such bias",
    ),
    "a bias of the head": (
        lambda f, t: t.update({"output.bias": t["output_norm.weight"][:8]}),
        "'output.bias': this llama model has no such bias",
    ),
    "a bias of the last norm": (
        lambda f, t: t.update({"output_norm.bias": t["output_norm.weight"]}),
        "'output_norm.bias': this llama model has no such bias",
    ),
    "a bias of the embedding": (
        lambda f, t: t.update({"token_embd.bias": t["output_norm.weight"]}),
        "'token_embd.bias': this llama model has no such bias",
    ),
    "a bias of q, k and v": (
        lambda f, t: t.update({"blk.0.attn_qkv.bias": t["blk.0.ffn_gate.weight"][:, 0]}),
        "'blk.0.attn_qkv.bias': this llama model has no such bias",
    ),
    "q, k and v in one beside them": (
        lambda f, t: t.update({"blk.0.attn_qkv.weight": t["blk.0.ffn_gate.weight"]}),
        "two tensors stand for 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "not causal": (
        lambda f, t: f.update({"llama.attention.causal": False}),
        "llama.attention.causal: expected true",
    ),
    "scaling": (lambda f, t: f.update({"llama.rope.scaling.type": "new"}), "scaling.type: expect"),
    "alignment": (lambda f, t: f.update({"general.alignment": 24}), "power of two"),
    "value length": (lambda f, t: f.update({"llama.attention.value_length": 8}), "values of diff"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_one_sentence(misfit, tmp_path):
    path = tmp_path / "model.gguf"
    change, words = MISFITS[misfit]
    llama_files.write_tiny(path, change)
    for opened in OPENED:
        with pytest.raises(InputError, match=words) as caught:
            opened(path)
        assert str(path) in str(caught.value)
