// Runs the CUDA kernels on a CPU, for tests: `emulated CALLS RESULTS`, two files.
//
// CALLS holds calls, one after another, in integers of 8 bytes:
//   bytes of the op's argument struct, which tell the ops apart, the struct, and how many arrays
//   follow; for each of these:
//   where its pointer lies in the struct, whether it is an output, whether the kernel before writes
//   it, its offset from a multiple of 16 bytes, its bytes, and these bytes
// RESULTS gets for each call: the bytes of an error's message and the message; or 0 and the bytes
// of its outputs. Arrays are allocated to the byte, for AddressSanitizer to guard, and those of the
// kernel before to 16 bytes before a page that is guarded.
#include <cstdint>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <vector>

#include "cuda/attention.h"
#include "cuda/kernel.h"
#include "cuda/w4_matmul.h"

namespace {

struct Array {
    std::int64_t place, output, before, offset, bytes;
    std::unique_ptr<char[]> memory;
    std::unique_ptr<emulate::Output> guarded;
    char* data() { return guarded ? guarded->data() : memory.get() + offset; }
};

std::int64_t read_integer(std::istream& in) {
    std::int64_t value = 0;
    in.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}

void write_integer(std::ostream& out, std::int64_t value) {
    out.write(reinterpret_cast<const char*>(&value), sizeof value);
}

Array read_array(std::istream& in) {
    Array array{};
    for (std::int64_t* field :
         {&array.place, &array.output, &array.before, &array.offset, &array.bytes})
        *field = read_integer(in);
    if (array.before)
        array.guarded = std::make_unique<emulate::Output>(array.bytes, array.offset);
    else
        array.memory.reset(new char[array.offset + array.bytes]);
    in.read(array.data(), array.bytes);
    return array;
}

template <typename Call>
void run_call(std::istream& in, std::ostream& out, void (*launch)(const Call&, void*)) {
    Call call;
    in.read(reinterpret_cast<char*>(&call), sizeof call);
    std::vector<Array> arrays;
    for (std::int64_t left = read_integer(in); left; --left) {
        arrays.push_back(read_array(in));
        char* address = arrays.back().data();
        std::memcpy(reinterpret_cast<char*>(&call) + arrays.back().place, &address, sizeof address);
    }
    try {
        launch(call, nullptr);
    } catch (const std::exception& error) {
        write_integer(out, std::strlen(error.what()));
        out << error.what();
        return;
    }
    write_integer(out, 0);
    for (Array& array : arrays)
        if (array.output) out.write(array.data(), array.bytes);
}

static_assert(sizeof(shallow::W4Matmul) != sizeof(shallow::DecodeAttention), "told apart");

void run_call(std::istream& in, std::ostream& out) {
    switch (read_integer(in)) {
        case sizeof(shallow::W4Matmul): return run_call(in, out, shallow::w4_matmul);
        case sizeof(shallow::DecodeAttention): return run_call(in, out, shallow::decode_attention);
        default: throw std::length_error("a struct of another size");
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: emulated CALLS RESULTS\n";
        return 2;
    }
    std::ifstream calls(arguments[1], std::ios::binary);
    std::ofstream results(arguments[2], std::ios::binary);
    while (calls.peek() != EOF) run_call(calls, results);
    return results.flush() ? 0 : 1;
}
