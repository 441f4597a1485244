"""The page that benchmarks/peers.py writes."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.benchmark import machine

if TYPE_CHECKING:
    from peers import Study

HEAD = """# Ours beside the peers, on a CPU

{device}, {threads} threads, {huge} huge pages, reading {gb_s:.1f} GB/s at best in the same run \
(a buffer of the model's size; {low:.1f}-{gb_s:.1f} over the turns). The default model's GGUF \
file, Q4_1, and the Q4_0 that llama.cpp's quantizer makes of it; perplexity on the first \
{windows} windows of the held-out text by our runtime: {perplexity}.

All engines took turns in one run; each figure is the median of {repeats} runs, a run's decode \
that of its steps. Prompts are held-out text: 16 tokens and 128 new ones for decode, 512 for \
prefill, 1,024 and 32 new ones for decode at that context. Keys and values are 16-bit floats, \
OpenVINO's and transformers' as they come. llama.cpp and ik_llama.cpp have a context and a batch \
of {context} and a micro-batch of 512. Ratios are ours on the same file over theirs. Peers ran in \
processes of their own, stopped between their turns.
"""


def write(path: Path, study: "Study") -> None:
    """The conditions, a row a contender, and the bounds of the best settings."""
    files = list(study.models)
    head = HEAD.format(
        device=machine.device_name(torch.device("cpu")),
        threads=torch.get_num_threads(),
        huge=machine.huge_pages() or "no word of",
        gb_s=max(study.gb_s),
        low=min(study.gb_s),
        windows=study.judged_windows,
        perplexity=", ".join(f"{file} {study.perplexity(file):.3f}" for file in files),
        repeats=study.repeats,
        context=study.context,
    )
    text = "\n".join([head, *speeds(study), "", *ratios(study), "", *notes(study)])
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


def speeds(study: "Study") -> list[str]:
    rows = [
        "| engine | file | setting | prefill 512, tok/s | | decode 128, tok/s | "
        "| decode at 1,024, tok/s | | agrees |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = {found.file: found for found in study.contenders if found.name == "ours"}
    for found in study.contenders:
        cells = [found.name, found.file, found.setting]
        for workload in ("prefill", "decode", "context"):
            if found.wrong:
                cells += ["-", ""]
                continue
            speed = found.tok_s(workload)
            ratio = own[found.file].tok_s(workload) / speed
            cells += [f"{speed:,.0f}", "" if found.name == "ours" else f"{ratio:.2f}x"]
        rows.append(f"| {' | '.join([*cells, f'{found.agreement:.0%}'])} |")
    return rows


def ratios(study: "Study") -> list[str]:
    """Ours over the best setting of each peer, figure by figure."""
    peers = [name for name in study.asked if name not in study.missing]
    rows = [
        f"| ours over the best of | {' | '.join(peers)} |",
        f"|---|{'---|' * len(peers)}",
    ]

    def row(label: str, workload: str, files: Iterable[str]) -> None:
        ours, cells = best(study, "ours", workload, files), []
        for name in peers:
            theirs = best(study, name, workload, files)
            cells.append(f"{ours / theirs:.2f}x" if ours and theirs else "-")
        rows.append(f"| {label} | {' | '.join(cells)} |")

    row("decode 128, Q4_1", "decode", ["Q4_1"])
    if len(study.models) > 1:
        row("decode 128, either file", "decode", study.models)
    row("prefill 512, Q4_1", "prefill", ["Q4_1"])
    row("decode at 1,024, Q4_1", "context", ["Q4_1"])
    decode, context = (best(study, "ours", w, ["Q4_1"]) for w in ("decode", "context"))
    assert decode and context  # ours is measured, whoever else is
    gb_s = decode * study.models["Q4_1"].runtime.weight_bytes_per_token / 1e9
    share = gb_s / max(study.gb_s)
    return [
        *rows,
        "",
        f"Our decode reads {gb_s:.1f} GB/s of weights, {share:.0%} of the best read; at a context "
        f"of 1,024 tokens it runs at {context / decode:.2f} of its speed.",
    ]


def best(study: "Study", name: str, workload: str, files: Iterable[str]) -> float | None:
    """Tokens a second of the fastest setting that gives this model's text."""
    speeds = [
        found.tok_s(workload)
        for found in study.contenders
        if found.name == name and found.file in files and not found.wrong
    ]
    return max(speeds, default=None)


def notes(study: "Study") -> list[str]:
    versions = {found.name: found.version for found in study.contenders}
    lines = [f"Versions: {', '.join(f'{name} {of}' for name, of in versions.items())}."]
    for found in study.contenders:
        if found.wrong:
            lines.append(
                f"{found.name} ({found.file}, {found.setting}) gives another text than the model: "
                f"{found.agreement:.0%} of its tokens are those that the model would choose."
            )
    return lines + [f"Not installed: {missing}." for missing in study.missing.values()]
