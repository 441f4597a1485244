"""What the default model loses on the C++ decoder: perplexity and greedy text, beside the exact
mode, the reference and llama.cpp."""

import math

import pytest
import torch
from speculation import PROMPTS as DRAFTED
from speculation import others, told
from support.close import assert_close, rms_ratio

from engine.api import load
from engine.benchmark.peers.process import Peer, PeerMissing, work_of
from engine.evaluate import cut_windows, evaluate
from engine.kernels import native
from engine.kernels.w4.cpu import isas
from engine.text import heldout_text

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

WINDOW = 512
PROMPTS = ["The old man looked at the sea and", "def quicksort(numbers):", "In 1905, Einstein"]
MODES = {  # options of load, and the RMS ratio to the reference's logits that they may reach
    "int8, float16": ({}, 3e-2),
    "int8, int8": ({"cache_dtype": "int8"}, 4e-2),
    "exact, float32": ({"dtype": "float32"}, 1e-4),
}


@pytest.fixture(scope="module")
def models(default_model):
    return {name: load(default_model, backend="cpu", **MODES[name][0]) for name in MODES}


@pytest.fixture(scope="module")
@torch.inference_mode()
def greedy(default_model):
    """Of each prompt: its ids, the reference's 128 tokens (128,), their logits (128, V)."""
    reference, found = load(default_model, backend="reference"), []
    for prompt in PROMPTS:
        ids = reference.text.encode(prompt)
        text = reference.generate(prompt, max_new_tokens=128, ignore_eos=True).token_ids
        logits = reference([[*ids, *text[:-1]]])[0, len(ids) - 1 :]
        found.append((torch.tensor([ids]), torch.tensor(text), logits))
    return found


ROUNDED = [  # over four windows alone, keys and values of 8 bits add chance of 0.3 %
    (4, ["int8, float16"]),
    pytest.param(None, ["int8, float16", "int8, int8"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("count", "modes"), ROUNDED)
def test_perplexity_of_rounded_activations(models, count, modes):
    """A few rows at a time, since many are multiplied unrounded; and as `evaluate` runs them."""
    exact = models["exact, float32"]
    windows = cut_windows(exact.text, heldout_text(), WINDOW, count, False, WINDOW)
    expected = evaluate(exact.runtime, exact.text, heldout_text(), count=count).perplexity
    for mode in modes:
        model = models[mode]
        many = evaluate(model.runtime, model.text, heldout_text(), count=count).perplexity
        for rows, found in ((16, perplexity_by(16, model, windows)), (WINDOW, many)):
            print(f"{mode}, {rows} rows: {found:.4f}, {found / expected - 1:+.3%}")
            assert abs(found / expected - 1) < 0.005


def perplexity_by(rows: int, model, windows: torch.Tensor) -> float:
    """Of windows (n, W), each run alone, `rows` tokens a call."""
    nll = 0.0
    for window in windows:
        cache = model.runtime.new_cache(1, WINDOW)
        for tokens, following in zip(window[:-1].split(rows), window[1:].split(rows), strict=True):
            logits = model.runtime.forward(tokens[None], cache, logits="all")[0]
            nll += torch.nn.functional.cross_entropy(logits, following, reduction="sum").item()
    return math.exp(nll / windows[:, 1:].numel())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [(None, None), ("Q4_K_M", 8), ("Q5_K_M", 8), ("Q6_K", 8)]
)
def test_perplexity_beside_llama_cpp(models, tmp_path, peer_python, kind, count):
    """In the bits of its own file, on all of the text, and of files that llama.cpp's quantizer
    makes of it."""
    model = models["int8, float16"]
    windows = cut_windows(model.text, heldout_text(), WINDOW, count, False, WINDOW)
    python = peer_python("llama.cpp")
    try:
        if kind is not None:
            path = tmp_path / f"{kind}.gguf"
            with Peer("llama.cpp", python, work_of("llama.cpp", model, 1, WINDOW)) as peer:
                peer.quantize(path, kind)
            model = load(path, backend="cpu")
        with Peer("llama.cpp", python, work_of("llama.cpp", model, 1, WINDOW)) as peer:
            nll = sum(peer.nll(window) for window in windows.tolist()) / (windows[:, 1:].numel())
    except PeerMissing as missing:
        pytest.skip(f"{missing}, or --peer-python llama.cpp=PATH")
    theirs = torch.tensor(nll).exp()
    text = heldout_text()
    ours = evaluate(model.runtime, model.text, text, window=WINDOW, count=count).perplexity
    print(f"ours {ours:.4f}, llama.cpp's {theirs:.4f}")
    assert abs(ours / theirs - 1) < 0.01


@torch.inference_mode()
@pytest.mark.parametrize("mode", MODES)
def test_greedy_text_of_the_reference(models, greedy, mode):
    """Each token after the reference's own, alone: logits within the stated error, and another
    token only where the reference's first two lie closer than that."""
    runtime, bound = models[mode].runtime, MODES[mode][1]
    for prompt, (ids, text, expected) in zip(PROMPTS, greedy, strict=True):
        cache = runtime.new_cache(1)
        pieces = [ids, *text[None, :-1].split(1, dim=1)]
        got = torch.cat([runtime.forward(piece, cache)[0] for piece in pieces])
        differs = got.argmax(-1) != text
        print(f"{mode}: {rms_ratio(expected, got):.1e}, {int(differs.sum())} of {len(text)} differ")
        assert_close(prompt, expected, got, bound)
        first, second = expected.topk(2).values.unbind(-1)
        error = bound * expected.square().mean(-1).sqrt()
        assert not (differs & (first - second > error)).any()


@pytest.mark.parametrize("isa", [isa for isa in isas() if isa != "generic"])
@pytest.mark.parametrize("name", ["repeats", "edit", "plain"])
def test_drafts_change_a_token_only_at_a_near_tie(default_model, isa, name):
    """Steps of several tokens round otherwise than one of its own: within the stated error."""
    with load(default_model, backend="cpu", isa=isa) as model:
        prompt = model.text.encode(DRAFTED.joinpath(f"{name}.txt").read_text().rstrip("\n"))
        made = model.generate(prompt, max_new_tokens=96, ignore_eos=True, speculate="ngram")
        found = others(model, prompt, made.token_ids)
        print(f"{isa}: {made.timings.accepted} drafts were right, other tokens {told(found)}")
        assert made.timings.accepted > 0 or name == "plain"
        assert max(found, default=0) <= 1
