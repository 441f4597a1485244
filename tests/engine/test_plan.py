"""The rules that choose layers, against brute force on random profiles and scores."""

import itertools
import json
import math
import random
import secrets
from types import SimpleNamespace

import pytest
from support.profiles import make_profile

from engine.artifacts import Plan, Profile
from engine.errors import InputError
from engine.pruning import plan as rules


@pytest.fixture
def draw():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_similarity_is_the_smallest_free_block(draw):
    for _ in range(50):
        total = draw.randint(3, 12)
        profile = make_profile(total, draw)
        count = draw.randint(1, total - 1)
        choice = rules.similarity(profile, count)
        assert choice.score == min(profile.distances[count - 1])
        assert choice.drop == tuple(range(choice.drop[0], choice.drop[0] + count))
        assert not choice.note
        protect = rules.default_protection(total)
        free = [s for s in range(total - count + 1) if protect.isdisjoint(range(s, s + count))]
        if not free:
            with pytest.raises(InputError, match="protect"):
                rules.similarity(profile, count, protect)
            continue
        guarded = rules.similarity(profile, count, protect)
        assert guarded.score == min(profile.distance(s, count) for s in free)
        assert bool(guarded.note) == (guarded.score > choice.score)


def test_simple_keeps_the_last_layer():
    assert rules.simple(32, 8).drop == tuple(range(23, 31))  # range(L - 1 - n, L - 1)
    assert rules.simple(4, 3).drop == (0, 1, 2)


def test_influence_takes_the_least(draw):
    profile = make_profile(9, draw)
    choice = rules.influence(profile, 4, frozenset({0}))
    best = min(itertools.combinations(range(1, 9), 4), key=lambda c: _total(profile, c))
    assert choice.drop == best
    assert choice.score == pytest.approx(_total(profile, best))


def _total(profile: Profile, layers) -> float:
    return sum(profile.influence[layer] for layer in layers)


class Landscape:
    """A score with interactions between layers, which counts how often it is asked."""

    def __init__(self, total: int, rng: random.Random) -> None:
        self.single = [rng.random() for _ in range(total)]
        self.pair = {p: rng.gauss(0, 0.5) for p in itertools.combinations(range(total), 2)}
        self.total, self.calls = total, 0

    def __call__(self, kept: tuple[int, ...]) -> float:
        self.calls += 1
        drop = [layer for layer in range(self.total) if layer not in kept]
        pairs = sum(self.pair[p] for p in itertools.combinations(drop, 2))
        return sum(self.single[layer] for layer in drop) + pairs


def test_greedy_drops_the_best_layer_at_every_step(draw):
    score = Landscape(8, draw)
    seen = []
    choice = rules.greedy(score, 8, 3, frozenset({0}), lambda kept, s: seen.append((kept, s)))
    kept = tuple(range(8))
    for expected, value in seen:
        candidates = [tuple(x for x in kept if x != layer) for layer in kept if layer != 0]
        assert value == min(map(score, candidates)) == score(expected)
        kept = expected
    assert choice.drop == tuple(x for x in range(8) if x not in kept)
    assert choice.score == seen[-1][1]


def test_search_is_seeded_within_its_budget_and_never_worse_than_greedy(draw):
    improved = 0
    for _ in range(20):
        score = Landscape(10, draw)
        start = rules.greedy(score, 10, 4)
        seed = draw.randint(0, 2**31)
        score.calls = 0
        found = rules.search(score, 10, start, seed=seed, evaluations=60)
        assert score.calls <= 60
        assert found.score <= start.score and found.score == pytest.approx(
            score(tuple(x for x in range(10) if x not in found.drop))
        )
        assert len(found.drop) == 4
        again = rules.search(score, 10, start, seed=seed, evaluations=60)
        assert again == found
        improved += found.score < start.score
    assert improved, "the search never found anything better than greedy"


def test_search_respects_protection_and_time(draw):
    score = Landscape(8, draw)
    protect = frozenset({1, 6})
    start = rules.greedy(score, 8, 3, protect)
    found = rules.search(score, 8, start, protect, evaluations=None, seconds=0.2)
    assert not protect & set(found.drop)
    with pytest.raises(InputError, match="budget"):
        rules.search(score, 8, start, evaluations=None)
    for seconds in (-1.0, float("nan")):
        with pytest.raises(InputError, match="seconds: expected a number of at least 0"):
            rules.search(score, 8, start, evaluations=None, seconds=seconds)


def test_a_search_ends_in_time(draw, monkeypatch):
    """Whatever a score takes: none is begun once the time is over."""
    score, clock, heard = Landscape(12, draw), [0.0], []
    start = rules.greedy(score, 12, 5)

    def slow(kept: tuple[int, ...]) -> float:
        clock[0] += 1.0
        return score(kept)

    monkeypatch.setattr(rules, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for seconds in (1.0, 7.5, 20.0):
        score.calls = 0
        heard.clear()
        rules.search(
            slow, 12, start, evaluations=None, seconds=seconds,
            on_score=lambda _, best: heard.append(best),
        )  # fmt: skip
        assert score.calls == 1 + math.ceil(seconds)  # of the start, and then until it is over
        assert heard == sorted(heard, reverse=True), "expected the best so far"


def test_a_search_uses_its_budget(draw):
    score = Landscape(20, draw)
    rules.search(score, 20, rules.Choice(tuple(range(8))), evaluations=600)
    assert score.calls == 600


@pytest.mark.parametrize("count", [4, 5, 6])
def test_a_search_among_few_that_are_free(count, draw):
    """Hardly any other layer can go in the place of one that does."""
    score, protect = Landscape(8, draw), frozenset({0, 7})
    start = rules.Choice(tuple(range(1, 1 + count)))
    found = rules.search(score, 8, start, protect, evaluations=1000)
    kept = ({*range(8)} - {*drop} for drop in itertools.combinations(range(1, 7), count))
    assert found.score == min(score(tuple(sorted(each))) for each in kept)


def test_largest_count(draw):
    profile = make_profile(10, draw)
    limit = 0.5
    count = rules.largest_count(profile, limit, frozenset())
    assert min(profile.distances[count - 1]) <= limit
    assert all(min(row) > limit for row in profile.distances[count:9])
    with pytest.raises(InputError, match="max-distance"):
        rules.largest_count(profile, 1e-9, frozenset())


def test_plan_speaks_of_the_checkpoints_layers(draw):
    """A profile of a model with layers left out: they stay out, and numbers are the original's."""
    profile = make_profile(5, draw, layers=(0, 2, 3, 7, 9), total_layers=10)
    made = rules.plan_from(profile, rules.Choice((1, 3)), "manual", frozenset({0}))
    assert made.keep == (0, 3, 9)
    assert made.drop == (1, 2, 4, 5, 6, 7, 8)
    assert made.protect == (0,)
    assert made.profile == profile.hash


def test_artifacts_go_to_json_and_back(draw, tmp_path):
    profile = make_profile(6, draw)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    raw = json.loads((tmp_path / "profile.json").read_text())
    assert raw["distances"][1][3] == profile.distance(3, 2)
    for count in range(1, 6):
        row = profile.rescaled(count)
        assert min(row) == 0 and max(row) == 1 and row.index(0) == profile.best(count)
    made = rules.plan_from(profile, rules.similarity(profile, 2), "similarity")
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "profile.json"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw | {"version": 99}, "a newer one is needed"),
        (lambda raw: raw | {"version": "1"}, "version: expected a whole number"),
        (lambda raw: raw | {"kind": "plan"}, "expected a profile, found 'plan'"),
        (lambda raw: {k: v for k, v in raw.items() if k != "influence"}, "'influence' is missing"),
        (lambda raw: raw | {"extra": 1}, "'extra' is not known"),
        (lambda raw: raw | {"distances": raw["distances"][1:]}, "expected a triangle"),
        (lambda raw: raw | {"influence": [0.5]}, "influence, magnitude: .*4 layers"),
        (lambda raw: raw | {"magnitude": [float("nan")] * 4}, "expected finite numbers"),
        (lambda raw: [raw], "expected a profile, found 'list'"),
    ],
)
def test_unreadable_profiles(change, sentence, draw, tmp_path):
    path = tmp_path / "profile.json"
    make_profile(4, draw).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=sentence):
        Profile.load(path)


def test_counts_out_of_range(draw):
    profile = make_profile(6, draw)
    for count in (0, -1, 6, 7):
        with pytest.raises(InputError, match="count: expected 1 to 5 of 6"):
            rules.similarity(profile, count)
        with pytest.raises(InputError):
            rules.simple(6, count)
    with pytest.raises(InputError, match="protect or drop fewer"):
        rules.influence(profile, 4, rules.default_protection(6))
    with pytest.raises(InputError, match="block: expected"):
        profile.distance(3, 4)
