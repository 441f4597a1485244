"""What callers hand over as prompts, as ids, masks and messages of plain Python."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.errors import InputError
from engine.generation import Prompt

_EXPECTED = "expected text, messages, token ids or what a tokenizer returns"


def as_prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """(prompts as the loop takes them, were they given as several?); InputError for what is none.

    Arrays and tensors become lists of ids; of what a tokenizer returns the padding is left out.
    """
    if isinstance(prompt, Mapping):
        return _unpadded(_input_ids(prompt), prompt.get("attention_mask"))
    if isinstance(prompt, str):
        return [prompt], False
    given = listed(prompt, "prompt")
    if not given and getattr(prompt, "ndim", 0) == 1:  # of ids, where [] is of prompts
        return [given], False
    if not given or not isinstance(given[0], dict | int | float | complex):
        return [each if isinstance(each, str) else _single(each) for each in given], True
    return [_single(given)], False


def as_tokens(input_ids: Any, attention_mask: Any = None) -> torch.Tensor:
    """(B, T) int64 from ids (B, T) or (T,) in any of these forms, -1 where the mask is 0."""
    if isinstance(input_ids, Mapping):
        attention_mask = input_ids.get("attention_mask", attention_mask)
        input_ids = _input_ids(input_ids)
    rows = _rows(listed(input_ids, "input_ids"))
    for row in rows:
        if not all(type(token) is int and 0 <= token < 1 << 31 for token in row):
            raise InputError(f"input_ids: expected whole numbers, none negative, found {row!r:.80}")
    if attention_mask is not None:
        masks = _rows(listed(attention_mask, "attention_mask"))
        rows = [
            [token if real else -1 for token, real in zip(row, mask, strict=True)]
            for row, mask in zip(rows, _checked(masks, rows), strict=True)
        ]
    if len({len(row) for row in rows}) != 1:
        raise InputError("input_ids: expected rows of one length; pad on the left, with a mask")
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def listed(values: Any, what: str) -> list[Any]:
    """A sequence, array or tensor as a list, what arrays it holds too; InputError for another."""
    if isinstance(values, torch.Tensor) and (values.is_meta or values.layout != torch.strided):
        raise InputError(f"{what}: expected a dense tensor with data, found one without")
    if hasattr(values, "tolist") and not isinstance(values, memoryview):
        values = values.tolist()
    if isinstance(values, str | bytes | bytearray | memoryview) or not isinstance(values, Sequence):
        raise InputError(f"{what}: {_EXPECTED}, found {type(values).__name__}")
    return [_plain(each, what) for each in values]


def _plain(value: Any, what: str) -> Any:
    """A number for an array without dimensions, a list for another, and else the value."""
    if not hasattr(value, "tolist"):
        return value
    return listed(value, what) if getattr(value, "ndim", 0) else value.tolist()


def _single(prompt: Any) -> Prompt:
    """Ids or messages."""
    given = listed(prompt, "prompt")
    if not any(isinstance(each, dict) for each in given):
        if not all(type(token) is int for token in given):
            raise InputError(f"prompt: token ids are whole numbers, found {given!r:.80}")
    return given


def _unpadded(ids: list[Any], mask: Any) -> tuple[list[Prompt], bool]:
    """The ids that the mask leaves, of every row."""
    rows = _rows(ids)
    if mask is not None:
        masks = _checked(_rows(listed(mask, "attention_mask")), rows)
        pairs = [zip(row, real, strict=True) for row, real in zip(rows, masks, strict=True)]
        rows = [[token for token, real in pair if real] for pair in pairs]
    return [_single(row) for row in rows], isinstance(ids[0], list | tuple)


def _input_ids(encoding: Mapping[str, Any]) -> list[Any]:
    if "role" in encoding:
        raise InputError("prompt: expected a list of messages, found one message by itself")
    if "input_ids" not in encoding:
        raise InputError(f"prompt: expected 'input_ids', found {', '.join(map(str, encoding))}")
    return listed(encoding["input_ids"], "input_ids")


def _rows(values: list[Any]) -> list[list[Any]]:
    """(B, T), one row where there is one dimension."""
    rows = values if values and isinstance(values[0], list | tuple) else [values]
    if not rows[0] or not all(isinstance(row, list | tuple) for row in rows):
        raise InputError(f"input_ids: expected ids (B, T) or (T,), found {values!r:.80}")
    return [[_plain(each, "input_ids") for each in row] for row in rows]


def _checked(masks: list[list[Any]], rows: list[list[Any]]) -> list[list[Any]]:
    if [len(row) for row in rows] != [len(real) for real in masks]:
        raise InputError("attention_mask: expected as many entries as there are input_ids")
    if not all(real in (0, 1) for mask in masks for real in mask):
        raise InputError("attention_mask: expected zeros and ones")
    return masks
