"""The run and eval commands: what they print, what they record, what they refuse."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.commands import refused
from support.fake import FakeRuntime, FakeText

from engine import run
from engine.artifacts import Evaluation
from engine.benchmark import speed
from engine.benchmark.peers import process
from engine.benchmark.speed import RunRecord, Speed, benchmark
from engine.cli import app
from engine.commands import common, output
from engine.commands.common import DEFAULT_MODEL
from engine.errors import InputError
from engine.generation import Drafting, Options, Timings, generate
from engine.kernels.dispatch import BackendUnavailable

testing = pytest.importorskip("typer.testing")
LETTERS = [chr(ord("a") + i % 26) for i in range(64)]


@pytest.fixture
def model(rng, monkeypatch):
    """What every command opens, in place of a checkpoint."""
    runtime = FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)))
    model = SimpleNamespace(runtime=runtime, config=runtime.config, text=FakeText(LETTERS))
    model.path, model.opened, model.locating_nan = "fake", [], nullcontext

    def open_model(ref, threads, **options):
        model.opened.append((ref, threads, options))
        return model, 12.5

    monkeypatch.setattr(run, "open_model", open_model)
    monkeypatch.setattr(common, "open_model", open_model)
    monkeypatch.setattr("engine.benchmark.machine.CEILING_BYTES", 2**22)
    return model


def invoke(*arguments: str) -> str:
    """Standard output of `engine ...`; what it raises comes out."""
    result = testing.CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def record_of(output: str) -> RunRecord:
    return RunRecord.from_json(json.loads(output.splitlines()[-1]), "stdout")


def test_the_text_then_a_table_then_one_line_of_json(model, tmp_path):
    file = tmp_path / "record.json"
    output = invoke("run", "--prompt", "hello", "--new-tokens", "9", "--json", str(file))
    (expected,) = generate(model.runtime, model.text, ["hello"], Options(max_new_tokens=9))
    assert output.startswith(expected.text + "\n")
    assert "decode, median" in output and "3 of 5 layers" in output
    record = record_of(output)
    assert RunRecord.load(file) == record
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert (record.layers, record.layers_kept, record.layers_total) == ("0-1,4", 3, 5)
    assert (record.prompt_tokens, record.new_tokens, record.finish_reason) == (5, 9, "length")
    assert (record.load_ms, record.batch, record.backend) == (12.5, 1, "fake")
    assert 0 < record.decode_tok_s_p5 <= record.decode_tok_s <= record.decode_tok_s_p95
    assert record.ms_per_token == pytest.approx(1e3 / record.decode_tok_s)
    assert record.kv_bytes == 14 * 8 and record.peak_rss_bytes > 2**20
    assert {"python", "torch", "engine"} <= set(record.versions)


def test_the_model_is_named_as_in_other_commands_or_by_its_option(model):
    for named in (["org/name"], ["--model", "org/name"], []):
        assert record_of(invoke("run", *named, "--new-tokens", "1")).model == (
            "org/name" if named else DEFAULT_MODEL
        )
    with pytest.raises(InputError, match="MODEL and --model exclude each other"):
        invoke("run", "org/name", "--model", "org/name")
    assert [ref for ref, _, _ in model.opened] == ["org/name", "org/name", DEFAULT_MODEL]


def test_options_reach_the_model_and_the_loop(model):
    invoke(
        *("run", "--drop", "2-3", "--backend", "reference", "--dtype", "float32", "--threads", "1"),
        *("--batch", "3", "--repeats", "2", "--warmup", "0", "--new-tokens", "4"),
        *("--cache-dtype", "int8", "--isa", "avx2"),
    )
    options = {"drop": "2-3", "keep": None, "backend": "reference", "dtype": "float32"}
    options |= {"cache_dtype": "int8", "isa": "avx2"}
    assert model.opened == [(common.DEFAULT_MODEL, 1, options)]
    shapes = [tuple(shape) for shape, _, _ in model.runtime.calls]
    assert shapes == 2 * [(3, len(run.PROMPT)), *[(3, 1)] * 3]


@pytest.mark.parametrize("count", [1, 7, 100])
def test_a_synthetic_prompt_has_exactly_its_length_and_ignores_eos(count, model):
    model.text.eos_ids = tuple(range(64))
    record = record_of(invoke("run", "--prompt-tokens", str(count), "--new-tokens", "5"))
    assert (record.prompt_tokens, record.new_tokens) == (count, 5)
    assert record_of(invoke("run", "--new-tokens", "5")).new_tokens == 1


@pytest.mark.parametrize(
    ("flag", "template", "chat"),
    [((), None, False), ((), "x", True), (("--raw",), "x", False), (("--chat",), None, True)],
)
def test_chat_where_there_is_a_template(flag, template, chat, model, monkeypatch):
    asked = []
    model.text.chat_template = template
    monkeypatch.setattr(model.text, "chat", lambda m: asked.append(m) or [1, 2], raising=False)
    invoke("run", "--prompt", "hi", "--new-tokens", "1", "--warmup", "0", *flag)
    assert asked == ([[{"role": "user", "content": "hi"}]] if chat else [])


def test_bytes_and_launches_are_of_a_step(model, monkeypatch):
    """Which gives a token of every sequence, or several with drafts."""
    monkeypatch.setattr(model.runtime, "launches_per_token", 7, raising=False)
    output = invoke("run", "--new-tokens", "4", "--batch", "3")
    shown = " ".join(output.replace("│", " ").split())
    megabytes = record_of(output).weight_bytes_per_token / 1e6
    assert f"weights read a step {megabytes:,.2f} MB" in shown and "launches a step 7" in shown


def test_one_token_has_no_decode_speed(model):
    record = record_of(invoke("run", "--new-tokens", "1"))
    assert record.decode_tok_s is None and record.achieved_gb_s is None


@pytest.mark.skipif(sys.platform != "linux", reason="of what Linux hands on to a child")
def test_the_peak_is_of_this_process_alone():
    """Whatever the program took that started it, a notebook say."""
    own = "from engine.benchmark.machine import peak_rss_bytes as peak; print(peak())"
    parent = "import subprocess, sys; held = b'x' * 1_000_000_000; subprocess.run(sys.argv[1:])"
    argv = [sys.executable, "-c", parent, sys.executable, "-c", own]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert 2**24 < int(done.stdout) < 900_000_000


def test_a_seed_reproduces_the_text(model):
    arguments = ("run", "--temperature", "2", "--new-tokens", "20", "--seed")
    first, again, other = (invoke(*arguments, seed).split("\n")[0] for seed in "112")
    assert first == again != other


def test_the_peers_take_turns_and_are_compared(model):
    order = []
    expected = generate(model.runtime, model.text, ["abc"], Options(max_new_tokens=6))[0].token_ids
    theirs = [*expected[:4], *[(i + 1) % 64 for i in expected[4:]]]

    def peer(name, ids):
        def work(prompts, new_tokens):
            assert prompts == [[97 % 64, 98 % 64, 99 % 64]]
            order.append((name, new_tokens))
            return [ids], Timings(3, 2000.0, 2000.0, (10**9,) * 5, (1,) * 5)

        return SimpleNamespace(name=name, version="1.2", setting={"fast": True}, generate=work)

    peers = [peer("other", theirs), peer("wrong", [(i + 1) % 64 for i in expected])]
    forward = model.runtime.forward
    model.runtime.forward = lambda tokens, *a, **k: (
        (order.append("prompt") if tokens.shape[1] > 1 else None) or forward(tokens, *a, **k)
    )
    record = benchmark(
        model, "abc", Options(max_new_tokens=6), name="m", load_ms=1.0, repeats=2, peers=peers
    )
    turn = [("other", 6), ("wrong", 6)]
    assert order[:-4] == ["prompt", "prompt", *turn[:1], *turn[1:], *turn, "prompt", *turn]
    other, wrong = record.compare
    assert other["decode_tok_s"] == 1 and other["prefill_tok_s"] == 1.5
    assert other["decode_ratio"] == record.decode_tok_s
    assert other["same_tokens"] == 4 and other["agreement"] >= 4 / 6
    assert record.versions["other"] == "1.2"
    assert wrong["same_tokens"] == 0 and "decode_tok_s" not in wrong and wrong["wrong"]
    assert RunRecord.from_json(json.loads(json.dumps(record.to_json())), "json") == record


def test_a_peer_that_is_not_installed_is_said_and_left_out(model, monkeypatch):
    def missing(name, python, work, prompt):
        raise process.PeerMissing(f"{name}: no module; pip install it")

    monkeypatch.setattr(process, "fastest", missing)
    record = record_of(invoke("run", "--new-tokens", "2", "--compare", "transformers"))
    assert record.compare == () and record.repeats == 5
    with pytest.raises(InputError, match="transformers: no module; pip install it"):
        invoke("run", "--compare", "transformers", "--peer-python", "transformers=python3")


def test_speed_pools_the_steps_of_all_repeats():
    def run_of(prefill_ms, *step_ms):
        steps = tuple(ms * 10**6 for ms in step_ms)
        return Timings(10, prefill_ms + 1, prefill_ms, steps, (2,) * len(steps))

    speed = Speed.of([run_of(10.0, 1, 2), run_of(20.0, 4), run_of(40.0, 8, 8)])
    assert (speed.prefill_tok_s, speed.ttft_ms) == (500, 21)
    assert (speed.decode_tok_s, speed.ms_per_token) == (500, 2)


def test_with_drafts_all_tokens_count_over_all_the_time():
    """The median step is one of many tokens, or of one: neither is the speed."""
    drafted = {"drafted": 9, "accepted": 7}
    runs = [
        Timings(10, 2.0, 1.0, (10**6, 2 * 10**6, 10**6), (1, 8, 1), **drafted),
        Timings(10, 2.0, 1.0, (10**6, 10**6), (1, 1)),
        Timings(10, 2.0, 1.0, (4 * 10**6, 10**6), (9, 1), **drafted),
    ]
    assert [run.overall_tok_s for run in runs] == [2500, 1000, 2000]
    speed = Speed.of(runs)
    assert (speed.decode_tok_s, speed.ms_per_token) == (2000, 0.5)
    assert Timings(10, 2.0, 1.0, (), ()).overall_tok_s is None


def test_the_record_says_what_was_guessed(model, monkeypatch):
    def propose(self, sequences, running):
        return {row: [5, 6][: sequences[row].room - 1] for row in running}

    monkeypatch.setattr(Drafting, "propose", propose)
    output = invoke("run", "--speculate", "ngram", "--new-tokens", "9", "--repeats", "2")
    record = record_of(output)
    assert record.speculate == "ngram" and record.drafted > record.accepted >= 0
    assert record.drafted % 2 == 0  # the same in both repeats
    shown = " ".join(output.replace("│", " ").split())
    assert f"drafts {record.accepted} of {record.drafted} tokens right" in shown
    assert "decode, overall" in shown
    record = record_of(invoke("run", "--new-tokens", "3"))
    assert (record.speculate, record.drafted, record.accepted) == (None, None, None)


def test_what_cannot_be_held_is_one_sentence(model, monkeypatch):
    def lacks(*_):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(model.runtime, "new_cache", lacks)
    refused("there is not enough memory for this", "run", "--batch", 4000)
    refused("--batch", "run", "--batch", 10**24)
    refused("--threads", "run", "--threads", 10**14)


def test_eval_prints_the_protocol_and_the_record(model, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("some words to predict, again and again. " * 4)
    output = invoke(
        *("eval", "any", "--text", str(text), "--window", "32", "--count", "4"),
        *("--against", "other", "--drop", "1", "--json", str(file)),
    )
    result = Evaluation.load(file)
    assert Evaluation.from_json(json.loads(output.splitlines()[-1]), "stdout") == result
    assert (result.windows, result.window, result.bos) == (4, 32, False)
    shown = " ".join(output.replace("│", " ").split())
    assert "4 windows of 32, without BOS" in shown and "KL from the whole model 0.00000" in shown
    assert [
        (ref, options["drop"] if "drop" in options else None) for ref, _, options in model.opened
    ] == [
        ("any", "1"),
        ("other", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "", "--raw"), "the prompt is empty"),
        (("--prompt", "a", "--prompt-tokens", "3"), "exclude each other"),
        (("--prompt-file", "/nowhere/prompt.txt"), "/nowhere/prompt.txt"),
        (("--json", "/nowhere/out.json"), "/nowhere/out.json: there is no directory"),
        (
            ("--compare", "vllm"),
            "--compare knows llama.cpp, ik, openvino, transformers, not 'vllm'",
        ),
        (("--compare", "ik,"), "not ''"),
        (("--compare", "ik", "--peer-python", "openvino=python3"), "with a name of --compare"),
        (("--compare", "ik", "--peer-python", "ik"), "expected NAME=PATH"),
        (("--compare", "transformers", "--temperature", "1"), "needs greedy decoding"),
        (("--temperature", "nan"), "temperature must be"),
        (("--top-p", "1.5"), "top_p must be a number from 0 to 1, not 1.5"),
        (("--prompt-tokens", "300"), "300 tokens; the model's context holds 256"),
        (("--prompt-tokens", "9" * 20), "tokens; the model's context holds 256"),
        (("--prompt-tokens", "3", "--chat"), "--chat: has no effect with --prompt-tokens"),
        (("--peer-python", "ik=python3"), "--peer-python: has no effect without --compare"),
        (("--top-k", "3"), "--top-k: has no effect at --temperature 0"),
        (("--temperature", "0", "--seed", "3"), "--seed: has no effect at --temperature 0"),
        (("--breakdown",), "--breakdown: the backend fake cannot tell"),
        (("--breakdown", "--new-tokens", "1"), "--breakdown needs --new-tokens of at least 2"),
        (("--new-tokens", "250"), "exceed the model's context of 256"),
        (("--stop", ""), "stop takes strings"),
    ],
)
def test_refusals(arguments, says, model):
    with pytest.raises(InputError) as error:
        invoke("run", *arguments)
    assert says in str(error.value)


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("engine.run", "--model", "/nowhere/model.gguf"),
        ("engine.run", "--backend", "abacus"),
        ("engine.cli", "eval", "any", "--text", "/nowhere/text.txt"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(arguments):
    done = command_line(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("engine: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", [InputError, BackendUnavailable])
def test_what_the_user_can_mend_has_no_traceback(kind, capfd):
    def app(standalone_mode):
        raise kind("no such thing")

    with pytest.raises(SystemExit) as stopped:
        output.execute(app)
    assert stopped.value.code == 2 and capfd.readouterr().err == "engine: no such thing\n"


def test_a_gpu_without_enough_memory_is_one_line(capfd):
    def app(standalone_mode):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    with pytest.raises(SystemExit) as stopped:
        output.execute(app)
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(
        "engine: this needs more memory than the GPU has free (2.00 GiB at once)"
    )


def test_a_fault_of_the_engine_is_not_hidden():
    def app(standalone_mode):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        output.execute(app)


def test_help_imports_nothing_heavy():
    code = "import sys, engine.cli, engine.run; print(*{'torch', 'rich.table'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == ""
    assert "--prompt-tokens" in command_line("engine.run", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--new-tokens", "0"], "'--new-tokens'"),
        (["run", "--nothing"], "No such option:? '?--nothing"),
        (["eval"], "Missing argument"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_options_that_cannot_be_read_are_one_line(arguments, sentence):
    done = command_line("engine.cli", *arguments)
    assert done.returncode == 2
    assert re.search(sentence, done.stderr) and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_a_peer_that_ends_early(count, model):
    options = Options(max_new_tokens=6)
    ids = generate(model.runtime, model.text, ["abc"], options)[0].token_ids[:count]
    times = Timings(3, 1.0, 1.0, (1,), (1,))
    peer = SimpleNamespace(name="other", version="1", setting={})
    peer.generate = lambda *_: ([list(ids)], times)
    (found,) = benchmark(model, "abc", options, name="m", load_ms=1.0, peers=[peer]).compare
    assert found["same_tokens"] == count and found["agreement"] == bool(count)


@pytest.mark.parametrize(("given", "field", "value"), [
    (("--stop", "x"), "stop", ("x",)),
    (("--repetition-penalty", 1.3), "repetition_penalty", 1.3),
    (("--ignore-eos",), "ignore_eos", True),
    (("--temperature", 1, "--min-p", 0.1), "min_p", 0.1),
    (("--temperature", 1, "--top-p", 0.9), "top_p", 0.9),
    (("--temperature", 1, "--top-k", 3), "top_k", 3),
])  # fmt: skip
def test_what_is_asked_for_reaches_the_draw(given, field, value, model, monkeypatch):
    seen, real = [], speed.generate
    monkeypatch.setattr(
        speed, "generate", lambda *asked, **more: seen.append(asked[3]) or real(*asked, **more)
    )
    invoke("run", "--new-tokens", "2", *map(str, given))
    assert {getattr(options, field) for options in seen} == {value}


def test_a_prompt_in_a_file(model, tmp_path):
    (tmp_path / "prompt.txt").write_text("hello")
    asked = "run", "--new-tokens", "7"
    from_file = invoke(*asked, "--prompt-file", str(tmp_path / "prompt.txt"))
    assert from_file.split("\n")[0] == invoke(*asked, "--prompt", "hello").split("\n")[0]
