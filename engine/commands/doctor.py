"""`engine doctor`: what this machine has, and which backend each operation would use on it."""

import json
from typing import Any

from engine.commands import common, output
from engine.scratch import write_text

PACKAGES = ("triton", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def doctor(threads: common.Threads = None, json_file: common.JsonFile = None) -> None:
    """Show what this machine has and which backends run on it; the last line is JSON."""
    common.check_writable(json_file)
    found = examine(threads)
    line = json.dumps(found)
    try:
        show(found)
        print(line, flush=True)
    finally:
        if json_file is not None:
            write_text(json_file, line + "\n")


def examine(threads: int | None = None) -> dict[str, Any]:
    """The facts, bandwidth measured on the spot with `threads` threads (torch's if None)."""
    import os

    import torch

    from engine.api import choose_backend
    from engine.benchmark import machine
    from engine.kernels import dispatch, native
    from engine.runtime import RUNTIMES

    threads = threads or torch.get_num_threads()
    cpu, gpus = torch.device("cpu"), machine.gpus()
    features = {} if native.error("cpu") else native.load("cpu").cpu_features()
    return {
        "cpu": machine.device_name(cpu),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_features": sorted(name for name, has in features.items() if has),
        "isas": native.load("cpu").isas() if features else [],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": machine.huge_pages(),
        "read_gb_s": machine.ceiling_gb_s(cpu, threads),
        "gpus": gpus,
        "gpu_read_gb_s": machine.ceiling_gb_s(torch.device("cuda"), threads) if gpus else None,
        "backends": {name: dispatch.why_not(name) for name in dispatch.BACKENDS},  # None: it runs
        "ops": {
            op: {
                device: dispatch.choose(op, device) for device in DEVICES if device == "cpu" or gpus
            }
            for op in dispatch.OPS
        },
        "runtimes": list(RUNTIMES),
        "runtime": {
            device: choose_backend(None, torch.device(device))
            for device in DEVICES
            if device == "cpu" or gpus
        },
        "versions": machine.versions() | machine.package_versions(*PACKAGES),
        "commit": machine.commit(),
    }


def show(found: dict[str, Any]) -> None:
    """As tables: the machine, the backends, the operations."""
    from rich.table import Table

    facts = Table(show_header=False, pad_edge=False)
    facts.add_row("CPU", f"{found['cpu']}, {found['cores']} cores")
    facts.add_row("instructions", " ".join(found["cpu_features"]) or "the generic ones")
    facts.add_row("--isa, best first", " ".join(found["isas"]) or "none")
    facts.add_row("memory", f"{found['memory_bytes'] / 1e9:,.1f} GB")
    facts.add_row("huge pages", found["huge_pages"] or "none known of")
    read, missing = found["read_gb_s"], f"not measured: {found['backends']['cpu']}"
    facts.add_row(
        f"read by {found['threads']} threads", missing if read is None else f"{read:.1f} GB/s"
    )
    for gpu in found["gpus"]:
        facts.add_row(
            "GPU",
            f"{gpu['name']}, {gpu['memory_bytes'] / 1e9:,.1f} GB, {gpu['multiprocessors']} "
            f"multiprocessors, compute capability {gpu['compute_capability']}",
        )
    if not found["gpus"]:
        facts.add_row("GPU", "none that torch finds")
    else:
        read = found["gpu_read_gb_s"]
        facts.add_row("read on the GPU", "-" if read is None else f"{read:.1f} GB/s")
    versions = (f"{name} {version or '-'}" for name, version in found["versions"].items())
    facts.add_row("versions", ", ".join(versions))
    facts.add_row("commit", found["commit"] or "no checkout")
    output.show(facts)

    backends = Table("backend", "runs here", pad_edge=False)
    for name, reason in found["backends"].items():
        backends.add_row(name, "yes" if reason is None else f"no: {reason}")
    output.show(backends)

    ops = Table("operation", *(DEVICES[device] for device in DEVICES), pad_edge=False)
    for op, chosen in found["ops"].items():
        ops.add_row(op, *(chosen.get(device, "-") for device in DEVICES))
    ops.add_row("a whole model", *(found["runtime"].get(device, "-") for device in DEVICES))
    output.show(ops)
