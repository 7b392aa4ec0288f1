// A model's own tokenizer: text into ids, and ids into text.
#pragma once

#include "llama.h"

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace reap {

class Tokenizer {
  public:
    // The vocabulary is the model's, which has to outlive this. `model_path` is named in errors.
    Tokenizer(const llama_vocab * vocab, const std::string & model_path) : vocab_(vocab), model_path_(model_path) {}

    int  n_vocab() const { return llama_vocab_n_tokens(vocab_); }
    bool exists() const { return llama_vocab_type(vocab_) != LLAMA_VOCAB_TYPE_NONE; }
    bool add_bos() const { return exists() && llama_vocab_get_add_bos(vocab_); }
    bool add_eos() const { return exists() && llama_vocab_get_add_eos(vocab_); }
    int  bos() const { return llama_vocab_bos(vocab_); }
    int  eos() const { return llama_vocab_eos(vocab_); }
    bool ends_generation(int token) const { return llama_vocab_is_eog(vocab_, token); }

    // Several pre-tokenizers run std::regex, which calls itself for each character of a match: a run of 26,000 letters overflows a stack
    // of 8 MiB. So texts are tokenised on a thread whose stack is as large as this vocabulary can need for them.
    // UsageError where there is no tokenizer, EngineError for a text that cannot be tokenised here.
    std::vector<int32_t> tokenize(const std::string & text, bool add_special, bool parse_special) const;

    // The bytes of a token, special tokens included.
    std::string token_text(int token) const;

  private:
    std::vector<int32_t> call(const std::string & text, bool add_special, bool parse_special) const;
    size_t stack_per_byte() const;

    const llama_vocab *    vocab_;
    std::string            model_path_;
    mutable std::once_flag measured_;
    mutable size_t         stack_per_byte_ = 0;
};

}  // namespace reap
