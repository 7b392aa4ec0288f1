#include "tokenizer.h"

#include "big_stack.h"
#include "errors.h"
#include "free_memory.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <new>

namespace reap {

namespace {

constexpr size_t SMALL_TEXT = 256;         // bytes; tokenised where it is, on any thread's stack
constexpr size_t BASE_STACK = 8ull << 20;  // bytes; for everything that does not grow with the text
constexpr size_t PROBE = 2048;             // characters of a probe
constexpr size_t PROBE_STACK = 64ull << 20;

// One for each way in which a pre-tokenizer takes a run as one piece.
std::vector<std::string> probes() {
    std::vector<std::string> texts;
    for (const char * part : {"a", "A", "aA", "é", "漢", "0", " ", "\n", "-", "$", "a ", "ab1-"}) {
        std::string text;
        for (size_t i = 0; i < PROBE; ++i) {
            text += part;
        }
        texts.push_back(text);
    }
    return texts;
}

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// The longest stretch of white space, or of anything else, in bytes.
size_t longest_run(const std::string & text) {
    size_t longest = 0;
    size_t start = 0;
    for (size_t i = 1; i <= text.size(); ++i) {
        if (i == text.size() || is_space(text[i]) != is_space(text[start])) {
            longest = std::max(longest, i - start);
            start = i;
        }
    }
    return longest;
}

}  // namespace

std::vector<int32_t> Tokenizer::call(const std::string & text, bool add_special, bool parse_special) const {
    std::vector<int32_t> tokens(text.size() + 8);
    const auto tokenize_into = [&] {
        return llama_tokenize(vocab_, text.data(), static_cast<int32_t>(text.size()), tokens.data(), static_cast<int32_t>(tokens.size()),
                              add_special, parse_special);
    };
    int32_t n = tokenize_into();
    if (n < 0 && n != std::numeric_limits<int32_t>::min()) {
        tokens.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = tokenize_into();
    }
    if (n < 0) {
        throw EngineError("it is too long");
    }
    tokens.resize(static_cast<size_t>(n));
    return tokens;
}

// How much stack this vocabulary's tokenizer takes for each byte of a long piece, measured: 0 where it does not call itself.
size_t Tokenizer::stack_per_byte() const {
    std::call_once(measured_, [this] {
        const size_t base = run_on_stack(PROBE_STACK, [this] { call("a", false, false); }, true);
        for (const std::string & probe : probes()) {
            const size_t used = run_on_stack(PROBE_STACK, [&] { call(probe, false, false); }, true);
            stack_per_byte_ = std::max(stack_per_byte_, (used - std::min(used, base)) / probe.size());
        }
    });
    return stack_per_byte_;
}

std::vector<int32_t> Tokenizer::tokenize(const std::string & text, bool add_special, bool parse_special) const {
    if (!exists()) {
        throw UsageError(model_path_ + ": this model has no tokenizer; give token ids");
    }
    const std::string what = "a text of " + std::to_string(text.size()) + " bytes cannot be tokenised: ";
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()) - 8) {
        throw EngineError(what + "the engine takes less than 2 GiB at once");
    }
    std::vector<int32_t> tokens;
    const auto work = [&] { tokens = call(text, add_special, parse_special); };
    try {
        if (text.size() <= SMALL_TEXT) {
            work();
            return tokens;
        }
        const size_t per_byte = stack_per_byte();
        const size_t run = longest_run(text);
        if (per_byte > 0 && run > free_memory() / per_byte) {
            throw EngineError("a run of " + std::to_string(run) + " bytes without a break takes this model's tokenizer more memory than there is");
        }
        run_on_stack(BASE_STACK + (per_byte + per_byte / 2) * text.size(), work);
    } catch (const std::bad_alloc &) {
        throw EngineError(what + "there is not enough memory");
    } catch (const std::exception & error) {
        throw EngineError(what + error.what());
    }
    return tokens;
}

std::string Tokenizer::token_text(int token) const {
    if (!exists() || token < 0 || token >= n_vocab()) {
        throw UsageError("there is no text for token " + std::to_string(token));
    }
    std::string piece(32, '\0');
    int32_t n = llama_token_to_piece(vocab_, token, piece.data(), static_cast<int32_t>(piece.size()), 0, true);
    if (n < 0) {
        piece.resize(static_cast<size_t>(-n));
        n = llama_token_to_piece(vocab_, token, piece.data(), static_cast<int32_t>(piece.size()), 0, true);
    }
    piece.resize(static_cast<size_t>(std::max(0, n)));
    return piece;
}

}  // namespace reap
