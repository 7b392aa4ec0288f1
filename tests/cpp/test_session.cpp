// A model that is opened: what it collects, refuses, and masks; and several at the same time.
#include "check.h"
#include "errors.h"
#include "generation.h"
#include "log_sink.h"
#include "memory_guard.h"
#include "scoring.h"
#include "session.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <sys/resource.h>

using namespace reap;

static SessionOptions small(const std::string & path) {
    SessionOptions options;
    options.model_path = path;
    options.ctx_size = 64;
    options.ubatch_size = 16;
    options.batch_size = 32;  // two ubatches: the graph runs twice in one decode
    options.threads = 2;
    return options;
}

void test_options() {
    const auto refused = [](auto change) {
        SessionOptions options = small("absent.gguf");
        change(options);
        return throws<UsageError>([&] { check(options); });
    };
    CHECK(!refused([](SessionOptions &) {}));
    CHECK(refused([](SessionOptions & o) { o.model_path = ""; }));
    CHECK(refused([](SessionOptions & o) { o.model_path = std::string("a\0b", 3); }));
    CHECK(refused([](SessionOptions & o) { o.ctx_size = -1; }));
    CHECK(refused([](SessionOptions & o) { o.ctx_size = 2147483647; }));
    CHECK(refused([](SessionOptions & o) { o.batch_size = -1; }));
    CHECK(refused([](SessionOptions & o) { o.ubatch_size = -2147483647 - 1; }));
    CHECK(refused([](SessionOptions & o) { o.n_sequences = 0; }));
    CHECK(refused([](SessionOptions & o) { o.threads = 513; }));
    CHECK(!refused([](SessionOptions & o) { o.threads = 512; }));
    CHECK(refused([](SessionOptions & o) { o.prediction_layer = -2; }));
    CHECK(refused([](SessionOptions & o) { o.type_k = "i8"; }));
    CHECK(refused([](SessionOptions & o) { o.type_v = "q8_1"; }));
    CHECK(refused([](SessionOptions & o) { o.flash_attn = "yes"; }));
    CHECK(refused([](SessionOptions & o) { o.override_tensors = {{"(", "CPU"}}; }));
    CHECK(refused([](SessionOptions & o) { o.override_tensors = {{std::string(1025, 'x'), "CPU"}}; }));
    const auto override_refused = [&](const char * type, const std::string & value) {
        return refused([&](SessionOptions & o) { o.kv_overrides = {{"a.key", type, value}}; });
    };
    CHECK(!override_refused("int", "-7") && override_refused("int", "7.5") && override_refused("int", "99999999999999999999"));
    CHECK(!override_refused("float", "1e-6") && override_refused("float", "nan") && override_refused("float", "x"));
    CHECK(!override_refused("bool", "true") && override_refused("bool", "1"));
    CHECK(!override_refused("str", std::string(127, 'x')) && override_refused("str", std::string(128, 'x')));
    CHECK(override_refused("number", "1"));
    CHECK(refused([](SessionOptions & o) { o.kv_overrides = {{std::string(128, 'x'), "int", "1"}}; }));
    CHECK(throws<EngineError>([] { Session(small("absent.gguf")); }));
}

void test_model(const std::string & path, size_t n_experts, const std::vector<int> & layers) {
    Session session(small(path));
    CHECK(session.warnings().empty());
    session.start_profile(layers, n_experts);
    std::vector<int32_t> tokens(50), positions(50), sequences(50, 0), groups(50, 0);
    for (int i = 0; i < 50; ++i) {
        tokens[i] = (i * 7) % session.n_vocab();
        positions[i] = i;
    }
    const auto run = [&](size_t first, size_t n) {
        session.profile_batch({tokens.data() + first, positions.data() + first, sequences.data(), n}, groups.data());
    };
    run(0, 32);
    run(32, 18);
    session.commit(1);
    const Sums sums = session.sums(0);
    for (size_t row = 0; row < layers.size(); ++row) {
        CHECK(sums.total_tokens[row] == 50);
    }
    bool asked = false;
    session.set_poll([&] { return asked = true; });
    CHECK(throws<Interrupted>([&] { run(0, 32); }));
    CHECK(asked);
    session.set_poll(nullptr);
    session.commit(1);
    CHECK(session.sums(0).total_tokens[0] == 50);  // the interrupted batch left nothing
    run(0, 32);
    session.commit(1);
    CHECK(session.sums(0).total_tokens[0] == 82);
    tokens[3] = session.n_vocab();
    CHECK(throws<UsageError>([&] { run(0, 32); }));
    tokens[3] = 0;
    CHECK(logits(session, tokens, 48).size() == 2 * static_cast<size_t>(session.n_vocab()));
    CHECK(log_probs(session, tokens, 25).size() == 24);

    CHECK(throws<UsageError>([&] { session.forward({nullptr, nullptr, nullptr, 0}, true); }));
    CHECK(throws<UsageError>([&] { session.profile_batch({nullptr, nullptr, nullptr, 0}, nullptr); }));
    CHECK(throws<UsageError>([&] { run(0, 33); }));  // the batch has 32
    CHECK(throws<UsageError>([&] { logits(session, {}, 0); }));
    CHECK(throws<UsageError>([&] { predict_ids(session, {}, 0, {}, 0); }));
    CHECK(throws<UsageError>([&] { generate(session, {{{1, 2}, SIZE_MAX, 0, {}}}, {}); }));
    CHECK(throws<UsageError>([&] { session.start_profile({}, n_experts); }));
    CHECK(throws<UsageError>([&] { session.start_profile({1, 1}, n_experts); }));
    CHECK(throws<UsageError>([&] { session.start_profile(layers, SIZE_MAX); }));
    CHECK(predict_top(session, tokens, 40, 0).log_probs.empty());
    CHECK(!sees_the_future(session));

    const std::vector<float> whole = logits(session, tokens, 0);
    RouterMask::Kept kept;
    for (const int layer : layers) {
        for (size_t expert = 0; expert < n_experts; expert += 2) {
            kept[layer].push_back(static_cast<int32_t>(expert));
        }
    }
    session.set_kept(kept, {});
    CHECK(logits(session, tokens, 0) != whole);
    asked = false;
    session.set_poll([&] { return asked = true; });
    CHECK(throws<Interrupted>([&] { logits(session, tokens, 0); }));
    CHECK(asked);
    session.set_poll(nullptr);
    session.set_kept(std::nullopt, {});
    CHECK(logits(session, tokens, 0) == whole);
}

// Several sequences in one batch are what each is by itself, with all experts and with some.
void test_together(const std::string & path, size_t n_experts, const std::vector<int> & layers) {
    SessionOptions options = small(path);
    Session alone(options);
    options.n_sequences = 6;
    options.cache_size = 256;
    Session session(options);
    if (session.n_sequences() < 6) {  // a recurrent state is kept for one sequence
        CHECK(throws<UsageError>([&] { score_continuations(session, {{{1, 2}, {{3}, {4}}}}); }));
        CHECK(throws<UsageError>([&] { generate(session, {{{1}, 2, 0, {}}, {{2}, 2, 0, {}}}, {}); }));
        return;
    }
    RouterMask::Kept kept;
    for (const int layer : layers) {
        for (size_t expert = 1; expert < n_experts; expert += 2) {
            kept[layer].push_back(static_cast<int32_t>(expert));
        }
    }
    std::vector<int32_t> context(20);
    for (int i = 0; i < 20; ++i) {
        context[static_cast<size_t>(i)] = (i * 11) % session.n_vocab();
    }
    const std::vector<Question> questions = {{context, {{1, 2, 3}, {4}, {1, 5}}}, {{7}, {{8, 9, 10, 11}}}};
    const std::vector<Prompt> prompts = {{context, 12, 1, {}}, {{3, 1}, 7, 2, {}}, {{9}, 0, 3, {}}, {{5, 5}, 9, 4, {}}};
    for (const bool is_pruned : {false, true}) {
        for (Session * each : {&alone, &session}) {
            each->set_kept(is_pruned ? std::optional(kept) : std::nullopt, {});
        }
        const auto scores = score_continuations(session, questions);
        for (size_t q = 0; q < questions.size(); ++q) {
            for (size_t c = 0; c < questions[q].continuations.size(); ++c) {
                std::vector<int32_t> tokens = questions[q].context;
                const size_t first = tokens.size() - 1;
                tokens.insert(tokens.end(), questions[q].continuations[c].begin(), questions[q].continuations[c].end());
                double expected = 0.0;
                for (const double log_prob : log_probs(alone, tokens, first)) {
                    expected += log_prob;
                }
                CHECK(std::abs(scores[q][c].log_prob - expected) < 1e-2 * std::abs(expected));
            }
        }
        const auto together = generate(session, prompts, {0.8F, 20, 0.95F, 0.01F});
        for (size_t p = 0; p < prompts.size(); ++p) {
            CHECK(together[p].tokens.size() <= prompts[p].n_new);
            CHECK(together[p].tokens.size() == prompts[p].n_new || together[p].ended == Ended::TEXT);
        }
        CHECK(generate(session, prompts, {0.8F, 20, 0.95F, 0.01F})[0].tokens == together[0].tokens);
    }
    bool asked = false;
    session.set_poll([&] { return asked = true; });
    CHECK(throws<Interrupted>([&] { generate(session, prompts, {}); }));
    session.set_poll(nullptr);
    CHECK(generate(session, prompts, {})[0].tokens == generate(session, {prompts[0]}, {})[0].tokens);
    CHECK(throws<UsageError>([&] { generate(session, prompts, {-1.0F, 0, 1.0F, 0.0F}); }));
    CHECK(throws<UsageError>([&] { score_continuations(session, {{context, {{session.n_vocab()}}}}); }));
}

static rlim_t address_limit() {
    rlimit limit{};
    getrlimit(RLIMIT_AS, &limit);
    return limit.rlim_cur;
}

// Opens, runs and closes; every other time a model that is not there, whose error must quote this thread's log alone.
static void open_and_close(const std::string & path, size_t n_experts, const std::vector<int> & layers, int number) {
    for (int round = 0; round < 3; ++round) {
        SessionOptions options = small(path);
        options.ctx_size = 48 + 16 * number;
        Session session(options);
        session.start_profile(layers, n_experts);
        std::vector<int32_t> tokens(16), positions(16), zeros(16, 0);
        for (int i = 0; i < 16; ++i) {
            tokens[i] = (i * 5 + number) % session.n_vocab();
            positions[i] = i;
        }
        session.profile_batch({tokens.data(), positions.data(), zeros.data(), 16}, zeros.data());
        session.commit(1);
        CHECK(session.sums(0).total_tokens[0] == 16);
        CHECK(log_probs(session, tokens, 0).size() == 15);
        const std::string absent = "absent" + std::to_string(number) + ".gguf";
        try {
            Session other(small(absent));
            CHECK(false);
        } catch (const EngineError & error) {
            const std::string message = error.what();
            CHECK(message.find(absent) != std::string::npos);
            for (int others = 0; others < 4; ++others) {
                CHECK(others == number || message.find("absent" + std::to_string(others)) == std::string::npos);
            }
        }
    }
}

void test_threads(const std::string & path, size_t n_experts, const std::vector<int> & layers) {
    const rlim_t before = address_limit();
    std::vector<std::thread> threads;
    for (int number = 0; number < 4; ++number) {
        threads.emplace_back([&, number] {
            try {
                open_and_close(path, n_experts, layers, number);
            } catch (const std::exception & error) {
                std::fprintf(stderr, "thread %d: %s\n", number, error.what());
                CHECK(false);
            }
        });
    }
    for (auto & thread : threads) {
        thread.join();
    }
    CHECK(address_limit() == before);
}
