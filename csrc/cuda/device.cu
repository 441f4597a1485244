#include <string>

#include "cuda/bindings.h"
#include "cuda/check.h"

namespace shallow {

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string device_error() {
    int count = 0, driver = 0, runtime = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count > 0) return "";
    cudaDriverGetVersion(&driver);  // 0 where there is none
    cudaRuntimeGetVersion(&runtime);
    return explain(status, driver, runtime);
}

std::string explain(int status, int driver, int runtime) {
    const auto version = [](int v) {
        return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
    };
    if (status == cudaSuccess || status == cudaErrorNoDevice) return "the driver shows no GPU";
    if (driver == 0) return "there is no NVIDIA driver";
    if (status == cudaErrorInsufficientDriver)
        return "the NVIDIA driver is for CUDA " + version(driver) + ", older than this build's " +
               version(runtime) + ": a newer driver is needed";
    return std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(status));
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
