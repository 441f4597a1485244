"""Pages of results, by section: what a script has measured, then what is written by hand."""

import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import InputError
from engine.scratch import check_target, write_text

BY_HAND = "<!-- By hand from here on: kept when the section is written anew. -->"
HEADING = re.compile(r"(\A# .*|^## .*)\n?", re.MULTILINE)


def sections(path: Path, title: str) -> dict[str, str]:
    """What stands below the page's title and below every other heading; InputError for a page of
    another title, or where a heading comes twice."""
    if not path.exists():
        return {title: ""}
    before, *parts = HEADING.split(path.read_text(encoding="utf-8", errors="replace"))
    headings = parts[::2]
    if before or headings[:1] != [title]:
        raise InputError(f"{path}: expected a page of ours, found another page; name another file")
    for heading in headings:
        if headings.count(heading) > 1:
            raise InputError(f"{path}: the section {heading[3:]!r:.60} comes twice; make it one")
    return dict(zip(headings, parts[1::2], strict=True))


def renewed(section: str, made: str, about: str) -> str:
    """The section with `made` before its mark. What was there moves behind the mark, unless it
    begins with `about`, as `made` does: else a run of another machine or model would be lost."""
    generated, mark, kept = section.partition(BY_HAND)
    same = mark and generated.lstrip().startswith(about)
    parts = (made, BY_HAND, "" if same else generated, kept)
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def write(path: Path, found: Mapping[str, str]) -> None:
    """The page of these sections, by heading."""
    parts = (part.strip("\n") for section in found.items() for part in section)
    write_text(path, "\n\n".join(filter(None, parts)) + "\n")


def check(path: Path, title: str) -> None:
    """InputError, before the work, for a page that `put` would refuse."""
    check_target(path)
    sections(path, title)


def put(path: Path, title: str, heading: str, made: str, about: str) -> None:
    """Renews one section of the page; the others stay."""
    found = sections(path, title)
    write(path, found | {heading: renewed(found.get(heading, ""), made, about)})
