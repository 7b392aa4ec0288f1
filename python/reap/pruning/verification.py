"""Is what was written what was meant? Reads new files back and compares them with the source.

It shares no arithmetic with the ranges that were copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from reap.errors import FormatError, OutputError
from reap.gguf.expert_tensors import ExpertLayout, read_id_table, read_layout
from reap.gguf.imatrix import Experts, Imatrix, read_imatrix
from reap.gguf.reader import GGUFFile, GGUFModel, TensorInfo
from reap.gguf.writer import NewFile

_SAMPLE_BYTES = 4096
_COMPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class Check:
    """Compares the files of a pruned model, and what was cut of an importance matrix, with their sources."""

    model: GGUFModel
    """The source."""
    layout: ExpertLayout
    """Where its experts are."""
    kept: Mapping[int, tuple[int, ...]]
    """Layer -> ids that stay, ascending."""
    new_files: Sequence[NewFile]
    """What was to be written, a shard each."""
    output: Path
    """Its name, for errors."""
    full: bool
    """Compare every byte, not samples."""
    imatrix: Imatrix | None = None
    """The source's importance matrix; None: none was cut."""
    imatrix_experts: Mapping[str, Experts] | None = None
    """Name of a weight -> what becomes of its part of the matrix."""

    def __call__(self, temporaries: Sequence[Path]) -> None:
        """Raise OutputError unless the complete files hold what they should; an importance matrix is the last of
        them."""
        try:
            with ExitStack() as stack:
                shards = [
                    stack.enter_context(GGUFFile.open_shard(path, index))
                    for index, path in enumerate(temporaries[: len(self.new_files)])
                ]
                written = GGUFModel(tuple(shards))
                self.structure(written)
                for tensor in self.model.tensors.values():
                    self.contents(tensor, written)
            if self.imatrix is not None and self.imatrix_experts is not None:
                with read_imatrix(temporaries[-1]) as matrix:
                    self.imatrix.compare(matrix, self.imatrix_experts)
        except FormatError as error:
            raise OutputError(f"{self.output}: was not written as it should be: {error}") from None

    def structure(self, written: GGUFModel) -> None:
        """Names, shapes, types, sizes and the experts that reap itself would find there."""
        for new_file, shard in zip(self.new_files, written.files, strict=True):
            expected = [(tensor.name, tensor.shape, tensor.type) for tensor in new_file.tensors]
            found = [(tensor.name, tensor.shape, tensor.type) for tensor in shard.tensors.values()]
            if found != expected or shard.size != new_file.n_bytes or len(shard.metadata) != new_file.n_keys:
                raise FormatError("its header differs from what was to be written")
        if list(written.tensors) != list(self.model.tensors):
            raise FormatError("its tensors are not those of the source")
        layout = read_layout(written)
        if layout.moe_layers != self.layout.moe_layers or any(
            len(kept) != layout.n_experts for kept in self.kept.values()
        ):
            raise FormatError("its experts differ from the plan")

    def contents(self, tensor: TensorInfo, written: GGUFModel) -> None:
        """The bytes of one tensor, or samples of them."""
        new = written.tensors[tensor.name]
        if tensor.name in self.layout.id_tables:
            return self.table(tensor, new, written)
        source, target = self.model.files[tensor.shard], written.files[new.shard]
        for offset, new_offset, n_bytes in self.pairs(tensor, new):
            for start, length in _chunks(n_bytes, full=self.full):
                if source.read_range(offset + start, length) != target.read_range(new_offset + start, length):
                    raise FormatError(f"{tensor.name} differs from the source's at byte {new_offset + start:,}")

    def table(self, tensor: TensorInfo, new: TensorInfo, written: GGUFModel) -> None:
        """Of a table of expert ids: every id that stays is where it was, renumbered, and no token has an expert
        twice."""
        kept = self.kept[self.layout.id_tables[tensor.name]]
        before, after = read_id_table(self.model, tensor), read_id_table(written, new)
        numbers = {expert: number for number, expert in enumerate(kept)}
        for old, row in zip(before.tolist(), after.tolist(), strict=True):
            once = [(expert, number) for expert, number in zip(old, row, strict=True) if old.count(expert) == 1]
            stays = all(number == numbers.get(expert, number) for expert, number in once)
            if not stays or len(set(row)) < len(row) or not 0 <= min(row) <= max(row) < len(kept):
                raise FormatError(f"{tensor.name} gives a token the experts {row} where the source has {old}")

    def pairs(self, tensor: TensorInfo, new: TensorInfo) -> list[tuple[int, int, int]]:
        """(offset in the source, offset in the new file, bytes) of each kept expert, or of the whole tensor."""
        layer = self.layout.cut.get(tensor.name)
        if layer is None:
            return [(tensor.offset_bytes, new.offset_bytes, tensor.n_bytes)]
        tail = tensor.tail_bytes
        size = (tensor.n_bytes - tail) // self.layout.n_experts
        pairs = [
            (tensor.offset_bytes + size * expert, new.offset_bytes + size * row, size)
            for row, expert in enumerate(self.kept[layer])
        ]
        if tail:
            pairs.append((tensor.offset_bytes + tensor.n_bytes - tail, new.offset_bytes + new.n_bytes - tail, tail))
        return pairs if self.full else [pairs[0], pairs[-1]]


def _chunks(n_bytes: int, *, full: bool) -> Iterator[tuple[int, int]]:
    """(start, length) of what to compare: everything in pieces, or the first and the last few KiB."""
    if full:
        for start in range(0, n_bytes, _COMPARE_BYTES):
            yield start, min(_COMPARE_BYTES, n_bytes - start)
    else:
        length = min(_SAMPLE_BYTES, n_bytes)
        yield 0, length
        yield n_bytes - length, length
