"""`engine push` against a stub of the hub's API: one commit, the card, what goes wrong."""

import pytest
from support import hub as stub
from support.commands import call, refused
from support.exported import packed_model

from engine.artifacts import Evaluation, HealRecord, Plan
from engine.judgement import Judgement
from engine.scratch import MARKER

REPO = "org/shallower"


def plan(keep: tuple[int, ...], total: int) -> Plan:
    return Plan(
        "org/whole",
        "a",
        "b",
        total,
        keep,
        "greedy",
        None,
        (),
        profile=None,
        text_hash=None,
        note="",
    )


def judged(path, kept: int, perplexity_nll: float):
    from engine.judgement import BUILT_IN

    one = Evaluation.from_json(
        {
            "kind": "evaluation", "version": 1, "model": path.stem, "layers": f"0-{kept - 1}",
            "layers_kept": kept, "layers_total": 4, "rule": None, "perplexity": 20.0,
            "nll": perplexity_nll, "tokens": 10, "windows": 1, "window": 11, "bos": False,
            "text_hash": "x",
        },
        "here",
    )  # fmt: skip
    Judgement.of({BUILT_IN: one}).save(path)
    return path


@pytest.fixture
def model(source, rng, tmp_path):
    packed_model(source("llama"), tmp_path / "packed", rng, drop=(2,), group=16)
    plan((0, 1, 3), 4).save(tmp_path / "packed" / "plan.json")
    return tmp_path / "packed"


@pytest.fixture
def endpoint(monkeypatch):
    """A function that has the hub's library speak to an address, whose settings it read before."""
    from huggingface_hub import constants

    def speak(url: str) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_stub")
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return speak


@pytest.fixture
def hub(endpoint):
    with stub.serving() as hub:
        endpoint(hub.url)
        yield hub


def test_one_commit_of_every_file_and_a_card(model, hub, tmp_path):
    records = [judged(tmp_path / "whole.json", 4, 3.0), judged(tmp_path / "cut.json", 3, 3.5)]
    options = [each for record in records for each in ("--record", record)]
    files = list(model.iterdir())
    (model / "cache").mkdir()
    for name in (MARKER, ".hidden", "README.md"):  # of a run that was killed, and the card of old
        (model / name).write_text("{}")
    code, said, err = call("push", model, REPO, "--license", "apache-2.0", "--private", *options)
    assert code == 0, err
    assert f"{REPO}: 3 layers" in said
    found = hub.repos[REPO]
    assert found.keys() == {path.name for path in files} | {"README.md"}
    for path in files:
        assert found[path.name] == path.read_bytes(), path.name
    assert len(hub.commits) == 1 and hub.visibility[REPO] == "private"
    text = found["README.md"].decode()
    assert text.startswith("---\nlicense: apache-2.0\n") and "base_model: org/whole" in text
    assert "without layers 2 (numbered from 0, inclusive): 3 of 4 stay" in text
    assert "4 bits, group 16, symmetric" in text and "`greedy`" in text
    assert "| whole | 4 of 4 | 20.09 |" in text and "| cut | 3 of 4 | 33.12 |" in text


def test_a_new_repository_is_by_default_as_its_owner_has_them(model, hub):
    assert call("push", model, REPO, "--license", "mit")[0] == 0
    assert hub.visibility[REPO] is None


def test_what_goes_wrong_is_one_sentence(model, hub):
    hub.fail = 403
    refused(f"{REPO}: the Hugging Face hub: ", "push", model, REPO, "--license", "mit")
    assert not hub.repos and not hub.commits


def test_a_hub_that_is_not_reached(model, endpoint):
    endpoint("http://127.0.0.1:9")  # nothing listens there
    refused(f"{REPO}: the Hugging Face hub: ", "push", model, REPO, "--license", "mit")


def test_refusals_come_before_the_hub(model, tmp_path):
    refused("expected a directory or a .gguf file", "push", tmp_path / "nothing", REPO)
    refused("the licence of org/whole is not known", "push", model, REPO)
    plan((0, 1), 4).save(tmp_path / "other.json")
    refused("keeps 2 layers", "push", model, REPO, "--plan", tmp_path / "other.json")
    record = judged(tmp_path / "other_model.json", 4, 3.0)
    refused(
        "the last record is of 4 layers",
        "push",
        model,
        REPO,
        "--license",
        "mit",
        "--record",
        record,
    )


def test_the_card_alone(source):
    whole = source("llama")
    (whole.path / "README.md").write_text("---\nlicense: mit\n---\n")
    code, out, _ = call("push", whole.path, REPO, "--card")
    assert code == 0 and "license: mit" in out
    assert f"\n{len(whole.config.layers)} layers, matrices as float32" in out


@pytest.mark.parametrize(
    ("methods", "steps", "said"),
    [
        (("linear",), 0, "Healed by linear from `org/whole`: perplexity on held-out text 9.00"),
        (("linear", "distil"), 7, "by linear, distil (7 steps, 0.4 minutes) from `org/whole`"),
    ],
)
def test_what_was_fitted_took_no_steps(methods, steps, said, model):
    record = HealRecord(
        "org/whole", "org/whole", "b", 4, (0, 1, 3), methods, {}, steps=steps, best_step=steps,
        minutes=steps / 18, stopped="", losses=(), checks=(), perplexity_before=9.0,
        perplexity_after=8.0, text_hash="t", seed=0,
    )  # fmt: skip
    record.save(model / "heal.json")
    code, card, err = call("push", model, REPO, "--card", "--license", "mit")
    assert code == 0, err
    assert said in card and "8.00 after" in card


@pytest.mark.parametrize("licence", ["mit\nfoo: bar", "a: b #c", "", "-"])
def test_a_licence_is_one_word(licence, model):
    refused("license: expected one word, like apache-2.0, found", "push", model, REPO, "--card",
            "--license", licence)  # fmt: skip


def test_records_write_no_markdown_of_their_own(model, tmp_path):
    record = judged(tmp_path / "cut.json", 3, 3.0)
    record.write_text(record.read_text().replace('"model": "cut"', '"model": "a | b\\n\\n# Two"'))
    code, said, err = call("push", model, REPO, "--card", "--license", "mit", "--record", record)
    assert code == 0, err
    assert r"| a \| b # Two | 3 of 4 |" in said and "\n# Two" not in said


def test_an_adapter_whose_base_would_not_be_beside_it(model):
    (model / "adapter_config.json").write_text("{}")
    refused("packed: an adapter, whose base the hub would not hold", "push", model, REPO, "--card",
            "--license", "mit")  # fmt: skip


def test_records_of_other_texts_do_not_share_a_table(model, tmp_path):
    whole, other = (
        judged(tmp_path / f"{name}.json", kept, 3.0) for name, kept in (("a", 4), ("b", 3))
    )
    other.write_text(other.read_text().replace('"text_hash": "x"', '"text_hash": "y"'))
    refused("b: its record is of other texts or windows than a's", "push", model, REPO, "--card",
            "--license", "mit", "--record", whole, "--record", other)  # fmt: skip
