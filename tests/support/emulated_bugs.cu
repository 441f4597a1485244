// Kernels that break one rule each, for tests of csrc/cuda/emulate.h: `bugs NAME` runs one.
#include <cstdio>
#include <cstring>
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
    result[0] = shallow::load_stream(result + 1).x;
}

const struct {
    const char* name;
    void (*kernel)(int*);
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(sound),
    KERNEL(barrier_after_return),
    KERNEL(barrier_in_a_branch),
    KERNEL(two_barriers),
    KERNEL(shuffle_without_a_lane),
    KERNEL(shuffle_outside_the_mask),
    KERNEL(shuffle_of_a_missing_lane),
    KERNEL(shuffle_by_two_masks),
    KERNEL(mma_by_half_a_warp),
    KERNEL(unwritten_shared),
    KERNEL(unwritten_in_the_next_block),
    KERNEL(shared_out_of_bounds),
    KERNEL(dynamic_shared_out_of_bounds),
    KERNEL(read_without_a_barrier),
    KERNEL(write_without_a_barrier),
    KERNEL(two_writers),
    KERNEL(global_out_of_bounds),
    KERNEL(load_off_its_alignment),
};

}  // namespace

int main(int count, char** arguments) {
    std::vector<int> result(64, -1);
    for (const auto& entry : kKernels) {
        if (count != 2 || std::strcmp(entry.name, arguments[1])) continue;
        const std::size_t shared_bytes = 63 * sizeof(int);
        shallow::launch({2, 64, shared_bytes, shared_bytes, nullptr, false}, entry.kernel,
                        result.data());
        std::printf("%d %d\n", result[0], result[1]);
        return 0;
    }
    std::fprintf(stderr, "no such kernel\n");
    return 2;
}
