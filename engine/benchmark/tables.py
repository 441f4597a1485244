"""What `engine run` prints of a record."""

from typing import Any

import torch
from rich.table import Table

from engine.benchmark.machine import ceiling_missing
from engine.benchmark.speed import RunRecord


def tables(record: RunRecord) -> list[Table]:
    """The speeds, then the peers and the parts of a step where they were asked for."""
    found = [speeds(record)]
    if record.compare:
        found.append(peers(record))
    if record.breakdown:
        found.append(parts(record))
    return found


def remarks(record: RunRecord) -> list[str]:
    """What the tables leave out, and why."""
    found = [
        f"{peer['name']}: {peer['wrong']} ({peer['agreement']:.0%} of its tokens agree)"
        for peer in record.compare
        if "wrong" in peer
    ]
    if record.ceiling_gb_s is None:
        full = f"{record.device} has no room for what would be read"
        found.append(f"no ceiling: {ceiling_missing(torch.device(record.device)) or full}")
    return found


def speeds(record: RunRecord) -> Table:
    """The record but for the peers."""
    r = record
    backend = r.backend if r.isa is None else f"{r.backend} ({r.isa})"
    share = "" if r.ceiling_share is None else f", {r.ceiling_share:.0%} of the ceiling"
    rows = {
        "model": f"{r.model} ({r.layers_kept} of {r.layers_total} layers)",
        "on": f"{r.device_name}, {r.threads} threads, {backend}, {r.dtype}",
        "tokens": f"{r.batch} x ({r.prompt_tokens} prompt + {r.new_tokens} new)",
        "load": figure(r.load_ms, "ms"),
        "prefill": figure(r.prefill_tok_s, "tok/s"),
        "time to first token": figure(r.ttft_ms, "ms"),
        f"decode, {'overall' if r.drafted else 'median'}": figure(r.decode_tok_s, "tok/s"),
        "decode, p5": figure(r.decode_tok_s_p5, "tok/s"),
        "decode, p95": figure(r.decode_tok_s_p95, "tok/s"),
        "a token": figure(r.ms_per_token, "ms"),
        "weights read a step": figure(r.weight_bytes_per_token / 1e6, "MB"),
        "achieved": figure(r.achieved_gb_s, "GB/s") + share,
        "ceiling, measured": figure(r.ceiling_gb_s, "GB/s"),
        "weights": figure(r.weight_bytes / 1e6, "MB"),
        "KV cache": figure(r.kv_bytes / 1e6, "MB"),
        "peak RSS": figure(r.peak_rss_bytes / 1e6, "MB"),
    }
    if r.drafted is not None:
        rows["drafts"] = f"{r.accepted} of {r.drafted} tokens right"
    if r.launches_per_token is not None:
        rows["launches a step"] = str(r.launches_per_token)
    if r.peak_vram_bytes is not None:
        rows["peak VRAM"] = figure(r.peak_vram_bytes / 1e6, "MB")
    out = Table(show_header=False, pad_edge=False)
    out.add_column()
    out.add_column(overflow="fold")
    for name, value in rows.items():
        out.add_row(name, value)
    return out


def peers(record: RunRecord) -> Table:
    """The peers' speeds and ours over theirs."""
    out = Table(pad_edge=False)
    out.add_column("peer", no_wrap=True)
    for name in ("prefill tok/s", "ratio", "decode tok/s", "ratio", "same tokens"):
        out.add_column(name, justify="right")
    for peer in record.compare:
        if "wrong" in peer:
            continue
        out.add_row(
            " ".join((peer["name"], peer["version"], setting_name(peer["setting"]))),
            figure(peer["prefill_tok_s"]),
            figure(peer["prefill_ratio"], "x"),
            figure(peer["decode_tok_s"]),
            figure(peer["decode_ratio"], "x"),
            f"{peer['same_tokens']} of {record.new_tokens}",
        )
    return out


def parts(record: RunRecord) -> Table:
    """The decode step by part."""
    out = Table("part of a step", pad_edge=False)
    for name in ("ms", "share", "MB", "GB/s"):
        out.add_column(name, justify="right")
    for part in record.breakdown:
        nbytes, gb_s = part["bytes"], part["gb_s"]
        out.add_row(
            part["name"],
            f"{part['ms']:.3f}",
            f"{part['share']:.1%}",
            "" if nbytes is None else f"{nbytes / 1e6:.2f}",
            "" if gb_s is None else f"{gb_s:.1f}",
        )
    return out


def setting_name(setting: dict[str, Any]) -> str:
    """{"flash": True, "attention": "PA"} as "flash, attention PA"."""
    words = {True: "{}", False: "no {}"}
    return ", ".join(
        words[value].format(name) if isinstance(value, bool) else f"{name} {value}"
        for name, value in setting.items()
    )


def figure(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.2f}{'' if unit == 'x' else ' '}{unit}".rstrip()
