"""The perplexity protocol over a fake runtime, against the definition written out."""

import json
import math

import pytest
import torch
from support.fake import FakeRuntime, FakeText

from engine.errors import InputError
from engine.evaluate import cut_windows, evaluate
from engine.evaluate import perplexity as module

VOCABULARY = [chr(i) for i in range(64)]


def fakes(rng, **options):
    return FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)), **options)


def sentence(rng, length: int) -> str:
    return "".join(map(chr, torch.randint(64, (length,), generator=rng).tolist()))


def distributions(runtime, window: list[int]) -> torch.Tensor:
    """(window - 1, V) float64 log probabilities of what follows each position."""
    logits = [runtime.logits(window[: at + 1]) for at in range(len(window) - 1)]
    return torch.stack(logits).double().log_softmax(-1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("positions", [1, 7, 40, 10**6])
def test_equals_the_definition(bos, count, positions, rng, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", positions * 4 * 64)
    monkeypatch.setattr(module, "ROWS", 5)
    runtime, second = fakes(rng), fakes(rng)
    text = FakeText(VOCABULARY, bos_id=9)
    content = sentence(rng, 70)
    result = evaluate(runtime, text, content, window=16, count=count, bos=bos, second=second)

    ids, width = text.encode(content, add_special=False), 15 if bos else 16
    windows = [ids[at : at + width] for at in range(0, 70 - width + 1, width)][:count]
    windows = [[9, *w] if bos else w for w in windows]
    q = torch.cat([distributions(runtime, w) for w in windows])
    p = torch.cat([distributions(second, w) for w in windows])
    targets = torch.tensor([w[1:] for w in windows]).flatten()
    nll = -q.gather(1, targets[:, None]).mean().item()
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert result.top1_agreement == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert (result.windows, result.window, result.bos) == (len(windows), 16, bos)
    assert result.tokens == len(windows) * 15
    assert max(math.prod(shape) for shape, _, _ in runtime.calls) <= max(positions, 1)


def test_no_more_at_once_than_both_runtimes_decode(rng):
    runtime, second, text = fakes(rng), fakes(rng), sentence(rng, 40)
    expected = evaluate(runtime, FakeText(VOCABULARY), text, window=2, second=second)
    second.most_sequences = 6
    runtime.calls.clear()
    found = evaluate(runtime, FakeText(VOCABULARY), text, window=2, second=second)
    assert {shape for shape, _, _ in runtime.calls} == {(6, 1), (2, 1)}
    assert (found.nll, found.kl) == pytest.approx((expected.nll, expected.kl))


def test_windows_run_whole_where_rotations_depend_on_their_length(rng, monkeypatch):
    """LongRoPE, dynamic NTK: however few logits are to be held."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 7 * 4 * 64)
    runtime = fakes(rng)
    runtime.config.whole_prefill = True
    evaluate(runtime, FakeText(VOCABULARY), sentence(rng, 70), window=16)
    assert {shape for shape, _, _ in runtime.calls} == {(1, 15)}


def test_a_model_agrees_with_itself(rng):
    runtime = fakes(rng)
    result = evaluate(runtime, FakeText(VOCABULARY), sentence(rng, 64), window=32, second=runtime)
    assert result.kl == 0 and result.top1_agreement == 1


def test_without_a_second_model_there_is_no_agreement(rng):
    result = evaluate(fakes(rng), FakeText(VOCABULARY), sentence(rng, 64), window=32)
    assert result.kl is None and result.top1_agreement is None
    assert json.loads(json.dumps(result.to_json()))["perplexity"] == result.perplexity


def test_progress_and_slots(rng):
    runtime, second, seen = fakes(rng), fakes(rng), []
    evaluate(
        runtime,
        FakeText(VOCABULARY),
        sentence(rng, 64),
        window=32,
        slots=[1],
        second=second,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (62, 62) and seen == sorted(seen)
    assert {slots and tuple(slots) for _, slots, _ in runtime.calls} == {(1,)}
    assert {slots for _, slots, _ in second.calls} == {None}


def test_perplexity_beyond_float_is_infinite(rng):
    runtime = fakes(rng)
    runtime.table *= 1e5
    result = evaluate(runtime, FakeText(VOCABULARY), sentence(rng, 64), window=32)
    assert result.perplexity == math.inf and math.isfinite(result.nll)


@pytest.mark.parametrize(
    ("length", "options", "says"),
    [
        (31, {}, "the text has 31 tokens; 1 windows of 32 need 32"),
        (64, {"count": 3}, "the text has 64 tokens; 3 windows of 32 need 96"),
        (64, {"count": 0}, "count must be at least 1, not 0"),
        (64, {"window": 1}, "window must be from 2 to the model's context 256, not 1"),
        (64, {"window": 257}, "window must be from 2 to the model's context 256, not 257"),
        (64, {"bos": True}, "no BOS token"),
    ],
)
def test_refusals(length, options, says, rng):
    options = {"window": 32, **options}
    with pytest.raises(InputError, match=says):
        evaluate(fakes(rng), FakeText(VOCABULARY), sentence(rng, length), **options)


def test_a_window_may_fill_the_context(rng):
    content = sentence(rng, 256)
    assert evaluate(fakes(rng), FakeText(VOCABULARY), content, window=256).tokens == 255


def test_models_of_different_vocabularies(rng):
    with pytest.raises(InputError, match="vocabularies of 64 and 32 tokens cannot be compared"):
        evaluate(
            fakes(rng), FakeText(VOCABULARY), sentence(rng, 64), second=fakes(rng, vocab_size=32)
        )


def test_windows_are_consecutive(rng):
    content = sentence(rng, 70)
    windows = cut_windows(FakeText(VOCABULARY), content, 16, None, False, 256)
    assert windows.flatten().tolist() == [ord(c) for c in content[:64]]


@pytest.mark.parametrize("bos", [None, True, False])
def test_bits_a_byte_and_bos_as_the_tokenizer_does(bos, rng):
    content = "\u00e9" + sentence(rng, 69)  # two bytes, one token
    text = FakeText(VOCABULARY, bos_id=9)
    result = evaluate(fakes(rng), text, content, window=17, bos=bos, source="a.txt")
    assert result.bos == (bos is not False) and result.text == "a.txt"
    spanned = 4 * (17 - result.bos)
    bits = result.nll / math.log(2) * spanned / (spanned + 1)
    assert result.bits_per_byte == pytest.approx(bits)
    assert not evaluate(fakes(rng), FakeText(VOCABULARY), content, window=17).bos


def test_bytes_that_tokens_span(default_model):
    from engine.text import load_text

    text, content = (
        load_text(default_model),
        "A na\u00efve \u65e5\u672c\u8a9e \U0001f600 caf\u00e9, twice.\n",
    )
    ids = text.encode(content, add_special=False)
    assert text.span_bytes(content, len(ids)) == len(content.encode())
    spans = [text.span_bytes(content, count + 1) for count in range(len(ids))]
    whole = [len(text.decode(ids[: count + 1]).encode()) for count in range(len(ids))]
    certain = [at for at in range(len(ids)) if "\ufffd" not in text.decode(ids[: at + 1])]
    assert len(certain) > 5 and all(spans[at] == whole[at] for at in certain)
    assert spans == sorted(spans)
