// Values of ggml tensors on the host, wherever the tensor lives and however it is strided.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace reap {

// The values of an I32 tensor [n0, n1] (n0 contiguous, rows strided), row after row.
void read_i32(const ggml_tensor * tensor, std::vector<int32_t> & values, size_t & bytes_read);

// The values of a contiguous F32 tensor.
void read_f32(const ggml_tensor * tensor, std::vector<float> & values, size_t & bytes_read);

// ‖row‖ in double precision for each row of an F32 tensor [n_row, n1, n2], in the order of memory.
void read_row_norms(const ggml_tensor * tensor, int n_threads, std::vector<double> & norms, size_t & bytes_read);

// Σ x² of n floats, accumulated in double precision.
double sum_of_squares(const float * x, size_t n);

}  // namespace reap
