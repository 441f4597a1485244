"""The adapter to lm-evaluation-harness against its own `hf` model, on a task in a local file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.errors import InputError

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{{context}}}}}"
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: {metric}}}]
{more}
"""


def spelled(number: int) -> str:
    return f"<{number}>" if number < 3 else f"w{number}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lm_eval")
    tiny.write("llama", directory / "model", seed=3, num_hidden_layers=4)
    vocabulary = {spelled(number): number for number in range(tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=spelled(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "model" / "tokenizer.json"))
    ends = dict(zip(("pad_token", "bos_token", "eos_token"), map(spelled, range(3)), strict=True))
    told = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends})
    directory.joinpath("model", "tokenizer_config.json").write_text(told)
    return directory / "model"


@pytest.fixture
def tasks(rng, tmp_path, monkeypatch):
    """A folder of tasks: choices, a text longer than the context, generation."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def words(count: int) -> str:
        numbers = torch.randint(3, tiny.VOCAB, (count,), generator=rng).tolist()
        return " ".join(map(spelled, numbers))

    rows = [
        {
            "question": words(5 + i),
            "choices": [words(1 + i % 3), words(3), words(2)],
            "answer": i % 3,
        }
        for i in range(9)
    ]
    rows.append({"question": words(300), "choices": [words(2), words(2)], "answer": 0})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    folder.joinpath("choices.yaml").write_text(CHOICES.format(file=file))
    until = "generation_kwargs: {until: [w7], max_gen_toks: 12}"
    kinds = {
        "rolling": ("loglikelihood_rolling", "''", "bits_per_byte", ""),
        "said": ("generate_until", "question", "exact_match", until),
    }
    for name, (kind, context, metric, more) in kinds.items():
        text = TEXT.format(file=file, kind=kind, context=context, metric=metric, more=more)
        folder.joinpath(f"{name}.yaml").write_text(text.replace("local_text", f"local_{name}"))
    return folder


def run(model, tasks, names):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, batch_size=4
    )


def responses(result, name) -> list:
    rows = sorted(result["samples"][name], key=lambda row: row["doc_id"])
    return [row["resps"] for row in rows]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_its_hf_model(backend, model, tasks):
    from lm_eval.models.huggingface import HFLM

    from engine.lm_eval import ShallowLM

    names = ["local_choices", "local_rolling", "local_said"]
    own = ShallowLM(pretrained=str(model), backend=backend, dtype="float32", batch_size=4)
    peer = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    ours, theirs = (run(each, tasks, names) for each in (own, peer))
    for left, right in zip(*(responses(r, names[0]) for r in (ours, theirs)), strict=True):
        for (a, greedy), (b, expected) in zip(
            [x[0] for x in left], [x[0] for x in right], strict=True
        ):
            assert a == pytest.approx(b, abs=1e-3) and greedy == expected
    for a, b in zip(*(responses(r, names[1]) for r in (ours, theirs)), strict=True):
        assert a[0][0] == pytest.approx(b[0][0], abs=1e-2)  # of up to 300 tokens
    assert responses(ours, names[2]) == responses(theirs, names[2])
    assert ours["results"][names[0]]["acc,none"] == theirs["results"][names[0]]["acc,none"]


def test_by_its_command_with_layers_dropped(model, tasks, tmp_path):
    from engine.lm_eval import ShallowLM

    command = [
        sys.executable, "-m", "engine.lm_eval", "run", "--model", "shallow",
        "--model_args", f"pretrained={model},dtype=float32,drop=1-2",
        "--tasks", "local_choices", "--include_path", str(tasks),
        "--output_path", str(tmp_path / "found"), "--log_samples", "--limit", "2",
        "--trust_remote_code",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = next(tmp_path.joinpath("found").rglob("samples*.jsonl")).read_text().splitlines()
    own = ShallowLM(pretrained=str(model), dtype="float32", drop="1-2")
    expected = responses(run(own, tasks, ["local_choices"]), "local_choices")
    said = [json.loads(row)["resps"] for row in rows]
    assert len(said) == 2
    for left, right in zip(said, expected, strict=False):
        assert [float(x[0][0]) for x in left] == pytest.approx([x[0][0] for x in right], abs=1e-3)
    command[command.index("--model_args") + 1] = f"pretrained={tmp_path / 'absent'}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "absent" in done.stderr


def test_generation_is_what_a_task_asks_for(model):
    from engine.lm_eval import ShallowLM

    own = ShallowLM(pretrained=str(model))
    made = own._options({"until": ["w7"], "max_gen_toks": 5, "repetition_penalty": 1.5})
    assert (made.temperature, made.repetition_penalty, made.stop) == (0, 1.5, ("w7",))
    torch.manual_seed(3)
    first = own._options({"do_sample": True, "top_k": 4, "num_beams": 1})
    torch.manual_seed(3)
    assert own._options({"do_sample": True, "top_k": 4}) == first
    assert (first.temperature, first.top_k) == (1.0, 4) and first.seed is not None
    assert own._options({"do_sample": True}).seed != first.seed
    assert own._options({"temperature": 0.5, "top_p": 0.9}).top_p == 0.9
    assert own._options({"do_sample": False, "top_p": 0.9}).temperature == 0
    for name, value in (("temperature", "warm"), ("max_gen_toks", "all"), ("max_tokens", [3])):
        with pytest.raises(InputError, match=f"gen_kwargs: expected numbers .*, found .*{name}"):
            own._options({name: value})
    for name, value in (("num_beams", 4), ("typo_p", 0.3)):
        with pytest.raises(InputError, match=f"gen_kwargs: '{name}' is not known"):
            own._options({"do_sample": True, name: value})


def test_a_context_keeps_the_last_tokens_that_fit(model, monkeypatch):
    from engine import lm_eval

    seen = []

    def told(runtime, text, contexts, options):
        seen.extend(contexts)
        return [SimpleNamespace(text="")] * len(contexts)

    monkeypatch.setattr(lm_eval, "generate", told)
    own = lm_eval.ShallowLM(pretrained=str(model), max_length=20)
    words = " ".join(map(spelled, range(3, 43)))
    for length, room in ((12, 8), (19, 1)):
        own.generate_until(
            [SimpleNamespace(args=(words, {"until": ["w7"], "max_gen_toks": length}))]
        )
        assert seen.pop() == list(range(43 - room, 43))
    with pytest.raises(InputError, match="max_gen_toks: 20 leave no room in a context of 20"):
        own.generate_until([SimpleNamespace(args=(words, {"until": ["w7"], "max_gen_toks": 20}))])


@pytest.mark.parametrize("case", ["llama-dynamic", "phi3-longrope"])
def test_what_is_written_does_not_depend_on_others(case, model, rng, tmp_path):
    """Of a batch the longest would turn all rotations."""
    from engine.lm_eval import ShallowLM

    tiny.write(case, tmp_path / "model", int(torch.randint(2**31, (1,), generator=rng)))
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    own = ShallowLM(pretrained=str(tmp_path / "model"), dtype="float32", batch_size=8)
    told = {"until": ["<2>"], "max_gen_toks": 12}
    asked = []
    for count in (60, *range(5, 12)):
        numbers = torch.randint(3, tiny.VOCAB, (count,), generator=rng).tolist()
        asked.append(SimpleNamespace(args=(" ".join(map(spelled, numbers)), told)))
    alone = [own.generate_until([each])[0] for each in asked]
    assert own.generate_until(asked) == alone


def test_a_text_begins_as_with_its_hf_model(model, tasks, tmp_path):
    """Where there is no BOS: with the tokenizer's own end, not the least of several."""
    from lm_eval.models.huggingface import HFLM

    from engine.lm_eval import ShallowLM

    shutil.copytree(model, tmp_path / "model")
    said = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    said = {key: value for key, value in said.items() if key != "bos_token"}
    name = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    end = next(token for token, index in name.items() if index == 9)
    said |= {"eos_token": end, "add_bos_token": False}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(said))
    for file in ("generation_config.json", "config.json"):
        path = tmp_path / "model" / file
        given = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(given | {"eos_token_id": [9, 5], "bos_token_id": None}))
    own = ShallowLM(pretrained=str(tmp_path / "model"), dtype="float32")
    peer = HFLM(pretrained=str(tmp_path / "model"), dtype="float32", device="cpu")
    assert own.prefix_token_id == peer.prefix_token_id == 9
    ours, theirs = (run(each, tasks, ["local_rolling"]) for each in (own, peer))
    for a, b in zip(*(responses(r, "local_rolling") for r in (ours, theirs)), strict=True):
        assert a[0][0] == pytest.approx(b[0][0], abs=1e-2)


def test_an_empty_text_has_no_likelihood(model):
    from engine.lm_eval import ShallowLM

    own = ShallowLM(pretrained=str(model), dtype="float32")
    one, none = own.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in ("w5 w6", "")])
    assert one < 0 and none == 0


def test_a_blank_context_is_an_empty_one(model):
    """Also among others, where it was scored behind what nothing had predicted."""
    from engine.lm_eval import ShallowLM

    own = ShallowLM(pretrained=str(model), dtype="float32")
    own.add_bos_token = False
    pairs = [(" ", "w5 w6"), ("w8 w9", " w5"), ("", "w5 w6")]
    asked = [SimpleNamespace(args=pair) for pair in pairs]
    (blank, _, empty), (alone,) = own.loglikelihood(asked), own.loglikelihood(asked[:1])
    assert blank[0] == pytest.approx(empty[0], abs=1e-4)
    assert alone[0] == pytest.approx(empty[0], abs=1e-4)


def test_without_lm_eval_its_command_says_what_to_install(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError")
    places = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "engine.lm_eval", "run"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": places},
        check=False,
    )
    said = "engine.lm_eval: lm-eval is not installed: pip install 'lm-eval>=0.4.10'\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_its_command_is_one_of_ours(model):
    """A refusal is a sentence, and an interrupt ends it without a traceback."""
    words = [sys.executable, "-m", "engine.lm_eval", "run", "--model", "shallow", "--model_args"]
    args = f"pretrained={model},foo=1"
    done = subprocess.run(
        [*words, args, "--tasks", "arc_easy"], capture_output=True, text=True, check=False
    )
    said = "engine: model_args: 'foo' is not known"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(said), done.stderr
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(os.listdir(f"/proc/{started.pid}/task")) < 2:  # its imports take seconds
        time.sleep(0.005)
    started.send_signal(signal.SIGINT)
    assert (started.communicate(timeout=60)[1], started.returncode) == (b"", 130)


def test_a_length_beyond_the_context_is_cut_with_a_warning(model, caplog):
    from engine.lm_eval import ShallowLM

    own = ShallowLM(pretrained=str(model), max_length=1 << 30)
    assert own.max_length == own.opened.config.max_context
    assert "max_length: 1073741824 becomes" in caplog.text
    assert ShallowLM(pretrained=str(model), max_length=16).max_length == 16


def test_an_instruction_set_is_chosen(model):
    from engine.lm_eval import ShallowLM

    own = ShallowLM(pretrained=str(model), backend="cpu", isa="generic")
    assert own.opened.runtime.isa == "generic"


def test_refusals(model):
    from engine.lm_eval import ShallowLM

    with pytest.raises(InputError, match="isa: expected one of .*, found 'avx9'"):
        ShallowLM(pretrained=str(model), backend="cpu", isa="avx9")
    with pytest.raises(InputError, match="model_args: 'foo' is not known"):
        ShallowLM(pretrained=str(model), trust_remote_code=True, foo=1)
    with pytest.raises(InputError, match="plan excludes drop"):
        ShallowLM(pretrained=str(model), plan="plan.json", drop="1")
    with pytest.raises(InputError, match="batch_size: expected a number of at least 1, found auto"):
        ShallowLM(pretrained=str(model), batch_size="auto")
    with pytest.raises(InputError, match="max_length: expected at least 2 tokens, found -5"):
        ShallowLM(pretrained=str(model), max_length=-5)
    for count in (0, "all"):
        with pytest.raises(InputError, match=f"max_gen_toks: expected at least 1 .* {count!r}"):
            ShallowLM(pretrained=str(model), max_gen_toks=count)
    with pytest.raises(InputError, match="device: expected one like 'cpu' .*, found 'mps'"):
        ShallowLM(pretrained=str(model), device="mps")
    with pytest.raises(InputError, match="layer 9 is out of range"):
        ShallowLM(pretrained=str(model), drop=9)
