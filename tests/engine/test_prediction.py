"""Multi-token-prediction blocks: run in a context of their own, fed with each token and the hidden state of the one
before it.

The model here is built so that the values are known. The prediction block is a copy of block 0, and its input
projection takes either the token's embedding (of unit root mean square, so that its norm changes nothing: the block
then computes what block 0 computes), or the hidden state (then the last token of a window, whose own hidden state
is never read, must not matter).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from helpers.sums import SUMS
from reap.gguf.model_info import inspect
from reap.gguf.reader import GGUFModel
from reap.profiling.gguf import profile
from reap.pruning.gguf import prune
from reap.scores.plan import plan

N_EMBD, N_VOCAB, N_EXPERTS, N_USED, N_FF, N_TRUNK = 32, 64, 8, 2, 32, 2
EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1}


def build(path: Path, takes: str) -> Path:
    """GLM-4-MoE with a prediction block; `takes` is "token" or "hidden"."""
    writer = gguf.GGUFWriter(str(path), "glm4moe")
    add_keys(writer)
    rng = np.random.default_rng(7)
    blocks = [block(rng) for _ in range(N_TRUNK)]
    embedding = rng.standard_normal((N_VOCAB, N_EMBD)).astype(np.float32)
    embedding /= np.sqrt((embedding**2).mean(axis=1, keepdims=True))
    tensors = {"token_embd.weight": embedding, "output_norm.weight": np.ones(N_EMBD, np.float32)}
    tensors["output.weight"] = rng.standard_normal((N_VOCAB, N_EMBD)).astype(np.float32)
    for layer, content in enumerate([*blocks, blocks[0]]):
        tensors |= {f"blk.{layer}.{name}": values for name, values in content.items()}
    identity, nothing = np.eye(N_EMBD, dtype=np.float32), np.zeros((N_EMBD, N_EMBD), np.float32)
    sides = [identity, nothing] if takes == "token" else [nothing, identity]
    tensors[f"blk.{N_TRUNK}.nextn.eh_proj.weight"] = np.concatenate(sides, axis=1)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        tensors[f"blk.{N_TRUNK}.nextn.{name}.weight"] = np.ones(N_EMBD, np.float32)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(N_TRUNK + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_leading_dense_block_count(0)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-9)
    writer.add_expert_count(N_EXPERTS)
    writer.add_expert_used_count(N_USED)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(1.5)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")


def block(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    def draw(*shape: int, scale: float = 0.3) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return {
        "attn_norm.weight": np.ones(N_EMBD, np.float32),
        "post_attention_norm.weight": np.ones(N_EMBD, np.float32),
        **{f"attn_{name}.weight": draw(32, N_EMBD) for name in "qkv"},
        "attn_output.weight": draw(N_EMBD, 32),
        "ffn_gate_inp.weight": draw(N_EXPERTS, N_EMBD, scale=1.0),
        "exp_probs_b.bias": draw(N_EXPERTS),
        "ffn_gate_exps.weight": draw(N_EXPERTS, N_FF, N_EMBD),
        "ffn_up_exps.weight": draw(N_EXPERTS, N_FF, N_EMBD),
        "ffn_down_exps.weight": draw(N_EXPERTS, N_EMBD, N_FF),
        "ffn_gate_shexp.weight": draw(N_FF, N_EMBD),
        "ffn_up_shexp.weight": draw(N_FF, N_EMBD),
        "ffn_down_shexp.weight": draw(N_EMBD, N_FF),
    }


def lines(last_tokens: tuple[int, int] = (5, 9)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {"tokens": [*rng.integers(0, N_VOCAB, n).tolist(), last]} for n, last in zip((40, 90), last_tokens, strict=True)
    ]


def test_the_block_sees_each_token_but_the_first_of_a_window(tmp_path: Path) -> None:
    found = profile(build(tmp_path / "m.gguf", "token"), lines(), **EXACT)
    assert found.layers.tolist() == [0, 1, 2]
    assert found.total_tokens.tolist() == [132, 132, 130]
    assert found.counts.sum(axis=1).tolist() == [264, 264, 260]


def test_fed_with_the_embedding_it_computes_what_block_0_computes(tmp_path: Path) -> None:
    path = build(tmp_path / "m.gguf", "token")
    tokens = lines()[1]["tokens"]
    found = profile(path, [{"tokens": tokens}], **EXACT)
    # block 0 has counted the first token as well, which a window of that token alone measures
    first = profile(path, [{"tokens": tokens[:1]}], **EXACT)
    assert (found.counts[2] == found.counts[0] - first.counts[0]).all()
    for name in sorted({*SUMS} - {"norm_max"}):
        sums = getattr(found, name)
        np.testing.assert_allclose(sums[2], sums[0] - getattr(first, name)[0], rtol=1e-4, atol=1e-4, err_msg=name)


def test_fed_with_hidden_states_it_reads_that_of_the_token_before(tmp_path: Path) -> None:
    path = build(tmp_path / "m.gguf", "hidden")
    a, b = profile(path, lines((5, 9)), **EXACT), profile(path, lines((6, 10)), **EXACT)
    assert (a.gated_norm_sum[2] == b.gated_norm_sum[2]).all()  # the hidden state of the last token is never read
    assert (a.gated_norm_sum[1] != b.gated_norm_sum[1]).any()
    taken = build(tmp_path / "t.gguf", "token")
    assert (profile(taken, lines((5, 9)), **EXACT).counts[2] != profile(taken, lines((6, 10)), **EXACT).counts[2]).any()


@pytest.mark.parametrize("takes", ["token", "hidden"])
def test_batches_do_not_change_it(tmp_path: Path, takes: str) -> None:
    path = build(tmp_path / "m.gguf", takes)
    whole = profile(path, lines(), **EXACT)
    parts = profile(path, lines(), ubatch_size=16, **EXACT)
    ubatches = profile(path, lines(), ubatch_size=16, batch_size=64, **EXACT)
    for found in (parts, ubatches):
        assert (found.counts == whole.counts).all()
        np.testing.assert_allclose(found.gated_norm_sum, whole.gated_norm_sum, rtol=1e-4)


def test_checkpoints_keep_it(tmp_path: Path) -> None:
    path = build(tmp_path / "m.gguf", "hidden")
    whole = profile(path, lines(), **EXACT)
    profile(path, lines(), checkpoint=tmp_path / "keep", **EXACT)
    resumed = profile(path, lines(), checkpoint=tmp_path / "keep", resume=True, **EXACT)
    assert (resumed.counts == whole.counts).all()
    assert (resumed.gated_norm_sum == whole.gated_norm_sum).all()


def test_the_pruned_model_profiles_again(tmp_path: Path) -> None:
    path = build(tmp_path / "m.gguf", "hidden")
    found = profile(path, lines(), **EXACT)
    small = tmp_path / "small.gguf"
    prune(path, small, plan(found, keep=4))
    assert inspect(small).n_experts == 4
    with GGUFModel.open(small) as model:
        assert model.tensors[f"blk.{N_TRUNK}.ffn_down_exps.weight"].shape[-1] == 4
    again = profile(small, lines(), **EXACT)
    assert again.total_tokens.tolist() == found.total_tokens.tolist()


def test_prediction_layers_can_be_left_out(tmp_path: Path) -> None:
    model = build(tmp_path / "m.gguf", "hidden")
    lines = [{"tokens": list(range(1, 30))}]
    whole = profile(model, lines, **EXACT)
    trunk = profile(model, lines, prediction_layers=False, **EXACT)
    assert (whole.layers.tolist(), trunk.layers.tolist()) == ([0, 1, 2], [0, 1])
    assert (trunk.counts == whole.counts[:2]).all()
    np.testing.assert_allclose(trunk.gated_norm_sum, whole.gated_norm_sum[:2], rtol=1e-6)
