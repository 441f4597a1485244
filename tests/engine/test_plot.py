"""Figures show what the artefacts hold; files decode, repeat byte for byte, need nothing else."""

import html.parser
import json
import os
import random
import re
import secrets
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from support.commands import call, refused
from support.profiles import make_profile

from engine.artifacts import Evaluation, Plan
from engine.judgement import Judgement
from engine.pruning import budget as costs
from engine.pruning.budget import Storage, built_in
from engine.report import figures, plot
from engine.report import page as report

RECORD = Evaluation(
    model="hub/small", layers="0-29", layers_kept=30, layers_total=30, rule=None, perplexity=30.0,
    nll=3.4, tokens=511, windows=1, window=512, bos=False, text_hash="t", kl=None,
    top1_agreement=None,
)  # fmt: skip


@pytest.fixture
def draw():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def profile(draw):
    total = draw.randint(3, 40)
    layers = sorted(draw.sample(range(2 * total), total))
    return make_profile(total, draw, total_layers=2 * total, layers=tuple(layers))


@pytest.fixture
def evaluations(draw):
    """Two rules that drop 1, 3 and 8 layers, one list of layers by hand, and the whole model."""
    rules = [(rule, count) for rule in ("similarity", "greedy") for count in (1, 3, 8)]
    dropped = [
        replace(RECORD, rule=rule, layers_kept=30 - count, perplexity=30 + 300 * draw.random())
        for rule, count in [*rules, (None, 2)]
    ]
    return draw.sample([RECORD, *dropped], 8)


@pytest.fixture
def budget():
    config = built_in("llama-3-8b")
    return costs.budget("llama-3-8b", config, config.keep(range(24)), Storage(4, 64), 4096)


def test_the_heat_map_is_the_rescaled_triangle(profile):
    total = len(profile.layers)
    axes = figures.heat_map(profile).axes[0]
    grid = axes.collections[0].get_array()
    assert grid.shape == (total - 1, total)
    for count in range(1, total):
        row = np.array(profile.distances[count - 1])
        expected = (row - row.min()) / (row.max() - row.min())
        assert np.allclose(grid[count - 1, : len(row)].data, expected, atol=1e-12)
        assert not grid.mask[count - 1, : len(row)].any() and grid.mask[count - 1, len(row) :].all()
    best, sizes = axes.lines[0].get_data()
    assert list(sizes) == list(range(1, total))
    assert list(best) == [int(np.argmin(profile.distances[size - 1])) for size in sizes]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, total - 0.5), (0.5, total - 0.5))
    labels_are_layers(axes, profile)


def test_samples_that_are_shorter_than_the_longest_are_said(profile):
    for draw in (figures.heat_map, figures.curves):
        title = draw(replace(profile, tokens_used=39)).axes[0].get_title(loc="left")
        assert "4 samples of up to 10 tokens" in title


def labels_are_layers(axes, profile):
    ticks = [
        (int(t), label.get_text())
        for t, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    ]
    assert ticks and ticks[0][0] == 0
    assert all(text == str(profile.layers[slot]) for slot, text in ticks)
    assert "4 samples of 10 tokens, last token, no BOS" in axes.get_title(loc="left")


def test_there_is_a_curve_of_every_size(profile):
    total = len(profile.layers)
    axes = figures.curves(profile).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    bands = [band for band in axes.collections if band.get_paths() and len(band.get_paths()[0])]
    for count in range(1, total):
        starts, row = lines[str(count)].get_data()
        assert list(starts) == list(range(total - count + 1))
        assert np.array_equal(row, profile.distances[count - 1])
    named = [text for text in axes.texts]
    assert len(named) == len(bands) <= 8
    for text, band in zip(named, bands, strict=True):
        count = int(re.search(r"\d+", text.get_text())[0])
        assert text.xy == (total - count, profile.distances[count - 1][-1])
        row, error = (np.array(v[count - 1]) for v in (profile.distances, profile.standard_errors))
        points = band.get_paths()[0].vertices
        for start in range(total - count + 1):
            edges = points[points[:, 0] == start, 1]
            assert edges.min() == pytest.approx(row[start] - error[start])
            assert edges.max() == pytest.approx(row[start] + error[start])
    labels_are_layers(axes, profile)


def test_quality_has_a_line_for_each_rule(evaluations):
    axes = figures.quality(evaluations).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"all layers", "greedy", "similarity", figures.MANUAL}
    assert set(lines["all layers"].get_ydata()) == {30.0}
    for rule in ("greedy", "similarity", None):
        points = {30 - e.layers_kept: e.perplexity for e in evaluations if e.rule == rule}
        x, y = lines[rule or figures.MANUAL].get_data()
        assert list(x) == sorted({0, *points}) and list(y) == [({0: 30.0} | points)[n] for n in x]
    assert lines[figures.MANUAL].get_linestyle() == "None"  # points: one is not the next's parent


def test_models_are_told_apart(evaluations):
    others = [replace(e, model="hub/other") for e in evaluations]
    axes = figures.quality(evaluations + others).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert len(set(labels)) == 8 and "other, greedy" in labels and "small, all layers" in labels
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines[2:]}
    assert len(styles) == 6


def test_the_bars_add_up(budget):
    memory, work = figures.bars(budget).axes
    sides = budget.before, budget.after
    for axes, totals in (
        (memory, [side["total_weight_bytes"] + side["kv_bytes"] for side in sides]),
        (work, [side["flops_per_token"] for side in sides]),
    ):
        widths = [[patch.get_width() for patch in bar] for bar in axes.containers]
        assert np.allclose(np.sum(widths, axis=0), np.array(totals) / 1e9)
        starts = [[patch.get_x() for patch in bar] for bar in axes.containers]
        assert np.allclose(np.cumsum(widths, axis=0)[:-1], starts[1:])
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in memory.containers}
    for part in costs.PARTS:
        expected = [side["weight_bytes"][part] / 1e9 for side in sides]
        assert bars[figures.PARTS[part][0]] == pytest.approx(expected)


@pytest.mark.parametrize("total", [2, 3, 80])
def test_any_number_of_layers(total, draw, tmp_path):
    profile = make_profile(total, draw)
    for name in ("heatmap", "curves"):
        plot.save(plot.draw([profile], name), tmp_path / "figure.png")
        assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05


@pytest.fixture
def files(profile, evaluations, budget, tmp_path):
    """Every artefact in a file; figure name -> the files it is drawn from."""
    paths = [tmp_path / f"evaluation{index}.json" for index in range(len(evaluations))]
    for evaluation, path in zip(evaluations, paths, strict=True):
        evaluation.save(path)
    profile.save(tmp_path / "profile.json")
    budget.save(tmp_path / "budget.json")
    one = {"heatmap": [tmp_path / "profile.json"], "curves": [tmp_path / "profile.json"]}
    return one | {"quality": paths, "budget": [tmp_path / "budget.json"]}


@pytest.mark.parametrize("kind", plot.FIGURES)
def test_files_decode_and_repeat(kind, files, tmp_path):
    settings = dict(matplotlib.rcParams)
    for suffix in (".png", ".svg"):
        out, again = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
        assert call("plot", *files[kind], "--kind", kind, "--out", out) == (0, "", "")
        assert call("plot", *files[kind], "--kind", kind, "--out", again)[0] == 0
        assert out.read_bytes() == again.read_bytes()
    pixels = matplotlib.image.imread(tmp_path / "one.png")
    assert pixels.shape[1] == round(5.6 * plot.DPI) and pixels[..., :3].std() > 0.05
    svg = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and svg.get("width") == "403.2pt"
    assert "date" not in (tmp_path / "one.svg").read_text().lower()
    assert dict(matplotlib.rcParams) == settings
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_process_and_its_settings_do_not_matter(files, tmp_path):
    tmp_path.joinpath("matplotlibrc").write_text("font.size: 30\nsvg.fonttype: none\n")
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7"}
    made = []
    for name in ("here", "there"):
        out = tmp_path / f"{name}.svg"
        call_ = [sys.executable, "-m", "engine.cli", "plot", *files["quality"], "--out", out]
        if name == "there":
            subprocess.run(call_, check=True, env=environment)
        else:
            call("plot", *files["quality"], "--out", out)
        made.append(out.read_bytes())
    assert made[0] == made[1]


class Page(html.parser.HTMLParser):
    """Checks that elements nest; gathers ids, references, texts and names of elements."""

    EMPTY = ("meta",)

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open, self.seen, self.ids, self.references, self.text = [], [], [], [], []
        self.links, self.labels = [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href", "src"):
                self.links.append(value)
            elif name == "aria-label":
                self.labels.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)


def test_the_report_holds_everything_and_needs_nothing(
    files, profile, evaluations, budget, tmp_path
):
    out = tmp_path / "out.html"
    given = [*files["heatmap"], *files["quality"], *files["budget"]]
    assert call("profile", "--show", *given, "--report", out)[0] == 0
    content = out.read_text(encoding="utf-8")
    page = Page(content)
    assert page.seen.count("svg") == 4 and len(page.labels) == 4
    assert {*page.seen}.isdisjoint({"script", "link", "img", "iframe", "object", "a", "image"})
    assert all(link.startswith("#") for link in page.links + page.references)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links + page.references} <= set(page.ids)
    assert not re.findall(r"@import|https?://(?!www\.w3\.org/)", content)
    text = " ".join(page.text)
    for count in range(1, len(profile.layers)):
        assert f"{min(profile.distances[count - 1]):.6f}" in text
    assert all(f"{e.perplexity:,.4f}" in text for e in evaluations)
    assert f"{budget.before['total_parameters']:,}" in text
    assert call("plot", *given, "--out", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == content


def test_a_report_of_what_has_no_figure(draw):
    page = Page(report.page([make_profile(1, draw), RECORD]))
    assert "svg" not in page.seen and "influence" in page.text and "small" in page.text


def test_judgements_stand_beside_each_other_on_the_page(tmp_path):
    whole = Judgement.of({"a.txt": RECORD, "b.txt": replace(RECORD, text_hash="u")})
    dropped = {name: replace(e, perplexity=45.0) for name, e in whole.texts.items()}
    paths = [tmp_path / "whole.json", tmp_path / "dropped.json"]
    for judgement, path in zip((whole, Judgement.of(dropped)), paths, strict=True):
        judgement.save(path)
    assert call("plot", *paths, "--out", tmp_path / "page.html")[0] == 0
    page = Page((tmp_path / "page.html").read_text())
    assert "svg" not in page.seen
    assert page.text.count("45.0000 (1.500x)") == 2 and "b.txt: perplexity" in page.text


def test_names_are_text(profile, evaluations, budget):
    name = 'a/<b>$x_1$ & "two" --> \n $\\frac'
    artefacts = [replace(profile, model=name), replace(budget, model=name)]
    artefacts += [replace(e, model=name, rule=e.rule and f"{e.rule}$<i>") for e in evaluations]
    page = Page(report.page(artefacts))
    assert {"b", "i", "two"}.isdisjoint(page.seen) and page.seen.count("svg") == 4
    assert name.split()[0] in " ".join(page.text)
    for artefact in artefacts[:2]:
        ElementTree.fromstring(plot.svg(plot.draw([artefact])))


def test_profile_writes_its_report(draw, tmp_path):
    """A measured profile ends in the same page as its file does."""
    from support import tiny

    model, text = tmp_path / "model", tmp_path / "text.txt"
    tiny.write("llama", model, 1)
    tiny.save_tokenizer(model)
    text.write_text(" ".join(str(draw.randrange(3, 150)) for _ in range(100)))
    options = ("--text", text, "--length", 8, "--out", tmp_path / "profile.json")
    assert call("profile", model, *options, "--report", tmp_path / "one.html")[0] == 0
    assert call("plot", tmp_path / "profile.json", "--out", tmp_path / "two.html")[0] == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        (
            ["profile"],
            ["--out", "x.pdf"],
            "x.pdf: expected a name that ends in .png or .svg or .html",
        ),
        (["profile"], ["--out", "x"], "x: expected a name that ends in .png"),
        (["profile"], ["--out", "/nowhere/x.png"], "there is no directory"),
        (
            ["profile"],
            ["--kind", "pie"],
            "kind: expected heatmap or curves for a file of kind profile",
        ),
        (["budget"], ["--kind", "curves"], "kind: expected budget for a file of kind budget"),
        (["profile"], ["--kind", "curves", "--out", "x.html"], "a page holds every figure"),
        (["profile", "budget"], [], "a figure shows artefacts of one kind, found budget, profile"),
        (["profile", "profile"], [], "heatmap: expected one profile, found 2"),
        (["budget", "budget"], [], "budget: expected one budget, found 2"),
        (["plan"], [], "expected one of profile, evaluation, judgement, budget, found 'plan'"),
        (["absent"], [], "No such file or directory"),
        (["list"], [], "expected one of profile, evaluation, judgement, budget, found None"),
        (["single"], [], "has one layer: there is nothing to draw"),
        (["whole"], [], "no evaluation drops a layer: there is nothing to draw"),
        (["dropped", "elsewhere"], [], "the evaluations predict different windows of text"),
        (["dropped", "infinite"], [], "a perplexity of inf is too large to draw"),
        (["judgement"], [], "a judgement has no figure; a page, which ends in .html, shows it"),
        (["newer"], [], "an evaluation of version 7"),
        (["huge"], [], "huge.json: evaluation: perplexity: expected a number of at most 64 bits"),
        (["half"], [], "half.json: evaluation: model: expected text, found"),
        (["half"], ["--out", "x.svg"], "half.json: evaluation: model: expected text, found"),
        (["cache"], [], "cache.json: budget: after: expected whole numbers from 0 to 1e+30"),
        (["cache"], ["--out", "x.html"], "after: expected whole numbers from 0 to 1e+30"),
        ([], [], "Missing argument"),
    ],
)
def test_bad_input(given, options, sentence, draw, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = make_profile(4, draw)
    plan = Plan("m", "a", "b", 4, (0, 1), "manual", None, (), None, None, "")
    dropped = replace(RECORD, layers_kept=20, rule="simple")
    made = {
        "plan": plan,
        "single": make_profile(1, draw),
        "whole": RECORD,
        "dropped": dropped,
        "elsewhere": replace(dropped, text_hash="u"),
        "infinite": replace(dropped, perplexity=float("inf")),
        "profile": profile,
        "judgement": Judgement.of({"a.txt": RECORD}),
    }
    for name, artefact in made.items():
        artefact.save(tmp_path / f"{name}.json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "newer.json").write_text(json.dumps(RECORD.to_json() | {"version": 7}))
    (tmp_path / "huge.json").write_text(json.dumps(RECORD.to_json() | {"perplexity": 10**400}))
    (tmp_path / "half.json").write_text(json.dumps(RECORD.to_json() | {"model": "a\ud800"}))
    raw = json.loads(files["budget"][0].read_text())
    raw["after"]["kv_bytes"] = 10**400
    (tmp_path / "cache.json").write_text(json.dumps(raw))
    if "--out" not in options:
        options = [*options, "--out", "figure.png"]
    before = set(tmp_path.iterdir())
    refused(sentence, "plot", *(f"{name}.json" for name in given), *options)
    assert set(tmp_path.iterdir()) == before


def test_damaged_artefacts_are_one_sentence(draw, files, tmp_path):
    """Any value of any field in place of another: drawn, or refused, never a traceback."""
    junk = [None, True, -1, 10**9, 10**300, 10**400, -1e308, 1e308, float("nan"), "x", "\ud800"]
    junk += ["", [], [[]], {}, {"a": 1}, {"a": 10**400}, [1, "b"], list(costs.PARTS)]
    make_profile(4, draw).save(files["heatmap"][0])
    for kind in ("heatmap", "quality", "budget"):
        raw = json.loads(files[kind][0].read_text())
        places = [(raw, key) for key in raw]
        places += [
            (raw[side], key) for side in ("before", "after") if side in raw for key in raw[side]
        ]
        for holder, key in places:
            original = holder[key]
            for value in draw.sample(junk, 3):
                holder[key] = value
                (tmp_path / "damaged.json").write_text(json.dumps(raw))
                code, _, err = call("plot", tmp_path / "damaged.json", "--out", tmp_path / "x.html")
                assert code in (0, 2) and err.count("\n") == (1 if code else 0), err
            holder[key] = original
