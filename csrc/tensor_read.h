// Values of ggml tensors on the host, wherever the tensor lives and however it is strided.
//
// What lies in host memory is read in place. On a device, rows are packed and norms are reduced by a small graph on a backend of that
// device, so that 12 bytes cross for each token and selected expert instead of the whole output.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace reap {

class TensorReader {
  public:
    void set_threads(int n_threads) { n_threads_ = n_threads; }
    // false: read whole tensors from devices, for comparison
    void set_reduce_on_device(bool reduce) { reduce_ = reduce; }

    // The values of an I32 tensor [n0, n1] (n0 contiguous, rows strided), row after row.
    void read_i32(const ggml_tensor * tensor, std::vector<int32_t> & values);

    // The values of a contiguous F32 tensor.
    void read_f32(const ggml_tensor * tensor, std::vector<float> & values);

    // ‖row‖ for each row of an F32 tensor [n_row, n1, n2], in the order of memory; double precision on the host, the device's own there.
    void read_row_norms(const ggml_tensor * tensor, std::vector<double> & norms);

    // From buffers that are not host memory.
    size_t bytes_read() const { return bytes_read_; }

  private:
    // A backend of one device, to run small graphs on.
    struct Device {
        explicit Device(ggml_backend_dev_t device);
        std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)>  backend;
        std::unique_ptr<ggml_gallocr, void (*)(ggml_gallocr_t)> allocator;
    };

    using Build = ggml_tensor * (*)(ggml_context *, ggml_tensor *);

    bool compute_on_device(const ggml_tensor * source, Build build, void * result, size_t result_bytes);

    int    n_threads_ = 1;
    bool   reduce_ = true;
    size_t bytes_read_ = 0;
    std::map<ggml_backend_dev_t, Device> devices_;
    std::vector<float> floats_;
};

// Writes `value` into some columns of every row of a contiguous F32 matrix, wherever it lives.
void fill_columns(ggml_tensor * rows, const std::vector<int32_t> & columns, float value);

// Lets `change` rewrite the values of a contiguous I32 tensor, wherever it lives.
void rewrite_i32(ggml_tensor * tensor, const std::function<void(std::vector<int32_t> & values)> & change);

// Σ x² of n floats, accumulated in double precision.
double sum_of_squares(const float * x, size_t n);

}  // namespace reap
