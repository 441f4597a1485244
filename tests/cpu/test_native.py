"""The compiled extensions: they load or say why not, and what they measure is plausible."""

from pathlib import Path

import pytest

from engine.kernels import native

CPU_INFO = Path("/proc/cpuinfo")
FLAG_LINES = ("flags", "Features")  # x86, ARM
LINUX_NAMES = {"neon": "asimd", "neon_dotprod": "asimddp"}


def test_cpu_features_are_those_of_the_system():
    if not CPU_INFO.exists():
        pytest.skip(f"{CPU_INFO} exists on Linux alone")
    lines = [line.partition(":") for line in CPU_INFO.read_text().splitlines()]
    listed = next(set(value.split()) for key, _, value in lines if key.strip() in FLAG_LINES)
    for name, found in native.load("cpu").cpu_features().items():
        assert found == (LINUX_NAMES.get(name, name) in listed), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_read_bandwidth_is_plausible(threads):
    gb_s = native.load("cpu").read_bandwidth(bytes=48_000_001, threads=threads, passes=3)
    assert 0.1 < gb_s < 10_000


def test_read_bandwidth_takes_the_smallest_buffer():
    assert native.load("cpu").read_bandwidth(bytes=2 * 4096, threads=2, passes=1) > 0


@pytest.mark.parametrize("wrong", [{"bytes": 4095}, {"bytes": -1}, {"threads": 0}, {"passes": 0}])
def test_read_bandwidth_names_what_is_wrong(wrong):
    given = {"bytes": 1 << 20, "threads": 1, "passes": 1} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        native.load("cpu").read_bandwidth(**given)


def test_a_peak_needs_a_pass():
    cpu = native.load("cpu")
    isa = next((isa for isa in cpu.isas() if isa in ("amx", "avx512", "avxvnni", "avx2")), None)
    if isa is None:
        pytest.skip("this processor has none of the instruction sets whose peak is measured")
    with pytest.raises(ValueError, match="passes=0"):
        cpu.int8_peak(isa, 1, passes=0)


def test_an_absent_extension_gives_its_reason():
    assert native.error("cpu") is None
    reason = native.error("absent")
    assert "engine._absent" in reason
    with pytest.raises(ImportError, match="engine._absent"):
        native.load("absent")


def test_cuda_counts_its_devices():
    if reason := native.error("cuda"):
        pytest.skip(f"engine._cuda does not load: {reason}")
    cuda = native.load("cuda")
    count = cuda.device_count()
    with pytest.raises(RuntimeError, match="device_info: "):
        cuda.device_info(count)
    if count == 0:
        pytest.skip("no GPU to measure")
    assert cuda.device_info(0)["memory_bytes"] > 1e9
    assert 10 < cuda.copy_bandwidth(bytes=1 << 26) < 100_000
