#include "tensor_read.h"

#include "errors.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>

// One build serves every x86 machine: the compiler makes a variant per instruction set and the loader picks one. Sanitizers
// cannot instrument the resolver, which runs before them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(REAP_SANITIZE)
#define REAP_VECTOR_VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REAP_VECTOR_VARIANTS
#endif

namespace reap {

namespace {

std::string describe(const ggml_tensor * t) {
    std::string text = std::string(t->name) + " is " + ggml_type_name(t->type) + " [";
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        text += (i ? ", " : "") + std::to_string(t->ne[i]);
    }
    return text + "]";
}

ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

bool on_host(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = buffer_of(t);
    return buffer == nullptr || ggml_backend_buffer_is_host(buffer);
}

void require(bool holds, const ggml_tensor * t, const char * expected) {
    if (!holds) {
        throw EngineError(describe(t) + " where reap expects " + expected);
    }
}

// Below this many values another thread costs more than it saves.
constexpr size_t VALUES_PER_THREAD = 1 << 19;

}  // namespace

REAP_VECTOR_VARIANTS
double sum_of_squares(const float * x, size_t n) {
    // independent accumulators: a fixed order of additions that the compiler may still vectorise
    constexpr size_t LANES = 32;
    double lanes[LANES] = {};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (size_t l = 0; l < LANES; ++l) {
            const double value = x[i + l];
            lanes[l] += value * value;
        }
    }
    for (; i < n; ++i) {
        const double value = x[i];
        lanes[i % LANES] += value * value;
    }
    double sum = 0.0;
    for (const double lane : lanes) {
        sum += lane;
    }
    return sum;
}

void read_i32(const ggml_tensor * t, std::vector<int32_t> & values, size_t & bytes_read) {
    require(t->type == GGML_TYPE_I32 && t->nb[0] == sizeof(int32_t) && t->ne[2] == 1 && t->ne[3] == 1, t, "a matrix of 32-bit ids");
    const size_t n_row = static_cast<size_t>(t->ne[0]);
    const size_t n_rows = static_cast<size_t>(t->ne[1]);
    values.resize(n_row * n_rows);
    if (on_host(t)) {
        for (size_t r = 0; r < n_rows; ++r) {
            const auto * row = reinterpret_cast<const int32_t *>(static_cast<const char *>(t->data) + r * t->nb[1]);
            std::copy_n(row, n_row, values.begin() + r * n_row);
        }
    } else {
        const size_t row_bytes = n_row * sizeof(int32_t);
        ggml_backend_tensor_get_2d(t, values.data(), 0, row_bytes, n_rows, t->nb[1], row_bytes);
        bytes_read += values.size() * sizeof(int32_t);
    }
}

void read_f32(const ggml_tensor * t, std::vector<float> & values, size_t & bytes_read) {
    require(t->type == GGML_TYPE_F32 && ggml_is_contiguous(t), t, "contiguous 32-bit floats");
    values.resize(static_cast<size_t>(ggml_nelements(t)));
    if (on_host(t)) {
        std::copy_n(static_cast<const float *>(t->data), values.size(), values.begin());
    } else {
        ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        bytes_read += ggml_nbytes(t);
    }
}

void read_row_norms(const ggml_tensor * t, int n_threads, std::vector<double> & norms, size_t & bytes_read) {
    require(t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1, t, "rows of 32-bit floats");
    const size_t n_row = static_cast<size_t>(t->ne[0]);
    const size_t n1 = static_cast<size_t>(t->ne[1]);
    const size_t n_rows = n1 * static_cast<size_t>(t->ne[2]);
    norms.resize(n_rows);

    std::vector<float> copy;
    const char * base = static_cast<const char *>(t->data);
    size_t nb1 = t->nb[1];
    size_t nb2 = t->nb[2];
    if (!on_host(t)) {
        read_f32(t, copy, bytes_read);
        base = reinterpret_cast<const char *>(copy.data());
        nb1 = n_row * sizeof(float);
        nb2 = n1 * nb1;
    }
    const auto norms_of = [&](size_t first, size_t last) {
        for (size_t r = first; r < last; ++r) {
            const char * row = base + (r / n1) * nb2 + (r % n1) * nb1;
            norms[r] = std::sqrt(sum_of_squares(reinterpret_cast<const float *>(row), n_row));
        }
    };
    const size_t wanted = std::max<size_t>(1, n_rows * n_row / VALUES_PER_THREAD);
    const size_t workers = std::min<size_t>(wanted, static_cast<size_t>(std::max(1, n_threads)));
    std::vector<std::thread> threads;
    for (size_t w = 1; w < workers; ++w) {
        threads.emplace_back(norms_of, n_rows * w / workers, n_rows * (w + 1) / workers);
    }
    norms_of(0, n_rows / workers);
    for (auto & thread : threads) {
        thread.join();
    }
}

}  // namespace reap
