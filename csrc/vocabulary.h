// A model's tokenizer and chat template alone: none of its tensors is read, so that it takes a moment however large the model is.
#pragma once

#include "tokenizer.h"

#include "llama.h"

#include <memory>
#include <optional>
#include <string>

namespace reap {

class Vocabulary {
  public:
    // EngineError with the end of the engine's log where the file has none.
    explicit Vocabulary(const std::string & model_path);
    Vocabulary(const Vocabulary &) = delete;
    Vocabulary & operator=(const Vocabulary &) = delete;

    const Tokenizer & tokenizer() const { return *tokenizer_; }
    int n_vocab() const { return tokenizer_->n_vocab(); }
    // As the file has it: bytes, of any encoding.
    std::optional<std::string> chat_template() const;

  private:
    std::unique_ptr<llama_model, void (*)(llama_model *)> model_{nullptr, llama_model_free};
    std::unique_ptr<Tokenizer> tokenizer_;
};

}  // namespace reap
