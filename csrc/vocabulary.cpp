#include "vocabulary.h"

#include "assertion_guard.h"
#include "errors.h"
#include "log_sink.h"
#include "session.h"

#include <array>

namespace reap {

Vocabulary::Vocabulary(const std::string & model_path) {
    start_engine();
    clear_log();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    // No tensor goes anywhere. Asked for its own choice the engine would ask every device for its memory, and end the process at an RPC
    // server of an earlier session that is gone.
    std::array<ggml_backend_dev_t, 1> no_devices{nullptr};
    params.devices = no_devices.data();
    params.n_gpu_layers = 0;
    const CatchAssertions catch_assertions;  // the engine logs what is thrown, and returns null
    model_.reset(llama_model_load_from_file(model_path.c_str(), params));
    if (!model_) {
        throw EngineError(with_log(model_path + ": the engine cannot read this model's tokenizer"));
    }
    tokenizer_ = std::make_unique<Tokenizer>(llama_model_get_vocab(model_.get()), model_path);
}

std::optional<std::string> Vocabulary::chat_template() const {
    const char * text = llama_model_chat_template(model_.get(), nullptr);
    return text ? std::optional<std::string>(text) : std::nullopt;
}

}  // namespace reap
