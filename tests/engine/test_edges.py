"""Every field of the engine's options at its edges, each in a process of its own: a sentence, never an abort."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.gguf_builder import build_moe
from reap.engine import native
from reap.errors import EngineError, UsageError

#: Opens a session for each value of one field, and lets it do everything once.
CHILD = """
import json, sys
import numpy as np
from reap.engine import native
from reap.errors import ReapError

core = native.load()
path, field, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokens = np.arange(2, dtype=np.int32)
for value in values:
    try:
        options = core.SessionOptions()
        options.model_path, options.ctx_size, options.threads = path, 64, 1
        if isinstance(value, list):
            value = [tuple(item) if isinstance(item, list) else item for item in value]
        setattr(options, field, value)
        session = core.Session(options)
        session.start_profile([0, 1], 8)
        session.profile_batch(tokens, tokens, tokens * 0, tokens * 0)
        session.commit(1)
        session.forward(tokens, False)
        session.log_probs(tokens, 0)
        print("ok", flush=True)
    except (ReapError, TypeError) as error:
        print(type(error).__name__, str(error).splitlines()[0], flush=True)
"""

NUMBERS = [0, 1, 2, -1, 512, 513, 2**20, 2**30, 2**31 - 1, -(2**31), 2**31, 1.5, "x", None]
TYPES = ["f32", "bf16", "q8_0", "i8", "f64", "q8_1", "q4_K", "", "F16", "\x00", None, 1]
SWITCHES = [True, False, 0, "x", None]
KEY = "qwen3moe."
EDGES: dict[str, list[Any]] = {
    **dict.fromkeys(
        (
            "ctx_size",
            "batch_size",
            "ubatch_size",
            "n_sequences",
            "cache_size",
            "threads",
            "gpu_layers",
            "prediction_layer",
        ),
        NUMBERS,
    ),
    **dict.fromkeys(("type_k", "type_v"), TYPES),
    **dict.fromkeys(("use_mmap", "repack", "head_on_host", "reduce_on_device", "stop_early"), SWITCHES),
    "model_bytes": [0, 1, 2**64 - 1, 2**64, -1, None],
    "model_path": ["", "/", "/nowhere", "/dev/null", "a\x00b", "\udcff", None, 1],
    "flash_attn": ["on", "off", "auto", "", "ON", None],
    "devices": [[], ["CPU"], ["CPU", "CPU"], ["none"], ["none", "CPU"], ["x"], [""], "CPU", None],
    "override_tensors": [
        [[".*", "CPU"]],
        [["(", "CPU"]],
        [["", "CPU"]],
        [["x" * 2000, "CPU"]],
        [["(a*)*b", "CPU"]],
        [["a\x00", "CPU"]],
        [["exps", "none"]],
        [["exps"]],
    ],
    "adapters": [[], [""], ["/nowhere"], ["/dev/null"], ["a\x00b"], ["\udcff"], "x", None, [1]],
    "rpc": [["x"], [":1"], ["h:99999"], ["h:0"], ["h:"], [""]],
    "kv_overrides": [
        [[KEY + "expert_used_count", "int", value]] for value in ("4", "0", "9", "-1", str(2**63), "", "x")
    ]
    + [
        [["a", "int", "1"]],
        [["", "int", "1"]],
        [["a" * 128, "int", "1"]],
        [["a", "str", "x" * 128]],
        [["a", "what", "1"]],
        [["a", "bool", "1"]],
        [["a", "float", "inf"]],
        [[KEY + "expert_used_count", "str", "4"]],
        [[KEY + "expert_count", "int", "100000"]],
        [[KEY + "block_count", "int", "0"]],
        [[KEY + "embedding_length", "int", "0"]],
        [[KEY + "attention.head_count", "int", "0"]],
        [[KEY + "attention.layer_norm_rms_epsilon", "float", "-1"]],
        [[KEY + "rope.dimension_count", "int", "7"]],
        [[KEY + "rope.scaling.type", "str", "x"]],
        [["general.architecture", "str", "x"]],
        [["split.count", "int", "9"]],
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_moe(tmp_path_factory.mktemp("edges") / "m.gguf")


def test_every_field_has_edges() -> None:
    fields = {name for name in dir(native.load().SessionOptions) if not name.startswith("_")}
    assert fields == set(EDGES)


@pytest.mark.parametrize("field", EDGES)
def test_no_value_ends_the_process(model: Path, field: str) -> None:
    command = [sys.executable, "-c", CHILD, str(model), field, json.dumps(EDGES[field])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    said = done.stdout.splitlines()
    tried = EDGES[field][: len(said) + 1]
    assert done.returncode == 0, f"{field} = {tried[-1]!r} ended the process: {done.stderr[-500:]}"
    assert len(said) == len(EDGES[field])
    for value, line in zip(EDGES[field], said, strict=True):
        assert re.match(r"ok$|(UsageError|EngineError|UnsupportedModelError) .{10}|TypeError ", line), (value, line)
        assert "unordered_map" not in line


def test_cache_types_are_those_that_work(tmp_path: Path) -> None:
    """With heads that blocks of 32 divide, each type of the list runs."""
    core = native.load()
    path = build_moe(tmp_path / "wide.gguf", n_embd=64, n_heads=2, n_heads_kv=2, n_head_dim=32)
    for name in core.kv_cache_types():
        for k, v in ((name, "f16"), (name, name)):
            options = core.SessionOptions()
            options.model_path, options.ctx_size, options.threads, options.type_k, options.type_v = path, 64, 1, k, v
            assert core.Session(options).log_probs([1, 2, 3], 0).shape == (2,)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ((KEY + "expert_used_count", "int", "9"), EngineError, "GGML_ASSERT"),
        ((KEY + "expert_used_count", "str", "2"), UsageError, "expected int but got str"),
        (("a" * 128, "int", "1"), UsageError, "128 bytes, expected 1 to 127"),
    ],
)
def test_overrides_that_cannot_be(model: Path, override: Any, error: type[Exception], words: str) -> None:
    core = native.load()
    options = core.SessionOptions()
    options.model_path, options.ctx_size, options.kv_overrides = str(model), 64, [override]
    with pytest.raises(error, match=words):
        core.Session(options)


def test_an_override_changes_what_the_model_does(model: Path) -> None:
    core = native.load()

    def said(overrides: list[tuple[str, str, str]]) -> Any:
        options = core.SessionOptions()
        options.model_path, options.ctx_size, options.threads, options.kv_overrides = str(model), 64, 1, overrides
        return core.Session(options).log_probs([1, 2, 3, 4], 0)

    assert (said([]) == said([(KEY + "expert_used_count", "int", "2")])).all()
    assert (said([]) != said([(KEY + "expert_used_count", "int", "4")])).any()


def test_empty_input_is_a_sentence(model: Path) -> None:
    core = native.load()
    options = core.SessionOptions()
    options.model_path, options.ctx_size = str(model), 64
    session = core.Session(options)
    for call in (
        lambda: session.forward([], True),
        lambda: session.logits([], 0),
        lambda: session.log_probs([], 0),
        lambda: session.predict_top([], 0, 1),
        lambda: session.predict_ids([], 0, [[]]),
        lambda: session.generate([([], 1, 0, [])], 0.0, 0, 1.0, 0.0),
        lambda: session.generate([([1], 2**63, 0, [])], 0.0, 0, 1.0, 0.0),
        lambda: session.generate([([1], 1, 0, [])] * 2, 0.0, 0, 1.0, 0.0),
        lambda: session.generate([([1], 1, 0, [])], -1.0, 0, 1.0, 0.0),
        lambda: session.score_continuations([([1], [[]])]),
        lambda: session.score_continuations([([], [[1]])]),
        lambda: session.score_continuations([([1], [[2**30]])]),
        lambda: session.score_continuations([([1], [[1], [1]])]),
        lambda: session.start_profile([], 8),
        lambda: session.start_profile([1, 0], 8),
        lambda: session.start_profile([0, 1], 2**40),
        lambda: session.profile_batch([], [], [], []),
    ):
        with pytest.raises(UsageError):
            call()
    session.start_profile([0, 1], 8)
    with pytest.raises(UsageError, match="there is no group"):
        session.restore(2**64 - 1, session.sums(0), 0)
    with pytest.raises(UsageError, match=r"norm_max has 1 values, expected 16"):
        session.restore(0, session.sums(0) | {"norm_max": [1.0]}, 0)
