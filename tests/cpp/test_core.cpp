// Tests of csrc without Python, meant for AddressSanitizer, UBSan and ThreadSanitizer. With the path of a small MoE GGUF as argument, that model is
// run as well: `reap_cpp_tests [MODEL N_EXPERTS LAYER...]`.
#include "check.h"
#include "collector.h"
#include "errors.h"
#include "node_names.h"
#include "router_likeness.h"
#include "router_mask.h"
#include "saliency.h"
#include "tensor_read.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

using namespace reap;

static void test_node_names() {
    CHECK(parse_node_name("ffn_moe_topk-3").role == Role::Ids);
    CHECK(parse_node_name("ffn_moe_topk-3").layer == 3);
    CHECK(parse_node_name("ffn_moe_weights_norm-47").role == Role::Weights);
    CHECK(parse_node_name("ffn_moe_weights_norm-47").kind == "ffn_moe_weights_norm");
    CHECK(parse_node_name("ffn_moe_down_biased-0").role == Role::Output);
    CHECK(parse_node_name("ffn_moe_logits-5").role == Role::Scores);
    CHECK(parse_node_name("ffn_moe_probs_biased-5").role == Role::Selection);
    CHECK(parse_node_name("ffn_moe_weights-3 (reshaped)").role == Role::None);
    CHECK(parse_node_name("ffn_moe_weights_sum-3").role == Role::None);
    CHECK(parse_node_name("ffn_moe_down").role == Role::None);
    CHECK(parse_node_name("ffn_moe_down-").role == Role::None);
    CHECK(parse_node_name("ffn_moe_down--1").role == Role::None);
    CHECK(parse_node_name("ffn_moe_down-99999999999").role == Role::None);
    CHECK(parse_node_name("").role == Role::None);
}

static void test_saliency_sums() {
    Saliency saliency(2, 4);
    saliency.reserve_groups(2);
    const int32_t experts[] = {0, 3, 3, 1, 2, 0};
    const float gates[] = {0.5f, 0.25f, 0.75f, 1.0f, 0.125f, 2.0f};
    const double norms[] = {1.0, 2.0, 4.0, 8.0, 16.0, 32.0};
    const int32_t groups[] = {0, Saliency::NOT_COUNTED, 1};
    saliency.add(1, {experts, gates, norms, 2, 3}, groups);
    CHECK(saliency.sums(0).counts[4] == 0);  // waits for commit
    saliency.commit();
    const Sums & first = saliency.sums(0);
    const Sums & second = saliency.sums(1);
    CHECK(first.counts[4 + 0] == 1 && first.counts[4 + 3] == 1 && first.counts[4 + 1] == 0);
    CHECK(first.total_tokens[0] == 0 && first.total_tokens[1] == 1);
    CHECK(first.gated_norm_sum[4 + 3] == 0.5 && first.gated_norm_sq_sum[4 + 3] == 0.25 && first.norm_sq_sum[4 + 3] == 4.0);
    CHECK(second.counts[4 + 2] == 1 && second.gate_sum[4 + 0] == 2.0 && second.norm_max[4 + 0] == 32.0);
    CHECK(second.gated_norm_sum[4 + 0] == 64.0);

    saliency.add(0, {experts, gates, norms, 2, 3}, groups);
    saliency.discard();
    saliency.commit();
    CHECK(saliency.sums(0).total_tokens[0] == 0 && saliency.sums(0).counts[0] == 0);

    // what waited once is all zero for the group that waits next, and a group that nothing was added to stays as it is
    const int32_t others[] = {2, 2, Saliency::NOT_COUNTED};
    saliency.reserve_groups(3);
    saliency.add(0, {experts, gates, norms, 2, 3}, others);
    saliency.commit();
    CHECK(saliency.sums(2).total_tokens[0] == 2 && saliency.sums(2).total_tokens[1] == 0 && saliency.sums(2).counts[3] == 2);
    CHECK(saliency.sums(0).counts[4 + 0] == 1 && saliency.sums(1).norm_max[4 + 0] == 32.0);
}

static void test_saliency_refuses() {
    Saliency saliency(1, 4);
    const int32_t groups[] = {0};
    const int32_t too_high[] = {4};
    const int32_t negative[] = {-1};
    const int32_t good[] = {1};
    const float gate[] = {1.0f};
    const float infinite_gate[] = {std::numeric_limits<float>::infinity()};
    const double norm[] = {1.0};
    const double nan_norm[] = {std::nan("")};
    CHECK(throws<EngineError>([&] { saliency.add(0, {too_high, gate, norm, 1, 1}, groups); }));
    CHECK(throws<EngineError>([&] { saliency.add(0, {negative, gate, norm, 1, 1}, groups); }));
    CHECK(throws<EngineError>([&] { saliency.add(0, {good, gate, nan_norm, 1, 1}, groups); }));
    CHECK(throws<EngineError>([&] { saliency.add(0, {good, infinite_gate, norm, 1, 1}, groups); }));
    CHECK(throws<UsageError>([&] { saliency.reserve_groups(Saliency::MAX_GROUPS + 1); }));
}

// A prediction block's layer is put after the others' and taken off again.
static void test_sums_in_layers() {
    Sums all(2, 3);
    Sums last(1, 3);
    for_each_field([&](const auto & field) {
        std::fill((all.*field.values).begin(), (all.*field.values).end(), 1);
        std::fill((last.*field.values).begin(), (last.*field.values).end(), 2);
    });
    append_layers(all, last);
    size_t n_fields = 0;
    for_each_field([&](const auto & field) {
        CHECK((all.*field.values).size() == (field.per_expert ? 9u : 3u) && (all.*field.values).front() == 1 && (all.*field.values).back() == 2);
        ++n_fields;
    });
    CHECK(n_fields == 8);
    const Sums taken = split_last_layer(all, 3);
    for_each_field([&](const auto & field) { CHECK(taken.*field.values == last.*field.values && (all.*field.values).back() == 1); });
    Saliency saliency(2, 3);
    saliency.restore(1, all);
    CHECK(saliency.n_groups() == 2 && saliency.sums(1).norm_max[5] == 1.0);
    CHECK(throws<UsageError>([&] { saliency.restore(0, taken); }));
    CHECK(throws<UsageError>([&] { saliency.restore(SIZE_MAX, all); }));
}

static void test_tensor_reading() {
    ggml_init_params params = {1 << 20, nullptr, false};
    ggml_context * context = ggml_init(params);
    // a strided view, as the selected experts are a view of the full argsort
    ggml_tensor * all = ggml_new_tensor_2d(context, GGML_TYPE_I32, 8, 3);
    std::iota(static_cast<int32_t *>(all->data), static_cast<int32_t *>(all->data) + 24, 0);
    ggml_tensor * top = ggml_view_2d(context, all, 2, 3, all->nb[1], 0);
    std::vector<int32_t> ids;
    TensorReader reader;
    reader.set_threads(2);
    reader.read_i32(top, ids);
    CHECK((ids == std::vector<int32_t>{0, 1, 8, 9, 16, 17}));
    CHECK(reader.bytes_read() == 0);

    ggml_tensor * values = ggml_new_tensor_3d(context, GGML_TYPE_F32, 67, 4, 5);
    auto * data = static_cast<float *>(values->data);
    for (int i = 0; i < 67 * 4 * 5; ++i) {
        data[i] = static_cast<float>(i % 13) - 6.0f;
    }
    const auto naive = [&](size_t row) {
        double sum = 0.0;
        for (size_t i = 0; i < 67; ++i) {
            sum += static_cast<double>(data[row * 67 + i]) * data[row * 67 + i];
        }
        return std::sqrt(sum);
    };
    std::vector<double> norms;
    reader.read_row_norms(values, norms);
    CHECK(norms.size() == 20);
    for (size_t row = 0; row < norms.size(); ++row) {
        CHECK(std::abs(norms[row] - naive(row)) < 1e-12);
    }
    ggml_tensor * middle = ggml_view_3d(context, values, 67, 2, 5, values->nb[1], values->nb[2], values->nb[1]);
    reader.read_row_norms(middle, norms);
    CHECK(norms.size() == 10);
    CHECK(std::abs(norms[0] - naive(1)) < 1e-12 && std::abs(norms[3] - naive(6)) < 1e-12);

    std::vector<float> floats;
    CHECK(throws<EngineError>([&] { reader.read_f32(middle, floats); }));
    CHECK(throws<EngineError>([&] { reader.read_i32(values, ids); }));
    ggml_free(context);
}

// A layer's routing as build_moe_ffn makes it: 6 experts, 2 a token, 4 tokens.
struct RoutingNodes {
    explicit RoutingNodes(ggml_context * c) : context(c) {
        const auto named = [](ggml_tensor * tensor, const char * name) { return ggml_set_name(tensor, name); };
        gate = named(ggml_new_tensor_2d(c, GGML_TYPE_F32, 8, 6), "gate_weight");
        input = named(ggml_new_tensor_2d(c, GGML_TYPE_F32, 8, 4), "input");
        bias = named(ggml_new_tensor_1d(c, GGML_TYPE_F32, 6), "bias");
        logits = named(ggml_mul_mat(c, gate, input), "ffn_moe_logits-3");
        probs = named(ggml_sigmoid(c, logits), "ffn_moe_probs-3");
        biased = named(ggml_add(c, probs, bias), "ffn_moe_probs_biased-3");
    }

    // The nodes of a graph that selects by `scores` and weighs by `weighing`.
    std::vector<ggml_tensor *> nodes(ggml_tensor * scores, ggml_tensor * weighing) {
        ggml_tensor * ids = ggml_set_name(ggml_argsort_top_k(context, scores, 2), "ffn_moe_topk-3");
        ggml_tensor * weights = ggml_get_rows(context, ggml_reshape_3d(context, weighing, 1, 6, 4), ids);
        ggml_set_name(weights, "ffn_moe_weights-3");
        ggml_tensor * output = ggml_set_name(ggml_scale(context, weights, 1.0f), "ffn_moe_down-3");
        return {logits, probs, biased, ids, weights, output};
    }

    ggml_context * context;
    ggml_tensor *gate, *input, *bias, *logits, *probs, *biased;
};

static void survey(RouterMask & mask, const std::vector<ggml_tensor *> & nodes) {
    mask.begin_survey();
    for (const ggml_tensor * node : nodes) {
        CHECK(!mask.on_ask(node));
    }
    mask.end_survey();
}

static void test_router_mask() {
    ggml_context * context = ggml_init({1 << 20, nullptr, false});
    RoutingNodes routing(context);
    RouterMask mask;
    survey(mask, routing.nodes(routing.biased, routing.probs));
    CHECK(mask.is_learnt() && !mask.in_force() && !mask.wants(routing.logits));
    CHECK(throws<UsageError>([&] { mask.set_kept({}, {}); }));
    CHECK(throws<UsageError>([&] { mask.set_kept({{3, {1}}}, {}); }));
    CHECK(throws<UsageError>([&] { mask.set_kept({{3, {1, 6}}}, {}); }));
    CHECK(throws<UsageError>([&] { mask.set_kept({{3, {1, 2}}, {4, {1, 2}}}, {}); }));
    CHECK(!mask.in_force());
    mask.set_kept({{3, {5, 1, 2}}}, {});
    CHECK(mask.wants(routing.logits) && mask.wants(routing.biased) && !mask.wants(routing.probs));

    const auto fill = [](ggml_tensor * t) { std::fill_n(static_cast<float *>(t->data), ggml_nelements(t), 1.0f); };
    fill(routing.logits);
    fill(routing.biased);
    mask.begin_batch();
    mask.apply(routing.logits);
    for (int i = 0; i < 24; ++i) {
        const float value = static_cast<const float *>(routing.logits->data)[i];
        CHECK(i % 6 == 1 || i % 6 == 2 || i % 6 == 5 ? value == 1.0f : value == -std::numeric_limits<float>::infinity());
    }
    // what selects was left unmasked, or only some of the tokens were masked
    CHECK(throws<EngineError>([&] { mask.check_batch(4, 4); }));
    mask.apply(routing.biased);
    mask.check_batch(4, 4);
    mask.check_batch(100, 4);  // the last layer, of which 4 tokens are wanted
    CHECK(throws<EngineError>([&] { mask.check_batch(100, 5); }));
    mask.lift();
    CHECK(!mask.wants(routing.logits));
    mask.check_batch(100, 5);

    // experts selected by what is not masked, gates that depend on it, two routings under one name
    const auto refused = [&](const std::vector<ggml_tensor *> & nodes) {
        RouterMask other;
        return throws<UnsupportedError>([&] { survey(other, nodes); });
    };
    ggml_tensor * table = ggml_new_tensor_2d(context, GGML_TYPE_F32, 6, 4);
    CHECK(refused(routing.nodes(table, routing.probs)));
    CHECK(refused(routing.nodes(routing.biased, table)));
    CHECK(!refused(routing.nodes(routing.logits, routing.logits)));
    std::vector<ggml_tensor *> twice = routing.nodes(routing.biased, routing.probs);
    const std::vector<ggml_tensor *> again = routing.nodes(routing.biased, routing.probs);
    twice.insert(twice.end(), again.begin(), again.end());
    CHECK(refused(twice));
    ggml_free(context);
}

// The others: test_process.cpp, test_session.cpp.
static void test_router_likeness() {
    RouterLikeness likeness(3);
    const float first[] = {1.0f, 2.0f, 3.0f};
    const float second[] = {0.5f, 0.0f, 4.0f};
    likeness.add(first);
    likeness.discard();
    likeness.add(first);
    likeness.add(second);
    CHECK(likeness.sums().n_tokens == 0);  // until it is committed
    likeness.commit();
    likeness.commit();  // nothing waits
    const auto & sums = likeness.sums();
    CHECK(sums.n_tokens == 2);
    CHECK(sums.values == (std::vector<double>{1.5, 2.0, 7.0}));
    CHECK(sums.products[0] == 1.25);
    CHECK(sums.products[1 * 3 + 0] == 2.0);
    CHECK(sums.products[2 * 3 + 0] == 5.0);
    CHECK(sums.products[2 * 3 + 1] == 6.0);
    CHECK(sums.products[2 * 3 + 2] == 25.0);
}

void test_process();
void test_options();
void test_model(const std::string & path, size_t n_experts, const std::vector<int> & layers);
void test_together(const std::string & path, size_t n_experts, const std::vector<int> & layers);
void test_threads(const std::string & path, size_t n_experts, const std::vector<int> & layers);

int main(int argc, char ** argv) {
    test_node_names();
    test_saliency_sums();
    test_saliency_refuses();
    test_router_likeness();
    test_tensor_reading();
    test_sums_in_layers();
    test_router_mask();
    test_process();
    test_options();
    if (argc > 3) {
        std::vector<int> layers;
        for (int i = 3; i < argc; ++i) {
            layers.push_back(std::atoi(argv[i]));
        }
        test_model(argv[1], static_cast<size_t>(std::atoi(argv[2])), layers);
        test_together(argv[1], static_cast<size_t>(std::atoi(argv[2])), layers);
        test_threads(argv[1], static_cast<size_t>(std::atoi(argv[2])), layers);
    }
    std::printf("%d checks, %d failed\n", checks.load(), failures.load());
    return failures == 0 ? 0 : 1;
}
