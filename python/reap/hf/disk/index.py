"""Where the index of a checkpoint and its files say different things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reap.files.strict_json import shorten
from reap.hf.disk.safetensors_file import SafetensorsFile

_MOST_QUOTED = 3


@dataclass(frozen=True)
class Difference:
    """What differs. False where nothing does."""

    unnamed: tuple[tuple[str, str], ...] = ()
    """(tensor, file) that the index does not name."""
    absent: tuple[tuple[str, str], ...] = ()
    """(tensor, file) that it names, and that no file holds."""
    elsewhere: tuple[tuple[str, str, str], ...] = ()
    """(tensor, file that it names, file that holds it)."""
    files: tuple[str, ...] = ()
    """Safetensors files beside it that it does not name."""

    def __bool__(self) -> bool:
        return bool(self.unnamed or self.absent or self.elsewhere or self.files)

    @property
    def is_settled_by_the_index(self) -> bool:
        """Whether all that the index names is where it says."""
        return not (self.absent or self.elsewhere)

    @property
    def text(self) -> str:
        """Its parts, with some of the names, as what the index does."""
        return "; ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        if self.files:
            yield f"does not name {_count(self.files, 'file')} beside it ({_quoted(self.files)})"
        if self.unnamed:
            yield (
                f"does not name {_count(self.unnamed, 'tensor')} of its files"
                f" ({_quoted([f'{shorten(name, 80, quote=False)} in {shard}' for name, shard in self.unnamed])})"
            )
        if self.absent:
            yield (
                f"names {_count(self.absent, 'tensor')} that {'is' if len(self.absent) == 1 else 'are'} in none of the"
                f" files ({_quoted([shorten(name, 80, quote=False) for name, _ in self.absent])})"
            )
        if self.elsewhere:
            name, said, found = self.elsewhere[0]
            others = f", and the like of {len(self.elsewhere) - 1} more" if len(self.elsewhere) > 1 else ""
            yield f"says that {shorten(name, 80, quote=False)} is in {said}, but it is in {found}{others}"


def compare_index(
    weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsFile], unnamed_files: Sequence[str] = ()
) -> Difference:
    """Compare what an index says with what the files hold."""
    held = {name: shard for shard, file in shards.items() for name in file.tensors}
    unnamed = tuple(
        (name, shard) for name, shard in held.items() if name not in weight_map and shard not in unnamed_files
    )
    wrong = [
        (name, shard) for name, shard in weight_map.items() if shard not in shards or name not in shards[shard].tensors
    ]
    absent = tuple((name, shard) for name, shard in wrong if name not in held)
    elsewhere = tuple((name, shard, held[name]) for name, shard in wrong if name in held)
    return Difference(unnamed, absent, elsewhere, tuple(unnamed_files))


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items):,} {noun}{'s' * (len(items) != 1)}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_QUOTED]) + ", …" * (len(names) > _MOST_QUOTED)
