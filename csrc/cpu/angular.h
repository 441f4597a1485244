// Angular distances between the boundaries of a model, for all pairs of boundaries at once.
// defines: Float Half Bfloat AngularJob Scratch angular_generic angular_avx2 angular_avx512
//          angular_amx angular
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace shallow {

enum class Float : int { f64, f32, f16, bf16 };
struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

// R boundaries of B samples with D features. P = R(R-1)/2 pairs i < j, row by row of the upper
// triangle: (0,1) (0,2) .. (0,R-1) (1,2) ..
struct AngularJob {
    const void* const* rows;  // (R,) each the first feature of a boundary's sample 0
    const int64_t* strides;   // (R,) elements from one sample to the next
    Float type;
    int R;
    int64_t B, D;
    const double* weights;  // (B,), null for ones; a sample of weight 0 is not read
    double* sums;           // (4, P) weighted: distance, its square, cosine, relative magnitude
    double* squares;        // (R, B) squared norms; 1 where the weight is 0
    double* values;         // (B, P) distances, or null; 0 where the weight is 0
};

// 64-byte aligned memory. Defined in angular.cpp, so that no instruction set's file defines it.
struct Scratch {
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    void* const data;
};

// Samples begin..end-1, added to `sums` (4, P). One function for each instruction set.
void angular_generic(const AngularJob& job, int64_t begin, int64_t end, double* sums);
void angular_avx2(const AngularJob& job, int64_t begin, int64_t end, double* sums);
void angular_avx512(const AngularJob& job, int64_t begin, int64_t end, double* sums);
void angular_amx(const AngularJob& job, int64_t begin, int64_t end, double* sums);

// All samples, overwriting the outputs. `isa` as in isa.h, "" for the best; throws
// std::invalid_argument where this processor does not have it.
void angular(const AngularJob& job, int threads, const std::string& isa);

}  // namespace shallow
