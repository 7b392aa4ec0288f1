// The eval callback: looks at the nodes of llama.cpp's graph as they pass, stops after each layer's experts, pairs the three
// tensors of a routing and feeds the saliency sums. No I/O, no maths.
//
// A graph is learnt once, from a survey pass that stops nowhere (moe_graph). Where ids or gates no longer hold their values when the
// output has been computed, the collector stops at them as well.
#pragma once

#include "capture.h"
#include "ggml.h"
#include "moe_graph.h"
#include "router_likeness.h"
#include "router_mask.h"
#include "saliency.h"
#include "tensor_read.h"

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace reap {

struct CollectorStats {
    double  seconds = 0.0;     // inside the callback, reading and adding
    int64_t stops = 0;
    int64_t batches = 0;
};

class Collector {
  public:
    // What llama.cpp is given as cb_eval and its user data.
    static bool callback(ggml_tensor * node, bool ask, void * self);

    // Asked at each stop; true ends the batch with Interrupted.
    void set_poll(std::function<bool()> poll) { poll_ = std::move(poll); }
    void poll() const;
    void set_threads(int n_threads) { reader_.set_threads(n_threads); }
    // What is written over while it is in force, whether anything is collected or not. Not owned.
    void set_mask(RouterMask * mask) { mask_ = mask; }
    // What reads along, of batches that are not collected; null: nothing. Not owned.
    void set_capture(Capture * capture) { capture_ = capture; }
    void set_reduce_on_device(bool reduce) { reader_.set_reduce_on_device(reduce); }
    // false: let the rest of the graph run after the last MoE layer, for comparison
    void set_stop_early(bool stop) { stop_early_ = stop; }
    // true: go on after the last MoE layer to the hidden states for a prediction block, and keep those of the batch
    void set_keep_hidden(bool keep) { keep_hidden_ = keep; }
    const std::vector<float> & hidden() const { return hidden_; }  // [n_tokens][n_embd]

    // The survey: begin, decode a few tokens, end. `layers` are the MoE layers that the model's file has, ascending.
    void begin_survey();
    void end_survey(const std::vector<int> & layers, size_t n_experts);

    // A batch: begin, decode, then end (which checks that every layer saw every token). A sample is one batch or several, and then
    // commit or discard.
    void begin_batch(const int32_t * groups, size_t n_tokens);
    void end_batch();
    // `n_units` says how many samples of the caller's that completes, counted in the same step so that no signal can part the two.
    void commit(int64_t n_units);
    void discard() noexcept;
    void restore(size_t group, const Sums & sums, int64_t n_units);
    int64_t units() const { return units_; }

    // Rethrows what went wrong inside the callback, if anything did.
    void rethrow();

    const Saliency & saliency() const;
    // By layer, of those whose experts are selected by token id.
    const std::map<int, RouterLikeness> & likeness() const { return likeness_; }
    const CollectorStats & stats() const { return stats_; }
    size_t bytes_read() const { return reader_.bytes_read(); }

  private:
    enum class Mode { Idle, Survey, Collect };

    // One layer in the graph under way.
    struct LayerState {
        const ggml_tensor *  weights = nullptr;
        bool                 have_ids = false, have_weights = false;
        bool                 done = false;  // in the graph under way; GroveMoE runs a second block under the same names
        std::vector<int32_t> ids;
        std::vector<float>   gates;
        size_t               tokens_seen = 0;
    };

    bool is_idle() const { return mode_ == Mode::Idle && !abandoned_; }
    bool mask(ggml_tensor * node);
    bool capture(const ggml_tensor * node);
    bool on_ask(ggml_tensor * node);
    void begin_graph();
    bool on_stop(ggml_tensor * node);
    void compare_values(int layer, const LayerState & state, const ggml_tensor * values);
    void gather(const LayerPlan & plan, LayerState & state, const ggml_tensor * output);

    Mode mode_ = Mode::Idle;
    MoeGraph                  graph_;  // as the survey sees it
    std::string               first_node_;  // with it, a graph begins
    std::string               hidden_node_;  // what is kept for a prediction block; empty: nothing
    std::map<int, LayerPlan>  plans_;
    std::map<int, LayerState> states_;
    int                       last_layer_ = -1;
    bool                      stop_early_ = true;
    bool                      stopped_ = false;    // the graph under way has given all we want
    bool                      abandoned_ = false;  // so has the whole batch: an error or an interruption
    std::exception_ptr        error_;
    std::function<bool()>     poll_;
    RouterMask *              mask_ = nullptr;
    Capture *                 capture_ = nullptr;
    TensorReader              reader_;
    const int32_t *           groups_ = nullptr;
    size_t                    n_tokens_ = 0;
    bool                      keep_hidden_ = false;
    std::vector<float>        hidden_, floats_;
    std::vector<double>       norms_;
    std::unique_ptr<Saliency> saliency_;
    std::map<int, RouterLikeness> likeness_;
    int64_t                   units_ = 0;
    CollectorStats            stats_;
};

}  // namespace reap
