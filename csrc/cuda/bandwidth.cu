#include <algorithm>
#include <limits>

#include "cuda/bindings.h"
#include "cuda/check.h"

namespace shallow {
namespace {

struct Buffer {
    explicit Buffer(int64_t bytes) { check(cudaMalloc(&data, bytes), "copy_bandwidth"); }
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
    void* data = nullptr;
};

struct Event {
    Event() { check(cudaEventCreate(&event), "copy_bandwidth"); }
    ~Event() { cudaEventDestroy(event); }
    Event(const Event&) = delete;
    cudaEvent_t event;
};

}  // namespace

double copy_bandwidth(int64_t bytes, int passes, void* stream) {
    if (bytes < 1 || passes < 1)
        throw std::invalid_argument("copy_bandwidth needs a byte and a pass, got bytes=" +
                                    std::to_string(bytes) + ", passes=" + std::to_string(passes));
    const auto queue = static_cast<cudaStream_t>(stream);
    const Buffer from(bytes), to(bytes);
    const Event start, end;
    check(cudaMemsetAsync(from.data, 1, bytes, queue), "copy_bandwidth");
    float best_ms = std::numeric_limits<float>::infinity();
    for (int pass = -1; pass < passes; ++pass) {  // pass -1 warms up
        check(cudaEventRecord(start.event, queue), "copy_bandwidth");
        check(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, queue),
              "copy_bandwidth");
        check(cudaEventRecord(end.event, queue), "copy_bandwidth");
        check(cudaEventSynchronize(end.event), "copy_bandwidth");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, start.event, end.event), "copy_bandwidth");
        if (pass >= 0) best_ms = std::min(best_ms, ms);
    }
    return 2.0 * static_cast<double>(bytes) / best_ms / 1e6;
}

}  // namespace shallow
