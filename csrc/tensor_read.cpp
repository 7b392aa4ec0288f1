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

TensorReader::Device::Device(ggml_backend_dev_t device)
    : backend(ggml_backend_dev_init(device, nullptr), ggml_backend_free),
      allocator(ggml_gallocr_new(ggml_backend_dev_buffer_type(device)), ggml_gallocr_free) {
    if (!backend || !allocator) {
        throw EngineError(std::string("the engine cannot open the device ") + ggml_backend_dev_name(device) + " a second time");
    }
}

// Runs build(source) on the device that holds `source` and reads its result. False where that device cannot.
bool TensorReader::compute_on_device(const ggml_tensor * source, Build build, void * result, size_t result_bytes) {
    const ggml_backend_buffer_t buffer = buffer_of(source);
    const ggml_backend_dev_t id = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    if (id == nullptr || !reduce_) {
        return false;
    }
    constexpr size_t MAX_NODES = 8;
    const ggml_init_params params = {MAX_NODES * ggml_tensor_overhead() + ggml_graph_overhead_custom(MAX_NODES, false), nullptr, true};
    const std::unique_ptr<ggml_context, void (*)(ggml_context *)> context(ggml_init(params), ggml_free);
    // a leaf over the same memory: the source itself would bring the whole graph that computed it
    ggml_tensor * leaf = ggml_new_tensor(context.get(), source->type, GGML_MAX_DIMS, source->ne);
    std::copy_n(source->nb, GGML_MAX_DIMS, leaf->nb);
    if (ggml_backend_tensor_alloc(buffer, leaf, source->data) != GGML_STATUS_SUCCESS) {
        return false;
    }
    ggml_tensor * output = build(context.get(), leaf);
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), MAX_NODES, false);
    ggml_build_forward_expand(graph, output);
    Device & device = devices_.try_emplace(id, id).first->second;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (!ggml_backend_supports_op(device.backend.get(), ggml_graph_node(graph, i))) {
            return false;
        }
    }
    if (!ggml_gallocr_alloc_graph(device.allocator.get(), graph)) {
        return false;
    }
    if (ggml_backend_graph_compute(device.backend.get(), graph) != GGML_STATUS_SUCCESS || ggml_nbytes(output) != result_bytes) {
        throw EngineError(describe(source) + " could not be read from the device " + ggml_backend_dev_name(id));
    }
    ggml_backend_tensor_get(output, result, 0, result_bytes);
    bytes_read_ += result_bytes;
    return true;
}

void TensorReader::read_i32(const ggml_tensor * t, std::vector<int32_t> & values) {
    require(t->type == GGML_TYPE_I32 && t->nb[0] == sizeof(int32_t) && t->ne[2] == 1 && t->ne[3] == 1, t, "a matrix of 32-bit ids");
    const size_t n_row = static_cast<size_t>(t->ne[0]);
    const size_t n_rows = static_cast<size_t>(t->ne[1]);
    const size_t row_bytes = n_row * sizeof(int32_t);
    values.resize(n_row * n_rows);
    if (on_host(t)) {
        for (size_t r = 0; r < n_rows; ++r) {
            const auto * row = reinterpret_cast<const int32_t *>(static_cast<const char *>(t->data) + r * t->nb[1]);
            std::copy_n(row, n_row, values.begin() + r * n_row);
        }
        return;
    }
    const auto pack = [](ggml_context * context, ggml_tensor * rows) { return ggml_cont(context, rows); };
    if (ggml_is_contiguous(t)) {
        ggml_backend_tensor_get(t, values.data(), 0, n_rows * row_bytes);
    } else if (compute_on_device(t, pack, values.data(), n_rows * row_bytes)) {
        return;
    } else {
        ggml_backend_tensor_get_2d(t, values.data(), 0, row_bytes, n_rows, t->nb[1], row_bytes);
    }
    bytes_read_ += n_rows * row_bytes;
}

void TensorReader::read_f32(const ggml_tensor * t, std::vector<float> & values) {
    require(t->type == GGML_TYPE_F32 && ggml_is_contiguous(t), t, "contiguous 32-bit floats");
    values.resize(static_cast<size_t>(ggml_nelements(t)));
    if (on_host(t)) {
        std::copy_n(static_cast<const float *>(t->data), values.size(), values.begin());
    } else {
        ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        bytes_read_ += ggml_nbytes(t);
    }
}

void fill_columns(ggml_tensor * t, const std::vector<int32_t> & columns, float value) {
    require(t->type == GGML_TYPE_F32 && ggml_is_contiguous(t), t, "contiguous 32-bit floats");
    const size_t n_row = static_cast<size_t>(t->ne[0]);
    const size_t n_rows = static_cast<size_t>(ggml_nrows(t));
    const auto fill = [&](float * values) {
        for (size_t r = 0; r < n_rows; ++r) {
            for (const int32_t column : columns) {
                values[r * n_row + static_cast<size_t>(column)] = value;
            }
        }
    };
    if (on_host(t)) {
        fill(static_cast<float *>(t->data));
        return;
    }
    // there and back whole: a router's values are few, and a transfer for each column would be many
    std::vector<float> values(n_row * n_rows);
    ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
    fill(values.data());
    ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
}

void rewrite_i32(ggml_tensor * t, const std::function<void(std::vector<int32_t> &)> & change) {
    require(t->type == GGML_TYPE_I32 && ggml_is_contiguous(t), t, "contiguous whole numbers of 32 bits");
    std::vector<int32_t> values(static_cast<size_t>(ggml_nelements(t)));
    ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
    change(values);
    ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
}

void TensorReader::read_row_norms(const ggml_tensor * t, std::vector<double> & norms) {
    require(t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1, t, "rows of 32-bit floats");
    const size_t n_row = static_cast<size_t>(t->ne[0]);
    const size_t n1 = static_cast<size_t>(t->ne[1]);
    const size_t n_rows = n1 * static_cast<size_t>(t->ne[2]);
    norms.resize(n_rows);

    const char * base = static_cast<const char *>(t->data);
    size_t nb1 = t->nb[1];
    size_t nb2 = t->nb[2];
    if (!on_host(t)) {
        floats_.resize(n_rows);
        const auto norm = [](ggml_context * context, ggml_tensor * rows) {
            return ggml_sqrt(context, ggml_sum_rows(context, ggml_sqr(context, rows)));
        };
        if (compute_on_device(t, norm, floats_.data(), n_rows * sizeof(float))) {
            std::copy(floats_.begin(), floats_.end(), norms.begin());
            return;
        }
        read_f32(t, floats_);
        base = reinterpret_cast<const char *>(floats_.data());
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
    const size_t workers = std::min<size_t>(wanted, static_cast<size_t>(std::max(1, n_threads_)));
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
