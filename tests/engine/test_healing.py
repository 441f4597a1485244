"""Distillation: what it promises of the model, of a run that is killed, and of what it refuses."""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.close import assert_close
from support.healing import (
    WINDOW,
    draw,
    killed_at,
    killing,
    kl,
    logits,
    same_after_a_kill,
    shortened,
)
from tokenizers import processors

from engine.api import load
from engine.artifacts import HealRecord
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.hf import prune
from engine.healing import distil, state
from engine.healing.data import Data, perplexity, read_data
from engine.healing.heal import heal
from engine.healing.settings import Settings
from engine.healing.student import learns
from engine.healing.teacher import Teacher, bins, divergence
from engine.healing.written import written
from engine.text import load_text

SETTINGS = Settings(("distil",), steps=14, lr=3e-3, window=WINDOW, batch_tokens=96, check_every=4)


def test_the_bins_hold_the_whole_loss(rng, tmp_path):
    """Against the KL over all tokens; a window is asked of the teacher once, ever."""
    teacher = 6 * torch.randn(3, WINDOW, 1000, generator=rng)  # as sharp as a language model
    student = teacher + torch.randn(teacher.shape, generator=rng)
    windows, asked = torch.arange(3 * WINDOW).view(3, WINDOW), []

    def ask(tokens):
        asked.append(int(tokens[0, 0]) // WINDOW)
        return teacher[asked[-1]][None]

    for _ in range(2):
        kept = Teacher(windows, 64, 1000, tmp_path, "text and teacher")
        for window in (2, 0, 2):
            expected, indices = kept(window, ask)
            assert indices.shape == (WINDOW, 64)
            found = float(divergence(student[window], expected, indices))
            assert found == pytest.approx(kl(teacher[window], student[window]), rel=0.01)
    assert asked == [2, 0]
    Teacher(windows, 64, 1000, tmp_path, "another text")(2, ask)
    assert asked == [2, 0, 2]


def test_windows_of_another_length_are_asked_for_anew(tmp_path):
    """They hold the same text, whose files in the cache have the same sizes."""
    text, asked = torch.arange(4 * WINDOW), []

    def ask(tokens):
        asked.append(tokens.tolist())
        return torch.zeros(1, tokens.shape[1], 9)

    for width in (WINDOW // 2, WINDOW, WINDOW // 2):
        windows = text.view(-1, width)
        Teacher(windows, 4, 9, tmp_path, "text and teacher")(1, ask)
    assert asked == [[text[WINDOW // 2 : WINDOW].tolist()], [text[WINDOW : 2 * WINDOW].tolist()]]


@pytest.mark.parametrize("kind", ["values", "indices", "done"])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_what_a_damaged_cache_lacks_is_asked_for_again(kind, damage, rng, tmp_path):
    teacher, windows, asked = torch.randn(1, WINDOW, 99, generator=rng), torch.zeros(2, WINDOW), []

    def ask(tokens):
        asked.append(tokens)
        return teacher

    expected, _ = Teacher(windows, 9, 99, tmp_path, "")(1, ask)
    (file,) = tmp_path.glob(f"*.{kind}")
    file.unlink() if damage == "gone" else os.truncate(file, 1)
    found, _ = Teacher(windows, 9, 99, tmp_path, "")(1, ask)
    assert torch.equal(found, expected) and len(asked) == 2


def test_the_gradient_of_the_loss(rng):
    """Against autograd in float64 through the definition of the bins."""
    logits = (4 * torch.randn(2, 5, 300, generator=rng)).requires_grad_()
    indices = torch.stack([torch.randperm(300, generator=rng)[:9] for _ in range(10)]).view(2, 5, 9)
    teacher = torch.randn(2, 5, 10, generator=rng).log_softmax(-1)
    exact = logits.detach().double().requires_grad_()
    expected = (teacher.double().exp() * (teacher.double() - bins(exact, indices))).sum(-1).mean()
    found = divergence(logits, teacher, indices)
    assert_close("loss", expected, found, 1e-5)
    assert_close(
        "gradient",
        *(torch.autograd.grad(3 * y, x)[0] for y, x in ((expected, exact), (found, logits))),
        1e-5,
    )


def test_a_bin_for_all_others_where_the_vocabulary_is_small(tmp_path):
    expected, indices = Teacher(torch.zeros(1, 2).long(), 64, 5, tmp_path, "")(
        0, lambda tokens: torch.eye(2, 5)[None]
    )
    assert indices.shape == (2, 4) and bool(expected.isfinite().all())
    assert_close("mass", torch.ones(2), expected.exp().sum(-1), 1e-6)


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "gemma3"])
def test_a_healed_model_is_nearer_and_an_ordinary_directory(case, source, rng, tmp_path):
    """Judged on 48 windows: by 12 one draw found a healed model no better than before."""
    import transformers

    checkpoint = source(case)
    config, data = shortened(checkpoint), draw(checkpoint, rng, held_out=48)
    out, settings = tmp_path / "out", replace(SETTINGS, steps=24, lr=1e-3, patience=100)
    record = heal(checkpoint, config, data, out, settings, dtype=torch.float32)
    assert record.perplexity_after <= record.perplexity_before
    assert HealRecord.load(out / "heal.json") == record
    assert (record.steps, record.stopped) == (24, "after 24 steps")
    assert not list(tmp_path.glob("out.*")), "expected nothing beside the result"
    whole = logits(checkpoint, checkpoint.config, data.held_out)
    unhealed = kl(whole, logits(checkpoint, config, data.held_out))
    with load(out, backend="reference") as model:
        ours = model(data.held_out)
    assert kl(whole, ours) < 0.95 * unhealed
    peer = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close("transformers", ours, peer(data.held_out, use_cache=False).logits, 1e-4)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0)])
def test_a_processor_without_bfloat16_trains_in_float32(device, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert replace(SETTINGS, precision="auto").on(device).precision == "float32"


def test_in_bfloat16_it_learns_as_well(source, rng, tmp_path):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    found = [
        heal(checkpoint, config, data, tmp_path / name, replace(SETTINGS, precision=name))
        for name in ("float32", "bfloat16")
    ]
    exact, rounded = (record.losses[0] - record.losses[-1] for record in found)
    assert exact > 0 and rounded == pytest.approx(exact, rel=0.2)
    assert [record.settings["precision"] for record in found] == ["float32", "bfloat16"]


def test_text_that_the_teacher_writes(tmp_path):
    """Rows that the teacher goes on with from the text and from BOS; a killed run keeps batches."""
    windows, asked = torch.arange(30 * WINDOW).view(30, WINDOW), []

    def write(prompts, options, broken=False):
        if broken and len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        assert options.temperature == 1 and options.ignore_eos
        draw = torch.Generator().manual_seed(options.seed)
        shape = len(prompts), options.max_new_tokens
        return torch.randint(0, 9, shape, generator=draw).tolist()

    def run(directory, writing=write, most=WINDOW + 11):
        given = {"name": "n", "seed": 3, "most": most, "report": lambda *_: None}
        return written(windows, 40 * WINDOW - 5, 1, writing, tmp_path / directory, **given)

    whole = run("a")
    assert whole.shape == (40, WINDOW) and asked == [32, 8]
    assert whole[0, :12].tolist() == list(range(12)) and whole[1::2, 0].eq(1).all()
    assert whole[0::2, 0].tolist() == [WINDOW * (i * 30 // 40) for i in range(0, 40, 2)]
    assert not whole[:, 12:].gt(8).any() and not torch.equal(whole[:8, 12:], whole[32:, 12:])
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run("b", partial(write, broken=True))
    assert torch.equal(run("b"), whole) and asked == [32, 8]
    asked.clear()
    apart = run("c", most=WINDOW + 10)  # those from the text do not fit beside what BOS needs
    assert asked == [16, 16, 4, 4] and torch.equal(apart[0::2, :12], whole[0::2, :12])
    assert apart[1::2, 0].eq(1).all() and not apart[:, 12:].gt(8).any()
    data = Data(windows, windows[:2]).extended(whole)
    assert torch.equal(data.windows, torch.cat((windows, whole[:19], whole[20:39])))
    assert torch.equal(data.held_out[2:], whole[[19, 39]])


def test_what_is_held_out_of_written_text_is_not_learnt():
    """Of a text of any length: eight rows are held out, and each of the others is learnt."""
    first, rows = torch.zeros(1, 2, dtype=torch.int64), torch.arange(1, 401)[:, None].expand(400, 2)
    data = Data(first, first).extended(rows)
    learnt, held_out = data.windows[1:, 0].tolist(), data.held_out[1:, 0].tolist()
    assert held_out == [20 * n for n in range(1, 9)]
    assert sorted(learnt + held_out) == list(range(1, 401))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # whose weights are copies
def test_a_killed_run_comes_to_the_same_bits(precision, source, rng, tmp_path):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    settings = replace(SETTINGS, methods=("linear", "distil"), precision=precision)
    straight = same_after_a_kill(checkpoint, config, data, tmp_path, settings)
    other = heal(checkpoint, config, data, tmp_path / "c", replace(settings, seed=1))
    assert other.losses != straight.losses


@pytest.mark.parametrize("other", ["weights", "text", "layers"])
def test_another_run_in_the_same_place_begins_anew(other, source, rng, tmp_path):
    """Though norms, and so their lineage, are the same: the run and the teacher's words."""
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    kept = {"cache": tmp_path / "cache"}
    with pytest.raises(KeyboardInterrupt):
        heal(checkpoint, config, data, tmp_path / "a", SETTINGS, reporting=killing, **kept)
    if other == "weights":
        file = tmp_path / "model" / "model.safetensors"
        weights = {name: t * (1 + ("proj" in name)) for name, t in load_file(file).items()}
        file.unlink()
        save_file(weights, file, {"format": "pt"})
    data = draw(checkpoint, rng) if other == "text" else data
    config = checkpoint.config.keep([0, 1, 3]) if other == "layers" else config
    changed = open_checkpoint(tmp_path / "model")
    again = heal(changed, config, data, tmp_path / "a", SETTINGS, **kept)
    anew = heal(changed, config, data, tmp_path / "b", SETTINGS)
    assert (again.lineage, again.losses) == (anew.lineage, anew.losses)


@pytest.mark.parametrize("methods", [("linear",), ("distil",)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_perplexity_after_is_of_what_is_written(dtype, methods, source, rng, tmp_path):
    """Rounding to 16 bits takes a part of what was learnt."""
    checkpoint = source("llama")
    data, settings = draw(checkpoint, rng), replace(SETTINGS, methods=methods, precision="float32")
    out = tmp_path / "out"
    record = heal(checkpoint, shortened(checkpoint), data, out, settings, dtype=dtype)
    written = open_checkpoint(out)
    found = perplexity(partial(logits, written, written.config), data.held_out)
    assert record.perplexity_after == pytest.approx(found, rel=1e-6)


def test_a_loss_that_is_no_number_ends_it_with_the_last_good_weights(
    source, rng, tmp_path, monkeypatch
):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    calls = []

    def broken(*bins):
        calls.append(1)
        return divergence(*bins) * (torch.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(distil, "divergence", broken)
    exact = replace(SETTINGS, precision="float32")
    record = heal(checkpoint, config, data, tmp_path / "out", exact, dtype=torch.float32)
    assert record.stopped == "the loss is not finite at step 7" and len(record.losses) == 6
    assert record.perplexity_after == min(record.checks)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_no_improvement_ends_it_with_the_best_weights(source, rng, tmp_path, monkeypatch):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    rising = iter(range(1, 100))
    monkeypatch.setattr(distil, "perplexity", lambda *_: float(next(rising)))
    settings = replace(SETTINGS, steps=100, check_every=1, patience=3)
    record = heal(checkpoint, config, data, tmp_path / "out", settings, dtype=torch.float32)
    assert record.stopped == "at step 3, no better for 3 checks" and record.best_step == 0
    prune(checkpoint, config, tmp_path / "pruned", dtype=torch.float32)
    names = (tmp_path / name / "model.safetensors" for name in ("out", "pruned"))
    first, second = map(load_file, names)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_minutes_end_it(source, rng, tmp_path):
    checkpoint = source("llama")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    settings = replace(SETTINGS, steps=None, minutes=0.02, patience=1000)
    record = heal(checkpoint, config, data, tmp_path / "out", settings)
    assert record.stopped == "after 0.02 minutes" and record.steps > 0
    assert record.minutes < 0.2


def test_a_killed_run_has_the_minutes_that_are_left(source, rng, tmp_path, monkeypatch):
    """By a clock that says a second more whenever it is asked: once a step, once a check."""
    checkpoint, clock = source("llama"), iter(range(10**6))
    monkeypatch.setattr(distil, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    settings = replace(SETTINGS, steps=None, minutes=1.0, patience=1000)
    given = checkpoint, shortened(checkpoint), draw(checkpoint, rng), tmp_path / "out", settings

    with pytest.raises(KeyboardInterrupt):
        heal(*given, reporting=killed_at("seconds", 31))
    assert 44 <= heal(*given).steps <= 52


def test_windows_in_parts_are_one_step(source, rng, tmp_path, monkeypatch):
    checkpoint = source("llama")
    config, data, losses = shortened(checkpoint), draw(checkpoint, rng), []
    for fitting in (1 << 27, 1):
        monkeypatch.setattr(distil, "LOGITS", fitting)
        out, settings = tmp_path / str(fitting), replace(SETTINGS, steps=3)
        record = heal(checkpoint, config, data, out, settings, dtype=torch.float32)
        losses.append(record.losses)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # AdamW widens what sums round


def test_what_the_optimiser_is_given(source, rng, tmp_path, monkeypatch):
    """A rate that rises and falls, gradients no longer than allowed, no decay of weights."""
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        (group,) = self.param_groups
        norm = torch.stack([weight.grad.norm() for weight in group["params"]]).norm()
        seen.append((group["lr"], float(norm), group["weight_decay"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    checkpoint, settings = source("llama"), replace(SETTINGS, steps=6, clip=1e-3)
    data = draw(checkpoint, rng)
    heal(checkpoint, shortened(checkpoint), data, tmp_path / "out", settings, dtype=torch.float32)
    rates, norms, decays = zip(*seen, strict=True)
    assert rates == pytest.approx([distil.rate((i + 0.5) / 6, settings) for i in range(6)])
    assert max(norms) <= 1.001e-3 and set(decays) == {0.0}


def test_the_nearer_limit_ends_a_run():
    both = Settings(("distil",), steps=100, minutes=1.0)
    assert distil.share(state.Standing(step=10, seconds=30.0), both) == pytest.approx(0.525)
    assert distil.share(state.Standing(step=90, seconds=6.0), both) == pytest.approx(0.905)


def test_windows_are_taken_all_over_the_text():
    windows = torch.arange(100)[:, None].expand(100, 2)
    assert [int(w[0, 0]) for w in Data(windows, windows[:1]).spread(4)] == [0, 25, 50, 75]


def test_the_rate_rises_and_falls():
    settings = Settings(("distil",), steps=100, lr=1.0)
    rates = [distil.rate(at / 100, settings) for at in range(101)]
    assert max(rates) == rates[10] == 1.0 and rates[0] == 0.1 and rates[100] == 0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.filterwarnings("error::FutureWarning")  # of peft, which a user cannot help
@pytest.mark.parametrize("train", ["norms", "around", "lora"])
def test_only_what_is_asked_for_learns(train, source, rng, tmp_path, monkeypatch):
    falling = iter(range(9, 0, -1))  # the last weights are the best
    monkeypatch.setattr(distil, "perplexity", lambda *_: float(next(falling)))
    if train == "lora":
        pytest.importorskip("peft")
    checkpoint = source("phi3", num_hidden_layers=6)
    config = checkpoint.config.keep([0, 1, 3, 4, 5])
    settings = replace(SETTINGS, train=train, steps=4)
    heal(checkpoint, config, draw(checkpoint, rng), tmp_path / "out", settings, dtype=torch.float32)
    prune(checkpoint, config, tmp_path / "pruned", dtype=torch.float32)
    names = (tmp_path / name / "model.safetensors" for name in ("out", "pruned"))
    healed, pruned = map(load_file, names)
    changed = {name for name in pruned if not torch.equal(healed[name], pruned[name])}
    expected = {
        "norms": {name for name in pruned if "norm" in name},
        "around": {name for name in pruned if learns(name, config, "around")},
        "lora": {name for name in pruned if ".mlp." in name},
    }
    assert changed == expected[train]
    if train == "around":
        layers = {name.split(".")[2] for name in changed if ".layers." in name}
        assert layers == {"1", "2"} and {"lm_head.weight", "model.embed_tokens.weight"} <= changed


def test_adapters_are_written_within_their_matrices(source, rng, tmp_path):
    """What is written predicts as what was trained does."""
    pytest.importorskip("peft")
    checkpoint, out = source("llama"), tmp_path / "out"
    data = draw(checkpoint, rng)
    data = replace(data, held_out=data.windows[:12])  # which it learns from
    settings = replace(SETTINGS, train="lora", precision="float32", steps=28)
    record = heal(checkpoint, shortened(checkpoint), data, out, settings, dtype=torch.float32)
    written = open_checkpoint(out)
    found = perplexity(partial(logits, written, written.config), data.held_out)
    assert record.perplexity_after < record.perplexity_before
    assert found == pytest.approx(record.perplexity_after, rel=1e-4)


def test_a_teacher_of_its_own(source, rng, tmp_path):
    """A model that was pruned before learns as if it had been pruned now."""
    checkpoint = source("qwen2")
    config, data = shortened(checkpoint), draw(checkpoint, rng)
    prune(checkpoint, config, tmp_path / "pruned", dtype=torch.float32)
    pupil = open_checkpoint(tmp_path / "pruned")
    one = heal(checkpoint, config, data, tmp_path / "a", SETTINGS)
    two = heal(pupil, pupil.config, data, tmp_path / "b", SETTINGS, teacher=checkpoint)
    assert one.losses == two.losses and one.lineage == two.lineage
    linear = replace(SETTINGS, methods=("linear", "distil"))
    with pytest.raises(InputError, match="excludes --teacher"):
        heal(pupil, pupil.config, data, tmp_path / "c", linear, teacher=checkpoint)


@pytest.mark.parametrize(
    ("cache", "sentence"),
    [
        ("file", "expected a directory, .*file is a file"),
        ("file/in/it", "expected a directory, .*file is a file"),
        ("", "expected a directory of its own, found the current one"),
        ("model", "expected a directory of its own, found config.json in .*model"),
        ("locked/in/it", "expected to write .*locked, found it read-only"),
    ],
)
def test_a_cache_that_is_none(cache, sentence, source, rng, tmp_path, monkeypatch):
    checkpoint = source("llama")
    data = draw(checkpoint, rng)
    tmp_path.joinpath("file").touch()
    tmp_path.joinpath("locked").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "locked")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"cache: {sentence}"):
        heal(checkpoint, shortened(checkpoint), data, tmp_path / "out", SETTINGS, cache=Path(cache))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_order_is_every_window_once_an_epoch():
    data = Data(torch.zeros(10, 2), torch.zeros(1, 2))
    order = [window for step in range(10) for window in data.batch(step, 3, seed=4)]
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order[:3] == data.batch(0, 3, seed=4) != data.batch(0, 3, seed=5)


@pytest.mark.parametrize("bos", [False, True])
def test_rows_are_packed_and_tails_held_out(bos, tmp_path):
    tiny.save_tokenizer(tmp_path)
    text = load_text(tmp_path)
    if bos:
        text.tokenizer.post_processor = processors.TemplateProcessing(
            "1 $A", special_tokens=[("1", 1)]
        )
        text = replace(text, special={"bos_token": "1"})
    rows, file = [list(range(3, 3 + n)) for n in (40, 1, 25, 7)], tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": " ".join(map(str, row))}) for row in rows))
    data = read_data([str(file), str(file)], None, text, 8)
    width = 8 - bos
    windows = torch.tensor(sum(rows, [])[: 73 // width * width]).view(-1, width)
    assert torch.equal(data.windows[:, bos:], torch.cat([windows[:-1]] * 2))
    assert torch.equal(data.held_out[:, bos:], torch.cat([windows[-1:]] * 2))
    assert not bos or bool((data.windows[:, 0] == 1).all())
    apart = read_data([str(file)], str(file), text, 8)
    assert torch.equal(apart.windows[:, bos:], windows)
    assert torch.equal(apart.held_out[:, bos:], windows[[i * len(windows) // 8 for i in range(8)]])
    with pytest.raises(InputError, match="expected 2 windows of 40 tokens, found 1"):
        read_data([str(file)], None, text, 40)


def test_records_survive_json(source, rng, tmp_path):
    checkpoint = source("llama")
    data = draw(checkpoint, rng)
    settings = Settings(("linear",), window=WINDOW)
    record = heal(checkpoint, shortened(checkpoint), data, tmp_path / "out", settings, name="tiny")
    assert HealRecord.from_json(json.loads(json.dumps(record.to_json())), "here") == record
    assert (record.steps, record.keep, record.model) == (0, (0, 2, 3), "tiny")


@pytest.mark.parametrize(
    ("tensors", "changes", "says"),
    [
        ({}, {"colour": 1}, "'colour' is not known"),
        ({}, {"step": "x"}, "standing: step: expected int, found 'x'"),
        ({}, {"losses": [None]}, "standing: losses: expected float, found None"),
        ({}, None, "'standing'"),
        ({"weight.a": None}, {}, r"tensor 'weight.a': expected \(3,\) torch.float32, found none"),
        ({"weight.a": torch.zeros(1)}, {}, r"'weight.a': expected \(3,\) .* found \(1,\)"),
        ({"exp_avg.a": torch.zeros(3, dtype=torch.int32)}, {}, "'exp_avg.a': .* torch.int32"),
        ({"exp_avg_sq.a": None}, {}, "tensor 'exp_avg_sq.a'"),
    ],
)
def test_a_damaged_standing_says_how_to_begin_anew(tensors, changes, says, tmp_path):
    weights, file = {"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / "training.safetensors"
    optimiser = torch.optim.AdamW(weights.values())
    weights["a"].sum().backward()
    optimiser.step()
    state.save(file, state.Standing(step=1, losses=[0.5]), weights, optimiser)
    assert state.restore(file, weights, optimiser) == state.Standing(step=1, losses=[0.5])
    found = load_file(file) | tensors
    standing = {state.KEY: json.dumps(asdict(state.Standing()) | (changes or {}))}
    kept = {name: tensor.clone() for name, tensor in found.items() if tensor is not None}
    save_file(kept, file, {"format": "pt"} if changes is None else standing)
    sentence = f"{file}: is not .*{says}.*; remove {tmp_path} to start over"
    with pytest.raises(InputError, match=sentence):
        state.restore(file, weights, optimiser)
