"""The commands profile, plan, eval and prune on a tiny model: what they write, say and refuse."""

import itertools
import json
import os
import secrets
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.commands import call, refused

from engine.api import load
from engine.artifacts import Evaluation, Plan, Profile
from engine.checkpoint import open_checkpoint
from engine.pruning.budget import Storage, cost
from engine.pruning.plan import default_protection
from engine.text.samples import read_samples

LAYERS = 8


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A model of 8 layers whose context is 64, text in its vocabulary, and the profile on it."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    root = tmp_path_factory.mktemp("commands")
    tiny.write("llama", root / "model", seed, num_hidden_layers=LAYERS, max_position_embeddings=64)
    tiny.write("llama", root / "wide", seed, num_hidden_layers=LAYERS, intermediate_size=96)
    tiny.write("llama", root / "other", seed + 1, num_hidden_layers=LAYERS)
    for name in ("model", "wide", "other"):
        tiny.save_tokenizer(root / name)
    numbers = torch.randint(3, tiny.VOCAB, (800,), generator=torch.Generator().manual_seed(seed))
    root.joinpath("text.txt").write_text(" ".join(map(str, numbers.tolist())))
    assert call("profile", root / "model", *sampling(root), "--out", root / "profile.json")[0] == 0
    return root


def sampling(root) -> tuple:
    return "--text", root / "text.txt", "--length", 16, "--no-bos"


@pytest.fixture
def planned(tree, tmp_path):
    """Runs `engine plan` with options on the tiny model's profile: (plan, what it printed)."""

    def run(*options, profile=None) -> tuple[Plan, str]:
        profile = profile or tree / "profile.json"
        code, out, err = call("plan", profile, "--out", tmp_path / "plan.json", *options)
        assert (code, err) == (0, "")
        return Plan.load(tmp_path / "plan.json"), out

    return run


def test_profile_is_shown_as_it_was_measured(tree):
    profile = Profile.load(tree / "profile.json")
    assert (profile.samples, profile.length, profile.bos) == (50, 16, False)
    code, out, _ = call("profile", "--show", tree / "profile.json")
    assert code == 0
    table = [line.replace("│", " ").split() for line in out.splitlines() if line[:1] == "│"]
    for count, row in zip(range(1, LAYERS), table, strict=True):
        distances = profile.distances[count - 1]
        start = distances.index(min(distances))
        block = f"{start}-{start + count - 1}" if count > 1 else f"{start}"
        assert row[:3] == [str(count), block, f"{min(distances):.6f}"]
    shown = [list(map(int, line.split())) for line in out.splitlines()[-LAYERS + 1 :]]
    for count, (size, *cells) in enumerate(shown, 1):
        row = profile.distances[count - 1]
        rescaled = [100 * (value - min(row)) / (max(row) - min(row)) for value in row]
        assert size == count and cells == pytest.approx(rescaled, abs=0.51)


def test_a_killed_profile_goes_on_with_the_same_model_alone(tree, tmp_path, monkeypatch):
    noted = []

    def killed(*_, resume, **__):
        noted.append(resume.exists())
        resume.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.pruning.profile.measure", killed)
    for changed in (None, None, "model.safetensors", None, "config.json"):
        if changed:
            os.utime(tree / "model" / changed)
        asked = "profile", tree / "model", *sampling(tree), "--out", tmp_path / "p.json"
        assert call(*asked)[0] == 130
    assert noted == [False, True, False, True, False]


def test_similarity_spares_the_protected_layers_and_says_so(tree, planned):
    profile = Profile.load(tree / "profile.json")
    guarded = default_protection(LAYERS)
    for count in range(1, LAYERS - 2):
        plan, said = planned("--count", count)
        starts = [s for s in range(2, LAYERS - count)]
        best = min(starts, key=lambda s: profile.distance(s, count))
        assert plan.drop == tuple(range(best, best + count))
        assert (plan.rule, plan.protect) == ("similarity", tuple(sorted(guarded)))
        assert plan.profile == profile.hash and plan.text_hash == profile.text_hash
        paper, unguarded = planned("--count", count, "--protect", "none")
        start = profile.best(count)
        assert paper.drop == tuple(range(start, start + count)) and paper.protect == ()
        assert "protection" not in unguarded
        overridden = paper.score < plan.score
        assert overridden == (f"protection overrode the block {start}-" in said)
        assert overridden == bool(plan.note)


def test_a_profile_of_some_layers_speaks_of_the_checkpoints(tree, planned, tmp_path):
    profile = tmp_path / "some.json"
    call("profile", tree / "model", *sampling(tree), "--drop", "2,5", "--out", profile)
    assert Profile.load(profile).layers == (0, 1, 3, 4, 6, 7)
    plan, said = planned("--rule", "manual", "--drop", "4", profile=profile)
    assert plan.keep == (0, 1, 3, 6, 7) and "drop 2,4-5 of 8" in said
    plan, _ = planned("--count", 2, "--protect", "3,7", profile=profile)
    assert plan.protect == (3, 7) and {3, 7} <= set(plan.keep)
    code, _, err = call("plan", profile, "--out", tmp_path / "x", "--count", 2, "--protect", 5)
    assert code == 2 and "layer 5 is not among the profiled layers" in err


@pytest.mark.parametrize("fraction", ["25%", "0.25", " 25.0 %", ".25"])
def test_a_fraction_of_the_layers(fraction, planned):
    assert planned("--fraction", fraction)[0] == planned("--count", 2)[0]


def test_the_most_within_a_distance(tree, planned):
    profile = Profile.load(tree / "profile.json")
    best = [min(profile.distance(s, n) for s in range(2, LAYERS - n)) for n in range(1, LAYERS - 2)]
    for limit in (best[0], sum(best[:2]) / 2, max(best)):
        plan, _ = planned("--max-distance", limit)
        assert len(plan.drop) == max(n for n, value in enumerate(best, 1) if value <= limit)
        assert plan.score <= limit


def test_the_fewest_that_fit_a_memory(tree, planned):
    config = open_checkpoint(tree / "model").config

    def weigh(count: int) -> int:
        kept = config.keep(range(LAYERS - count))
        return cost(kept, Storage(8, 16, 8)).total_weight_bytes

    target = f"{(weigh(2) + weigh(3)) / 2e3:.3f}kB"
    for where in ((), ("--model", tree / "model" / "config.json")):
        plan, _ = planned("--target-memory", target, "--bits", 8, "--group", 16, *where)
        assert len(plan.drop) == 3


@pytest.mark.parametrize("group", [16, 32])
def test_small_groups_carry_a_minimum(group, tree, planned):
    """As quantize's do without --scheme: a scale alone would leave a layer too many."""
    kept = open_checkpoint(tree / "model").config.keep(range(LAYERS - 2))
    whole, less = (cost(kept, Storage(4, group, 8, s)).total_weight_bytes for s in (32, 16))
    for target, count in ((whole, 2), ((whole + less) / 2, 3)):
        plan, _ = planned("--target-memory", f"{target / 1e3:.3f}kB", "--group", group)
        assert len(plan.drop) == count


def test_layers_by_hand_are_the_users_word(planned):
    plan, said = planned("--rule", "manual", "--drop", "0,3-4,7")
    assert (plan.drop, plan.protect, plan.score) == ((0, 3, 4, 7), (), None)
    assert said == "drop 0,3-4,7 of 8\n"
    assert planned("--rule", "manual", "--drop", "3", "--protect", "0")[0].protect == (0,)


def test_simple_and_influence(tree, planned):
    assert planned("--rule", "simple", "--count", 3)[0].drop == (4, 5, 6)
    influence = Profile.load(tree / "profile.json").influence
    least = sorted(range(2, LAYERS - 1), key=influence.__getitem__)[:3]
    assert planned("--rule", "influence", "--count", 3)[0].drop == tuple(sorted(least))


@torch.no_grad()
def test_greedy_and_search_are_wired_to_the_model(tree, planned):
    """The score is the divergence that full and pruned runtimes give on the same windows."""
    model = load(tree / "model", backend="reference")
    samples, _ = read_samples(str(tree / "text.txt"), model.text, 64, count=4, bos=False)
    windows = torch.tensor(samples)

    def divergence(drop) -> float:
        rows = []
        for runtime in (model.runtime, load(tree / "model", drop=drop).runtime):
            logits = runtime.forward(windows, runtime.new_cache(4), logits="all")[:, :-1]
            rows.append(logits.double().log_softmax(-1))
        return float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean())

    scored = ("--text", tree / "text.txt", "--windows", 4)
    one, _ = planned("--rule", "greedy", "--count", 1, *scored)
    alone = {layer: divergence([layer]) for layer in range(2, LAYERS - 1)}
    assert one.score == pytest.approx(min(alone.values()), rel=1e-3)
    assert alone[one.drop[0]] == pytest.approx(min(alone.values()), rel=1e-3)
    greedy, _ = planned("--rule", "greedy", "--count", 2, *scored)
    assert one.drop[0] in greedy.drop and greedy.text_hash != one.profile
    pairs = itertools.combinations(range(2, LAYERS - 1), 2)
    search, said = planned("--rule", "search", "--count", 2, "--evaluations", 40, *scored)
    assert search.score == pytest.approx(divergence(search.drop), rel=1e-3)
    assert min(map(divergence, pairs)) <= search.score * 1.001 <= greedy.score * 1.002
    assert "evaluations, seed 0" in said


def test_a_plan_goes_into_eval_and_prune(tree, planned, tmp_path):
    planned("--count", 3)
    plan = Plan.load(tmp_path / "plan.json")
    text = ("--text", tree / "text.txt", "--window", 32)
    records = []
    for options in ((), ("--plan", tmp_path / "plan.json"), ("--drop", "2")):
        code, out, _ = call("eval", tree / "model", *text, *options)
        records.append(Evaluation.from_json(json.loads(out.splitlines()[-1]), "stdout"))
        assert code == 0 and records[-1].model == str(tree / "model")
    whole, pruned, by_hand = records
    assert [r.layers_kept for r in records] == [8, 5, 7] and whole.layers_total == 8
    assert [r.rule for r in records] == [None, "similarity", None]
    assert by_hand.layers == "0-1,3-7" and len({r.text_hash for r in records}) == 1
    assert (
        call("prune", tree / "model", tmp_path / "shallow", "--plan", tmp_path / "plan.json")[0]
        == 0
    )
    code, out, _ = call("eval", tmp_path / "shallow", *text)
    shallow = Evaluation.from_json(json.loads(out.splitlines()[-1]), "stdout")
    assert shallow.layers_total == len(plan.keep) == 5
    assert shallow.perplexity == pytest.approx(pruned.perplexity, rel=0.02)  # stored in 16 bits


def test_other_weights_are_one_line_of_warning(tree, tmp_path):
    options = ("--rule", "greedy", "--count", 1, "--text", tree / "text.txt", "--windows", 2)
    code, _, err = call(
        "plan", tree / "profile.json", "--out", tmp_path / "p", *options, "--model", tree / "other"
    )
    assert code == 0
    assert err == f"engine: {tree / 'other'}: other weights than the profile's {tree / 'model'}\n"


REFUSALS = [
    (["--count", 0], "count: expected 1 to 7 of 8 layers, found 0"),
    (["--count", -1], "count: expected 1 to 7 of 8 layers, found -1"),
    (["--count", 8], "count: expected 1 to 7 of 8 layers, found 8"),
    (["--count", 8, "--protect", "none"], "count: expected 1 to 7 of 8 layers, found 8"),
    (["--fraction", "90%"], "count: 7 of 8 layers cannot go while 3 are protected"),
    (["--fraction", "100%"], "count: expected 1 to 7 of 8 layers, found 8"),
    (["--fraction", "a quarter"], "fraction: expected one like 25% or 0.25, found 'a quarter'"),
    (["--fraction", "1%"], "count: expected 1 to 7 of 8 layers, found 0"),
    (["--count", 5, "--protect", "3"], "count: no block of 5 layers is free"),
    (["--count", 1, "--protect", "9"], "protect: layer 9 is out of range"),
    (["--max-distance", "0"], "max-distance: expected a number in (0, 1], found 0"),
    (["--max-distance", "nan"], "max-distance: expected a number in (0, 1], found nan"),
    (["--max-distance", "1e-9"], "max-distance: no free block lies within 1e-09"),
    (["--target-memory", "8"], "target-memory: expected a size like 8GB"),
    (["--target-memory", "8GB"], "with all its layers"),
    (["--target-memory", "1kB"], "target-memory: one layer alone takes"),
    (["--target-memory", "1MB", "--model", "{wide}"], "its layers have other shapes"),
    ([], "plan: expected one of --count, --fraction, --target-memory and --max-distance"),
    (["--count", 2, "--fraction", "25%"], "plan: expected one of --count"),
    (["--rule", "best", "--count", 2], "rule: expected one of similarity"),
    (["--rule", "manual"], "rule manual: --rule manual and --drop LAYERS go together"),
    (["--count", 2, "--drop", "3"], "rule similarity: --rule manual and --drop LAYERS go"),
    (["--rule", "manual", "--drop", "3", "--count", 1], "rule manual: --drop says how many"),
    (["--rule", "manual", "--drop", "8"], "drop: layer 8 is out of range"),
    (["--rule", "manual", "--drop", "0-7"], "drop: expected some but not all of the slots 0-7"),
    (["--rule", "manual", "--drop", "3", "--protect", "3"], "drops 3, which --protect keeps"),
    (["--rule", "simple", "--count", 3, "--protect", "5"], "drops 5, which --protect keeps"),
    (["--rule", "greedy", "--count", 1, "--metric", "bleu"], "metric: expected kl or loss"),
    (["--rule", "greedy", "--count", 1, "--model", "{wide}"], "its layers have other shapes"),
    (["--rule", "greedy", "--count", 1, "--windows", 0], "'--windows'"),
    (["--rule", "greedy", "--count", 1, "--windows", 99], "expected 99 samples of 64"),
    (["--rule", "greedy", "--count", 1, "--column", "body"], "column: goes with a .jsonl, .parq"),
    *(
        (["--rule", rule, "--count", 1, f"--{name}", value], f"{name}: goes with --rule {others}")
        for name, value, others, rules in (
            ("text", "{text}", "greedy or search, found --rule", ("similarity", "simple")),
            ("column", "text", "greedy or search, found --rule", ("influence",)),
            ("windows", 8, "greedy or search, found --rule", ("influence", "manual")),
            ("metric", "kl", "greedy or search, found --rule", ("similarity",)),
            ("backend", "cpu", "greedy or search, found --rule", ("similarity",)),
            ("threads", 2, "greedy or search, found --rule", ("simple",)),
            ("seed", 0, "search, found --rule", ("similarity", "greedy")),
            ("evaluations", 200, "search, found --rule", ("influence", "greedy")),
            ("seconds", 9, "search, found --rule", ("simple", "greedy")),
        )
        for rule in rules
    ),
    (["--count", 1, "--model", "{wide}"], "model: goes with --target-memory or --rule greedy"),
    (["--count", 1, "--bits", 4], "bits: goes with --target-memory, found none"),
    (["--count", 1, "--group", 64], "group: goes with --target-memory, found none"),
    (["--target-memory", "1MB", "--bits", 16, "--group", 64], "group: has no effect with --bits"),
    (["--rule", "search", "--count", 1, "--evaluations", 0], "'--evaluations'"),
    (["--rule", "search", "--count", 1, "--seconds", "-1"], "'--seconds'"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSALS)
def test_plan_refuses_in_one_line(options, sentence, tree, tmp_path):
    options = [tree / "wide" if option == "{wide}" else option for option in options]
    if "greedy" in options:
        options += ["--text", tree / "text.txt"]
    refused(sentence, "plan", tree / "profile.json", "--out", tmp_path / "plan.json", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file or directory"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a profile, found 'list'"),
        ({"kind": "plan"}, "expected a profile, found 'plan'"),
        ({"version": 2}, "a profile of version 2; this Shallow reads up to 1, a newer one is"),
        ({"version": True}, "version: expected a whole number, found True"),
        ({"version": "1"}, "version: expected a whole number"),
        ({"layers": "01234567"}, "layers: expected tuple, found '01234567'"),
        ({"layers": [0, 1, 2, 3]}, "influence, magnitude: do not fit 4 layers"),
        ({"layers": [0, 1, 2, 3, 4, 5, 7, 6]}, "layers: expected ascending layers below 8"),
        ({"total_layers": 10**9}, "total_layers: expected 1 to 4096, found 1000000000"),
        ({"layers": [0, 1, 2, 3, 4, 5, 6, "7"]}, "layers: expected int, found '7'"),
        ({"distances": [[0.5]]}, "distances: expected a triangle of 8 rows"),
        ({"standard_errors": [[0.1] * n for n in (8, 7, 6, 5, 4, 3, 2)] + [[-1]]}, "from 0 to 1"),
        ({"influence": [None] * 8}, "influence: expected float, found None"),
        ({"influence": [10**400] * 8}, "influence: expected a number of at most 64 bits"),
        ({"samples": 10**400}, "samples: expected a number of at most 64 bits"),
        ({"text_hash": "\udc80"}, "text_hash: expected text, found half a character in '\\udc80'"),
        ({"samples": True}, "samples: expected int, found True"),
        ({"bos": 0}, "bos: expected bool, found 0"),
        ({"colour": "red"}, "'colour' is not known"),
    ],
)
def test_profiles_that_are_none(content, sentence, tree, tmp_path):
    path = tmp_path / "bad.json"
    if isinstance(content, dict):
        raw = json.loads((tree / "profile.json").read_text())
        content = json.dumps(raw | content)
    if content is not None:
        path.write_text(content)
    refused(sentence, "plan", path, "--count", 1, "--out", tmp_path / "plan.json")
    refused(sentence, "profile", "--show", path)


def test_a_name_in_brackets_is_shown_as_it_is(tree, tmp_path):
    """Which tables would read as their own words for bold or red, or stumble over."""
    raw = json.loads((tree / "profile.json").read_text())
    for name in ("model[v2]", "model[/y]"):
        (tmp_path / "named.json").write_text(json.dumps(raw | {"model": name}))
        code, out, _ = call("profile", "--show", tmp_path / "named.json")
        assert code == 0 and name in out


def test_a_plan_of_another_model(tree, planned, tmp_path):
    planned("--count", 2)
    plan = tmp_path / "plan.json"
    refused("layers have other shapes", "eval", tree / "wide", "--plan", plan)
    refused("layers have other shapes", "prune", tree / "wide", tmp_path / "x", "--plan", plan)
    of_the_model = f"other shapes than those of {tree / 'wide'}"
    refused(of_the_model, "budget", tree / "wide", "--plan", plan)
    for option in ("--drop", "--keep"):
        refused("--plan excludes", "eval", tree / "model", "--plan", plan, option, "3")
    raw = json.loads(plan.read_text())
    plan.write_text(json.dumps(raw | {"version": 9}))
    refused("a plan of version 9", "eval", tree / "model", "--plan", plan)
    plan.write_text(json.dumps(raw | {"keep": [3, 1]}))
    refused("keep: expected ascending layers", "eval", tree / "model", "--plan", plan)
    plan.write_text(json.dumps(raw | {"score": float("nan")}))
    refused("score: expected a finite number", "eval", tree / "model", "--plan", plan)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{model}"], "profile: --out FILE says where the profile goes"),
        (["{model}", "{model}", "--out", "{out}"], "profile: expected one model, found 2"),
        (["{model}", "--out", "/nowhere/p.json"], "there is no directory"),
        (["{model}", "--out", "{out}", "--tokens", "first"], "tokens: expected 'last' or 'all'"),
        (
            ["{model}", "--out", "{out}", "--length", 65],
            "length: 65 tokens exceed the context of 64",
        ),
        (["{model}", "--out", "{out}", "--shard", "2/2"], "shard: expected I/N"),
        (["{model}", "--out", "{out}", "--column", "body"], "column: goes with a .jsonl, .parq"),
        (["{model}", "--out", "{out}", "--split", "test"], "split: goes with a hub source"),
        (["{model}", "--out", "{out}", "--drop", "8"], "drop: layer 8 is out of range"),
        (["{model}", "--out", "{out}", "--report", "r.pdf"], "expected a name that ends in .html"),
        (
            ["{model}", "--out", "{out}", "--report", "r.html", "--shard", "0/2"],
            "give it to --merge",
        ),
        (["--show", "{profile}", "--out", "{out}"], "--show excludes --merge and --out"),
        (["--show", "{profile}", "--samples", 3], "samples: is of a model that is measured"),
        (["--show", "{profile}", "--no-bos"], "bos: is of a model that is measured"),
        (["--merge", "{profile}", "--out", "{out}", "--length", 256], "length: is of a model"),
        (["--merge", "{profile}", "--out", "{out}"], "expected a profile-part, found 'profile'"),
        ([], "Missing argument"),
    ],
)
def test_profile_refuses_in_one_line(arguments, sentence, tree, tmp_path):
    names = SimpleNamespace(
        model=tree / "model", out=tmp_path / "out", profile=tree / "profile.json"
    )
    filled = [str(argument).format(**vars(names)) for argument in arguments]
    text = [] if "--show" in filled or "--merge" in filled else ["--text", tree / "text.txt"]
    refused(sentence, "profile", *filled, *text)


@pytest.fixture(scope="module")
def parts(tree):
    files = [tree / f"part{index}.json" for index in range(2)]
    for index, file in enumerate(files):
        shard = ("--shard", f"{index}/2", "--out", file)
        assert call("profile", tree / "model", *sampling(tree), *shard)[0] == 0
    return files


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": {}}, "source: 'architecture' is missing"),
        ({"source": {"shard": "xx"}}, "source: shard: expected tuple, found 'xx'"),
        ({"source": {"shard": [1]}}, "source: shard: expected i/n with 0 <= i < n, found 1"),
        ({"source": {"shard": [0, 1 << 60]}}, "merge: expected the shards 0 to 11529215046068469"),
        ({"source": {"layers": [1]}}, "state: influence, magnitude: do not fit 1 layers"),
        ({"source": {"text_hash": "x"}}, "merge: the parts come from different models"),
        ({"state": {"boundaries": None}}, "state: not the state of an AngularAccumulator: Type"),
        ({"state": {"boundaries": 10**400}}, "state: "),
        ({"state": {"weight": 1e308}}, "state: "),
        ({"state": {"weight": 0}}, "state: "),
        ({"state": {"samples": 10**6}}, "state: expected one count from 1 to "),
        ({"state": {"samples": "x"}}, "state: not the state of an AngularAccumulator"),
        ({"state": {"sums": [1]}}, "state: not the state of an AngularAccumulator"),
        ({"state": {"sums": {"distance": [[None]]}}}, "state: not the state of an Angular"),
        ({"state": [1]}, "state: expected dict, found [1]"),
        ({"done": -1}, "done, tokens_used: expected at least 0, found -1"),
    ],
)
def test_parts_that_are_none(change, sentence, parts, tmp_path):
    raw = json.loads(parts[0].read_text())
    for field, value in change.items():
        raw[field] = raw[field] | value if isinstance(value, dict) and value else value
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(raw))
    sentence = sentence if sentence.startswith("merge") else f"{damaged}: profile-part: {sentence}"
    refused(sentence, "profile", "--merge", damaged, parts[1], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--v", 8), ("--minimum",), ("--context", 64), ("--head", 4), ("--group", 32)]
)
def test_options_change_the_budget(option):
    lines = [call("budget", "phi-2", *more)[1].splitlines()[-1] for more in ((), option)]
    assert json.loads(lines[0])["after"] != json.loads(lines[1])["after"]


def test_prune_keeps_what_is_named(tree, tmp_path):
    assert call("prune", tree / "model", tmp_path / "out", "--keep", "0,2")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
