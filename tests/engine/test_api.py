"""The surface that `import engine` shows: signatures, prompts of every kind, closing."""

import inspect
import re

import numpy as np
import pytest
import torch
from support import tiny
from support.fake import FakeRuntime, FakeText

import engine
from engine.api import Model
from engine.options import Options

IDS = [5, 6, 7, 8]


@pytest.fixture
def model(rng, tmp_path):
    runtime = FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)))
    made = Model(tmp_path, runtime)
    made.__dict__["text"] = FakeText([chr(ord("a") + i % 26) for i in range(64)])
    return made


@pytest.fixture
def directory(tmp_path):
    tiny.write("llama", tmp_path, 1)
    tiny.save_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("device", ["meta", "mps", "tpu", 1.5])
def test_devices_that_are_none(device, directory):
    with pytest.raises(engine.InputError, match="device: expected one like 'cpu' or 'cuda:0'"):
        engine.load(directory, device=device)


def test_only_public_names_are_shown():
    assert set(dir(engine)) == {*engine.__all__, "__version__"}
    for name in engine.__all__:
        assert getattr(engine, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engine.nothing  # noqa: B018


@pytest.mark.parametrize(
    "function",
    [
        engine.load,
        engine.generate,
        engine.Model.generate,
        engine.Model.stream,
        engine.Model.__call__,
    ],
)
def test_signatures_name_every_option(function):
    parameters = inspect.signature(function).parameters.values()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert all(p.annotation is not p.empty for p in parameters if p.name != "self")
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("function", [engine.generate, engine.Model.generate, engine.Model.stream])
def test_options_have_the_defaults_of_the_loop(function):
    parameters = inspect.signature(function).parameters
    for name in Options.__dataclass_fields__:
        assert parameters[name].default == getattr(Options, name)


def test_generate_takes_the_options_of_load():
    ours, loads = (inspect.signature(f).parameters for f in (engine.generate, engine.load))
    assert all(ours[name].default == loads[name].default for name in loads if name != "progress")


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        np.array(IDS),
        torch.tensor(IDS),
        list(torch.tensor(IDS)),
        {"input_ids": IDS, "attention_mask": [1] * 4},
        {"input_ids": torch.tensor(IDS)},
        {"input_ids": [0, 0, *IDS, 0], "attention_mask": [0, 0, 1, 1, 1, 1, 0]},
    ],
    ids=str,
)
def test_one_prompt_of_ids(prompt, model):
    expected = model.generate(IDS, max_new_tokens=6)
    got = model.generate(prompt, max_new_tokens=6)
    assert (got.token_ids, got.prompt_tokens) == (expected.token_ids, 4)
    assert "".join(model.stream(prompt, max_new_tokens=6)) == expected.text


@pytest.mark.parametrize(
    "prompt",
    [
        [IDS, IDS[:2]],
        [torch.tensor(IDS), np.array(IDS[:2])],
        {
            "input_ids": torch.tensor([IDS, [0, 0, *IDS[:2]]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        },
        {"input_ids": [IDS, [*IDS[:2], 0]], "attention_mask": [[1] * 4, [1, 1, 0]]},
    ],
    ids=str,
)
def test_several_prompts_of_ids(prompt, model):
    expected = [model.generate(ids, max_new_tokens=6).token_ids for ids in (IDS, IDS[:2])]
    assert [each.token_ids for each in model.generate(prompt, max_new_tokens=6)] == expected
    with pytest.raises(engine.InputError, match="stream: expected one prompt"):
        model.stream(prompt)


def test_a_batch_of_one_stays_a_batch(model):
    assert isinstance(model.generate(torch.tensor([IDS]), max_new_tokens=1), list)
    assert isinstance(model.generate({"input_ids": [IDS]}, max_new_tokens=1), list)
    assert isinstance(model.generate(["a"], max_new_tokens=1), list)
    assert model.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"ids": IDS}, "expected 'input_ids', found ids"),
        ({"role": "user", "content": "hi"}, "expected a list of messages, found one message"),
        (7, "expected text, messages, token ids or what a tokenizer returns, found int"),
        ("", "the prompt is empty"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "the prompt is empty"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask: expected"),
        (torch.tensor([1.5, 2.0]), r"token ids are whole numbers, found \[1.5"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "token ids are whole numbers, found"),
    ],
    ids=str,
)
def test_what_is_no_prompt(prompt, sentence, model):
    with pytest.raises(engine.InputError, match=sentence):
        model.generate(prompt)


def test_a_transformers_tokenizer(directory):
    model = engine.load(directory)
    encode = model.tokenizer
    encode.pad_token = "0"
    texts = ["3 14 15 92", "65 35"]
    expected = model.generate(texts, max_new_tokens=4)
    padded = encode(texts, padding=True, return_tensors="pt")
    assert padded["input_ids"].shape == (2, 4)
    for prompts in (padded, encode(texts), encode(texts, padding=True, padding_side="right")):
        got = model.generate(prompts, max_new_tokens=4)
        assert [each.token_ids for each in got] == [each.token_ids for each in expected]
    logits = model(padded)
    assert logits.shape == (2, 4, tiny.VOCAB)
    assert torch.equal(logits, model(padded["input_ids"], padded["attention_mask"]))
    assert torch.allclose(logits[0], model(encode(texts[0]))[0], atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_closing_and_what_a_model_says(backend, directory):
    threads = {"threads": 1} if backend == "cpu" else {}
    with engine.load(directory, drop="1", backend=backend, **threads) as m:
        said = repr(m)
        assert f"{directory.name}: 3 of 4 layers, " in said
        bits = float(re.search(rf"([\d.]+) bits a weight, {backend} \(float32", said)[1])
        assert bits == 32 if backend == "reference" else 32 < bits < 45  # in padded tiles
        assert said.endswith(" threads>") and (backend == "reference" or ", 1 threads" in said)
        assert m.generate([1, 2], max_new_tokens=1).text is not None
    assert repr(m) == f"<Model {directory.name}, closed>"
    m.close()
    with pytest.raises(engine.InputError, match="the model is closed"):
        m.generate([1, 2])
    with pytest.raises(engine.InputError, match="the model is closed"):
        m([1, 2])


def test_one_call(directory):
    model = engine.load(directory, keep="0,2", dtype="float32")
    got = engine.generate("3 14", directory, keep="0,2", dtype="float32", max_new_tokens=3)
    assert got.token_ids == model.generate("3 14", max_new_tokens=3).token_ids


def test_a_program_that_goes_elsewhere_finds_the_text(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    with engine.load(directory.name) as model:
        monkeypatch.chdir("/")
        assert model.text.encode("5 6") == [5, 6]
