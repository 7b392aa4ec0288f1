"""How far routers are from each other: rounded to every storage type, after one step of an optimiser, permuted, of a
sibling model. The bounds of `reap.gguf.router_sketch` lie between what rounding does and all the rest.

    python benchmarks/router_distances.py            # needs PyTorch and transformers for the families and the steps

Printed are ‖a − b‖ / ‖a‖ of whole routers, as they are and as their sketches estimate them: the smallest and the
largest over the layers of all models.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import reap
from reap.gguf.dequantize import dequantize
from reap.gguf.router_sketch import LayerSketch, measure_distances, rounding_bound, sketch_rows
from reap.gguf.tensor_types import TENSOR_TYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

Rows = NDArray[np.float32]
QUANTISED = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "IQ4_NL", "Q4_1", "Q4_0")
STEPS = (1e-6, 1e-5, 1e-4)


def bf16(rows: Rows) -> Rows:
    """Rounded to nearest, ties to even."""
    bits = rows.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).reshape(rows.shape)


def quantised(rows: Rows, name: str) -> Rows | None:
    """Rounded by ggml's own quantiser; None where a row is not a whole number of blocks."""
    kind = next(number for number, stored in TENSOR_TYPES.items() if stored.name == name)
    stored = TENSOR_TYPES[kind]
    if rows.shape[1] % stored.block_size:
        return None
    library = ctypes.CDLL(str(next(Path(reap.__file__).parent.glob("libggml-base.so*"))))
    target = ctypes.create_string_buffer(rows.size // stored.block_size * stored.block_bytes)
    source = np.ascontiguousarray(rows)
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    longs = (ctypes.c_int64(0), ctypes.c_int64(rows.shape[0]), ctypes.c_int64(rows.shape[1]))
    quantize(ctypes.c_int(kind), source.ctypes.data_as(ctypes.c_void_p), target, *longs, None)
    found = dequantize(target.raw, name)
    return None if found is None else found.reshape(rows.shape)


def made_up() -> Iterator[tuple[str, Rows]]:
    """Routers of the sizes of published models: numbers of 0.02, as they are initialised, and heavier tails."""
    rng = np.random.default_rng(0)
    for shape in ((128, 2048), (256, 4096), (512, 2048)):
        yield f"normal {shape}", (rng.standard_normal(shape) * 0.02).astype(np.float32)
        yield f"heavy-tailed {shape}", (rng.standard_t(3, shape) * 0.02).astype(np.float32)


def families() -> dict[str, Any]:
    """The test families of tests/helpers/torch_models.py, as transformers models."""
    from helpers.torch_models import FAMILIES, build

    return {name: build(name) for name in FAMILIES}


def routers_of(model: Any) -> list[Rows]:
    from reap.hf.memory.modules import find_moe_layers

    found = []
    for layer in find_moe_layers(model).values():
        matrices = [tensor for tensor in layer.router.parameters() if tensor.dim() == 2]
        found.append(matrices[0].detach().float().numpy().copy())
    return found


def after_one_step(model: Any, optimiser: str, rate: float) -> list[Rows]:
    """The routers after one step on random tokens; the model is put back."""
    import torch

    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    kinds: dict[str, Callable[..., Any]] = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
    step = kinds[optimiser](model.parameters(), lr=rate)
    ids = torch.randint(10, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    model.train()
    step.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    step.step()
    changed = routers_of(model)
    model.load_state_dict(before)
    return changed


class Table:
    """Distances by what was compared."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[float, float]]] = {}

    def add(self, what: str, first: Rows, second: Rows, type_name: str | None = None) -> None:
        """Exactly, and by the sketches."""
        a, b = sketch_rows(first), sketch_rows(second)
        if type_name is not None:
            b = LayerSketch(type_name, b.rows)
        (found,) = measure_distances({0: a}, {0: b})
        exact = float(np.linalg.norm(first.astype(np.float64) - second) / np.linalg.norm(first.astype(np.float64)))
        self.rows.setdefault(what, []).append((exact, found.distance))

    def show(self) -> None:
        print(f"{'':<58}{'exactly':>21}{'by the sketch':>23}")
        for what, found in self.rows.items():
            exact, sketched = zip(*found, strict=True)
            print(f"{what:<58}{min(exact):>10.2e} {max(exact):>10.2e}{min(sketched):>12.2e} {max(sketched):>10.2e}")


def main() -> None:
    table = Table()
    models = families()
    routers = list(made_up()) + [(name, rows) for name, model in models.items() for rows in routers_of(model)]
    for _, rows in routers:
        table.add("F32, stored as BF16", rows, bf16(rows))
        table.add("F32, stored as F16", rows, rows.astype(np.float16).astype(np.float32))
        table.add("BF16, stored as F16", bf16(rows), bf16(rows).astype(np.float16).astype(np.float32))
        for kind in QUANTISED:
            stored = quantised(rows, kind)
            if stored is not None:
                table.add(f"F32, stored as {kind}", rows, stored, kind)
        table.add(f"two rows changed places, {len(rows)} rows", rows, rows[[1, 0, *range(2, len(rows))]])
        table.add("all rows in another order", rows, rows[np.random.default_rng(1).permutation(len(rows))])
    from helpers.torch_models import build

    for name, model in models.items():
        for rows, others in zip(routers_of(model), routers_of(build(name, seed=4321)), strict=True):
            table.add("of another model of the family", rows, others)
    for rate in STEPS:
        for optimiser in ("SGD", "Adam"):
            for model in models.values():
                for before, after in zip(routers_of(model), after_one_step(model, optimiser, rate), strict=True):
                    table.add(f"one step of {optimiser} at {rate:g}, F32 both, test families", before, after)
                    table.add(
                        f"one step of {optimiser} at {rate:g}, BF16 both, test families", bf16(before), bf16(after)
                    )
        for _, rows in made_up():
            # the first step of Adam moves every number by the rate
            signs = np.random.default_rng(2).choice(np.array([-1, 1], dtype=np.float32), rows.shape)
            moved = rows + np.float32(rate) * signs
            table.add(f"one step of Adam at {rate:g}, F32 both, numbers of 0.02", rows, moved)
            table.add(f"one step of Adam at {rate:g}, BF16 both, numbers of 0.02", bf16(rows), bf16(moved))
            table.add(f"one step of Adam at {rate:g}, F32 and BF16, numbers of 0.02", rows, bf16(moved))
    table.show()
    print("\nthe bounds")
    for first, second in (("F32", "F32"), ("F32", "BF16"), ("F32", "F16"), *(("F32", kind) for kind in QUANTISED)):
        print(f"{first + ' and ' + second:<58}{rounding_bound(first, second):>10.2e}")


if __name__ == "__main__":
    main()
