"""Layers whose experts are chosen by token id (DeepSeek-V4's first ones): counts follow from the table in the file,
sums from the graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from helpers.architectures import N_EXPERTS, write_model
from helpers.graph_oracle import Sums, dump, read_routing
from helpers.llama_tools import require_tool
from helpers.sums import SUMS
from reap.gguf.model_info import inspect
from reap.scores.profile import Profile

N_HASHED = 2
EXACT = 'type_k="f32", type_v="f32", flash_attn="off", threads=1, ctx_size=128'


def write_hashed(source: Path, target: Path) -> np.ndarray:
    """The same model with its first layers routed by a table, int32 [n_layers hashed, n_vocab, n_used]."""
    reader = GGUFReader(source)
    n_vocab = next(len(tensor.data) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    rng = np.random.default_rng(11)
    pairs = [rng.choice(N_EXPERTS, 2, replace=False) for _ in range(N_HASHED * n_vocab)]
    table = np.array(pairs, dtype=np.int32).reshape(N_HASHED, n_vocab, 2)
    writer = GGUFWriter(target, "deepseek4")
    for key, pair in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = N_HASHED if key == "deepseek4.hash_layer_count" else pair.contents()
            if pair.types[0] != GGUFValueType.ARRAY or len(value):
                writer.add_key_value(key, value, pair.types[0], sub_type=pair.types[1] if len(pair.types) > 1 else None)
    for tensor in reader.tensors:
        if not any(tensor.name.startswith(f"blk.{layer}.exp_probs_b") for layer in range(N_HASHED)):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for layer in range(N_HASHED):
        writer.add_tensor(f"blk.{layer}.ffn_gate_tid2eid.weight", table[layer], raw_dtype=GGMLQuantizationType.I32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return table


def test_counts_follow_the_table_and_sums_the_graph(tmp_path: Path) -> None:
    program, oracle = require_tool("test-llama-archs"), require_tool("reap-dump-nodes")
    plain = write_model(program, "deepseek4", tmp_path)
    hashed = tmp_path / "hashed.gguf"
    table = write_hashed(plain, hashed)
    samples = np.random.default_rng(2).integers(0, 100, (6, 16)).tolist()

    # in a process of its own: a failed assertion of llama.cpp would end this one
    lines = [{"tokens": tokens} for tokens in samples]
    code = f"import reap; reap.profile({str(hashed)!r}, {lines!r}, {EXACT}).save({str(tmp_path / 'p.json')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = Profile.load(tmp_path / "p.json")

    for layer in range(N_HASHED):
        expected = np.zeros(N_EXPERTS, dtype=np.int64)
        for tokens in samples:
            for token in tokens:
                expected[table[layer, token]] += 1
        assert found.counts[found.row(layer)].tolist() == expected.tolist()
    assert found.total_tokens.tolist() == [96] * found.n_layers

    sums = {int(layer): Sums(N_EXPERTS) for layer in found.layers}
    for tokens, nodes in zip(samples, dump(oracle, hashed, samples, tmp_path), strict=True):
        for layer, total in sums.items():
            total.add(read_routing(nodes, layer, len(tokens), gate_first=False))
    for layer in range(N_HASHED):
        for name in SUMS:
            np.testing.assert_allclose(
                getattr(found, name)[found.row(layer)], sums[layer].arrays[name], rtol=1e-5, err_msg=name
            )


def test_virtual_pruning_is_refused_by_name(tmp_path: Path) -> None:
    """A token's removed expert has no successor, so there is no pruned file either: `reap.prune` refuses the model as
    well."""
    hashed = tmp_path / "hashed.gguf"
    write_hashed(write_model(require_tool("test-llama-archs"), "deepseek4", tmp_path), hashed)
    code = f"""
import numpy as np
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import UnsupportedModelError
from reap.gguf.model_info import inspect
session = open_session({str(hashed)!r}, EngineOptions({EXACT}))
tokens = np.arange(16, dtype=np.int32)
whole = session.logits(tokens, 0)
try:
    session.set_kept({{layer: [0, 1, 2, 3] for layer in inspect({str(hashed)!r}).moe_layers}})
except UnsupportedModelError as error:
    print(error)
assert (session.logits(tokens, 0) == whole).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("layer 0: its experts are selected by ")
    assert "as well as by the router" in done.stdout
    assert "cannot be cut" in inspect(hashed).refusals[0]
