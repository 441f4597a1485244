"""Profiles against transformers' own hidden states in float64; streaming, resuming, sharding."""

import json
import os
import secrets
import subprocess
import sys

import pytest
import torch
from support import tiny
from support.profiles import Case, angles, largest_difference

from engine.artifacts import Profile
from engine.errors import InputError
from engine.pruning.profile import ProfilePart, describe, measure, measure_streamed, merge
from engine.text.samples import read_samples


# LongRoPE: the last sample is past its switch, and the others are not.
@pytest.fixture(params=["llama", "gemma3", "phi2", "olmo2", "phi3-longrope"])
def case(request, tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return Case(request.param, tmp_path, seed)


def test_last_tokens_against_transformers(case):
    vectors = torch.stack([case.boundaries(sample)[:, -1] for sample in case.samples], dim=1)
    profile = case.profile()
    assert largest_difference(profile, angles(vectors)) < 2e-5
    assert profile.vectors == profile.samples == len(case.samples)
    assert profile.tokens_used == sum(map(len, case.samples))


def test_all_tokens_leave_bos_and_padding_out(case):
    vectors = torch.cat([case.boundaries(sample)[:, 1:] for sample in case.samples], dim=1)
    profile = case.profile("all")
    assert largest_difference(profile, angles(vectors)) < 2e-5
    assert profile.vectors == sum(len(sample) - 1 for sample in case.samples)
    assert profile.samples == len(case.samples)
    assert profile.tokens_used == sum(map(len, case.samples))


def test_what_a_profile_says_of_single_layers_and_of_chance(case):
    """Influence, magnitude and standard errors by their definitions."""
    vectors = torch.stack([case.boundaries(sample)[:, -1] for sample in case.samples], dim=1)
    profile, before, after = case.profile(), vectors[:-1], vectors[1:]
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean(1)
    assert profile.influence == pytest.approx((1 - cosine).tolist(), abs=1e-4)
    change = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean(1)
    assert profile.magnitude == pytest.approx(change.tolist(), rel=1e-3)
    count = len(case.samples)
    each = torch.stack([angles(vectors[:, [at]]) for at in range(count)])
    errors = each.std(0) / count**0.5
    for width, row in enumerate(profile.standard_errors, 1):
        assert row == pytest.approx(errors.diagonal(width).tolist(), abs=2e-5)


def test_the_last_boundary_is_before_the_final_norm(case):
    """The mistake of hidden_states[-1] would be seen: the norm turns the vectors by more."""
    vectors = torch.stack([case.boundaries(sample)[:, -1] for sample in case.samples], dim=1)
    final = getattr(case.peer.model, "norm", None) or case.peer.model.final_layernorm
    with torch.no_grad():
        normed = torch.cat((vectors[:-1], final(vectors[-1:].float()).double()))
    assert largest_difference(case.profile(), angles(normed)) > 1e-3


def test_batches_do_not_matter(case):
    one, many = case.profile(batch_tokens=1), case.profile(batch_tokens=10_000)
    assert largest_difference(one, _table(many)) < 1e-6


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_streaming_gives_the_same(case, tokens):
    plain = _table(case.profile(tokens))
    source = case.source(tokens)
    memory = measure_streamed(case.checkpoint, case.config, case.samples, source)
    assert largest_difference(merge([memory]), plain) < 1e-6
    files = measure_streamed(
        case.checkpoint, case.config, case.samples, source, limit_bytes=0, batch_tokens=64
    )
    assert largest_difference(merge([files]), plain) < 1e-6
    assert files.tokens_used == memory.tokens_used == sum(map(len, case.samples))


def _table(profile: Profile) -> torch.Tensor:
    total = len(profile.layers) + 1
    table = torch.zeros(total, total, dtype=torch.float64)
    for count, row in enumerate(profile.distances, 1):
        for start, value in enumerate(row):
            table[start, start + count] = value
    return table


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    case = Case("llama", tmp_path, 1)
    monkeypatch.setattr("engine.pruning.profile.SAVE_SECONDS", -1.0)
    whole = case.profile(batch_tokens=64)
    calls = []

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if done > total // 2:
            raise Killed

    resume = tmp_path / "profile.json.partial"
    with pytest.raises(Killed):
        case.profile(batch_tokens=64, resume=resume, progress=kill)
    first = len(calls)
    again = case.profile(
        batch_tokens=64, resume=resume, progress=lambda done, _: calls.append(done)
    )
    assert again == whole
    assert calls[first] > calls[first - 1], "samples were run again"


def test_what_another_run_noted_is_not_gone_on_from(tmp_path):
    case, resume = Case("llama", tmp_path, 1), tmp_path / "profile.json.partial"
    part = measure(case.decoder, case.samples[:4], case.source(text_hash="another text"))
    part.save(resume)
    assert case.profile(resume=resume) == case.profile()


@pytest.mark.parametrize("lost", [None, "hidden.0", "hidden.1", "vectors"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_killed_stream_goes_on(lost, cut, tmp_path):
    case = Case("gemma3", tmp_path, 1)
    work = tmp_path / "work"
    work.mkdir()
    source = case.source()
    whole = merge([measure_streamed(case.checkpoint, case.config, case.samples, source)])

    def kill(boundary: int, _: int) -> None:
        if boundary == 3:
            raise Killed

    def run(**options):
        return measure_streamed(
            case.checkpoint, case.config, case.samples, source, directory=work, **options
        )

    with pytest.raises(Killed):
        run(progress=kill)
    if lost:  # then it begins anew, and does so again after a kill
        if cut:
            os.truncate(work / lost, work.joinpath(lost).stat().st_size // 2)
        else:
            work.joinpath(lost).unlink()
        with pytest.raises(Killed):
            run(progress=lambda *_: kill(3, 0))
    seen = []
    again = merge([run(progress=lambda boundary, _: seen.append(boundary))])
    assert again == whole
    assert seen[0] == (0 if lost else 3), "the run did not go on where it was"


def test_a_killed_stream_of_samples_of_another_length_begins_anew(tmp_path):
    """They hold the same text, and all of its tokens are measured: files of the same sizes."""
    case, text = Case("llama", tmp_path, 1), list(range(3, 67))

    def run(length, **options):
        samples = [text[at : at + length] for at in range(0, len(text), length)]
        source = describe("m", case.checkpoint, case.config, samples, "all")
        given = case.checkpoint, case.config, samples, source
        return merge([measure_streamed(*given, **options)])

    def kill(boundary: int, _: int) -> None:
        if boundary == 3:
            raise Killed

    (tmp_path / "work").mkdir()
    with pytest.raises(Killed):
        run(16, directory=tmp_path / "work", progress=kill)
    assert run(32, directory=tmp_path / "work") == run(32)


def test_shards_join_exactly(case):
    whole = case.profile()
    for count in (2, 3, len(case.samples)):
        parts = [
            measure(case.decoder, case.samples, case.source(shard=(index, count)))
            for index in range(count)
        ]
        joined = merge(parts[::-1])
        assert largest_difference(joined, _table(whole)) < 1e-6  # batches differ, so sums round
        assert (joined.samples, joined.tokens_used) == (whole.samples, whole.tokens_used)
        with pytest.raises(InputError, match="expected the shards"):
            merge(parts[1:])
        with pytest.raises(InputError, match="expected the shards"):
            merge([*parts, parts[0]])
        with pytest.raises(InputError, match="expected the shards"):
            merge([parts[0]] * count)
    other = measure(case.decoder, case.samples, case.source("all", shard=(1, 2)))
    with pytest.raises(InputError, match="different models, texts or settings"):
        merge([measure(case.decoder, case.samples, case.source(shard=(0, 2))), other])
    with pytest.raises(InputError, match="merge: the parts hold no samples"):
        merge([ProfilePart(case.source(), {}, 0, 0)])
    with pytest.raises(InputError, match="shard: expected i/n with 0 <= i < n, found 2/2"):
        case.source(shard=(2, 2))


def test_two_launched_processes(tmp_path):
    """As torchrun launches them: RANK and WORLD_SIZE say which part is whose."""
    directory = tmp_path / "model"
    directory.mkdir()
    tiny.write("qwen2", directory, 3)
    tiny.save_tokenizer(directory)
    text = tmp_path / "text.jsonl"
    rows = [" ".join(str(secrets.randbelow(150)) for _ in range(20)) for _ in range(10)]
    text.write_text("\n".join(json.dumps({"body": row}) for row in rows))
    command = [sys.executable, "-m", "engine.cli", "profile"]
    options = ["--text", str(text), "--column", "body", "--length", "16", "--no-bos"]
    running = []
    call = [*command, str(directory), "--out", str(tmp_path / "part.json"), *options]
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}
        running.append(subprocess.Popen(call, env=environment, stdout=subprocess.PIPE))
    assert [process.wait(120) for process in running] == [0, 0]
    parts = [str(tmp_path / f"part.{rank}-of-2.json") for rank in range(2)]
    joined, whole = tmp_path / "joined.json", tmp_path / "whole.json"
    subprocess.run([*command, *parts, "--merge", "--out", str(joined)], check=True)
    call = [*command, str(directory), "--out", str(whole), *options, "--shard", "0/1"]
    subprocess.run(call, check=True, stdout=subprocess.PIPE)
    assert largest_difference(Profile.load(joined), _table(Profile.load(whole))) < 1e-6
    assert Profile.load(joined).samples == 10
    assert not list(tmp_path.glob("*.partial"))


def test_sources_of_text(tmp_path, default_model):
    from engine.text import load_text

    text = load_text(default_model)
    prose, bos = read_samples(None, text, 64)
    assert len(prose) > 500 and {len(sample) for sample in prose} == {64} and not bos
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("second file " * 40)
    (folder / "a.txt").write_text("first file " * 40)
    cut, _ = read_samples(str(folder), text, 16)
    assert text.decode(cut[0]).startswith("first file") and len(cut) > 5
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "one two three"}\n\n{"q": "' + "long " * 50 + '"}\n')
    found, bos = read_samples(str(rows), text, 8, column="q", bos=True)
    assert bos and [len(sample) for sample in found] == [4, 8]
    assert {sample[0] for sample in found} == {text.bos_id}


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("short.txt", "few", {"length": 64}, "too short for one sample of 64"),
        ("empty.txt", "", {}, "empty file"),
        ("rows.jsonl", '{"a": "x"}', {}, "expected a text column 'text', found a"),
        ("rows.jsonl", '{"text": 3}', {}, "found a column that is not text"),
        ("rows.jsonl", "{", {}, "line 1: not valid JSON"),
        ("absent.txt", None, {}, "expected a text file"),
        ("rows.jsonl", '{"text": ""}', {}, "rows.jsonl: holds no text"),
        (
            "rows.jsonl",
            '{"text": "a \\ud800"}',
            {},
            "rows.jsonl:1: expected Unicode text, found half",
        ),
        ("rows.jsonl", '{"text": "few"}', {"full": True}, "too short for one sample of 16"),
        ("text.txt", "word " * 50, {"length": 0}, "length: expected at least 1"),
        ("text.txt", "word " * 50, {"count": 0}, "samples: expected at least 1"),
        ("text.txt", "word " * 50, {"count": 9}, "expected 9 samples of 16, found 3"),
    ],
)
def test_bad_sources(name, content, options, sentence, tmp_path, default_model):
    from engine.text import load_text

    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    options = {"length": 16} | options
    with pytest.raises(InputError, match=sentence):
        read_samples(str(path), load_text(default_model), **options)


def test_rows_that_are_damaged_behind_what_a_file_says_of_itself(tmp_path, default_model):
    from engine.text import load_text

    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra heal")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, table = tmp_path / "rows.parquet", pyarrow.table({"text": ["word " * 9] * 2000})
    parquet.write_table(table, path, compression="gzip")
    data = bytearray(path.read_bytes())
    data[20:80] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.parquet: not readable as parquet"):
        read_samples(str(path), load_text(default_model), 16)


_STREAM = """
import threading
from pathlib import Path
import torch
from engine.checkpoint import open_checkpoint
from engine.pruning.profile import describe, measure_streamed

def private_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

checkpoint = open_checkpoint(Path(DIRECTORY))
samples = torch.randint(0, 256, (6, 200)).tolist()
torch.ones(8, 8) @ torch.ones(8, 8)
before, peak, done = private_kb(), [0], threading.Event()

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], private_kb())

watcher = threading.Thread(target=watch)
watcher.start()
source = describe("big", checkpoint, checkpoint.config, samples)
measure_streamed(checkpoint, checkpoint.config, samples, source, directory=Path(WORK))
done.set()
watcher.join()
print((peak[0] - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts memory as Linux does")
def test_streaming_a_2_gb_checkpoint_takes_less_than_300_mb(tmp_path):
    from safetensors.torch import save_file

    from engine.architecture.families import layer_tensors, outer_tensors
    from engine.architecture.hf_config import from_hf

    directory, work = tmp_path / "model", tmp_path / "work"
    directory.mkdir()
    work.mkdir()
    raw = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 16, "num_hidden_layers": 15, "vocab_size": 256,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(raw))
    config = from_hf(raw, "config.json")
    index = {}
    for layer in range(15):
        tensors = dict(layer_tensors(config, layer).values())
        tensors |= dict(outer_tensors(config).values()) if layer == 0 else {}
        drawn = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in tensors.items()}
        save_file(drawn, directory / f"{layer}.safetensors")
        index |= dict.fromkeys(drawn, f"{layer}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert size > 2e9
    code = f"DIRECTORY, WORK = {str(directory)!r}, {str(work)!r}\n{_STREAM}"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    private = int(done.stdout)
    print(f"{private / 1e6:.0f} MB of private memory for a checkpoint of {size / 1e9:.2f} GB")
    assert private < 300e6
