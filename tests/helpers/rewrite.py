"""A GGUF file with other keys and tensors, written by the `gguf` package; knows nothing of reap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

Array = np.ndarray[Any, Any]


def rewrite(
    source: Path,
    target: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
) -> Path:
    """`source` with some keys and tensors replaced, added (at the end; a whole number becomes 32 bits) or, where the
    value is None, left out."""
    reader, changed, arrays = GGUFReader(source), dict(keys or {}), dict(tensors or {})
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, pair in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changed.pop(key, pair.contents())
        if value is None or (pair.types[0] == GGUFValueType.ARRAY and len(value) == 0):
            continue
        writer.add_key_value(key, value, pair.types[0], sub_type=pair.types[1] if len(pair.types) > 1 else None)
    for key, value in changed.items():
        if value is not None:
            _add(writer, key, value)
    for tensor in reader.tensors:
        array = arrays.pop(tensor.name, np.array(tensor.data))
        if array is not None:
            kind = None if array.dtype in (np.float32, np.float16, np.int32) else tensor.tensor_type
            writer.add_tensor(tensor.name, array, raw_dtype=kind)
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType.I32 if array.dtype == np.int32 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
