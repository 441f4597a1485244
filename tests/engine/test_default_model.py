"""The real default model against transformers' own reading of the same GGUF."""

import pytest
import torch
from support.close import assert_close

from engine.api import load
from engine.evaluate import evaluate
from engine.evaluate.choices import encode, log_likelihoods
from engine.text import heldout_text
from engine.text.questions import Question

PERPLEXITY = 30.992  # first 8 windows of the held-out text; transformers in float32 gives the same


@pytest.fixture(scope="module")
def model(default_model):
    return load(default_model, backend="reference")


@pytest.fixture(scope="module")
def peer(default_model):
    import transformers

    directory, name = default_model.parent, default_model.name
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def test_logits_and_perplexity_equal_transformers(model, peer):
    ids = model.text.encode(heldout_text(), add_special=False)
    windows = torch.tensor(ids[: 2 * 512]).view(2, 512)
    nll = 0.0
    for window in windows:
        reference = peer(window[None]).logits
        assert_close("logits on real text", reference, model(window), 1e-3)
        loss = torch.nn.functional.cross_entropy(reference[0, :-1], window[1:], reduction="sum")
        nll += float(loss)
    ours = evaluate(model.runtime, model.text, heldout_text(), count=2)
    assert ours.tokens == 2 * 511
    assert abs(ours.nll - nll / ours.tokens) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_log_likelihoods_of_choices_equal_transformers(backend, model, peer):
    rows = [
        ("What is the capital of France?", ("Paris", "a city by the river Thames", "no")),
        ("Lee wore a jacket because it was cold. Why?", ("Buy some mittens", "Stay warm")),
    ]
    encoded = [encode(model.text, Question(*row, 0, "here")) for row in rows]
    with load(model.path, backend=backend, dtype="float32") as opened:
        found = list(log_likelihoods(opened.runtime, encoded))
    for (question, choices), likelihoods in zip(rows, found, strict=True):
        context = f"Question: {question}\nAnswer:"
        start = len(model.text.encode(context))
        for choice, ours in zip(choices, likelihoods.sums.tolist(), strict=True):
            ids = torch.tensor(model.text.encode(f"{context} {choice}"))
            logits = peer(ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
            expected = logits.gather(-1, ids[start:, None]).sum()
            assert abs(ours - float(expected)) < 1e-3


@torch.no_grad()
def test_greedy_text_equals_transformers(model, peer):
    prompt = "The old man looked at the sea and"
    ids = model.text.encode(prompt)
    expected = peer.generate(
        torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2
    )[0, len(ids) :]
    got = model.generate(prompt, max_new_tokens=64, ignore_eos=True)
    assert list(got.token_ids) == expected.tolist()
    assert "".join(model.stream(prompt, max_new_tokens=64, ignore_eos=True)) == got.text


@pytest.mark.slow
def test_perplexity_of_the_protocol(model):
    found = evaluate(model.runtime, model.text, heldout_text(), count=8).perplexity
    assert abs(found - PERPLEXITY) < 0.01


def test_the_public_surface(model):
    """A string gives one result, a list gives a list, messages go through the template."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    single = model.generate(question, max_new_tokens=12)
    assert "Paris" in single.text and single.finish_reason in ("stop", "length")
    batch = model.generate([question, "Once upon a time"], max_new_tokens=12)
    assert batch[0].token_ids == single.token_ids
    assert model(model.text.encode("Hello")).shape[2] == model.config.vocab_size
    assert model.tokenizer.decode(single.token_ids, skip_special_tokens=True) == single.text


@torch.no_grad()
def test_profile_of_the_handbook_against_transformers(model, peer):
    """All distances, and the best block of every size, from hooked states in float64."""
    from support.profiles import angles, largest_difference

    from engine.checkpoint import open_checkpoint
    from engine.pruning.profile import describe, measure, merge

    ids = model.text.encode(heldout_text(), add_special=False)
    samples = [ids[start : start + 64] for start in range(0, 12 * 64, 64)]
    states = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in peer.model.layers
    ]
    hooks.append(peer.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    peer(torch.tensor(samples), use_cache=False)
    for hook in hooks:
        hook.remove()
    table = angles(torch.stack([state[:, -1] for state in states]).double())

    checkpoint = open_checkpoint(model.path)
    source = describe("default", checkpoint, model.config, samples)
    profile = merge([measure(model.runtime.decoder, samples, source)])
    assert largest_difference(profile, table) < 2e-5
    for count in range(1, len(profile.layers)):
        rivals = [float(table[start, start + count]) for start in range(31 - count)]
        assert rivals[profile.best(count)] - min(rivals) < 2e-5
