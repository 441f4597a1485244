"""Facts about the machine, the process and the checkout, for the records of runs."""

import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

CEILING_BYTES = 512 * 2**20  # read to find the bandwidth: far more than a cache holds


def device_name(device: torch.device) -> str:
    """What the processor that `device` stands for calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident, mapped files included."""
    # On Linux ru_maxrss is no less than what the program had that started this one.
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_vram_bytes(device: torch.device) -> int | None:
    """The most memory that torch has had allocated on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def ceiling_gb_s(device: torch.device, threads: int, nbytes: int = CEILING_BYTES) -> float | None:
    """The memory bandwidth measured here and now, reading `nbytes` (CEILING_BYTES on a GPU).

    None where the native extension that measures it is not there, as `ceiling_missing` says, or a
    GPU has no room for it.
    """
    from engine.kernels import native

    if ceiling_missing(device) is not None:
        return None
    if device.type == "cuda":
        try:
            return gpu_read_gb_s(device)
        except RuntimeError:  # no room, or no kernel of torch's
            return None
    return native.load("cpu").read_bandwidth(nbytes, threads)


def ceiling_missing(device: torch.device) -> str | None:
    """Why the bandwidth cannot be measured; None when it can."""
    from engine.kernels import native

    return None if device.type == "cuda" else native.error(device.type)


def gpu_read_gb_s(device: torch.device, passes: int = 10) -> float:
    """The best of `passes` sums over CEILING_BYTES, which no cache holds."""
    data = torch.zeros(CEILING_BYTES // 4, device=device)
    total = torch.zeros((), device=device)
    seconds = []
    with torch.cuda.device(device):
        for _ in range(passes):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.sum(data, dim=0, out=total)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return data.nbytes / min(seconds) / 1e9


def commit() -> str | None:
    """The commit this runs from, "-dirty" behind it where files differ; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a repository that it may read
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python, torch and this engine."""
    from engine import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "engine": __version__,
    }


def package_versions(*packages: str) -> dict[str, str | None]:
    """Of installed packages; None for those that are not."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def huge_pages() -> str | None:
    """When the system gives memory in huge pages: "always", "madvise", "never"; None: no word."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.is_file() else None
    return chosen and chosen[1]


def gpus() -> list[dict[str, Any]]:
    """Every GPU that torch finds."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "compute_capability": f"{facts.major}.{facts.minor}",
                "memory_bytes": facts.total_memory,
                "multiprocessors": facts.multi_processor_count,
            }
        )
    return found
