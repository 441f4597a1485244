"""The sampler against transformers' processors, and what must hold for any logits."""

import math
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.options import Options, Sampling
from engine.sample import (
    beyond_top_p,
    draw,
    filter_logits,
    make_generators,
    one_thread,
    penalise,
    sample,
    threads,
)

finite = st.floats(-20, 20, width=32)


@st.composite
def cases(draw):
    """(logits (B, V), Sampling): any filters, with ties among the logits."""
    batch, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    value = finite | st.sampled_from([-1.0, 0.0, 1.0])
    row = st.lists(value, min_size=vocab, max_size=vocab)
    logits = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    return logits, Sampling(
        temperature=draw(st.floats(0.1, 5) | st.sampled_from([1e-6, 1e6])),
        top_k=draw(st.integers(0, 14)),
        top_p=draw(st.floats(0, 1)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(st.integers(0, 2**40)),
    )


def theirs(sampling: Sampling, history: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = [process.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    steps.append(process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(process.MinPLogitsWarper(sampling.min_p))
    return process.LogitsProcessorList(steps)(history, logits)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.0},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.1},
    ],
)
def test_equals_transformers(options, rng):
    sampling = Sampling(**{"temperature": 1.0, **options})
    logits = 4 * torch.randn(5, 1000, generator=rng)
    history = torch.randint(0, 1000, (5, 30), generator=rng)
    before = logits.clone()
    ours = filter_logits(penalise(logits, sampling, history.tolist()), sampling).softmax(-1)
    expected = theirs(sampling, history, logits.clone()).softmax(-1)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
    assert torch.equal(logits, before), "the caller's logits changed"


def test_penalty_applies_to_greedy_choice():
    logits = torch.tensor([[2.0, 1.9, -1.0], [2.0, 1.9, -1.0]])
    ids = sample(logits, Sampling(repetition_penalty=1.5), [[0, 0, 99], []], make_generators(0, 2))
    assert ids.tolist() == [1, 0]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(2, 5000)
    logits[0, 7:] = 1
    assert sample(logits, Sampling(), [[], []], make_generators(None, 2)).tolist() == [7, 0]


@given(cases())
def test_top_k_keeps_k_and_ties(case):
    logits, sampling = case
    kept = filter_logits(logits, Sampling(temperature=1.0, top_k=sampling.top_k)).isfinite()
    k = min(sampling.top_k or logits.shape[1], logits.shape[1])
    for row, mask in zip(logits, kept, strict=True):
        assert torch.equal(mask, row >= row.sort(descending=True).values[k - 1])


@given(cases())
def test_top_p_keeps_the_smallest_set(case):
    logits, sampling = case
    kept = filter_logits(logits, Sampling(temperature=1.0, top_p=sampling.top_p)).isfinite()
    probabilities = logits.double().softmax(-1)
    for row, mask in zip(probabilities, kept, strict=True):
        inside = row[mask]
        assert inside.sum() >= sampling.top_p - 1e-6
        if len(inside) > 1:
            assert inside.sum() - inside.min() < sampling.top_p + 1e-6
        assert mask.all() or row[~mask].max() <= inside.min() + 1e-6


@given(cases())
def test_top_p_is_the_same_by_a_sort_of_all(case):
    """As elsewhere than on a CPU."""
    logits, sampling = case
    outside = beyond_top_p(logits, logits.double().softmax(-1), sampling.top_p)
    kept = filter_logits(logits, Sampling(temperature=1.0, top_p=sampling.top_p)).isfinite()
    assert torch.equal(kept, ~outside | (sampling.top_p == 1))


def test_a_draw_never_waits_for_the_device():
    """No shape and no choice depends on data, which tensors without any have not."""
    logits, uniforms = torch.empty(3, 50, device="meta"), torch.empty(3, device="meta")
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.1)
    assert draw(logits, sampling, uniforms).shape == (3,)


@given(cases())
def test_always_a_token_and_never_a_masked_one(case):
    logits, sampling = case
    kept = filter_logits(logits, sampling).isfinite()
    best = filter_logits(logits, Sampling(temperature=sampling.temperature)).amax(-1)
    assert torch.equal(filter_logits(logits, sampling).amax(-1), best)
    for _ in range(3):
        generators = make_generators(sampling.seed, len(logits))
        ids = sample(logits, sampling, [[]] * len(logits), generators)
        assert kept.gather(1, ids[:, None]).all()


@given(cases())
def test_a_sequence_does_not_depend_on_its_neighbours(case):
    logits, sampling = case
    history = [[row] for row in range(len(logits))]
    together = sample(logits, sampling, history, make_generators(sampling.seed, len(logits)))
    generators = make_generators(sampling.seed, len(logits))
    for row in range(len(logits)):
        alone = slice(row, row + 1)
        ids = sample(logits[alone], sampling, history[alone], generators[alone])
        assert ids.item() == together[row]


def test_seed_reproduces_and_distinguishes(rng):
    logits = torch.randn(4, 500, generator=rng)
    sampling = Sampling(temperature=1.0)

    def draw(seed):
        generators = make_generators(seed, 4)
        return [sample(logits, sampling, [[]] * 4, generators).tolist() for _ in range(8)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    assert draw(3) != draw(3 + 2**32), "only the seed's low bits count"
    first, other = make_generators(1, 12)[11], make_generators(11, 2)[1]
    assert first.random() != other.random(), "sequences of two seeds draw the same numbers"


def test_draws_follow_the_distribution(rng):
    """Pearson's statistic stays under its mean + 6 standard deviations (one in 1e6 or rarer)."""
    draws, vocab = 20_000, 40
    logits = 2 * torch.randn(1, vocab, generator=rng)
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.97)
    expected = filter_logits(logits, sampling)[0].double().softmax(-1) * draws
    generators = make_generators(int(torch.randint(2**31, (1,), generator=rng)), draws)
    ids = sample(logits.expand(draws, vocab), sampling, [[]] * draws, generators)
    found = torch.bincount(ids, minlength=vocab)
    kept = expected > 0
    assert found[~kept].sum() == 0
    statistic = ((found - expected)[kept].square() / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 10


def test_one_generator_walks_through_the_distribution(rng):
    generators = make_generators(int(torch.randint(2**31, (1,), generator=rng)), 1)
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]])
    counts = Counter(
        sample(logits, Sampling(temperature=1.0), [[]], generators).item() for _ in range(4000)
    )
    assert counts[2] == 0
    assert abs(counts[1] / 4000 - 0.75) < 6 * math.sqrt(0.75 * 0.25 / 4000)


@settings(max_examples=50)
@given(st.sampled_from([math.nan, math.inf]), st.sampled_from([0.0, 1.0]))
def test_logits_that_are_not_numbers_are_refused(value, temperature):
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(ArithmeticError, match="not finite"):
        sample(logits, Sampling(temperature=temperature), [[], []], make_generators(0, 2))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", [-0.1, 1e-7, 1e7, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.0, math.nan, "2", True]),
        ("top_p", [-0.1, 1.1, math.nan, "0.5", None]),
        ("min_p", [-0.1, 1.1, math.nan, "0.5", None]),
        ("repetition_penalty", [0, -1.0, 1e-4, 1e4, math.nan, math.inf, None]),
        ("seed", [1.0, "1", math.nan, False]),
    ],
)
def test_values_out_of_range(option, values):
    for value in values:
        with pytest.raises(InputError, match=option) as error:
            Sampling(**{option: value})
        assert repr(value) in str(error.value)


def test_threads_of_a_caller_leave_torch_as_it_was():
    """One that is new while another is inside finds one thread, and must not give that back."""
    before, found = torch.get_num_threads(), []
    inside, leave = threading.Event(), threading.Event()

    def stays():
        with one_thread():
            inside.set()
            leave.wait(30)
        found.append(torch.get_num_threads())

    def comes_and_goes():
        with one_thread():
            assert torch.get_num_threads() == 1
        found.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        first, second = threading.Thread(target=stays), threading.Thread(target=comes_and_goes)
        first.start()
        assert inside.wait(30)
        second.start()
        second.join()
        leave.set()
        first.join()
        assert found == [3, 3] and torch.get_num_threads() == 3
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found[2] == 3
    finally:
        torch.set_num_threads(before)


def test_numbers_of_an_array_library_are_numbers():
    options = Options(
        temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(7), max_new_tokens=np.int32(2)
    )
    assert options == Options(temperature=0.5, top_k=3, seed=7, max_new_tokens=2)
    assert {type(value) for value in (options.top_k, options.seed, options.max_new_tokens)} == {int}
    for wrong in (True, 2.0, np.float64(2), "2", None):
        with pytest.raises(InputError, match="max_new_tokens must be a whole number"):
            Options(max_new_tokens=wrong)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_inside_of_nothing():
    """It has none of the threads that were in there."""
    with one_thread():
        if (child := os.fork()) == 0:
            torch.set_num_threads(3)
            with one_thread():
                pass
            os._exit(0 if torch.get_num_threads() == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_top_p_takes_the_lowest_ids_of_equals():
    kept = filter_logits(torch.zeros(1, 4096), Sampling(temperature=1.0, top_p=0.25))[0].isfinite()
    assert kept[:1024].all() and not kept[1024:].any()


def test_a_new_thread_takes_the_threads_of_torch_while_another_is_inside():
    """Else a model that a service opens beside an answer would run by one for good."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with one_thread():
            for asked in (torch.get_num_threads, threads):
                new = threading.Thread(target=lambda asked=asked: found.append(asked()))
                new.start()
                new.join()
        assert found == [1, 3] and threads() == 3
    finally:
        torch.set_num_threads(before)
