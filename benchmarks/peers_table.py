"""The page that benchmarks/peers.py writes, a section an instruction set."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pages
import torch

from engine.benchmark import machine
from engine.benchmark.speed import LEAST_AGREEMENT
from engine.errors import InputError

if TYPE_CHECKING:
    from peers import Study, Subject

TITLES = {  # in the page's order
    "amx": "AMX",
    "avx512": "AVX-512",
    "avxvnni": "AVX-VNNI",
    "avx2": "AVX2",
    "i8mm": "ARM i8mm",
    "dotprod": "ARM dot products",
    "neon": "NEON",
    "generic": "Portable C++",
}
HEAD = f"""# Ours beside the peers, on a CPU

`python benchmarks/peers.py --isa NAME --shape Llama-3.2-1B --shape Llama-3.2-1B-Q4_K_M` writes \
the section of an instruction set. All engines take turns in one run on the same file; a figure \
is the median of the runs, a run's decode that of its steps. Files: the default model's GGUF, \
Q4_1; the Q4_0 that llama.cpp's quantizer makes of it; random weights in the shape of a named \
model, Q4_0, or Q4_K and Q6_K as in a file of Q4_K_M. Prompts are held-out text: 512 tokens for \
prefill; 16 tokens and 128 new ones (a billion weights: 32) for decode; 1,024 and as many new \
ones for decode at that context. Keys and values are 16-bit floats, OpenVINO's and transformers' \
as they come. llama.cpp and ik_llama.cpp have a context and a batch of 1,280 and a micro-batch of \
512. Ratios are ours on the same file over theirs; `agrees` is the share of a peer's tokens that \
our model would choose after the same ones, and below {LEAST_AGREEMENT:.0%} no speed is given. \
Peers run in processes of their own, stopped between their turns.
"""
HEADINGS = {
    "prefill": "prefill 512",
    "decode": "decode",
    "context": "decode at 1,024",
}


def write(path: Path, study: "Study") -> None:
    """Puts the section of the study in its place in the page."""
    page = sections(path)
    title = TITLES[study.isa]
    page[title] = pages.renewed(page.get(title, ""), section(study), f"{processor()}, ")
    title, head = HEAD.split("\n", 1)
    found = {f"## {name}": page[name] for name in TITLES.values() if name in page}
    pages.write(path, {title: head} | found)


def sections(path: Path) -> dict[str, str]:
    """Of a page that is there, by title; InputError for one with a section that is not of ours.
    What stands before them is ours to write anew."""
    _, *found = pages.sections(path, HEAD.partition("\n")[0]).items()
    page = {heading.removeprefix("## "): text for heading, text in found}
    for name in page:
        if name not in TITLES.values():
            raise InputError(
                f"{path}: expected a page of ours, found the section {name!r:.60}; name another "
                "file"
            )
    return page


def processor() -> str:
    return machine.device_name(torch.device("cpu"))


def section(study: "Study") -> str:
    lines = [
        f"{processor()}, {study.threads} threads, "
        f"{machine.huge_pages() or 'no word of'} huge pages; medians of {study.repeats} runs.",
        "",
        *lead(study),
    ]
    for subject in study.subjects:
        lines += ["", f"### {study_name(study, subject)}", "", *speeds(subject), "", *read(subject)]
    return "\n".join([*lines, "", *notes(study)])


def study_name(study: "Study", subject: "Subject") -> str:
    return f"{subject.name}, {subject.bits} by {TITLES[study.isa]}"


def lead(study: "Study") -> list[str]:
    """Every engine in its best setting, and ours over it; models side by side."""
    columns = [(found, workload) for found in study.subjects if found.alone
               for workload in found.workloads]  # fmt: skip
    heads = [f"{found.name}, {found.bits}: {HEADINGS[workload]}" for found, workload in columns]
    rows = [f"| tok/s | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
    for name in ("ours", *(name for name in study.asked if name not in study.missing)):
        cells = []
        for found, workload in columns:
            speed, own = found.best(name, workload), found.best("ours", workload)
            assert own  # is measured, whoever else is
            ratio = "" if name == "ours" or not speed else f" ({own / speed:.2f}x)"
            cells.append(f"{rounded(speed)}{ratio}" if speed else "-")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def rounded(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def speeds(subject: "Subject") -> list[str]:
    workloads = list(subject.workloads)
    rows = [
        f"| engine | setting | {' | '.join(f'{HEADINGS[w]} | ' for w in workloads)} | agrees |",
        f"|---|---|{'---:|---:|' * len(workloads)}---:|",
    ]
    own = subject.contenders[0]
    for found in subject.contenders:
        cells = [found.name, found.setting]
        for workload in workloads:
            if found.wrong:
                cells += ["-", ""]
                continue
            speed = found.tok_s(workload)
            ratio = own.tok_s(workload) / speed
            cells += [rounded(speed), "" if found is own else f"{ratio:.2f}x"]
        rows.append(f"| {' | '.join([*cells, f'{found.agreement:.0%}'])} |")
    return rows


def spread(found: list[float], digits: int = 1) -> str:
    """The median, and what lies around it."""
    middle, least, most = (
        f"{value:.{digits}f}" for value in (statistics.median(found), min(found), max(found))
    )
    return f"{middle} ({least}-{most})"


def read(subject: "Subject") -> list[str]:
    """What decoding takes of the memory's speed."""
    decode, context = subject.best("ours", "decode"), None
    assert decode
    gb = subject.nbytes / 1e9
    reads = [statistics.median(passes) for passes in subject.gb_s]
    steps = [run.decode_tok_s() or 0.0 for run in subject.contenders[0].runs["decode"]]
    shares = [100 * gb * step / read for step, read in zip(steps, reads, strict=True)]
    best = max(map(max, subject.gb_s))
    line = (
        f"Our decode reads {gb * decode:.1f} GB/s of weights. Right before and after it a buffer "
        f"of their size is read at {spread(reads)} GB/s, by the median pass, of which it takes "
        f"{spread(shares, 0)} %; by the best pass of all at {best:.1f} GB/s, "
        f"{gb * decode / best:.0%}."
    )
    if "context" in subject.workloads:
        context = subject.best("ours", "context")
        assert context
        line += f" At a context of 1,024 tokens it runs at {context / decode:.2f} of its speed."
    if subject.perplexity is not None:
        line += f" Perplexity on the first windows of the held-out text: {subject.perplexity:.3f}."
    return [line]


def notes(study: "Study") -> list[str]:
    contenders = [found for subject in study.subjects for found in subject.contenders]
    versions = {found.name: found.version for found in contenders}
    lines = [f"Versions: {', '.join(f'{name} {of}' for name, of in versions.items())}."]
    return lines + [f"Left out: {missing}." for missing in study.missing.values()]
