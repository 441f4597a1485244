"""Tokenizers from where checkpoints keep them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.checkpoint.files import open_regular
from engine.errors import InputError
from engine.text import spm
from engine.text.corpus import read_text_file
from engine.text.damage import tokenizer_errors
from engine.text.gguf import text_from_gguf
from engine.text.special import add_ends, add_special
from engine.text.text import Text

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load_text(path: str | Path) -> Text:
    """The tokenizer of a Hugging Face directory or of a .gguf file.

    A directory's tokenizer.json is taken as it is; without one, its sentencepiece tokenizer.model
    is converted. Raises InputError where there is neither, or what there is is damaged.
    """
    path = Path(path)
    with tokenizer_errors(path):
        if path.is_dir() and (path := tokenizer_path(path)).is_dir():
            return _from_directory(path)
        from engine.checkpoint.gguf_file import GgufFile

        return text_from_gguf(GgufFile(path).metadata, str(path))


def tokenizer_path(path: Path) -> Path:
    """Where a model's tokenizer lies: an adapter may have none but its base's."""
    from engine.checkpoint.adapter import base_path, is_adapter

    alone = not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return base_path(path) if alone and is_adapter(path) else path


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no such file."""
    try:
        with open_regular(path) as file:
            value = json.loads(file.read())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, found otherwise ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_tokenizer(path: Path) -> Tokenizer:
    with tokenizer_errors(path):
        open_regular(path).close()
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _entry(config: Mapping[str, Any], name: str, kinds: type | tuple, where: Path) -> Any:
    """`config[name]`, None where it is absent or null; InputError unless it is of `kinds`."""
    value = config.get(name)
    if value is not None and not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{where}: expected {name!r} of type {expected}, found {value!r:.80}")
    return value


def _added_token(value: Any, where: Path) -> AddedToken:
    """A token of a config file, which spells it as a string or with its flags."""
    try:
        if isinstance(value, str):
            return AddedToken(value, special=True, normalized=False)
        return AddedToken(**{key: x for key, x in value.items() if key != "__type"})
    except (AttributeError, TypeError) as error:
        raise InputError(f"{where}: expected a token, found {value!r:.80} ({error})") from error


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], where: Path) -> dict[str, str]:
    """Adds the tokens that only the config knows; returns the special ones that have a name."""
    listed = _entry(config, "added_tokens_decoder", dict, where) or {}
    if not all(index.isdecimal() for index in listed):
        raise InputError(f"{where}: expected ids in 'added_tokens_decoder', found {list(listed)}")
    for index, value in sorted(listed.items(), key=lambda item: int(item[0])):
        token = _added_token(value, where)
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != int(index):
            raise InputError(
                f"{where}: expected {token.content!r} at id {index}, found it at {found}"
            )
    named = {name: _added_token(config[name], where).content for name in _NAMED if config.get(name)}
    old_name = _entry(config, "additional_special_tokens", list, where) or []
    extra = _entry(config, "extra_special_tokens", (list, dict), where) or old_name
    extra = extra.values() if isinstance(extra, dict) else extra
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for content in [*named.values(), *(_added_token(value, where).content for value in extra)]:
        tokenizer.add_special_tokens([added.get(content) or AddedToken(content, normalized=False)])
    return named


def _eos_ids(path: Path, model: Mapping[str, Any]) -> set[int]:
    """What ends a generation, by generation_config.json or where that does not say by config.json
    (`model`): as the checkpoint has it (engine/checkpoint/safetensors.py)."""
    ids = _entry(_read_json(path / "generation_config.json"), "eos_token_id", (int, list), path)
    if ids is None:
        ids = _entry(model, "eos_token_id", (int, list), path)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(index, int) for index in ids):
        raise InputError(f"{path}: expected token ids under 'eos_token_id', found {ids}")
    return set(ids)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the one in the config, where several have names the default."""
    if (path / "chat_template.jinja").is_file():
        return read_text_file(path / "chat_template.jinja")
    template = _entry(config, "chat_template", (str, list), path)
    if not isinstance(template, list):
        return template
    for entry in template:
        match entry:
            case {"name": "default", "template": str(default)}:
                return default
            case {"name": str(), "template": str()}:
                pass
            case _:
                raise InputError(f"{path}: expected a named chat template, found {entry!r:.80}")
    return None


def _max_length(path: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> int | None:
    number = (int, float)
    limits = (
        _entry(config, "model_max_length", number, path),
        _entry(model, "max_position_embeddings", number, path),
    )
    # transformers writes 1e30 for "no limit"
    return min((int(n) for n in limits if n is not None and 0 < n < 1 << 40), default=None)


def _from_model(path: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a sentencepiece tokenizer.model, and its named special tokens."""
    vocabulary = spm.read_model(path / "tokenizer.model")
    if config.get("legacy") is False and vocabulary.prefix == "every":
        vocabulary = replace(vocabulary, prefix="first")
    with tokenizer_errors(path / "tokenizer.model"):
        tokenizer = spm.build(vocabulary)
    add_special(tokenizer, vocabulary.of_type(spm.CONTROL, spm.UNKNOWN))
    special = _add_tokens(tokenizer, {**vocabulary.special, **config}, path)
    add_bos, add_eos = (config.get(f"add_{end}_token") is True for end in ("bos", "eos"))
    add_ends(tokenizer, special, add_bos, add_eos, path)
    return tokenizer, special


def _from_directory(path: Path) -> Text:
    config, model = _read_json(path / "tokenizer_config.json"), _read_json(path / "config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(path / "special_tokens_map.json")
    native = (path / "tokenizer.json").exists()
    if native:
        tokenizer = _read_tokenizer(path / "tokenizer.json")
        special = _add_tokens(tokenizer, config, path)
    elif (path / "tokenizer.model").exists():
        tokenizer, special = _from_model(path, config)
    else:
        raise InputError(f"{path}: expected tokenizer.json or tokenizer.model, found neither")
    eos_ids = _eos_ids(path, model)
    if "eos_token" in special and (eos := tokenizer.token_to_id(special["eos_token"])) is not None:
        eos_ids.add(eos)
    return Text(
        tokenizer,
        str(path),
        special,
        eos_ids=tuple(sorted(eos_ids)),
        chat_template=_chat_template(path, config),
        max_length=_max_length(path, config, model),
        directory=path if native else None,
    )
