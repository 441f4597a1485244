// Every op file defines one of these; bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

void bind_bandwidth(pybind11::module_& m);
void bind_w4_format(pybind11::module_& m);
void bind_angular(pybind11::module_& m);
void bind_w4_matmul(pybind11::module_& m);
void bind_peak(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
