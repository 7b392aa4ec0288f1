// What a repair is fitted on, read from the graph as it passes: of each layer the ids of the selected experts, their gates, what enters
// their down projections, and the hidden states that the layer hands on. No I/O, no maths.
#pragma once

#include "ggml.h"
#include "tensor_read.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace reap {

class Capture {
  public:
    // Of one batch, token after token.
    struct Layer {
        size_t n_used = 0, n_ff = 0, n_embd = 0;
        bool   gate_before = false;    // the gate multiplies the experts' input: what enters the down projection has it already
        std::vector<int32_t> ids;      // [n_tokens][n_used]
        std::vector<float>   gates;    // [n_tokens][n_used]
        std::vector<float>   inputs;   // [n_tokens][n_used][n_ff]
        std::vector<float>   stream;   // [n_tokens][n_embd]
    };

    // `layers`: block numbers. `experts`: false: the hidden states alone.
    Capture(const std::vector<int> & layers, bool experts);

    // Of each node as it is asked about: whether it has to be stopped at. When all is read, the graph ends at the next node.
    bool on_ask(const ggml_tensor * node);
    bool on_stop(const ggml_tensor * node, TensorReader & reader);

    void begin_batch();
    // EngineError where a layer was not seen whole.
    void check_batch(size_t n_tokens) const;

    const std::map<int, Layer> & layers() const { return layers_; }

  private:
    enum class Part { None, Inputs, Gates, Stream };

    struct Found {
        Part part = Part::None;
        int  layer = -1;
    };

    Found find(const ggml_tensor * node) const;

    bool                 experts_;
    int                  last_layer_;
    std::string          first_node_;  // with it, a graph begins
    bool                 done_ = false;
    std::map<int, Layer> layers_;
};

}  // namespace reap
