"""csrc/cuda/emulate.h reports what a GPU leaves undefined."""

import re
import subprocess

import pytest
from support.emulated import ENVIRONMENT, ROOT, build

REPORTS = {
    "barrier_after_return": r"__syncthreads.* not all threads reach: thread 5 has returned",
    "barrier_in_a_branch": r"__syncthreads.* not all threads reach: thread 3 is at __shfl_xor_sync",
    "syncwarp_without_a_lane": r"__syncwarp.* not all threads reach: thread 9 has returned",
    "two_barriers": r"thread 32: is at __syncthreads.* while others wait at __syncthreads",
    "shuffle_without_a_lane": r"__shfl_xor_sync.* not all threads reach: thread 7 has returned",
    "shuffle_outside_the_mask": r"mask 0000ffff lacks this lane",
    "shuffle_of_a_missing_lane": r"reads lane 20, which mask 0000ffff lacks",
    "shuffle_in_half_a_warp": r"__shfl_xor_sync.* not all threads reach: thread 48 does not exist",
    "shuffle_by_two_masks": r"mask ffffffff, other lanes have 55555555",
    "mma_by_half_a_warp": r"mma.* not all threads reach: thread 16 has returned",
    "unwritten_shared": r"thread 63: shared memory: element 63 is read and was never written",
    "unwritten_in_the_next_block": r"block \(1, 0, 0\).*element 0 is read and was never written",
    "shared_out_of_bounds": r"thread 63: shared memory: index 63 of 63",
    "shared_before_its_first": r"thread 0: shared memory: index -1 of 64",
    "dynamic_shared_out_of_bounds": r"thread 63: shared memory: index 63 of 63",
    "read_without_a_barrier": r"element \d+ is read, and thread \d+ wrote it .* a race",
    "write_without_a_barrier": r"element \d+ is written, and another thread .* a race",
    "two_writers": r"element 0 is written, and another thread .* a race",
    "global_out_of_bounds": r"AddressSanitizer: heap-buffer-overflow",
    "load_off_its_alignment": r"16-byte load from .* off its alignment",
    "pair_off_its_alignment": r"8-byte load from .* off its alignment",
    "order_of_blocks": r"results differ with the order of blocks",
    "arrival_without_a_fence": r"atomicAdd.*: thread 0 has not come to a __threadfence before it",
    "arrival_before_others": r"atomicAdd.*: thread 1 has not come to a __threadfence before it",
    "second_arrival_without_a_fence": r"atomicAdd.*: thread 0 has not come to a __threadfence",
    "read_without_a_fence": r"thread 5: __ldcg.*: no __threadfence since the warp's atomicAdd",
    "copy_without_a_wait": r"element 0 is read before the copy to it is waited for",
    "copy_without_a_group": r"element 0 is read before the copy to it is waited for",
    "write_over_a_copy": r"element 0 is written before the copy to it is waited for",
    "copy_read_without_a_barrier": r"element \d+ is read, and thread \d+ wrote it .* a race",
    "copy_waited_for_behind_a_barrier": r"element 0 is read, and thread 0 wrote it .* a race",
    "too_much_static_memory": r"51452 bytes, 51200 of them static; a block has",
    "static_and_dynamic_memory": r"102400 bytes, 40960 of them static; a block has 101376",
    "too_much_shared_memory": r"launch: 102400 bytes of shared memory, a block has 101376 at most",
    "more_memory_than_announced": r"launch: 252 bytes of shared memory, more than the 248",
    "too_many_threads": r"launch: 1056 threads, a block has 1 to 1024",
    "too_many_rows_of_blocks": r"launch: a grid of \(1, 65536, 1\) blocks",
    "overlap_out_of_bounds": r"thread 7: touches memory behind what the kernel before writes",
    "read_before_the_wait": r"thread 33: touches what the kernel before writes, and has not waited",
    "write_before_the_wait": r"thread 5: touches what the kernel before writes, and has not waited",
    "another_threads_wait": r"thread 1: touches what the kernel before writes, and has not waited",
    "exit_without_a_wait": r"thread 40: returns, and has not waited for the kernel before",
}


@pytest.fixture(scope="session")
def kernels():
    return build("bugs", "tests/support/emulated_bugs.cu")


def run(kernels, name: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(kernels), name], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )


SOUND = {
    "sound": "2016 2016",
    "sound_arrival": "3 -1",
    "sound_copy": "-2 -2",
    "sound_overlap": "0 0",
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_kernels_run(kernels, name):
    ran = run(kernels, name)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{SOUND[name]}\n"


@pytest.mark.parametrize("name", REPORTS)
def test_bug_is_reported(kernels, name):
    ran = run(kernels, name)
    assert ran.returncode not in (0, 2), f"{name} went unnoticed"
    assert re.search(REPORTS[name], ran.stderr), ran.stderr


def test_every_bug_is_tested():
    source = (ROOT / "tests" / "support" / "emulated_bugs.cu").read_text()
    kernels = re.findall(r"__global__ void (\w+)", source)
    assert set(kernels) == {*SOUND, *REPORTS}
