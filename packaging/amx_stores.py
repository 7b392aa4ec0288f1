"""Check that a library's AMX tile configuration is whole: what `ldtilecfg` loads was stored before it
(docs/building.md).

    python packaging/amx_stores.py libggml-cpu-sapphirerapids.so [...]

Reads the disassembly (objdump, of binutils), so it needs no processor with AMX. A library without AMX instructions
passes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIGURATION_BYTES = 64
# The palette, the eight tiles' bytes a row (16 bits each), their rows: none of them may be zero when a tile is used.
NOT_ZERO = {0, *range(16, 32, 2), *range(48, 56)}
WINDOW = 80  # instructions before the load that are looked at
OPERAND = re.compile(r"(-?0x[0-9a-f]+|)\((%\w+)\)$")
BY_REGISTER = {"zmm": 64, "ymm": 32, "xmm": 16}
BY_SUFFIX = {"b": 1, "w": 2, "l": 4, "q": 8}


def main(paths: Sequence[str]) -> int:
    bad = 0
    for path in paths:
        missing = missing_bytes(disassemble(Path(path)))
        for load, offsets in missing.items():
            print(
                f"{path}: {load}: bytes {offsets} of the tile configuration are zero or never stored", file=sys.stderr
            )
        if not missing:
            print(f"{path}: whole")
        bad += bool(missing)
    return int(bad > 0)


def disassemble(library: Path) -> list[str]:
    """Instructions, without addresses and comments."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = (line.partition("\t")[2].split("#")[0].split("<")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def missing_bytes(instructions: Sequence[str]) -> dict[str, list[int]]:
    """For each load of a configuration that is not whole, the bytes that nothing before it stores, or nothing but
    zeros."""
    missing = {}
    for index, instruction in enumerate(instructions):
        if not instruction.startswith("ldtilecfg"):
            continue
        base, start = memory_operand(instruction)
        stored: set[int] = set()
        set_to_values: set[int] = set()
        zeros: set[str] = set()  # vector registers that hold zero
        for earlier in instructions[max(0, index - WINDOW) : index]:
            written = stored_bytes(earlier, base, start)
            stored |= written
            registers = re.findall(r"%[xyz]mm(\d+)", earlier)
            if written and not (registers and registers[0] in zeros):
                set_to_values |= written
            elif registers and not written:
                (zeros.add if re.match(r"v?pxor", earlier) and len(set(registers)) == 1 else zeros.discard)(
                    registers[-1]
                )
        absent = sorted((set(range(CONFIGURATION_BYTES)) - stored) | (NOT_ZERO - set_to_values))
        if absent:
            missing[instruction] = absent
    return missing


def memory_operand(text: str) -> tuple[str, int]:
    """The register and the offset of an operand like 0xc0(%rsp)."""
    found = OPERAND.search(text)
    if found is None:
        raise ValueError(f"no simple memory operand in {text!r}")
    return found[2], int(found[1] or "0", 16)


def stored_bytes(instruction: str, base: str, start: int) -> set[int]:
    """The bytes, counted from `start`, that a store to memory at `base` writes."""
    mnemonic, _, operands = instruction.partition(" ")
    source, _, target = operands.strip().rpartition(",")
    if not re.match(r"v?mov", mnemonic) or not OPERAND.match(target):
        return set()
    register, offset = memory_operand(target)
    if register != base:
        return set()
    return set(range(offset - start, offset - start + store_size(mnemonic, source)))


def store_size(mnemonic: str, source: str) -> int:
    """Bytes that a store of `source` writes; 0 where that cannot be told, which can only make the check stricter."""
    vector = re.match(r"%([xyz]mm)", source)
    if vector:
        return {"vmovq": 8, "vmovd": 4, "movq": 8, "movd": 4}.get(mnemonic, BY_REGISTER[vector[1]])
    if source.startswith("$"):
        return BY_SUFFIX.get(mnemonic[-1], 0)
    if re.match(r"%r(\d+|[a-z]{2})$", source):
        return 8
    if re.match(r"%(r\d+d|e[a-z]{2})$", source):
        return 4
    if re.match(r"%(r\d+w|[a-z]{2})$", source) and not source.endswith("l"):
        return 2
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
