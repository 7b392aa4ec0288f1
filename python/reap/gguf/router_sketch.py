"""A few numbers for each row of a model's routers, by which two files of one model are told from two models.

The sketch of a row (float32 or whatever it is stored as, [n_embd]) is its products with four vectors of signs, always
the same ones. For two rows a and b the mean square of the difference of their sketches estimates ‖a − b‖², without
bias (Alon, Matias & Szegedy 1996; Achlioptas 2003). So sketches show how far two routers are from each other, and that
is compared with what rounding to the types they are stored in accounts for: docs/formulas.md, "Are they one model?".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reap.files.strict_json import EXPERT_LIMIT, Node
from reap.gguf.dequantize import PLAIN_TYPES, dequantize

#: Numbers for each row.
WIDTH = 4
#: The most that storing a router in a type changes of it, ‖rounded − exact‖ / ‖exact‖: benchmarks/router_distances.py.
ROUNDING: Mapping[str, float] = {
    "F32": 3.0e-8,
    "F16": 2.2e-4,
    "BF16": 1.75e-3,
    "Q8_0": 8.6e-3,
    "Q6_K": 2.6e-2,
    "Q5_K": 4.7e-2,
    "Q5_1": 4.9e-2,
    "Q5_0": 6.7e-2,
    "Q4_K": 9.3e-2,
    "Q4_1": 1.01e-1,
    "IQ4_NL": 1.03e-1,
    "Q4_0": 1.29e-1,
}
_EXACT_TYPES = frozenset({"F32", "F16", "BF16"})
#: The layer's distance may be so many times what rounding accounts for, a single row's so many times more again.
LAYER_FACTOR = 1.6
ROW_FACTOR = 4.0
#: Between routers of one exact type: what a float32 in the sketch rounds, and what small numbers of BF16 lose in F16.
EXACT_BOUND = 5e-6
#: Routers that are larger are forged: the largest known have 1,024 rows of 8,192.
_MOST_NUMBERS = 1 << 26
_MOST_COLUMNS = 1 << 18
_CHUNK_NUMBERS = 1 << 20

Rows = NDArray[np.float32]


class LayerSketch(NamedTuple):
    """The sketch of one layer's router."""

    type: str
    """How its numbers are stored; of exact types the narrowest that holds them all ("BF16" for such numbers in F32)."""
    rows: Rows | None
    """float32 [n_experts, WIDTH]; None where the type is not one that reap can read, or a number is not finite."""


RouterSketch = Mapping[int, LayerSketch]


class Router(NamedTuple):
    """A router as it is stored."""

    type: str
    """ggml type or safetensors dtype."""
    n_rows: int
    """Experts."""
    n_columns: int
    """Numbers of a row: the width of the hidden states."""
    read: Callable[[int, int], bytes]
    """(first row, rows) -> their bytes."""


# ---- making one


def sketch_router(router: Router) -> LayerSketch:
    """The sketch of a stored router, read a few rows at a time."""
    if not 0 < router.n_rows * router.n_columns <= _MOST_NUMBERS or router.n_columns > _MOST_COLUMNS:
        return LayerSketch(router.type, None)
    step = max(1, _CHUNK_NUMBERS // router.n_columns)
    return _sketch(
        router.type,
        (
            dequantize(router.read(first, min(step, router.n_rows - first)), router.type)
            for first in range(0, router.n_rows, step)
        ),
        router.n_columns,
    )


def sketch_rows(rows: NDArray[Any]) -> LayerSketch:
    """The sketch of a router in memory, any float type, [n_experts, n_embd]."""
    return _sketch("F32", [np.ascontiguousarray(rows, dtype=np.float32)], rows.shape[1])


def _sketch(type_name: str, chunks: Iterable[Rows | None], n_columns: int) -> LayerSketch:
    signs = _signs(n_columns)
    sketched, narrowest = [], {"BF16", "F16"} if type_name in PLAIN_TYPES else set()
    for chunk in chunks:
        if chunk is None:
            return LayerSketch(type_name, None)
        narrowest = {name for name in narrowest if _is_exact(chunk, name)}
        with np.errstate(over="ignore", invalid="ignore"):
            sketched.append((chunk.reshape(-1, n_columns).astype(np.float64) @ signs).astype(np.float32))
    rows = np.concatenate(sketched)
    name = next((name for name in ("BF16", "F16") if name in narrowest), "F32")
    name = name if type_name in PLAIN_TYPES else type_name
    return LayerSketch(name, rows if np.isfinite(rows).all() else None)


def _is_exact(numbers: Rows, type_name: str) -> bool:
    if type_name == "BF16":
        return not (numbers.view(np.uint32) & 0xFFFF).any()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((numbers.astype(np.float16).astype(np.float32) == numbers).all())


@lru_cache(maxsize=4)
def _signs(n_columns: int) -> NDArray[np.float64]:
    """float64 [n_columns, WIDTH] of +1 and −1: the bits of SHAKE-256, which no version of a library changes."""
    n_bits = n_columns * WIDTH
    raw = hashlib.shake_256(b"reap.router_sketch.1").digest(-(-n_bits // 8))
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")[:n_bits]
    return bits.reshape(n_columns, WIDTH).astype(np.float64) * 2 - 1


def select_rows(sketch: RouterSketch, ids: Mapping[int, Sequence[int]]) -> RouterSketch:
    """The sketch of a model that keeps of each layer in `ids` these experts, in this order.

    A layer that has no such experts is left out.
    """
    return {
        layer: found if found.rows is None else found._replace(rows=found.rows[list(ids[layer])])
        for layer, found in sketch.items()
        if ids.get(layer) and (found.rows is None or 0 <= min(ids[layer]) <= max(ids[layer]) < len(found.rows))
    }


# ---- in a file


def to_record(sketch: RouterSketch) -> dict[str, Any]:
    """For a file's "model": layer -> [type, base64 of the rows as little-endian float32], or [type] without rows."""
    return {
        str(layer): [type_name]
        if rows is None
        else [type_name, base64.b64encode(rows.astype("<f4").tobytes()).decode("ascii")]
        for layer, (type_name, rows) in sketch.items()
    }


def read_record(node: Node) -> RouterSketch:
    """What `to_record` wrote. FormatError where it cannot be a sketch."""
    return dict(_read_layers(node))


def _read_layers(node: Node) -> Iterator[tuple[int, LayerSketch]]:
    for key, entry in node.items():
        if not key.isascii() or not key.isdigit() or len(key) > 6:
            entry.fail("should be named by a layer")
        parts = [entry.entry(index).string() for index in range(len(entry.entries()))]
        if not 1 <= len(parts) <= 2:
            entry.fail("should be the type of a router and its sketch")
        yield int(key), LayerSketch(parts[0], None if len(parts) < 2 else _read_rows(entry.entry(1)))


def _read_rows(node: Node) -> Rows:
    try:
        raw = base64.b64decode(node.string().encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        node.fail("is not base64")
    row_bytes = 4 * WIDTH
    if len(raw) % row_bytes or not 0 < len(raw) <= EXPERT_LIMIT * row_bytes:
        node.fail(f"should be {WIDTH} float32 for each expert, found {len(raw):,} bytes")
    rows = np.frombuffer(raw, dtype="<f4").reshape(-1, WIDTH).astype(np.float32)
    if not np.isfinite(rows).all():
        node.fail("holds a number that is not finite")
    return rows


# ---- comparing two


class Distance(NamedTuple):
    """How far two routers of one layer are from each other, as a share of their size."""

    layer: int
    """GGUF block index."""
    types: tuple[str, str]
    """How the two are stored."""
    distance: float
    """Root mean square over the rows."""
    bound: float
    """The most that rounding accounts for."""
    expert: int
    """Of the row that differs most."""
    row_distance: float
    """Of that row."""
    is_reordered: bool
    """Whether the one has the rows of the other in another order."""

    @property
    def differs(self) -> bool:
        return not (self.distance <= self.bound and self.row_distance <= self.bound * ROW_FACTOR)


def rounding_bound(first: str, second: str) -> float:
    """How far two routers of one model, stored in these types, may be from each other."""
    if first == second and first in _EXACT_TYPES:
        return EXACT_BOUND  # both hold the same numbers, or the same numbers rounded in the same way
    return max(EXACT_BOUND, LAYER_FACTOR * math.hypot(ROUNDING[first], ROUNDING[second]))


def measure_distances(first: RouterSketch, second: RouterSketch) -> list[Distance]:
    """Of every layer that both have a readable router of, with equally many rows."""
    found = []
    for layer in sorted(set(first) & set(second)):
        a, b = first[layer], second[layer]
        if a.rows is None or b.rows is None or a.type not in ROUNDING or b.type not in ROUNDING:
            continue
        if a.rows.shape == b.rows.shape:
            found.append(_distance(layer, (a.type, b.type), a.rows, b.rows))
    return found


def _distance(layer: int, types: tuple[str, str], first: Rows, second: Rows) -> Distance:
    a, b = first.astype(np.float64), second.astype(np.float64)
    # of one row four products tell the size only roughly, so a small one is held against the layer's
    sizes = np.sqrt((a**2 + b**2).mean(axis=1) / 2)
    size = math.sqrt(float((sizes**2).mean())) or 1.0
    apart = np.sqrt(((a - b) ** 2).mean(axis=1))
    distance = math.sqrt(float((apart**2).mean())) / size
    rows = apart / np.maximum(sizes, size)
    worst = int(rows.argmax())
    made = Distance(layer, types, distance, rounding_bound(*types), worst, float(rows[worst]), False)
    return made._replace(is_reordered=made.differs and _is_reordered(a, b, size * made.bound * ROW_FACTOR))


def _is_reordered(a: NDArray[np.float64], b: NDArray[np.float64], most: float) -> bool:
    nearest = []
    for row in a:
        apart = np.sqrt(((b - row) ** 2).mean(axis=1))
        nearest.append(int(apart.argmin()))
        if apart[nearest[-1]] > most:
            return False
    return sorted(nearest) == list(range(len(a)))
