// Texts that a model goes on with.
#pragma once

#include "session.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace reap {

// How the next token is chosen: llama.cpp's samplers, in the order top-k, top-p, min-p, temperature.
struct Sampling {
    float   temperature = 0.0F;  // 0: the most probable token, and none of the others matters
    int32_t top_k = 0;           // 0: all tokens
    float   top_p = 1.0F;        // 1: all tokens
    float   min_p = 0.0F;        // 0: all tokens
};

struct Prompt {
    std::vector<int32_t>     tokens;
    size_t                   n_new = 0;  // at most so many tokens
    uint32_t                 seed = 0;   // of this prompt's draws alone
    std::vector<std::string> stops;      // bytes that end the text where they appear in it
};

enum class Ended { LENGTH, TEXT, STOP };

struct Continuation {
    std::vector<int32_t> tokens;                 // the one that ended the text included
    Ended                ended = Ended::LENGTH;  // LENGTH: n_new tokens are there; TEXT: by a token that ends a generation; STOP: by a stop
};

// What follows each prompt; every one is a sequence of its own, and all of them share batches.
// UnsupportedError for a model without a cache, UsageError where prompts and new tokens do not fit.
std::vector<Continuation> generate(Session & session, const std::vector<Prompt> & prompts, const Sampling & sampling);

}  // namespace reap
