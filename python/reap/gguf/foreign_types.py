"""Types of tensors that the pinned llama.cpp does not know: whose they are, and how many bytes their rows have.

To inspect, plan and prune such a file only the bytes of an expert are needed, and the file itself gives them: a tensor
ends where the next one begins, less padding, so the bytes of a row follow wherever a tensor has more rows than the
alignment has bytes. What is written here names the types, says which engine runs them and checks what the file gives.

Ids, names and block sizes were read in ik_llama.cpp's gguf-py/gguf/constants.py (commit 1a4cfbcc), prefixes of rows in
its ggml/src/ggml.c (commit 00b4bff2, `row_meta_size`), the tail of I2_S in bitnet.cpp's fork of ggml/src/ggml.c
(`ggml_nbytes`), type 66 in reports of Unsloth's builds ("invalid ggml type 66. should be in [0, 43)").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from reap.gguf.tensor_types import TENSOR_TYPES

#: Ids beyond this are damage, not a type that is newer than this table.
MAX_TYPE_ID = 1023
# a row of ik_llama.cpp's begins with a scale of 2 or 4 bytes, or with a scale and a sum
_ROW_PREFIXES = (0, 2, 4, 8)
_MOST_SIZES = 64
IK_LLAMA, UNSLOTH, BITNET = "ik_llama.cpp", "Unsloth's build of llama.cpp", "bitnet.cpp"


@dataclass(frozen=True, slots=True)
class ForeignType:
    """A type of another engine."""

    name: str
    """What it is called there."""
    engine: str
    """Which engine runs it; empty where none does any more, or none is known to."""
    block_size: int = 0
    """Elements of a row that share a block; 0 where that is not known."""
    block_bytes: int = 0
    """Bytes of a block, a prefix of the row not counted."""
    n_rows: int = 1
    """Rows that are interleaved."""
    tail_bytes: int = 0
    """Bytes at the end of each tensor, for all of it."""

    def fits(self, row: int, row_bytes: int) -> bool:
        """Whether a row of `row` elements can have `row_bytes` bytes."""
        if not self.block_size:
            return True
        return row % self.block_size == 0 and row_bytes - row // self.block_size * self.block_bytes in _ROW_PREFIXES


def _ik(*types: tuple[int, str, int, int]) -> dict[int, ForeignType]:
    """Types of ik_llama.cpp's; a name that ends in _R4 has four rows interleaved."""
    found = {}
    for type_id, name, block_size, block_bytes in types:
        digits = name.rpartition("_R")[2]
        found[type_id] = ForeignType(name, IK_LLAMA, block_size, block_bytes, int(digits) if digits.isdigit() else 1)
    return found


FOREIGN_TYPES: Mapping[int, ForeignType] = MappingProxyType(
    {
        4: ForeignType("Q4_2", ""),
        5: ForeignType("Q4_3", ""),
        31: ForeignType("Q4_0_4_4", IK_LLAMA, 32, 18, 4),
        32: ForeignType("Q4_0_4_8", IK_LLAMA, 32, 18, 4),
        33: ForeignType("Q4_0_8_8", IK_LLAMA, 32, 18, 8),
        36: ForeignType("I2_S", BITNET, 4, 1, tail_bytes=32),
        37: ForeignType("IQ4_NL_4_8", ""),
        38: ForeignType("IQ4_NL_8_8", ""),
        66: ForeignType("Q1_0 of Unsloth", UNSLOTH),
    }
    | _ik(
        (97, "Q8_0_X4", 32, 34),
        (98, "Q8_1_X4", 32, 36),
        (99, "Q8_2_X4", 32, 36),
        (133, "Q6_0", 32, 26),
        (134, "IQ1_BN", 64, 13),
        (135, "IQ2_BN", 64, 16),
        (136, "Q8_K64", 64, 68),
        (137, "IQ2_K", 256, 76),
        (138, "IQ3_K", 256, 110),
        (139, "IQ4_K", 256, 144),
        (140, "IQ5_K", 256, 176),
        (141, "IQ6_K", 256, 212),
        (144, "IQ4_KS", 256, 136),
        (145, "IQ2_KS", 256, 70),
        (146, "IQ4_KSS", 256, 128),
        (147, "Q8_K16", 64, 64),
        (148, "Q8_K32", 256, 292),
        (149, "Q8_KR8", 256, 292),
        (150, "Q8_K128", 128, 140),
        (151, "Q8_KV", 32, 32),
        (152, "IQ5_KS", 256, 168),
        (153, "IQ2_KT", 256, 68),
        (154, "IQ3_KT", 256, 100),
        (155, "IQ4_KT", 256, 128),
        (156, "IQ3_KS", 256, 102),
        (157, "IQ2_KL", 256, 86),
        (158, "IQ1_KT", 256, 56),
        (202, "Q4_0_R8", 32, 18),
        (206, "Q5_0_R4", 32, 22),
        (208, "Q8_0_R8", 32, 34),
        (210, "Q2_K_R4", 256, 84),
        (211, "Q3_K_R4", 256, 110),
        (212, "Q4_K_R4", 256, 144),
        (213, "Q5_K_R4", 256, 176),
        (214, "Q6_K_R4", 256, 210),
        (216, "IQ2_XXS_R4", 256, 66),
        (217, "IQ2_XS_R4", 256, 74),
        (218, "IQ3_XXS_R4", 256, 98),
        (219, "IQ1_S_R4", 32, 6),
        (220, "IQ4_NL_R4", 32, 18),
        (221, "IQ3_S_R4", 256, 110),
        (222, "IQ2_S_R4", 256, 82),
        (223, "IQ4_XS_R8", 256, 136),
        (229, "IQ1_M_R4", 32, 7),
        (230, "BF16_R16", 1, 2),
        (233, "Q6_0_R4", 32, 26),
        (335, "IQ2_BN_R4", 64, 16),
        (337, "IQ2_K_R4", 256, 76),
        (338, "IQ3_K_R4", 256, 110),
        (339, "IQ4_K_R4", 256, 144),
        (340, "IQ5_K_R4", 256, 176),
        (344, "IQ4_KS_R4", 256, 136),
        (352, "IQ5_KS_R4", 256, 168),
        (398, "Q8_KV_R8", 32, 32),
        (399, "Q8_K_R8", 256, 258),
    )
)


def foreign_type(type_id: int) -> ForeignType:
    """What is known of a type that is not in `TENSOR_TYPES`; of an id that no table has, its number."""
    return FOREIGN_TYPES.get(type_id) or ForeignType(f"type {type_id}", "")


def type_name(type_id: int) -> str:
    """A type's name, known to the pinned engine or not."""
    return TENSOR_TYPES[type_id].name if type_id in TENSOR_TYPES else foreign_type(type_id).name


def which_engine(type_id: int) -> str:
    """What an error says of a type that the pinned engine does not know: whose it is, where that is known."""
    if type_id not in FOREIGN_TYPES:
        return "which may be newer than the llama.cpp that reap is built with"
    engine = FOREIGN_TYPES[type_id].engine
    return f"which {engine} runs" if engine else "which llama.cpp has removed; convert or quantise the model again"


# ---- how many bytes a row has


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor of a foreign type as the file shows it."""

    name: str
    """Its name."""
    type: int
    """ggml type id."""
    shape: tuple[int, ...]
    """GGUF order, ne[0] (the contiguous axis) first."""
    gap: int
    """Bytes from its start to where the next tensor begins, or the file ends."""

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.shape[0] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        n = 1
        for length in self.shape[1:]:
            n *= length
        return n

    def row_sizes(self, alignment: int) -> range:
        """The sizes in bytes that its rows may have: the last one leaves the least padding."""
        tail = foreign_type(self.type).tail_bytes
        first = max(0, self.gap - tail - alignment) // self.n_rows + 1 if self.n_rows else 1
        return range(first, (self.gap - tail) // self.n_rows + 1 if self.n_rows else 1)


def sizes_in_bytes(extents: Iterable[Extent], alignment: int) -> dict[str, int]:
    """Name -> bytes of each tensor of a foreign type; -1 where the file contradicts itself or does not say.

    Tensors of one type with rows as long must have rows of as many bytes, which also settles the small ones.
    """
    alike: dict[tuple[int, int], list[Extent]] = {}
    for extent in extents:
        alike.setdefault((extent.type, extent.row), []).append(extent)
    found: dict[str, int] = {}
    for (type_id, row), tensors in alike.items():
        kind, ranges = foreign_type(type_id), [tensor.row_sizes(alignment) for tensor in tensors]
        size = _common_size(ranges, kind, row)
        for tensor, sizes in zip(tensors, ranges, strict=True):
            is_sound = size is not None and size in sizes and tensor.n_rows > 0
            found[tensor.name] = tensor.n_rows * (size or 0) + kind.tail_bytes if is_sound else -1
    return found


def _common_size(ranges: Sequence[range], kind: ForeignType, row: int) -> int | None:
    """The one size of a row that most of the tensors can have; None where none or several are possible."""
    # most of them, so that an error names the tensor that is cut off and not those alike
    largest = [sizes[-1] for sizes in ranges if sizes]
    usual = max(largest, key=lambda size: sum(size in sizes for sizes in ranges), default=0)
    agreeing = [sizes for sizes in ranges if usual in sizes]
    if not agreeing:
        return None
    first, stop = max(sizes.start for sizes in agreeing), min(sizes.stop for sizes in agreeing)
    # a tensor of few rows leaves a few sizes open; a forged one could leave billions
    possible = [size for size in range(max(first, stop - _MOST_SIZES), stop) if kind.fits(row, size)]
    return possible[0] if len(possible) == 1 else None
