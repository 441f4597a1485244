"""What the studies of benchmarks/ (heal, quality, llama_quantizers, plans) write and take up."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import heal
import llama_quantizers
import pages
import plans
import pytest
import quality
import speculation
import torch
import work

from engine.errors import InputError
from engine.reference.decoder import load_decoder


@dataclass
class Found:
    share: float


def ended(module, monkeypatch, *arguments) -> int:
    """The exit code of the script."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        module.main()
    return end.value.code


def test_a_study_is_of_one_model_and_one_set_of_options(source, tmp_path):
    model, place = str(source("llama").path), tmp_path / "work"
    options = {"model": model, "windows": 3}  # an option of that name hides no model
    for _ in range(2):
        work.begin(place, model, options)
    with pytest.raises(InputError, match="another model or with other options"):
        work.begin(place, model, options | {"windows": 4})
    weights = next(Path(model).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(InputError, match="another model or with other options"):
        work.begin(place, model, options)
    with pytest.raises(InputError, match="expected an empty directory"):
        work.begin(Path(model), model, options)
    with pytest.raises(InputError):
        work.begin(weights, model, options)


@pytest.mark.parametrize("damage", [None, b"", b"{", b"\xff", b"[1]", b'{"other": 1}'])
def test_what_is_damaged_is_made_again(damage, tmp_path):
    file = tmp_path / "row.json"
    if damage is not None:
        file.write_bytes(damage)
    assert work.kept(file, Found, lambda: Found(0.5)) == Found(0.5)
    assert work.kept(file, Found, lambda: pytest.fail("it is there")) == Found(0.5)


@pytest.mark.parametrize(("there", "before"), [(None, 0), (b"", 0), (b"\xff", 0), (b"7.5", 7.5)])
def test_seconds_go_on(there, before, tmp_path):
    file, clock = tmp_path / "a.seconds", iter([10.0, 12.0])
    if there is not None:
        file.write_bytes(there)
    with pytest.raises(KeyboardInterrupt), work.clocked(file, lambda: next(clock)):
        raise KeyboardInterrupt
    assert work.seconds(file) == before + 2


@pytest.mark.parametrize("model", ["smollm2-135m", "another"])
@pytest.mark.parametrize(
    ("name", "title", "heading", "about"),
    [
        ("plans.md", plans.TITLE, plans.TITLE, "{}, "),
        ("quality.md", quality.TITLE, quality.TITLE, "`{}` "),
        ("quality.md", quality.TITLE, f"{llama_quantizers.HEADING}, off-grid", "`{}`, "),
    ],
)
def test_pages_keep_what_is_written_by_hand(name, title, heading, about, model, tmp_path):
    recorded = (plans.RESULT.parent / name).read_text()
    page = tmp_path / name
    page.write_text(recorded)
    generated, _, by_hand = pages.sections(page, title)[heading].partition(pages.BY_HAND)
    others = pages.sections(page, title)
    about = about.format(model)
    for _ in range(2):
        pages.put(page, title, heading, f"{about}a table", about)
        found = pages.sections(page, title)
        made, _, kept = found[heading].partition(pages.BY_HAND)
        assert made.strip() == f"{about}a table" and by_hand.strip() in kept
        assert (generated.strip() in kept) == (model == "another")
        for other in others.keys() - {heading}:
            assert found[other].strip() == others[other].strip()


def test_a_page_of_another_kind_is_refused_first(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Notes\n\nmine\n")
    for module, given in ((plans, ()), (quality, (tmp_path / "work",))):
        assert ended(module, monkeypatch, *given, "--out", page) == 2
        assert "expected a page of ours" in capsys.readouterr().err
    assert page.read_text() == "# Notes\n\nmine\n" and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("module", "option"),
    [(quality, "--samples"), (plans, "--windows"), (plans, "--judged"), (heal, "--windows")],
)
def test_a_count_of_none_is_refused(module, option, tmp_path, monkeypatch, capsys):
    for count in ("0", "-1"):
        assert ended(module, monkeypatch, tmp_path / "w", option, count) == 2
        assert f"argument {option}: expected at least 1" in capsys.readouterr().err


def test_llama_cpp_is_looked_for_before_the_work(tmp_path, monkeypatch, capsys):
    for module in (quality, llama_quantizers):
        assert ended(module, monkeypatch, tmp_path / "work", "--llama", tmp_path) == 2
        assert "libggml-base.so: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def logits(checkpoint) -> torch.Tensor:
    decoder = load_decoder(checkpoint, checkpoint.config)
    cache = decoder.new_cache(1, 8)
    return decoder.forward(torch.arange(3, 11)[None], cache)


def test_off_the_grid_the_function_stays(source, tmp_path, monkeypatch):
    """Also after a kill, which leaves weights that are rescaled and do not lie in their place."""
    checkpoint = source("llama", num_hidden_layers=2)
    llama_quantizers.check_rescalable(checkpoint)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llama_quantizers.off_grid(checkpoint, tmp_path / "plain")
    monkeypatch.setattr(Path, "rename", rename)
    found = llama_quantizers.off_grid(checkpoint, tmp_path / "plain")
    once = {name: found.read(name) for name in found.names()}
    assert (logits(found) - logits(checkpoint)).abs().max() < 1e-4
    again = llama_quantizers.off_grid(checkpoint, tmp_path / "other")
    assert all(torch.equal(again.read(name), once[name]) for name in once)


@pytest.mark.parametrize("case", ["llama-biased-tied", "phi3"])
def test_others_are_not_rescaled(case, source):
    with pytest.raises(InputError, match="takes a Llama without biases, found a "):
        llama_quantizers.check_rescalable(source(case))


class Cells:
    """`engine` in the study of healing: every command takes a second, and leaves what it is for."""

    def __init__(self) -> None:
        self.now, self.words = 0.0, list[tuple]()

    def __call__(self, study, *words) -> dict:
        self.now += 60
        self.words.append(words)
        if words[0] in ("heal", "quantize"):
            Path(words[2]).mkdir()
        if words[0] in ("profile", "plan"):
            Path(words[words.index("--out") + 1]).touch()
        return {"decode_tok_s": 3.0}


@pytest.fixture
def study(source, tmp_path, monkeypatch):
    """Runs heal.py with these options beside the usual ones; everything but healing is made up."""
    for name in ("train.txt", "text.txt", "choices.jsonl"):
        (tmp_path / name).touch()
    given = [tmp_path / "work", "--model", source("llama").path, "--out", tmp_path / "heal.json"]
    for option in ("train", "text", "choices"):
        given += [f"--{option}", next(tmp_path.glob(f"{option}.*"))]
    cells = Cells()
    judged = {"texts": {"text.txt": {"perplexity": 2.0}}, "perplexity": 2.0}
    answers = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "probability"), 0.5)
    monkeypatch.setattr(heal.Study, "engine", lambda *words: cells(*words))
    monkeypatch.setattr(heal.Study, "judged", lambda *_: judged | {"choices": answers})
    monkeypatch.setattr(heal.time, "monotonic", lambda: cells.now)
    monkeypatch.setattr(heal.Plan, "load", lambda _: type("", (), {"drop": (1,)}))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["heal.py", *map(str, [*given, *options])])
        heal.main()
        return {(c["dropped"], c["method"]): c for c in json.loads(given[4].read_text())}

    return run


def test_minutes_are_of_healing_alone(study):
    last = heal.METHODS[-1]
    cells = study("--only", f"3:{last}", "--only", "0:no healing")
    assert cells[3, last]["minutes"] == 1 and cells[0, "no healing"]["minutes"] == 0
    cells = study("--only", "3:distil", "--only", "3:linear")
    assert cells[3, "distil"]["minutes"] == cells[3, "linear"]["minutes"] == 1


def test_cells_that_there_are_none_of(study, tmp_path, capsys):
    for name in ("4:distil", "3:distill", "0:distil"):
        with pytest.raises(SystemExit) as end:
            study("--only", name)
        assert end.value.code == 2 and f"invalid choice: '{name}'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("text", ["", "[3]", '[{"dropped": 3}]', "\udcff"])
def test_a_damaged_record_of_cells(text, study, tmp_path, capsys):
    (tmp_path / "heal.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as end:
        study()
    assert end.value.code == 2 and "is no record of healing" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_child_that_fails_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="engine plan: ended with exit code 2"):
        heal.Study.engine(None, "plan", "nowhere.json")


def test_drafts_are_timed_on_the_cpu(monkeypatch, capsys):
    """Where there is a GPU too, whose back ends take no --isa."""

    def load(model, **options):
        assert options["backend"] == "cpu"
        raise InputError("no model")

    monkeypatch.setattr(speculation.engine, "load", load)
    assert ended(speculation, monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err == "engine: no model\n" and not captured.out
