#include "cuda/bindings.h"
#include "cuda/check.h"

namespace shallow {

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

DeviceInfo device_info(int device) {
    cudaDeviceProp found;
    check(cudaGetDeviceProperties(&found, device), "device_info");
    DeviceInfo info;
    info.name = found.name;
    info.major = found.major;
    info.minor = found.minor;
    info.multiprocessors = found.multiProcessorCount;
    info.memory_bytes = static_cast<int64_t>(found.totalGlobalMem);
    info.l2_bytes = found.l2CacheSize;
    return info;
}

}  // namespace shallow
