// All that kernels use of the machine beyond plain CUDA C++. nvcc compiles them for a GPU; the C++
// compiler compiles the same .cu files for a CPU, where emulate.h provides what is in here.
// defines: shallow::Shared, SharedArray, dynamic_shared, and_or, load_stream, copy_async,
//          commit_copies, wait_copies, mma, wait_for_previous_kernel, allow_next_kernel, Launch, prepare, launch
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace shallow {

struct Launch {
    dim3 grid, block;
    std::size_t shared_bytes;      // dynamic
    std::size_t max_shared_bytes;  // the most that any launch of this kernel asks for
    cudaStream_t stream;
    bool overlap;  // see wait_for_previous_kernel; compute capability 9.0 and later
};

}  // namespace shallow

#ifndef __CUDACC__
#include "cuda/emulate.h"
#else

#include <mutex>
#include <set>
#include <utility>

#include "cuda/check.h"

namespace shallow {

// An array in shared memory: `__shared__ Shared<float, 64> sums;`
template <typename T, int N>
struct Shared {
    T values[N];
    __device__ T& operator[](int i) { return values[i]; }
};

// Shared memory whose size the launch gives: a pointer to its elements.
template <typename T>
using SharedArray = T*;

template <typename T>
__device__ SharedArray<T> dynamic_shared() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}

// (v & mask) | bits in one instruction, where the compiler takes two.
__device__ inline uint32_t and_or(uint32_t v, uint32_t mask, uint32_t bits) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(v), "r"(mask), "r"(bits));
    return result;
}

// Of what is read once: first to leave the L2.
__device__ inline uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes that are read once: first to leave the L2, never in the L1.
__device__ inline uint4 load_stream(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address), "l"(evict_first()));
    return v;
}

// Copies 16 bytes that are read once from global memory to element i, a uint4, of an array in shared
// memory; they are there when this thread has waited, and for others after a barrier too.
template <typename Array>
__device__ void copy_async(Array&& to, int i, const void* from) {
    uint4* element = &to[i];
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(element))), "l"(from),
                   "l"(evict_first())
                 : "memory");
}

// Makes one group of the copies since the last.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the last LEFT.
template <int LEFT>
__device__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// c (16 x 8, float) += a (16 x 16) * b (16 x 8), a and b of T, by the lanes of a warp. Lane 4 g + t
// holds, two elements to a register and the lower column or row in the lower half:
//   a[0], a[1]: rows g, g + 8; columns 2 t, 2 t + 1       a[2], a[3]: columns 2 t + 8, 2 t + 9
//   b[0], b[1]: column g; rows 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
//   c[0], c[1]: row g; columns 2 t, 2 t + 1               c[2], c[3]: row g + 8
template <typename T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define SHALLOW_MMA(T, name)                                                                       \
    template <>                                                                                    \
    __device__ inline void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                 \
            ".f32 "                                                                                \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
    }
SHALLOW_MMA(__half, "f16")
SHALLOW_MMA(__nv_bfloat16, "bf16")
#undef SHALLOW_MMA

// In a kernel launched with `overlap`: what precedes this call may run while the previous kernel
// still does, so it touches nothing that a kernel writes. Without `overlap` it does nothing.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel, where launched with `overlap`, may start as soon as every block came here.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Lets a kernel have so much dynamic shared memory on the current device, and loads it: once, so
// that a launch costs one call, and none that a stream capture forbids. Throws as `launch` does.
inline void prepare(const void* kernel, std::size_t max_shared_bytes) {
    static std::mutex mutex;
    static std::set<std::pair<int, const void*> > prepared;
    int device = 0;
    check(cudaGetDevice(&device), "kernel launch");
    const std::lock_guard lock(mutex);
    if (!prepared.insert({device, kernel}).second) return;
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(max_shared_bytes));
    if (status != cudaSuccess) prepared.erase({device, kernel});
    check(status, "kernel launch");
}

// Throws std::runtime_error with CUDA's message.
template <typename... Parameters>
void launch(const Launch& where, void (*kernel)(Parameters...), Parameters... arguments) {
    prepare(reinterpret_cast<const void*>(kernel), where.max_shared_bytes);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = where.grid;
    config.blockDim = where.block;
    config.dynamicSmemBytes = where.shared_bytes;
    config.stream = where.stream;
    config.attrs = &overlap;
    config.numAttrs = where.overlap ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
}

}  // namespace shallow

#endif  // __CUDACC__
