"""Hub ids: what is asked of huggingface-hub, and what it may answer."""

import os
import subprocess
import sys

import pytest

from engine.checkpoint import fetch as fetching
from engine.checkpoint.locate import locate
from engine.errors import InputError

REPOSITORY = (
    *("config.json", "model.safetensors", "pytorch_model.bin", "model.ckpt", "model.onnx"),
    *("consolidated.safetensors", "onnx/model.safetensors", "original/params.json"),
    *("tokenizer.model", "chat_template.jinja", "README.md", "evil.py", "model.Q4_K_M.gguf"),
)


@pytest.fixture(autouse=True)
def away_from_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface-hub whose downloads are a function of the test's choosing; the calls made."""
    import huggingface_hub
    from huggingface_hub import constants

    calls = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # where it is set here

    def serve(answer):
        def download(repo, *file, **options):
            calls.append((repo, *file, options))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return calls

    return serve


def test_a_hub_model_without_pickles(hub, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "model.safetensors").write_bytes(b"")
    calls = hub(tmp_path)
    assert locate("org/some-model_1.5") == tmp_path
    repo, options = calls[0]
    assert repo == "org/some-model_1.5"
    assert list(filter_repo_objects(REPOSITORY, **options)) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
    ]


def test_a_gguf_on_the_hub(hub, tmp_path):
    calls = hub(tmp_path / "x.gguf")
    assert locate("org/name:x.gguf") == tmp_path / "x.gguf"
    assert calls == [("org/name", "x.gguf", {})]


def test_a_hub_model_without_safetensors(hub, tmp_path):
    hub(tmp_path)
    with pytest.raises(InputError, match="no safetensors; name a GGUF file as org/name:FILE.gguf"):
        locate("org/name")


def hub_errors():
    from huggingface_hub import errors

    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    return {
        "gated": (errors.GatedRepoError("no", response=response), "accept the terms at https"),
        "absent": (errors.RepositoryNotFoundError("no", response=response), "no such model on"),
        "offline": (errors.LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        "server": (errors.HfHubHTTPError("503 busy\nx", response=response), "hub: 503 busy$"),
        "disk": (OSError("disk full"), "hub: disk full"),
        "id": (errors.HFValidationError("bad id"), "hub: bad id"),
    }


@pytest.mark.parametrize("case", hub_errors())
def test_what_the_hub_says_is_one_sentence(case, hub):
    error, words = hub_errors()[case]
    hub(error)
    with pytest.raises(InputError, match=f"^org/name.*{words}"):
        locate("org/name")


def run_python(command: str, **environment: str) -> subprocess.CompletedProcess:
    root = fetching.__file__.removesuffix("engine/checkpoint/fetch.py")
    environment = os.environ | {"PYTHONPATH": root} | environment
    return subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )


def test_offline_and_not_cached(tmp_path):
    command = "from engine.checkpoint.locate import locate; locate('org/name')"
    ran = run_python(command, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in ran.stderr.splitlines()[-1]


def test_importing_is_light():
    ran = run_python(
        "import sys, engine.checkpoint.locate; "
        "print(set(sys.modules) & {'torch', 'huggingface_hub', 'rich', 'filelock'})"
    )
    assert ran.stdout.strip() == "set()"
