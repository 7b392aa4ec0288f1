"""Reads importance matrices, as llama.cpp's imatrix program writes them, and cuts them to the experts that stay.

Two forms, read in llama.cpp's tools/imatrix/imatrix.cpp (save_imatrix, save_imatrix_legacy) and
common/imatrix-loader.cpp. GGUF: for each weight `<name>.in_sum2` (F32 [n_in, n_matrices], sums of squared activations)
and `<name>.counts` (F32 [1, n_matrices]); experts are matrices. Legacy: a count, then for each weight its name, calls,
number of values, and F32 values [n_in × n_matrices]; then anything. Nothing is computed here: the values that stay are
copied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

from reap.errors import FormatError, MismatchError
from reap.files.paths import PathLike
from reap.files.ranges import Piece, RawFile, Span, Writable, merge_spans, total_bytes
from reap.files.recognise import HEAD_BYTES, what_are
from reap.files.regular import RegularFile
from reap.gguf.parser import MAGIC, MAX_NAME_BYTES, MAX_TENSORS, TensorInfo
from reap.gguf.reader import GGUFFile
from reap.gguf.tensor_types import INTEGER_TYPES, ValueType
from reap.gguf.writer import NewFile, NewTensor, edit_metadata

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32, _F32_BYTES = 0, 4
_I32 = struct.Struct("<i")
# a name of one byte, its length, the calls, the number of values, and one value
_MIN_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4


class Experts(NamedTuple):
    """What becomes of one tensor of experts."""

    n_in: int
    """Length of a row: numbers that an expert takes in."""
    n_experts: int
    """Experts of the tensor."""
    kept: tuple[int, ...]
    """Ids of those that stay, ascending."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight's part of the matrix; offsets and sizes are in F32 numbers."""

    offset: int
    """Where its values begin."""
    n_values: int
    """How many there are."""
    counts_offset: int = 0
    """Where its counts begin."""
    n_counts: int = 0
    """How many there are; 0 in the legacy form, which has none."""


class Imatrix:
    """An open importance matrix. Use it as a context manager. entries: name of the weight -> `Entry`."""

    def __init__(
        self, file: RegularFile, entries: Mapping[str, Entry], taken: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Use `read_imatrix`. taken: name that the file does not have -> the one whose numbers stand for it."""
        self.file, self.entries, self.taken = file, entries, taken

    def serving(self, names: Iterable[str]) -> Imatrix:
        """The same, which speaks of these weights too where it speaks of their other form: gate and up projections may
        be two tensors or one, and take in the same numbers."""
        taken = {}
        for name in names:
            source = next((other for other in other_forms(name) if other in self.entries), None)
            if name not in self.entries and source is not None:
                taken[name] = source
        entries = {**self.entries, **{name: self.entries[source] for name, source in taken.items()}}
        return Imatrix(self.file, entries, taken)

    @property
    def is_legacy(self) -> bool:
        """Whether it has the older form, without GGUF's header."""
        return not isinstance(self.file, GGUFFile)

    def cut(self, experts: Mapping[str, Experts]) -> Writable:
        """The same matrix with the kept experts' parts only. Raises MismatchError where its sizes are not those of the
        model."""
        for name, entry in self.entries.items():
            if name in experts:
                self._check(name, entry, experts[name])
        if not any(name in self.entries for name in experts):
            raise MismatchError(f"{self.file.path}: holds nothing about any expert of the model")
        return self._cut_legacy(experts) if self.is_legacy else self._cut_gguf(experts)

    def missing(self, experts: Iterable[str]) -> list[str]:
        """Tensors of experts that it says nothing about."""
        return [name for name in experts if name not in self.entries]

    def compare(self, written: Imatrix, experts: Mapping[str, Experts]) -> None:
        """Raise FormatError unless `written`, read back, is this matrix cut to `experts`, value by value."""
        if list(written.entries) != list(self.entries):
            raise FormatError("its entries differ from the matrix's")
        for name, entry in self.entries.items():
            expected = (self._numbers(entry.offset, entry.n_values), self._numbers(entry.counts_offset, entry.n_counts))
            if name in experts:
                _, n_experts, kept = experts[name]
                expected = (
                    _rows(expected[0], n_experts, kept),
                    _rows(expected[1], n_experts if entry.n_counts > 1 else 1, kept),
                )
            found = written.entries[name]
            values = (
                written._numbers(found.offset, found.n_values),
                written._numbers(found.counts_offset, found.n_counts),
            )
            if values != expected:
                raise FormatError(f"{name} differs from the matrix's")

    def values(self, name: str) -> tuple[bytes, bytes | int]:
        """One weight's F32 sums, and its F32 counts; of the legacy form the number of calls."""
        entry = self.entries[name]
        if self.is_legacy:
            (calls,) = _I32.unpack(self.file.read_range(entry.offset - 2 * _I32.size, _I32.size))
            return self._numbers(entry.offset, entry.n_values), calls
        return self._numbers(entry.offset, entry.n_values), self._numbers(entry.counts_offset, entry.n_counts)

    def origin(self) -> tuple[str | None, int]:
        """(first text that it was measured on, chunks of it) as the file says; None and 0 where it does not."""
        return _gguf_origin(self.file) if isinstance(self.file, GGUFFile) else self._legacy_origin()

    def _legacy_origin(self) -> tuple[str | None, int]:
        """From the tail: chunks, the length of a name, the name."""
        last = list(self.entries.values())[-1]
        end = last.offset + last.n_values * _F32_BYTES
        tail = self.file.read_range(end, min(self.file.size - end, 2 * _I32.size + MAX_NAME_BYTES))
        chunks = _I32.unpack_from(tail)[0] if len(tail) >= _I32.size else 0
        length = _I32.unpack_from(tail, 4)[0] if len(tail) >= 2 * _I32.size else 0
        name = tail[8 : 8 + length] if 0 < length <= len(tail) - 8 else b""
        return name.split(b"\0")[0].decode("utf-8", "replace") or None, chunks

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Imatrix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _numbers(self, offset: int, n_numbers: int) -> bytes:
        return self.file.read_range(offset, n_numbers * _F32_BYTES)

    def _check(self, name: str, entry: Entry, experts: Experts) -> None:
        if entry.n_values != experts.n_in * experts.n_experts:
            raise MismatchError(
                f"{self.file.path}: {name} has {entry.n_values:,} values, but the model's has"
                f" {experts.n_experts} experts of {experts.n_in:,}"
            )
        if entry.n_counts not in (1, experts.n_experts) and not self.is_legacy:
            raise MismatchError(
                f"{self.file.path}: {name} counts {entry.n_counts} experts where the model has {experts.n_experts}"
            )

    def _cut_gguf(self, experts: Mapping[str, Experts]) -> NewFile:
        assert isinstance(self.file, GGUFFile)
        n_keys, metadata = edit_metadata(self.file, replace={})
        tensors = [self._new_tensor(self.file, tensor, experts) for tensor in self.file.tensors.values()]
        for name, source in self.taken.items():
            for suffix in (_SUMS, _COUNTS):
                written = self._new_tensor(self.file, self.file.tensors[source + suffix], experts)
                tensors.append(replace(written, name=name + suffix))
        return NewFile(self.file.version, self.file.alignment, n_keys, metadata, tuple(tensors))

    def _new_tensor(self, file: GGUFFile, tensor: TensorInfo, experts: Mapping[str, Experts]) -> NewTensor:
        found = experts.get(tensor.name.removesuffix(_SUMS).removesuffix(_COUNTS))
        if found is None or (tensor.name.endswith(_COUNTS) and tensor.n_elements == 1):
            return NewTensor(tensor.name, tensor.shape, tensor.type, (Span(file, tensor.offset_bytes, tensor.n_bytes),))
        _, n_experts, kept = found
        # [n_in, n_experts]; where all were counted together llama.cpp writes [n_in * n_experts, 1]
        axis = len(tensor.shape) - 1 if tensor.shape[-1] == n_experts else 0
        shape = list(tensor.shape)
        if shape[axis] % n_experts:
            raise FormatError(f"{file.path}: {tensor.name} {shape} cannot be shared by {n_experts} experts")
        shape[axis] = shape[axis] // n_experts * len(kept)
        return NewTensor(
            tensor.name, tuple(shape), tensor.type, merge_spans(_cut(file, tensor.offset_bytes, tensor.n_bytes, found))
        )

    def _cut_legacy(self, experts: Mapping[str, Experts]) -> RawFile:
        pieces: list[Piece] = [_I32.pack(len(self.entries))]
        position = end = _I32.size
        for name, entry in self.entries.items():
            if name in self.taken:
                continue
            end = entry.offset + entry.n_values * _F32_BYTES
            if name in experts:
                n_in, _, kept = experts[name]
                pieces += [Span(self.file, position, entry.offset - 4 - position), _I32.pack(n_in * len(kept))]
                pieces += _cut(self.file, entry.offset, entry.n_values * _F32_BYTES, experts[name])
                position = end
        pieces.append(Span(self.file, position, end - position))
        for name in self.taken:
            pieces += self._legacy_entry(name, experts.get(name))
        pieces.append(Span(self.file, end, self.file.size - end))
        return RawFile(merge_spans(piece for piece in pieces if not isinstance(piece, Span) or piece.n_bytes))

    def _legacy_entry(self, name: str, experts: Experts | None) -> list[Piece]:
        """An entry of another name than the file's: the name, the calls, the number of values, the values."""
        entry, text = self.entries[name], name.encode()
        calls = self.file.read_range(entry.offset - 2 * _I32.size, _I32.size)
        n_bytes = entry.n_values * _F32_BYTES
        values: list[Piece] = [Span(self.file, entry.offset, n_bytes)]
        if experts is not None:
            values = list(_cut(self.file, entry.offset, n_bytes, experts))
        n_values = total_bytes(values) // _F32_BYTES
        return [_I32.pack(len(text)) + text + calls + _I32.pack(n_values), *values]


def _gguf_origin(file: GGUFFile) -> tuple[str | None, int]:
    datasets, chunks = file.metadata.get("imatrix.datasets"), file.metadata.get("imatrix.chunk_count")
    names = datasets.value if datasets is not None and datasets.array_type == ValueType.STRING else []
    return (names[0] if names else None), (
        int(chunks.value) if chunks is not None and chunks.type in INTEGER_TYPES else 0
    )


def _cut(file: RegularFile, offset: int, n_bytes: int, experts: Experts) -> Iterator[Piece]:
    size = n_bytes // experts.n_experts
    return (Span(file, offset + expert * size, size) for expert in experts.kept)


def _rows(numbers: bytes, n_rows: int, kept: tuple[int, ...]) -> bytes:
    if n_rows == 1:
        return numbers
    size = len(numbers) // n_rows
    return b"".join(numbers[row * size : row * size + size] for row in kept)


def other_forms(name: str) -> tuple[str, ...]:
    """The weights that take in the same numbers where experts' gate and up projections are stored in the other way."""
    if ".ffn_gate_up_exps." in name:
        return tuple(name.replace("ffn_gate_up_exps", part) for part in ("ffn_gate_exps", "ffn_up_exps"))
    if ".ffn_gate_exps." in name or ".ffn_up_exps." in name:
        return (name.replace("ffn_gate_exps", "ffn_gate_up_exps").replace("ffn_up_exps", "ffn_gate_up_exps"),)
    return ()


def read_imatrix(path: PathLike) -> Imatrix:
    """Open an importance matrix of either form.

    Raises UsageError if `path` is not a readable regular file, FormatError if it holds no importance matrix.
    """
    with RegularFile.open(path) as file:
        is_gguf = file.size >= len(MAGIC) and file.read_range(0, len(MAGIC)) == MAGIC
    opened = GGUFFile.open(path) if is_gguf else RegularFile.open(path)
    try:
        return Imatrix(opened, _gguf_entries(opened) if isinstance(opened, GGUFFile) else _legacy_entries(opened))
    except BaseException:
        opened.close()
        raise


def _gguf_entries(file: GGUFFile) -> dict[str, Entry]:
    sums = {name.removesuffix(_SUMS): tensor for name, tensor in file.tensors.items() if name.endswith(_SUMS)}
    counts = {name.removesuffix(_COUNTS): tensor for name, tensor in file.tensors.items() if name.endswith(_COUNTS)}
    if not sums:
        raise FormatError(f"{file.path}: holds no importance matrix: no tensor's name ends in {_SUMS}")
    if unpaired := sums.keys() ^ counts.keys():
        raise FormatError(f"{file.path}: {min(unpaired)} does not have both {_SUMS} and {_COUNTS}")
    for tensor in (*sums.values(), *counts.values()):
        if tensor.type != _F32 or not tensor.n_elements:
            raise FormatError(f"{file.path}: {tensor.name} is not of F32 numbers")
    return {
        name: Entry(tensor.offset_bytes, tensor.n_elements, counts[name].offset_bytes, counts[name].n_elements)
        for name, tensor in sums.items()
    }


def _legacy_entries(file: RegularFile) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    if file.size < _I32.size:
        raise FormatError(f"{file.path}: holds no importance matrix: {file.size} bytes are too few")
    (n_entries,), position = _I32.unpack(file.read_range(0, 4)), 4
    if not 0 < n_entries <= min(MAX_TENSORS, file.size // _MIN_ENTRY_BYTES):
        raise FormatError(
            f"{file.path}: holds no importance matrix{_said(file)}: neither a GGUF file nor the count of a legacy one"
            f" ({n_entries:,})"
        )
    for index in range(n_entries):
        what = f"{file.path}: entry {index} of the importance matrix"
        name_bytes, position = _legacy_number(file, position, f"{what}: the length of its name", MAX_NAME_BYTES)
        if name_bytes > file.size - position:
            raise FormatError(f"{what} runs past the end of the file at {file.size:,}")
        name = _legacy_name(file.read_range(position, name_bytes), what)
        _, position = _legacy_number(file, position + name_bytes, f"{what} ({name}): its calls", least=0)
        n_values, position = _legacy_number(file, position, f"{what} ({name}): its number of values")
        if n_values * _F32_BYTES > file.size - position:
            raise FormatError(f"{what} ({name}) runs past the end of the file at {file.size:,}")
        if name in entries:
            raise FormatError(f"{what} ({name}) appears twice")
        entries[name] = Entry(position, n_values)
        position += n_values * _F32_BYTES
    return entries


def _said(file: RegularFile) -> str:
    what = what_are(file.read_range(0, min(file.size, HEAD_BYTES)), file.size)
    return "" if what is None else f" but is {what}"


def _legacy_name(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{what} has a name that is not valid UTF-8") from None


def _legacy_number(
    file: RegularFile, position: int, what: str, most: int = 2**31 - 1, least: int = 1
) -> tuple[int, int]:
    if position + 4 > file.size:
        raise FormatError(f"{what} lies past the end of the file at {file.size:,}")
    (number,) = _I32.unpack(file.read_range(position, 4))
    if not least <= number <= most:
        raise FormatError(f"{what} is {number:,}, expected {least} to {most:,}")
    return number, position + 4


def output_name(output: Path, *, is_legacy: bool) -> Path:
    """Where a cut matrix goes by default: small.gguf -> small.imatrix.gguf, or small.imatrix for the legacy form."""
    stem = output.with_suffix("") if output.suffix == ".gguf" else output
    return stem.with_name(stem.name + (".imatrix" if is_legacy else ".imatrix.gguf"))
