"""reap.gguf.router_sketch: routers of one model are near each other in every type, of two models they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf import GGMLQuantizationType
from helpers.identity_models import N_EXPERTS, bf16, model_with, routers
from reap.errors import FormatError
from reap.files.strict_json import Node
from reap.gguf.dequantize import READABLE_TYPES
from reap.gguf.model_info import inspect
from reap.gguf.router_sketch import (
    EXACT_BOUND,
    ROUNDING,
    WIDTH,
    LayerSketch,
    Router,
    measure_distances,
    read_record,
    rounding_bound,
    sketch_router,
    sketch_rows,
    to_record,
)

STORED = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@pytest.mark.parametrize("name", STORED)
def test_one_model_in_another_type_is_the_same(tmp_path: Path, name: str) -> None:
    rows = routers()
    plain = inspect(model_with(tmp_path / "a.gguf", rows))
    stored = inspect(model_with(tmp_path / "b.gguf", rows, GGMLQuantizationType[name]))
    assert stored.routers[0].type == name
    distances = measure_distances(plain.routers, stored.routers)
    assert len(distances) == 2
    assert not any(distance.differs for distance in distances), distances
    assert (name == "F32") == (distances[0].distance == 0)


@pytest.mark.parametrize("name", STORED)
def test_other_rows_and_a_sibling_differ(tmp_path: Path, name: str) -> None:
    rows = routers()
    plain = inspect(model_with(tmp_path / "a.gguf", rows)).routers
    order = np.roll(np.arange(N_EXPERTS), 1)
    permuted = model_with(tmp_path / "p.gguf", [values[order] for values in rows], GGMLQuantizationType[name])
    found = measure_distances(plain, inspect(permuted).routers)
    assert all(distance.differs and distance.is_reordered for distance in found)
    sibling = model_with(tmp_path / "s.gguf", routers(seed=10), GGMLQuantizationType[name])
    found = measure_distances(plain, inspect(sibling).routers)
    assert all(distance.differs and not distance.is_reordered for distance in found)


def test_numbers_of_bf16_in_f32_are_known_as_such() -> None:
    rows = routers()[0]
    assert sketch_rows(rows).type == "F32"
    assert sketch_rows(bf16(rows)).type == "BF16"
    assert sketch_rows(rows.astype(np.float16)).type == "F16"
    # the same rounding of the same numbers: nothing may be left of it
    raw = (bf16(rows).view(np.uint32) >> 16).astype("<u2").tobytes()
    stored = sketch_router(Router("BF16", *rows.shape, lambda first, n: raw[first * 512 : (first + n) * 512]))
    (found,) = measure_distances({0: sketch_rows(bf16(rows))}, {0: stored})
    assert (found.distance, found.bound) == (0, EXACT_BOUND)


def test_a_small_step_shows_where_nothing_was_rounded() -> None:
    rows = routers()[0]
    moved = rows + np.float32(1e-5) * np.sign(np.random.default_rng(0).standard_normal(rows.shape)).astype(np.float32)
    (found,) = measure_distances({0: sketch_rows(rows)}, {0: sketch_rows(moved)})
    assert found.differs
    (found,) = measure_distances({0: sketch_rows(bf16(rows))}, {0: sketch_rows(bf16(moved))})
    assert found.differs
    (found,) = measure_distances({0: sketch_rows(rows)}, {0: sketch_rows(rows + np.float32(1e-3))})
    assert found.differs


def test_two_rows_that_changed_places_show_among_many() -> None:
    rows = (np.random.default_rng(3).standard_normal((512, 64)) * 0.02).astype(np.float32)
    swapped = rows[[1, 0, *range(2, 512)]]
    for kind in ("BF16", "Q8_0", "Q4_0"):
        stored = LayerSketch(kind, sketch_rows(swapped).rows)
        (found,) = measure_distances({0: sketch_rows(rows)}, {0: stored})
        assert found.differs, kind
        assert found.expert in (0, 1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 300))
def test_the_sketch_estimates_the_distance(seed: int, n_rows: int, n_columns: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((n_rows * 16, n_columns)).astype(np.float32) for _ in range(2))
    (found,) = measure_distances({0: sketch_rows(a)}, {0: sketch_rows(b)})
    size = np.sqrt((np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2) / 2)
    assert found.distance == pytest.approx(np.linalg.norm(a - b) / size, rel=0.7)


def test_what_cannot_be_read_has_a_type_and_no_rows() -> None:
    unknown = Router("IQ1_S", 4, 256, lambda first, n: bytes(50 * n))
    assert sketch_router(unknown) == LayerSketch("IQ1_S", None)
    infinite = sketch_rows(np.full((4, 8), np.inf, dtype=np.float32))
    assert infinite.rows is None
    forged = Router("F32", 1 << 30, 1 << 30, lambda first, n: pytest.fail("was read"))
    assert sketch_router(forged).rows is None
    assert measure_distances({0: infinite}, {0: infinite}) == []


def test_every_readable_type_has_a_bound() -> None:
    assert set(ROUNDING) | {"F64"} == set(READABLE_TYPES)
    for name in ROUNDING:
        assert rounding_bound(name, "F32") == rounding_bound("F32", name)
        assert rounding_bound(name, name) < 0.5


def test_a_sketch_survives_its_file() -> None:
    sketch = {3: sketch_rows(routers()[0]), 7: LayerSketch("IQ1_S", None)}
    found = read_record(Node(to_record(sketch), "model"))
    assert found[7] == sketch[7]
    assert found[3].type == "F32"
    assert found[3].rows is not None
    assert found[3].rows.shape == (N_EXPERTS, WIDTH)
    assert np.array_equal(found[3].rows, np.asarray(sketch[3].rows))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "should be an object"),
        ({"x": ["F32"]}, "named by a layer"),
        ({"1": []}, "type of a router"),
        ({"1": ["F32", "AAAA", "AAAA"]}, "type of a router"),
        ({"1": [3]}, "should be a string"),
        ({"1": ["F32", "not base64"]}, "not base64"),
        ({"1": ["F32", "AAAA"]}, "4 float32 for each expert"),
        ({"1": ["F32", "AACAfwAAgH8AAIB/AACAfw=="]}, "not finite"),
    ],
)
def test_a_damaged_sketch_is_refused(record: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_record(Node(record, "model"))
