"""Prompts of types that are none: one sentence from every entrance."""

import numpy as np
import pytest
import torch
from support import tiny

import engine
from engine.errors import InputError

WRONG = {
    "None": None,
    "an id": 3,
    "a float": 3.5,
    "float ids": [3, 3.7],
    "whole floats": [3, 3.0],
    "a set": {3, 4},
    "bytes": b"abc",
    "a bytearray": bytearray(b"abc"),
    "a view": memoryview(b"abc"),
    "bytes in a list": [b"abc"],
    "truths": [True, False],
    "a float tensor": torch.tensor([3.0, 4.0]),
    "a float array": np.array([3.0, 4.0]),
    "a bool tensor": torch.tensor([True]),
    "objects": np.array(["a", 3], dtype=object),
    "None in a list": [None],
    "no data": torch.empty(3, dtype=torch.int64, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "three dimensions": torch.ones(1, 1, 1, dtype=torch.int64),
    "an empty tensor": torch.ones(0, dtype=torch.int64),
    "an empty array": np.ones(0, dtype=np.int64),
    "a scalar tensor": torch.tensor(3),
    "a generator": (i for i in [3, 4]),
    "no ids": {"input_ids": None},
    "text as ids": {"input_ids": "abc"},
    "a mask that is none": {"input_ids": [3, 4], "attention_mask": 5},
    "a mask of words": {"input_ids": [[3, 4]], "attention_mask": [[1, "x"]]},
    "a short mask": {"input_ids": [3, 4], "attention_mask": [1]},
    "huge": [2**70],
    "complex": [1j],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1)
    tiny.save_tokenizer(path)
    return engine.load(path)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_types(what, model):
    for call in (model.generate, model.__call__, lambda prompt: list(model.stream(prompt))):
        with pytest.raises(InputError):
            call(WRONG[what])


def test_what_a_tokenizer_returns(model):
    ids = torch.tensor([[3, 1, 4], [0, 1, 5]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    batch = model.generate({"input_ids": ids, "attention_mask": mask}, max_new_tokens=3)
    alone = [model.generate(prompt, max_new_tokens=3) for prompt in ([3, 1, 4], (1, 5))]
    assert [each.token_ids for each in batch] == [each.token_ids for each in alone]
    assert model.generate(np.array([3, 1, 4]), max_new_tokens=3).token_ids == alone[0].token_ids
    logits = model({"input_ids": ids, "attention_mask": mask})
    assert torch.allclose(logits[1, 1:], model([1, 5])[0], atol=1e-5)


def test_ids_of_a_call(model):
    ids, mask = [[0, 1, 5]], [[0, 1, 1]]
    assert torch.equal(model({"input_ids": ids}, mask), model(ids, mask))
    for wrong, sentence in (([[-1, 5]], "none negative"), ([[3, 1], [4]], "rows of one length")):
        with pytest.raises(InputError, match=f"input_ids: expected .*{sentence}"):
            model(wrong)
