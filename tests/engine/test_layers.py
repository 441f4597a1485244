"""The grammar of --drop and --keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.architecture.layers import format_layers, kept_layers, parse_layers
from engine.errors import InputError

some_layers = st.integers(1, 100).flatmap(
    lambda total: st.tuples(
        st.just(total), st.sets(st.integers(0, total - 1), min_size=1).map(sorted).map(tuple)
    )
)


def test_numbers_and_inclusive_ranges():
    assert parse_layers("3,7,21-25", 30) == (3, 7, 21, 22, 23, 24, 25)
    assert parse_layers(" 7 , 3-3,0 ", 8) == (0, 3, 7)


@given(some_layers)
def test_format_and_parse_are_inverse(case):
    total, layers = case
    assert parse_layers(format_layers(layers), total) == layers


@given(some_layers)
def test_keep_and_drop_complement_each_other(case):
    total, layers = case
    assert kept_layers(total, keep=layers) == layers
    assert kept_layers(total, keep=format_layers(reversed_pairs(layers))) == layers
    if len(layers) < total:
        kept = kept_layers(total, drop=format_layers(layers))
        assert sorted(kept + layers) == list(range(total))
        assert kept_layers(total, keep=kept) == kept
    assert kept_layers(total) == tuple(range(total))


def reversed_pairs(layers):
    """The order in the text does not matter: the same layers, last first."""
    return layers[::-1]


@given(st.text(alphabet="0123456789,- x٣²\n", max_size=20), st.integers(1, 40))
def test_any_text_gives_layers_or_one_sentence(spec, total):
    try:
        layers = parse_layers(spec, total, "--drop")
    except InputError as error:
        assert "--drop" in str(error) and "\n" not in str(error)
    else:
        assert list(layers) == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < total


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("1,,2", "neither a layer nor a range"),
        ("1,", "neither"),
        ("a", "'a' is neither"),
        ("1.5", "neither"),
        ("-1", "neither"),
        ("1--3", "neither"),
        ("٣", "neither"),
        ("9" * 5000, "neither"),
        ("5-3", "5-3 runs backwards"),
        ("1 -\n0", "1-0 runs backwards"),
        ("10", "layer 10 is out of range; the model has layers 0 to 9"),
        ("3-999999999", "out of range"),
        ("1,1", "layer 1 twice"),
        ("1-4,3", "layer 3 twice"),
    ],
)
def test_bad_text(spec, says):
    with pytest.raises(InputError, match="--drop") as error:
        parse_layers(spec, 10, "--drop")
    assert says in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"drop": "0-9"}, "all 10 layers"),
        ({"drop": "1", "keep": "2"}, "exclude each other"),
        ({"drop": []}, "empty"),
        ({"keep": ()}, "empty"),
        ({"drop": [True]}, "True is not a layer number"),
        ({"drop": ["3"]}, "'3' is not a layer number"),
        ({"drop": 5}, "drop: expected layers such as .*, found 5"),
        ({"keep": [1.5]}, "1.5 is not a layer number"),
        ({"keep": [-1]}, "out of range"),
        ({"keep": [2, 2]}, "twice"),
    ],
)
def test_bad_choice(choice, says):
    with pytest.raises(InputError, match=says):
        kept_layers(10, **choice)


def test_numbers_of_any_kind():
    for numbers in (np.array([3, 1]), torch.tensor([3, 1])):
        kept = kept_layers(5, keep=numbers)
        assert kept == (1, 3) and all(type(layer) is int for layer in kept)
