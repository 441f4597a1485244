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
    return {found.name,
            found.major,
            found.minor,
            found.multiProcessorCount,
            static_cast<int64_t>(found.totalGlobalMem),
            found.l2CacheSize};
}

}  // namespace shallow
