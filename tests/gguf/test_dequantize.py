"""reap.gguf.dequantize against the `gguf` package."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES

import gguf
from gguf import GGMLQuantizationType
from reap.gguf.dequantize import PLAIN_TYPES, READABLE_TYPES, dequantize
from reap.gguf.tensor_types import TENSOR_TYPES


@pytest.mark.parametrize("name", [name for name in READABLE_TYPES if name not in PLAIN_TYPES])
def test_blocks_are_read_as_the_gguf_package_reads_them(name: str) -> None:
    kind = GGMLQuantizationType[name]
    _, n_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (50, n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # some of the scales are infinite
        expected = gguf.quants.dequantize(raw, kind).reshape(-1)
    found = dequantize(raw.tobytes(), name)
    assert found is not None
    assert found.dtype == np.float32
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    assert (np.isfinite(found) == finite).all()
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PLAIN_TYPES)
def test_plain_numbers_are_exact(name: str) -> None:
    values = np.array([0.0, -1.5, 3.140625, 2.0**-20, 1024.0])
    if name == "BF16":
        raw = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raw = values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[name]).tobytes()
    found = dequantize(raw, name)
    assert found is not None
    assert found.tolist() == values.tolist()


def test_other_types_are_not_guessed_at() -> None:
    assert dequantize(b"\0" * 256, "IQ1_S") is None
    assert dequantize(b"\0" * 256, "F8_E4M3") is None
    assert set(READABLE_TYPES) <= {kind.name for kind in TENSOR_TYPES.values()}
