// Kernels that break one rule each, for tests of csrc/cuda/emulate.h: `bugs NAME` runs one.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/kernel.h"

using shallow::Shared;

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Sums 0 .. 63 by shuffles, shared memory and a barrier.
__global__ void sound(int* result) {
    __shared__ Shared<int, 2> sums;
    int sum = threadIdx.x;
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(kAll, sum, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) result[blockIdx.x] = sums[0] + sums[1];
}

__global__ void barrier_after_return(int*) {
    if (threadIdx.x == 5) return;
    __syncthreads();
}

__global__ void barrier_in_a_branch(int*) {
    if (threadIdx.x < 3) __syncthreads();
    __shfl_xor_sync(kAll, 1, 1);
}

__global__ void syncwarp_without_a_lane(int*) {
    if (threadIdx.x == 9) return;
    __syncwarp();
}

__global__ void two_barriers(int*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void shuffle_without_a_lane(int*) {
    if (threadIdx.x % 32 != 7) __shfl_xor_sync(kAll, 1, 1);
}

__global__ void shuffle_outside_the_mask(int*) { __shfl_sync(0xffffu, 1, 0); }

__global__ void shuffle_of_a_missing_lane(int*) {
    if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

__global__ void shuffle_in_half_a_warp(int*) { __shfl_xor_sync(kAll, 1, 1); }

__global__ void shuffle_by_two_masks(int*) {
    __shfl_sync(threadIdx.x % 2 ? kAll : 0x55555555u, 1, 0);
}

__global__ void mma_by_half_a_warp(int*) {
    float c[4] = {};
    if (threadIdx.x % 32 < 16) shallow::mma<__half>(c, {0, 0, 0, 0}, {0, 0});
}

__global__ void unwritten_shared(int* result) {
    __shared__ Shared<int, 64> values;
    if (threadIdx.x < 63) values[threadIdx.x] = 1;
    __syncthreads();
    result[0] = values[threadIdx.x];
}

__global__ void unwritten_in_the_next_block(int* result) {
    __shared__ Shared<int, 1> value;
    if (threadIdx.x) return;
    if (blockIdx.x == 0) value[0] = 1;
    result[0] = value[0];
}

__global__ void shared_out_of_bounds(int*) {
    __shared__ Shared<int, 63> values;
    values[threadIdx.x] = 1;
}

__global__ void shared_before_its_first(int*) {
    __shared__ Shared<int, 64> values;
    values[static_cast<int>(threadIdx.x) - 1] = 1;
}

__global__ void dynamic_shared_out_of_bounds(int*) {
    shallow::dynamic_shared<int>()[threadIdx.x] = 1;
}

__global__ void read_without_a_barrier(int* result) {
    __shared__ Shared<int, 64> values;
    values[threadIdx.x] = 1;
    result[0] = values[threadIdx.x / 2];
}

__global__ void write_without_a_barrier(int* result) {
    __shared__ Shared<int, 64> values;
    values[threadIdx.x] = 1;
    __syncthreads();
    result[0] = values[0];
    if (threadIdx.x == 0) values[0] = 2;
}

__global__ void two_writers(int*) {
    __shared__ Shared<int, 1> value;
    value[0] = threadIdx.x;
}

__global__ void global_out_of_bounds(int* result) { result[threadIdx.x * 32] = 1; }

__global__ void load_off_its_alignment(int* result) {
    result[0] = shallow::load_stream(result + 2).x;
}

__global__ void pair_off_its_alignment(int* result) {
    int two[2];
    std::memcpy(two, __builtin_assume_aligned(result + 1, sizeof two), sizeof two);
    result[0] = two[0] + two[1];
}

__global__ void order_of_blocks(int* result) {
    if (threadIdx.x) return;
    if (blockIdx.x == 0) result[1] = 7;
    if (blockIdx.x == 1) result[0] = result[1];
}

// The last block to arrive adds up what both wrote.
__global__ void sound_arrival(int* result) {
    __shared__ Shared<int, 1> before;
    if (threadIdx.x == 40) result[4 + blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before[0] = atomicAdd(result + 2, 1);
    __syncthreads();
    __threadfence();
    if (threadIdx.x == 9 && before[0] == 0) result[0] = __ldcg(result + 4) + __ldcg(result + 5);
}

__global__ void arrival_without_a_fence(int* result) {
    result[4 + threadIdx.x % 32] = 1;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(result + 2, 1);
}

__global__ void arrival_before_others(int* result) {
    if (threadIdx.x == 3) result[4] = 1;
    __threadfence();
    if (threadIdx.x == 0) atomicAdd(result + 2, 1);
}

__global__ void second_arrival_without_a_fence(int* result) {
    __threadfence();
    __syncwarp();
    if (threadIdx.x == 0) atomicAdd(result + 2, 1);
    result[4 + threadIdx.x % 32] = 1;
    __syncwarp();
    if (threadIdx.x == 0) atomicAdd(result + 3, 1);
}

__global__ void read_without_a_fence(int* result) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(result + 2, 1);
    __syncthreads();
    if (threadIdx.x == 5) result[0] = __ldcg(result + 4);
}

// What a copy waits for, and what it does not.
__global__ void sound_copy(int* result) {
    __shared__ Shared<uint4, 128> values;
    for (int group = 0; group < 2; ++group) {
        shallow::copy_async(values, 64 * group + threadIdx.x, result + 16 + 4 * (threadIdx.x % 8));
        shallow::commit_copies();
    }
    shallow::wait_copies<1>();
    const uint4 own = values[threadIdx.x];
    __syncthreads();
    const uint4 other = values[63 - threadIdx.x];
    shallow::wait_copies<0>();
    if (threadIdx.x == 0) result[blockIdx.x] = own.x + other.x;
}

__global__ void copy_without_a_wait(int* result) {
    __shared__ Shared<uint4, 64> values;
    shallow::copy_async(values, threadIdx.x, result + 16);
    shallow::commit_copies();
    shallow::wait_copies<1>();
    const uint4 value = values[threadIdx.x];
    result[0] = value.x;
}

__global__ void copy_without_a_group(int* result) {
    __shared__ Shared<uint4, 64> values;
    shallow::copy_async(values, threadIdx.x, result + 16);
    shallow::wait_copies<0>();
    const uint4 value = values[threadIdx.x];
    result[0] = value.x;
}

__global__ void write_over_a_copy(int* result) {
    __shared__ Shared<uint4, 64> values;
    shallow::copy_async(values, threadIdx.x, result + 16);
    shallow::commit_copies();
    values[threadIdx.x] = uint4{};
}

__global__ void copy_read_without_a_barrier(int* result) {
    __shared__ Shared<uint4, 64> values;
    shallow::copy_async(values, threadIdx.x, result + 16);
    shallow::commit_copies();
    shallow::wait_copies<0>();
    const uint4 value = values[threadIdx.x / 2];
    result[0] = value.x;
}

// Its thread may read what it waited for, others after one more barrier.
__global__ void copy_waited_for_behind_a_barrier(int* result) {
    __shared__ Shared<uint4, 64> values;
    shallow::copy_async(values, threadIdx.x, result + 16);
    shallow::commit_copies();
    __syncthreads();
    shallow::wait_copies<0>();
    if (threadIdx.x != 1) return;
    const uint4 value = values[0];
    result[0] = value.x;
}

__global__ void too_much_static_memory(int*) {
    __shared__ Shared<uint4, 1600> values, others;
    values[threadIdx.x] = uint4{};
    others[threadIdx.x] = uint4{};
}

__global__ void static_and_dynamic_memory(int*) {
    __shared__ Shared<uint4, 2560> values;
    values[threadIdx.x] = uint4{};
}

__global__ void more_memory_than_announced(int*) {}

__global__ void too_much_shared_memory(int*) { shallow::dynamic_shared<int>()[threadIdx.x] = 1; }

__global__ void too_many_threads(int*) {}

__global__ void too_many_rows_of_blocks(int*) {}

__global__ void sound_overlap(int* result) {
    shallow::wait_for_previous_kernel();
    if (threadIdx.x == 0) result[blockIdx.x] = result[2] + 1;
}

__global__ void overlap_out_of_bounds(int* result) {
    shallow::wait_for_previous_kernel();
    if (threadIdx.x == 7) result[64] = 1;
}

__global__ void read_before_the_wait(int* result) {
    const int value = threadIdx.x == 33 ? result[2] : 0;
    shallow::wait_for_previous_kernel();
    if (threadIdx.x == 33) result[blockIdx.x] = value;
}

__global__ void write_before_the_wait(int* result) {
    if (threadIdx.x == 5) result[blockIdx.x] = 1;
    shallow::wait_for_previous_kernel();
}

__global__ void another_threads_wait(int* result) {
    if (threadIdx.x == 0) shallow::wait_for_previous_kernel();
    __syncthreads();
    if (threadIdx.x == 1) result[blockIdx.x] = 1;
    shallow::wait_for_previous_kernel();
}

__global__ void exit_without_a_wait(int*) {
    if (threadIdx.x == 40) return;
    shallow::wait_for_previous_kernel();
}

const struct {
    const char* name;
    void (*kernel)(int*);
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(sound),
    KERNEL(barrier_after_return),
    KERNEL(barrier_in_a_branch),
    KERNEL(syncwarp_without_a_lane),
    KERNEL(two_barriers),
    KERNEL(shuffle_without_a_lane),
    KERNEL(shuffle_outside_the_mask),
    KERNEL(shuffle_of_a_missing_lane),
    KERNEL(shuffle_in_half_a_warp),
    KERNEL(shuffle_by_two_masks),
    KERNEL(mma_by_half_a_warp),
    KERNEL(unwritten_shared),
    KERNEL(unwritten_in_the_next_block),
    KERNEL(shared_out_of_bounds),
    KERNEL(shared_before_its_first),
    KERNEL(dynamic_shared_out_of_bounds),
    KERNEL(read_without_a_barrier),
    KERNEL(write_without_a_barrier),
    KERNEL(two_writers),
    KERNEL(global_out_of_bounds),
    KERNEL(load_off_its_alignment),
    KERNEL(pair_off_its_alignment),
    KERNEL(order_of_blocks),
    KERNEL(sound_arrival),
    KERNEL(arrival_without_a_fence),
    KERNEL(arrival_before_others),
    KERNEL(second_arrival_without_a_fence),
    KERNEL(read_without_a_fence),
    KERNEL(sound_copy),
    KERNEL(copy_without_a_wait),
    KERNEL(copy_without_a_group),
    KERNEL(write_over_a_copy),
    KERNEL(copy_read_without_a_barrier),
    KERNEL(copy_waited_for_behind_a_barrier),
    KERNEL(too_much_static_memory),
    KERNEL(static_and_dynamic_memory),
    KERNEL(too_much_shared_memory),
    KERNEL(more_memory_than_announced),
    KERNEL(too_many_threads),
    KERNEL(too_many_rows_of_blocks),
    KERNEL(sound_overlap),
    KERNEL(overlap_out_of_bounds),
    KERNEL(read_before_the_wait),
    KERNEL(write_before_the_wait),
    KERNEL(another_threads_wait),
    KERNEL(exit_without_a_wait),
};

constexpr int kLaunches = 16;  // each with its blocks in another order

shallow::Launch launch_of(const std::string& name) {
    shallow::Launch where{2, 64, 63 * sizeof(int), 63 * sizeof(int), nullptr, false};
    if (name == "static_and_dynamic_memory") where.shared_bytes = 60 << 10;
    if (name == "too_much_shared_memory") where.shared_bytes = 100 << 10;
    where.max_shared_bytes = where.shared_bytes;
    if (name == "more_memory_than_announced") where.max_shared_bytes -= sizeof(int);
    if (name == "shuffle_in_half_a_warp") where.block = 48;
    if (name == "too_many_threads") where.block = 1056;
    if (name == "too_many_rows_of_blocks") where.grid = dim3(1, 65536);
    for (const char* word : {"overlap", "the_wait", "threads_wait", "exit_without"})
        where.overlap = where.overlap || name.find(word) != std::string::npos;
    return where;
}

void run(const shallow::Launch& where, void (*kernel)(int*)) {
    std::vector<int> first;
    for (int launch = 0; launch < kLaunches; ++launch) {
        const emulate::Output output(64 * sizeof(int), 0);
        std::vector<int> heap(64, -1);
        int* result = where.overlap ? reinterpret_cast<int*>(output.data()) : heap.data();
        std::fill_n(result, 64, -1);
        shallow::launch(where, kernel, result);
        const std::vector<int> found(result, result + 2);
        if (launch && found != first) emulate::fail("results differ with the order of blocks");
        first = found;
    }
    std::printf("%d %d\n", first[0], first[1]);
}

}  // namespace

int main(int count, char** arguments) {
    for (const auto& entry : kKernels) {
        if (count != 2 || std::strcmp(entry.name, arguments[1])) continue;
        run(launch_of(entry.name), entry.kernel);
        return 0;
    }
    std::fprintf(stderr, "no such kernel\n");
    return 2;
}
