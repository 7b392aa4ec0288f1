// llama.cpp's quantiser: a GGUF file in, a smaller one out.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace reap {

struct QuantizeOptions {
    std::string input;  // the first file of a split model; paths are bytes, as the file system has them
    std::string output;
    std::string type;                  // a name of `quantize_types`
    int         threads = 0;           // 0: as many as the machine has
    bool        allow_requantize = false;
    bool        pure = false;          // every matrix gets the type itself, and no mixture
    bool        quantize_output = true;
    std::string output_tensor_type;    // a ggml type; empty: as the mixture has it
    std::string token_embedding_type;
    std::vector<std::pair<std::string, std::string>> tensor_types;             // (regular expression of names, ggml type)
    std::map<std::string, std::vector<float>>        imatrix;                  // weight -> [n_matrices * n_in]
    std::vector<std::pair<std::string, std::variant<std::string, int64_t>>> metadata;  // keys to add to the output
};

// A tensor whose shape does not allow the type that it should have got, and what it got instead (names of ggml types).
struct Fallback {
    std::string tensor, wanted, got;
};

// Names that `type` may have -> llama.cpp's number of the file type.
std::map<std::string, int> quantize_types();

// Names of ggml types that a tensor may be given.
std::vector<std::string> tensor_types();

// Computes nothing and writes nothing: the size of the output's tensors in bytes, exact to a hundredth of a MiB.
double quantized_size(const QuantizeOptions & options);

// Writes `output`. `progress` is called with (tensors begun, tensors in all). Returns what fell back to another type, in the file's order.
// Throws EngineError with the end of llama.cpp's log, UsageError.
std::vector<Fallback> quantize(const QuantizeOptions & options, const std::function<void(int, int)> & progress);

}  // namespace reap
