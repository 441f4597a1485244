"""Calibration samples: token ids from a text, a directory, a JSONL or parquet column, a hub set."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from engine.errors import InputError
from engine.judgement import BUILT_IN
from engine.text import Text, default_text, read_text_file
from engine.text.corpus import read_jsonl

TEXT_SUFFIXES = (".txt", ".md")
COLUMN, SPLIT = "text", "train"  # of rows, where nothing else is asked for


def read_samples(
    source: str | None,
    text: Text,
    length: int,
    *,
    count: int | None = None,
    most: int | None = None,
    column: str = COLUMN,
    split: str = SPLIT,
    bos: bool | None = None,
    full: bool = False,
    built_in: Callable[[], str] = default_text,
) -> tuple[list[list[int]], bool]:
    """(samples of at most `length` tokens, do they begin with BOS?).

    `source`: a text file or a directory of them, cut into consecutive samples of `length` tokens;
    a .jsonl or .parquet file, one sample a row from `column`, the first `length` tokens of each;
    "hub:NAME", a dataset of the Hugging Face hub (the extra `heal` brings `datasets`), likewise;
    None, the `built_in` text. `bos` puts BOS first; by default where the tokenizer has the habit.
    `count` takes so many, `most` no more: of rows the first, of running text ones spread evenly
    over it; `full` passes over rows that are shorter. InputError when there is nothing, or less
    than `count`.
    """
    if source == "":
        raise InputError("text: expected a file, a directory or hub:NAME, found an empty name")
    if length < 1:
        raise InputError(f"length: expected at least 1 token, found {length}")
    if count is not None and count < 1:
        raise InputError(f"samples: expected at least 1, found {count}")
    prefix = bos_prefix(text, bos)
    room = length - len(prefix)
    if room < 1:
        raise InputError(f"length: {length} leaves no room beside BOS")
    where = source or BUILT_IN
    samples: list[list[int]] = []
    whole, wanted = is_running_text(source), count or most
    pieces = [built_in()] if source is None else _pieces(source, column, split)
    for piece in pieces:
        ids = text.encode(piece, add_special=False)
        least = room if full else 1
        starts = range(0, len(ids) - room + 1, room) if whole else range(len(ids) >= least)
        samples += [prefix + ids[start : start + room] for start in starts]
        if wanted is not None and len(samples) >= wanted and not whole:
            break
    if not samples and not whole and not full:
        raise InputError(f"{where}: holds no text")
    if not samples:
        raise InputError(f"{where}: too short for one sample of {length} tokens")
    if count is not None and len(samples) < count:
        raise InputError(f"{where}: expected {count} samples of {length}, found {len(samples)}")
    if wanted is not None and wanted < len(samples):
        step = len(samples) if whole else wanted
        samples = [samples[index * step // wanted] for index in range(wanted)]
    return samples, bool(prefix)


def hash_samples(samples: Sequence[Sequence[int]], context: int) -> str:
    """Of their token ids; InputError for a sample that is longer than the context."""
    longest = max(map(len, samples))
    if longest > context:
        raise InputError(f"length: {longest} tokens exceed the context of {context}")
    return hashlib.sha256(repr([list(sample) for sample in samples]).encode()).hexdigest()


def bos_prefix(text: Text, bos: bool | None) -> list[int]:
    """The ids that a sample begins with: BOS or none; by default as the tokenizer does."""
    if text.bos_id is None:
        if bos:
            raise InputError("bos: the tokenizer has no BOS token")
        return []
    wanted = text.encode("a")[:1] == [text.bos_id] if bos is None else bos
    return [text.bos_id] if wanted else []


def is_running_text(source: str | None) -> bool:
    """One text from end to end, rather than rows."""
    return source is None or not source.endswith((".jsonl", ".parquet")) and source[:4] != "hub:"


def check_column(sources: Iterable[str | None], column: str, split: str = SPLIT) -> None:
    """InputError for the name of a column or a split where no source has any."""
    told = [source or BUILT_IN for source in sources]
    if column != COLUMN and all(is_running_text(source) for source in told):
        raise InputError(f"column: goes with a .jsonl, .parquet or hub source, found {told[0]}")
    if split != SPLIT and not any(source.startswith("hub:") for source in told):
        raise InputError(f"split: goes with a hub source, found {told[0]}")


def source_files(source: str | None) -> list[Path]:
    """What a source is read from; nothing of the hub and of the built-in text."""
    if not source or source.startswith("hub:"):
        return []
    path = Path(source)
    if not path.is_dir():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()
    )


def _pieces(source: str, column: str, split: str) -> Iterator[str]:
    if source.startswith("hub:"):
        yield from _hub_rows(source, column, split)
    elif source.endswith(".jsonl"):
        yield from _jsonl_rows(Path(source), column)
    elif source.endswith(".parquet"):
        yield from _parquet_rows(Path(source), column)
    elif Path(source).is_dir():
        files = source_files(source)
        if not files:
            raise InputError(f"{source}: expected files {', '.join(TEXT_SUFFIXES)}, found none")
        yield "\n\n".join(read_text_file(file) for file in files)
    else:
        yield read_text_file(source)


def _jsonl_rows(path: Path, column: str) -> Iterator[str]:
    for number, row in read_jsonl(path):
        columns = list(row) if isinstance(row, dict) else []
        yield _value(row.get(column) if columns else None, column, columns, f"{path}:{number}")


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'pyarrow>=15'") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            _value(None, column, names, str(path))
        for batch in file.iter_batches(columns=[column]):
            for row in batch.column(0).to_pylist():
                yield _value(row, column, names, str(path))
    except (OSError, ArrowException) as error:
        raise InputError(f"{path}: not readable as parquet ({error})") from error


def _hub_rows(source: str, column: str, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{source}: needs datasets: pip install 'datasets>=3.0'") from None
    from huggingface_hub.utils import logging

    told = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of every try; one sentence says how they ended
    try:
        rows = load_dataset(source.removeprefix("hub:"), split=split, streaming=True)
        for row in rows:
            yield _value(row.get(column), column, list(row), source)
    except InputError:
        raise
    except Exception as error:  # whatever the hub, the network or the dataset's files bring up
        raise InputError(f"{source}: {type(error).__name__}: {error}") from error
    finally:
        logging.set_verbosity(told)


def _value(value: object, column: str, columns: Sequence[str], where: str) -> str:
    if not isinstance(value, str):
        found = "a column that is not text" if column in columns else ", ".join(columns) or "none"
        raise InputError(f"{where}: expected a text column {column!r}, found {found}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{where}: expected Unicode text, found half of a surrogate pair")
    return value
