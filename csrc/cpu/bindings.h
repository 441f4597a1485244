// Every op file defines one of these; bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/borrowed.h"
#include "w4.h"

void bind_bandwidth(pybind11::module_& m);
void bind_w4_format(pybind11::module_& m);
void bind_angular(pybind11::module_& m);
void bind_w4_matmul(pybind11::module_& m);
void bind_peak(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);

// std::invalid_argument for what is no float of kernels.
w4::ScaleType float_from_name(const std::string& name);

// Of a packed matrix all but its arrays, by the names of kernels/w4/format.py's Spec. Throws
// std::invalid_argument.
w4::Matrix describe_matrix(std::int64_t n, std::int64_t k, std::int32_t bits, std::int32_t group,
                           const std::string& scheme, const std::string& scale_dtype);

// Its perm, or null, each of whose columns is one of k. Throws std::invalid_argument.
const std::int32_t* columns_from(const shallow::Tensor& perm, std::int64_t k);
