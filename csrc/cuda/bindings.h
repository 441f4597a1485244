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

int device_count();          // 0 without a GPU or a driver
std::string device_error();  // why there is none, in words; empty where there is one
// What a status of cudaGetDeviceCount means beside these versions (1000 major + 10 minor).
std::string explain(int status, int driver, int runtime);
DeviceInfo device_info(int device);
double copy_bandwidth(int64_t bytes, int passes, void* stream);

}  // namespace shallow
