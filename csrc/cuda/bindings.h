// What the .cu files export: raw pointers, sizes and a stream; no CUDA type, so that bindings.cpp
// compiles with the C++ compiler alone. A CUDA error is thrown as std::runtime_error with its text.
#pragma once

#include <cstdint>
#include <string>

namespace shallow {

struct DeviceInfo {
    std::string name;
    int major, minor;  // compute capability
    int multiprocessors;
    int64_t memory_bytes, l2_bytes;
};

int device_count();  // 0 without a GPU or a driver
DeviceInfo device_info(int device);
double copy_bandwidth(int64_t bytes, int passes, void* stream);

}  // namespace shallow
