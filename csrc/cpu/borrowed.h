// Memory of a tensor as it crosses from Python: where, how much, of what, on which device.
// defines: TensorTuple Tensor Borrowed
#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace shallow {

// What engine.kernels.native.span() makes of a tensor: (address, elements from there to the end of
// the tensor, dtype by torch's name, device); None where there is none.
using TensorTuple = std::tuple<std::uintptr_t, std::int64_t, std::string, std::string>;
using Tensor = std::optional<TensorTuple>;

class Borrowed {
public:
    Borrowed(const Tensor& tensor, const char* what) : what_(what) {
        if (!tensor) return;
        std::string device;
        std::tie(address_, count_, dtype_, device) = *tensor;
        if (device != "cpu") fail("memory of the CPU", "a tensor on " + device);
    }

    const std::string& dtype() const { return dtype_; }

    // Its first element, where it has so many of `dtype`; null where there is no tensor.
    void* of(const std::string& dtype, std::int64_t count) const {
        if (address_ == 0 && count_ == 0) return nullptr;
        if (dtype_ != dtype) fail(dtype, dtype_);
        if (count < 0 || count_ < count)
            fail(std::to_string(count) + " elements", std::to_string(count_));
        return reinterpret_cast<void*>(address_);
    }
    // The same where there must be one.
    void* need(const std::string& dtype, std::int64_t count) const {
        if (count > 0 && address_ == 0) fail("a tensor", "none");
        return of(dtype, count);
    }
    // (m, n) whose rows are `stride` elements apart.
    void* rows(const std::string& dtype, std::int64_t m, std::int64_t n,
               std::int64_t stride) const {
        if (m < 0 || n < 0 || stride < 0) fail("sizes of at least 0", "less");
        return need(dtype, m && n ? (m - 1) * stride + n : 0);
    }

private:
    [[noreturn]] void fail(const std::string& expected, const std::string& found) const {
        throw std::invalid_argument(std::string(what_) + ": expected " + expected + ", found " +
                                    found);
    }

    const char* what_;
    std::uintptr_t address_ = 0;
    std::int64_t count_ = 0;
    std::string dtype_;
};

}  // namespace shallow
