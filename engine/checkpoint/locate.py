"""From what a user types to a path: a directory, a .gguf file, a hub id, the default model."""

import os
import re
from pathlib import Path

from engine.checkpoint.fetch import DEFAULT, fetch
from engine.errors import InputError
from engine.scratch import check_name

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>.+\.gguf))?")
# Weights as safetensors, config, tokenizer; never pickles. "*/*" is whatever lies in a folder, and
# "consolidated" Mistral's second copy of its weights.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_UNWANTED = ("*/*", "consolidated*")


def locate(ref: str) -> Path:
    """A local path for `ref`, downloaded first if need be.

    `ref`: a Hugging Face directory; a .gguf file; "smollm2-135m", the default model; a hub id
    "org/name" (its safetensors) or "org/name:file.gguf", through huggingface-hub and its cache.

    Raises:
        InputError: there is no such thing, or it cannot be reached.
    """
    if ref == DEFAULT.name:
        return fetch(DEFAULT)
    check_name(ref)
    path = os.path.expanduser(ref)
    try:
        os.stat(os.path.join(path, "."))  # of a directory, which one must be let into, too
    except PermissionError as error:
        raise InputError(f"{ref}: {error.strerror}") from error
    except (OSError, ValueError):  # a file, or nothing
        pass
    if os.path.isdir(path) or (os.path.isfile(path) and path.endswith(".gguf")):
        return Path(path)
    if os.path.exists(path):
        raise InputError(f"{ref}: expected a Hugging Face directory or a .gguf file")
    hub_id = _HUB_ID.fullmatch(ref)
    if hub_id is None or _looks_like_path(ref, hub_id["file"]):
        raise InputError(
            f"{ref}: no such file or directory (other models: the default, {DEFAULT.name!r}, or a "
            "hub id 'org/name')"
        )
    return _from_hub(ref, hub_id["repo"], hub_id["file"])


def _looks_like_path(ref: str, file: str | None) -> bool:
    """True of "models/tiny.gguf" and of "models/tiny" where there is a directory "models"."""
    return (file is None and ref.endswith(".gguf")) or os.path.isdir(os.path.dirname(ref))


def _from_hub(ref: str, repo: str, file: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        path = huggingface_hub.snapshot_download(
            repo, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{ref}: access is restricted; accept the terms at https://huggingface.co/{repo} and "
            "log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{ref}: no such file or directory, and no such model on the Hugging Face hub"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise InputError(
            f"{ref}: no such file or directory, not in the hub's cache, and {why}"
        ) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise hub_refused(ref, error) from error
    if not any(Path(path).glob("*.safetensors")):
        raise InputError(
            f"{ref}: this hub model has no safetensors; name a GGUF file as {repo}:FILE.gguf"
        )
    return Path(path)


def hub_refused(ref: str, error: Exception) -> InputError:
    """What the hub says, or why it cannot be reached, in one line."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"{ref}: the Hugging Face hub: {reason[0]}")
