"""LoRA adapters in llama.cpp's format: what one holds, whether it fits a model, and how one is written.

The format is read by llama.cpp's src/llama-adapter.cpp: for a weight NAME the tensors NAME.lora_a and NAME.lora_b,
whose product is added to it. Of a weight with experts they have as many experts as it has; the engine does not compare
these numbers and would read beyond the adapter's end, so it is done here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, MismatchError
from reap.files.paths import PathLike
from reap.gguf.parser import DEFAULT_ALIGNMENT, TensorInfo
from reap.gguf.reader import GGUFFile, GGUFModel
from reap.gguf.tensor_types import ValueType
from reap.gguf.writer import NewFile, NewTensor, encode_pair

#: Metadata of a repair: the record of the model that it belongs to ("model" of a plan), as JSON.
MODEL_KEY = "reap.repair.model"
#: Of a weight: a [n_experts, rank, n_in] and b [n_experts, n_out, rank].
Factors = tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]
_FLOATS: Mapping[int, Any] = {0: np.float32, 1: np.float16}
_TYPE_IDS = {"F32": 0, "F16": 1}


@dataclass(frozen=True)
class Adapter:
    """What an adapter's header says."""

    path: Path
    """The file."""
    architecture: str
    """general.architecture of the models that it is for."""
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]]
    """Name of a weight -> its two factors, lora_a and lora_b."""
    model: Mapping[str, Any] | None
    """Of a repair, the record of the model that it belongs to; None for another adapter."""
    metadata: Mapping[str, Any]
    """Its reap.* keys."""
    n_bytes: int
    """Size of the file."""

    @property
    def n_experts(self) -> int | None:
        """Of the layers that it changes the experts of; None where there is none."""
        counts = {a.shape[2] for a, _ in self.pairs.values() if len(a.shape) == 3}
        return max(counts, default=None)


def read_adapter(path: PathLike) -> Adapter:
    """Read an adapter's header. Raises UsageError where there is no such file, FormatError where it is no adapter."""
    with GGUFFile.open(path) as file:
        return _read(file)


def _read(file: GGUFFile) -> Adapter:
    kind = file.get("general.type", "model")
    if kind != "adapter" or file.get("adapter.type") != "lora":
        found = f"a LoRA adapter of type {file.get('adapter.type')!r}" if kind == "adapter" else f"a GGUF {kind}"
        raise FormatError(f"{file.path}: is {found}, expected a LoRA adapter (general.type and adapter.type say so)")
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        weight, _, half = name.rpartition(".")
        if half in ("lora_a", "lora_b"):
            halves.setdefault(weight, {})[half] = tensor
        elif not name.endswith("_norm.weight"):
            raise FormatError(f"{file.path}: the tensor {name!r} of an adapter should end in .lora_a or .lora_b")
    for weight, found_halves in halves.items():
        if len(found_halves) != 2:
            raise FormatError(f"{file.path}: {weight} has {next(iter(found_halves))} and not the other factor")
    return Adapter(
        path=file.path,
        architecture=str(file.get("general.architecture", "")),
        pairs={weight: (pair["lora_a"], pair["lora_b"]) for weight, pair in halves.items()},
        model=_model_record(file),
        metadata={key: it.value for key, it in file.metadata.items() if key.startswith("reap.") and key != MODEL_KEY},
        n_bytes=file.size,
    )


def _model_record(file: GGUFFile) -> Mapping[str, Any] | None:
    text = file.get(MODEL_KEY)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{file.path}: {MODEL_KEY} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{file.path}: {MODEL_KEY} should be an object, found {type(record).__name__}")
    return record


def check_fits(adapter: Adapter, model: GGUFModel) -> None:
    """Raise MismatchError where the engine could not add an adapter to a model, or would read what is not there."""
    architecture = model.get("general.architecture")
    if adapter.architecture != architecture:
        raise MismatchError(
            f"{adapter.path} is for the architecture {adapter.architecture!r}, but {model.path} is {architecture!r}"
        )
    for name, (a, b) in adapter.pairs.items():
        weight = model.tensors.get(name)
        if weight is None:
            raise MismatchError(f"{adapter.path} changes {name}, which {model.path} does not have")
        expected = _expected_shapes(name, weight, a)
        if (a.shape, b.shape) != expected:
            raise MismatchError(
                f"{adapter.path}: the factors of {name} have the shapes {list(a.shape)} and {list(b.shape)}, expected"
                f" {list(expected[0])} and {list(expected[1])} for {model.path}{_experts_hint(weight, a)}"
            )


def _expected_shapes(name: str, weight: TensorInfo, a: TensorInfo) -> tuple[Sequence[int], Sequence[int]]:
    if name == "token_embd.weight":  # turned over: a is looked up by token
        rank = a.shape[0] if a.shape else 0
        return (rank, weight.shape[1]), (rank, weight.shape[0])
    rank = a.shape[1] if len(a.shape) > 1 else 0
    n_in, n_out, *experts = weight.shape if len(weight.shape) > 1 else (*weight.shape, 1)
    return (n_in, rank, *experts), (rank, n_out, *experts)


def _experts_hint(weight: TensorInfo, a: TensorInfo) -> str:
    if len(weight.shape) == len(a.shape) == 3 and weight.shape[2] != a.shape[2]:
        return f": it is of a model with {a.shape[2]} experts, not {weight.shape[2]}"
    return ""


# ---- to write


def new_adapter(
    architecture: str, factors: Mapping[str, Factors], pairs: Iterable[bytes] = (), type_name: str = "F16"
) -> NewFile:
    """An adapter to write with `reap.files.atomic`.

    Args:
        architecture: general.architecture of its models.
        factors: name of a weight -> its two factors.
        pairs: more metadata, encoded.
        type_name: of its tensors, "F16" or "F32".
    """
    rank = max((a.shape[-2] for a, _ in factors.values()), default=1)
    text = ValueType.STRING
    metadata = [
        encode_pair("general.architecture", architecture, text),
        encode_pair("general.type", "adapter", text),
        encode_pair("adapter.type", "lora", text),
        encode_pair("adapter.lora.alpha", float(rank), ValueType.FLOAT32),
        *pairs,
    ]
    tensors = []
    for name, (a, b) in factors.items():
        # the engine multiplies by alpha over the rank of each pair
        for half, values in ((f"{name}.lora_a", a), (f"{name}.lora_b", b * np.float32(b.shape[-1] / rank))):
            data = values.astype(_FLOATS[_TYPE_IDS[type_name]]).tobytes()
            tensors.append(NewTensor(half, tuple(reversed(values.shape)), _TYPE_IDS[type_name], (data,)))
    return NewFile(3, DEFAULT_ALIGNMENT, len(metadata), tuple(metadata), tuple(tensors))


def read_factors(path: PathLike, name: str) -> Factors:
    """The two factors of a weight, outermost axis first, with the adapter's scale in the second."""
    with GGUFFile.open(path) as file:
        a, b = (_values(file, file.tensors[f"{name}.{half}"]) for half in ("lora_a", "lora_b"))
        alpha = float(file.get("adapter.lora.alpha", 0.0))
    return a, b * np.float32(alpha / b.shape[-1]) if alpha else b


def _values(file: GGUFFile, tensor: TensorInfo) -> NDArray[np.float32]:
    if tensor.type not in _FLOATS:
        raise FormatError(f"{file.path}: {tensor.name} is {tensor.type_name}, expected F32 or F16")
    raw = np.frombuffer(file.data(tensor), dtype=_FLOATS[tensor.type])
    return raw.reshape(tuple(reversed(tensor.shape))).astype(np.float32)


def spread_adapter(path: PathLike, kept: Mapping[int, Sequence[int]], n_experts: int) -> NewFile:
    """The adapter of a pruned model, for the whole one: each expert's factors at its number there, zeros elsewhere.

    kept: layer -> the experts that stay, in the order that they have in the pruned model.
    """
    adapter = read_adapter(path)
    factors: dict[str, Factors] = {}
    for name in adapter.pairs:
        a, b = read_factors(path, name)
        ids = kept.get(int(name.split(".")[1])) if name.startswith("blk.") and a.ndim == 3 else None
        if ids is not None and len(ids) != len(a):
            raise MismatchError(f"{path}: {name} has factors for {len(a)} experts, but the plan keeps {len(ids)}")
        if ids is not None:
            a, b = _spread(a, ids, n_experts), _spread(b, ids, n_experts)
        factors[name] = (a, b)
    return new_adapter(adapter.architecture, factors, type_name="F32")


def _spread(values: NDArray[np.floating[Any]], ids: Sequence[int], n_experts: int) -> NDArray[np.float32]:
    whole = np.zeros((n_experts, *values.shape[1:]), np.float32)
    whole[list(ids)] = values
    return whole
