"""Quantized checkpoints lose layers and nothing else: bytes are copied, what wrote them reads them,
and the logits are those of the pruned dequantized model."""

import json
import re

import gguf
import pytest
import torch
from support import llama_files, tiny
from support.close import assert_close
from support.exported import WIDE, assert_same_matrices, logits, packed_model, write_awq

from engine.checkpoint import open_checkpoint
from engine.checkpoint.gguf_file import GgufFile
from engine.checkpoint.safetensors import SafetensorsCheckpoint
from engine.errors import InputError
from engine.export import copied
from engine.export.formats import export, prune

KEEP = [0, 2, 3]


def bitsandbytes(source, out):
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.path, quantization_config=settings, dtype=torch.float32
    )
    model.save_pretrained(out)


def quantized(kind, source, rng, path):
    """A directory of that kind, of a tiny Llama."""
    out = path / kind
    if kind == "nf4":
        bitsandbytes(source, out)
    elif kind == "awq":
        write_awq(packed_model(source, path / "ours", rng, scheme="zero"), out)
    elif kind == "packed":
        packed_model(source, out, rng, drop=())
    else:
        ours = packed_model(source, path / "ours", rng)
        export(ours, ours.config, out, kind)
    return open_checkpoint(out)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors", "nf4", "packed"])
def test_a_directory_keeps_its_bytes(kind, source, rng, tmp_path):
    checkpoint = quantized(kind, source("llama", **WIDE), rng, tmp_path)
    config, out = checkpoint.config.keep(KEEP), tmp_path / "out"
    copied.prune(checkpoint, config, out, shard_bytes=40_000)
    before, after = SafetensorsCheckpoint(checkpoint.path), SafetensorsCheckpoint(out)
    gone = [name for name in before.names() if ".layers.1." in name]
    assert len(after.names()) == len(before.names()) - len(gone) and gone
    for name in before.names():
        if name not in gone:
            new = re.sub(r"layers\.(\d)", lambda m: f"layers.{KEEP.index(int(m[1]))}", name)
            old, copy = before.read(name), after.read(new)
            assert old.dtype == copy.dtype and torch.equal(old, copy), name
    said = json.loads((out / "config.json").read_text())
    assert said["num_hidden_layers"] == 3 and len(said.get("layer_types", "abc")) == 3
    pruned = open_checkpoint(out)
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=rng)
    assert torch.equal(logits(checkpoint, ids, config), logits(pruned, ids))
    assert len(list(out.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.partial"))
    if kind == "awq":
        assert said["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    with pytest.raises(InputError, match="out: exists already"):
        prune(checkpoint, config, out)
    with pytest.raises(InputError, match="keeps the bits that it has; `engine export --to hf`"):
        prune(checkpoint, config, tmp_path / "other", dtype=torch.float16)


@pytest.mark.parametrize("kind", ["compressed-tensors", "nf4"])
@torch.no_grad()
def test_transformers_opens_what_it_quantized(kind, source, rng, tmp_path):
    import transformers

    # bitsandbytes' product on a CPU takes rows of whole blocks
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    checkpoint = quantized(kind, source("qwen2", **sizes), rng, tmp_path)
    config = checkpoint.config.keep(KEEP)
    prune(checkpoint, config, tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for module in peer.modules():  # bitsandbytes would round to bfloat16 on some processors
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=rng)
    assert_close(kind, logits(checkpoint, ids, config), peer(ids, use_cache=False).logits, 1e-3)


def test_modules_that_a_config_names_are_renumbered():
    names = {f"model.layers.{old}.mlp.up_proj.weight": f"model.layers.{new}.mlp.up_proj.weight"
             for new, old in enumerate(KEEP)}  # fmt: skip
    slots = {layer: slot for slot, layer in enumerate(KEEP)}
    said = {
        "ignore": ["lm_head", *(f"model.layers.{n}.mlp.up_proj" for n in (1, 3)), "re:.*o_proj"],
        "config_groups": {"group_0": {"targets": [r"re:.*layers\.[12]\..*up_proj", "Linear"]}},
        "extra_config": {f"model.layers.{n}.mlp.up_proj": {"bits": n} for n in (1, 2)},
        "dynamic": {r"-:.*\.up_proj": {}},
        "bits": 4,
    }  # fmt: skip
    assert copied.cut(said, slots, names) == {
        "ignore": ["lm_head", "model.layers.2.mlp.up_proj", "re:.*o_proj"],
        "config_groups": {"group_0": {"targets": ["model.layers.1.mlp.up_proj", "Linear"]}},
        "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 2}},
        "dynamic": {r"-:.*\.up_proj": {}},
        "bits": 4,
    }
    with pytest.raises(InputError, match=r"rules for all layers or for modules by name, found '-:"):
        copied.cut({"dynamic": {r"-:.*layers\.2\..*up_proj": {}}}, slots, names)


def test_rules_without_the_word_layers_are_not_of_others_then():
    """As GPTQModel's README has them: by the number between two dots."""
    slots = {layer: slot for slot, layer in enumerate(KEEP)}
    names = {f"model.layers.{old}.mlp.up_proj.qweight": f"model.layers.{new}.mlp.up_proj.qweight"
             for old, new in slots.items()}  # fmt: skip
    for rule in (r"+:.*\.2\..*up.*", r".*\.2\..*up.*", r"-:.*\.\d*[1-2]\..*"):
        with pytest.raises(InputError, match="rules for all layers or for modules by name"):
            copied.cut({"dynamic": {rule: {"bits": 8}}}, slots, names)
    assert copied.cut([r"re:.*\.2\.mlp.*"], slots, names) == ["model.layers.1.mlp.up_proj"]
    of_the_first = {"dynamic": {r"+:.*\.0\..*up.*": {"bits": 8}}, "ignore": [r"re:.*\.0\..*"]}
    assert copied.cut(of_the_first, slots, names) == of_the_first


def test_what_lies_beside_is_renumbered(source, rng, tmp_path):
    """GPTQModel reads it before config.json."""
    checkpoint = quantized("gptq", source("llama", **WIDE), rng, tmp_path)
    path = checkpoint.path / "quantize_config.json"
    rules = {f"model.layers.{layer}.mlp.up_proj": {"bits": 4 + layer} for layer in (1, 2)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dynamic": rules}))
    copied.prune(checkpoint, checkpoint.config.keep(KEEP), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert said["dynamic"] == {"model.layers.1.mlp.up_proj": {"bits": 6}} and said["bits"] == 4


@pytest.mark.parametrize("pattern", ["re:layers.0.(*", "re:layers.0" + "(" * 9999])
def test_a_pattern_that_is_none_is_named(pattern):
    with pytest.raises(InputError, match=r"quantization_config: expected a pattern behind 're:'"):
        copied.cut({"ignore": [pattern]}, {0: 0}, {})


def test_what_lies_beside_keeps_its_bytes(source, rng, tmp_path):
    checkpoint = quantized("awq", source("llama", **WIDE), rng, tmp_path)
    said = b'{"version": "gemm\xff"}'
    (checkpoint.path / "quant_config.json").write_bytes(said)
    copied.prune(checkpoint, checkpoint.config.keep(KEEP), tmp_path / "out")
    assert (tmp_path / "out" / "quant_config.json").read_bytes() == said


def lists(fields, tensors):
    """A second and a third layer, and metadata with an entry a layer."""
    for name, tensor in list(tensors.items()):
        if name.startswith("blk.0."):
            for layer in (1, 2):
                tensors[name.replace("blk.0.", f"blk.{layer}.")] = tensor + layer
    for name in [f"blk.{layer}.ffn_up.weight" for layer in range(3)]:
        kind = gguf.GGMLQuantizationType.Q4_0
        tensors[name] = gguf.quants.quantize(tensors[name], kind), kind
    fields |= {"llama.block_count": 3, "llama.attention.head_count_kv": [1, 1, 1]}
    fields |= {"general.name": "three", "llama.feed_forward_length": [64, 64, 64]}


def test_a_gguf_keeps_its_bytes(tmp_path, rng):
    llama_files.write_tiny(tmp_path / "model.gguf", lists)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    config, out = checkpoint.config.keep([0, 2]), tmp_path / "out.gguf"
    prune(checkpoint, config, out)
    before, after = checkpoint.file, GgufFile(out)
    assert after.metadata["llama.block_count"] == 2
    for key in before.metadata:
        cut = before.metadata[key]
        if key in ("llama.attention.head_count_kv", "llama.feed_forward_length"):
            cut = cut[:2]
        if key != "llama.block_count":
            assert after.metadata[key] == cut and after.metadata.kind(key) == before.metadata.kind(
                key
            )
    reader = gguf.GGUFReader(out)  # the package's own
    old = {tensor.name: tensor for tensor in gguf.GGUFReader(checkpoint.path).tensors}
    assert {t.name for t in reader.tensors} == {n for n in old if not n.startswith("blk.2.")}
    for tensor in reader.tensors:
        same = old[tensor.name.replace("blk.1.", "blk.2.")]
        assert tensor.tensor_type == same.tensor_type and (tensor.data == same.data).all()
    ids = torch.randint(8, (1, 12), generator=rng)
    assert torch.equal(logits(checkpoint, ids, config), logits(open_checkpoint(out), ids))
    with pytest.raises(InputError, match="exists already"):
        prune(checkpoint, config, out)
    with pytest.raises(InputError, match="expected a name that ends in .gguf"):
        prune(checkpoint, config, tmp_path / "directory")


def test_a_killed_run_goes_on_behind_the_last_tensor(tmp_path):
    llama_files.write_tiny(tmp_path / "model.gguf", lists)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    config, out = checkpoint.config.keep([0, 2]), tmp_path / "out.gguf"

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, config, out, progress=kill)
    begun = tmp_path / "out.gguf.partial" / "model.gguf"
    with open(begun, "ab") as file:
        file.write(b"half of the next tensor")
    steps: list[int] = []
    prune(checkpoint, config, out, progress=lambda done, total: steps.append(done))
    assert steps[0] == 8 and sorted(p.name for p in tmp_path.iterdir()) == [
        "model.gguf",
        "out.gguf",
    ]
    prune(checkpoint, config, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("case, keep, sentence", [
    ("gemma3", [0, 2, 4, 5], "windows must follow one period"),
    ("smollm3", [0, 1, 3], "GGUF says every fourth layer has none"),
])  # fmt: skip
def test_layers_that_a_cut_gguf_would_misname_are_refused(case, keep, sentence, tmp_path, rng):
    changes = {"query_pre_attn_scalar": 16, "layer_types": None} if case == "gemma3" else {}
    model = tiny.write(case, tmp_path, int(torch.randint(99, (1,), generator=rng)), **changes)
    llama_files.convert(model, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=sentence):
        prune(checkpoint, checkpoint.config.keep(keep), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    prune(checkpoint, checkpoint.config.keep([0, 1, 2]), tmp_path / "out.gguf")
    cut = open_checkpoint(tmp_path / "out.gguf")
    ids = torch.randint(3, tiny.VOCAB, (1, 20), generator=rng)
    assert torch.equal(logits(checkpoint, ids, checkpoint.config.keep([0, 1, 2])), logits(cut, ids))


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_round_trips(kind, source, rng, tmp_path):
    """Source -> ours -> export -> ours: equal codes and scales."""
    from engine.quantize.packing import pack
    from engine.quantize.recipe import Recipe

    whole = source("llama", **WIDE)
    first = quantized(kind, whole, rng, tmp_path)
    pack(first, first.config, tmp_path / "kept", Recipe(method="keep", head=None))
    kept = open_checkpoint(tmp_path / "kept")
    assert_same_matrices(first, kept)
    to = "compressed-tensors" if kind == "awq" else kind
    export(kept, kept.config, tmp_path / "again", to)
    assert_same_matrices(first, open_checkpoint(tmp_path / "again"))
