"""reap.gguf.reader against the `gguf` package's reader, and against files that lie."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf
from helpers.gguf_builder import build_moe
from reap.errors import FormatError, UsageError
from reap.gguf.reader import GGUFFile, GGUFModel
from reap.gguf.tensor_types import TENSOR_TYPES, ValueType

# ---- against the oracle


def test_storage_of_every_tensor_type_is_that_of_the_gguf_package() -> None:
    ours = {type_id: (kind.name, kind.block_size, kind.block_bytes) for type_id, kind in TENSOR_TYPES.items()}
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {type_id: ours.get(type_id) for type_id in theirs} == theirs
    newer = set(ours) - set(theirs)
    assert newer <= {42}, "types that no oracle confirms"
    assert ours[42] == ("Q2_0", 64, 18)  # 2 bytes of scale and 64 values of 2 bits


def test_value_types_are_those_of_the_gguf_package() -> None:
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in GGUFValueType}


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    keys = {
        f"test.{kind.name.lower()}": (kind, value)
        for kind, value in {
            GGUFValueType.UINT8: 255,
            GGUFValueType.INT8: -128,
            GGUFValueType.UINT16: 65535,
            GGUFValueType.INT16: -32768,
            GGUFValueType.UINT32: 2**32 - 1,
            GGUFValueType.INT32: -(2**31),
            GGUFValueType.UINT64: 2**64 - 1,
            GGUFValueType.INT64: -(2**63),
            GGUFValueType.FLOAT32: 0.5,
            GGUFValueType.FLOAT64: 0.1,
            GGUFValueType.BOOL: True,
            GGUFValueType.STRING: "ein Wörtchen \x00 日本",
        }.items()
    }
    keys["test.ints"] = (GGUFValueType.ARRAY, [1, -2, 3])
    keys["test.floats"] = (GGUFValueType.ARRAY, [0.25, -1.5])
    keys["test.bools"] = (GGUFValueType.ARRAY, [True, False])
    keys["test.strings"] = (GGUFValueType.ARRAY, ["", "a", "日本"])
    return build_moe(
        tmp_path / "m.gguf",
        keys=keys,
        tokenizer="words",
        n_vocab=300,
        expert_type=GGMLQuantizationType.Q8_0,
        router_type=GGMLQuantizationType.F16,
        biases=True,
        alignment=64,
    )


def test_metadata_is_what_the_gguf_package_reads(model_path: Path) -> None:
    oracle = gguf.GGUFReader(model_path)
    expected = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    with GGUFFile.open(model_path) as file:
        assert list(file.metadata) == list(expected)
        for key, field in expected.items():
            pair = file.metadata[key]
            assert [pair.type, *([] if pair.array_type is None else [pair.array_type])] == [
                int(kind) for kind in field.types
            ]
            assert pair.value == field.contents(), key
            assert file.get(key) == pair.value
        assert file.get("no.such.key", 7) == 7
        assert file.version == 3
        assert file.alignment == 64
        assert file.metadata["tokenizer.ggml.tokens"].length == 300


def test_tensors_are_what_the_gguf_package_reads(model_path: Path) -> None:
    oracle = gguf.GGUFReader(model_path)
    with GGUFFile.open(model_path) as file:
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        assert file.data_offset == oracle.data_offset
        for theirs in oracle.tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(int(n) for n in theirs.shape)
            assert ours.type == int(theirs.tensor_type)
            assert ours.type_name == theirs.tensor_type.name
            assert (ours.offset_bytes, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
            assert ours.n_elements == theirs.n_elements
            assert bytes(file.data(ours)) == theirs.data.tobytes()


def test_raw_bytes_of_a_pair_are_those_in_the_file(model_path: Path) -> None:
    content = model_path.read_bytes()
    with GGUFFile.open(model_path) as file:
        end = 24
        for key, pair in file.metadata.items():
            assert pair.offset_bytes == end  # the pairs fill the header without gaps
            end += pair.n_bytes
            stored = content[pair.offset_bytes : end]
            assert stored == struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", pair.type) + bytes(pair.raw)


def test_values_outlive_the_file(model_path: Path) -> None:
    with GGUFFile.open(model_path) as file:
        tensor = file.tensors["token_embd.weight"]
        view = file.data(tensor)
    assert view.nbytes == tensor.n_bytes
    assert bytes(view[:4])
    with pytest.raises(ValueError, match="released"):
        file.data(tensor)


VOCABULARY = """
import sys, time
started = time.perf_counter()
from reap.gguf.model_info import inspect
info = inspect(sys.argv[1])
seconds = time.perf_counter() - started
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(info.vocab_size, seconds, int(peak) / 1024, "numpy" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read in /proc")
def test_inspecting_a_vocabulary_of_150000_is_quick_and_small(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "qwen3moe")
    writer.add_block_count(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{index}" for index in range(151_936)])
    writer.add_token_merges([f"to ken{index}" for index in range(280_000)])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = subprocess.run(
        [sys.executable, "-c", VOCABULARY, str(tmp_path / "v.gguf")], capture_output=True, text=True, check=True
    )
    vocab_size, seconds, mebibytes, has_numpy = done.stdout.split()
    assert vocab_size == "151936"
    assert float(mebibytes) < 150
    assert has_numpy == "False", "inspect() does without numpy, which takes longer to import than a header to read"
    assert float(seconds) < 2  # 0.1 to 0.2 s on a quiet machine


# ---- files that lie


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, type_id: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + value


def entry(
    name: bytes = b"t", shape: tuple[int, ...] = (32,), type_id: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    n_dims = len(shape) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", n_dims, *shape, type_id, offset)


def raw_file(
    pairs: tuple[bytes, ...] = (),
    entries: tuple[bytes, ...] = (),
    *,
    data: int = 128,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    n_tensors = len(entries) if n_tensors is None else n_tensors
    header = struct.pack("<4sIQQ", magic, version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(entries)
    return header + bytes(-len(header) % alignment + data)


def array(type_id: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", type_id, length) + values


STRING, ARRAY, UINT32 = 8, 9, 4
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few for a header"),
    "magic only": (b"GGUF", "too few for a header"),
    "wrong magic": (raw_file(magic=b"GGML"), "starts with b'GGML', expected b'GGUF'"),
    "a zip": (b"PK\x03\x04" + bytes(100), "not a GGUF file but a ZIP archive"),
    "version 0": (raw_file(version=0), "version 0, expected 2 or 3"),
    "version 1": (raw_file(version=1), "version 1, expected 2 or 3"),
    "version 4": (raw_file(version=4), "version 4, expected 2 or 3"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "billions of pairs": (raw_file(n_pairs=3_000_000_000), "3,000,000,000 metadata keys"),
    "billions of tensors": (raw_file(n_tensors=2**62), "tensors, more than the file can hold"),
    "more pairs than bytes": (raw_file((pair(b"a", 0, b"\1"),), n_pairs=500, data=0), "500 metadata keys"),
    "one pair too many": (raw_file((pair(b"a", 0, b"\1"),), n_pairs=2, data=999), "metadata key 1 is 0 bytes long"),
    "key past the end": (raw_file((struct.pack("<Q", 60_000) + bytes(20),)), "the file ends at"),
    "key of 2^64 bytes": (
        raw_file((struct.pack("<Q", 2**64 - 1) + bytes(20),)),
        "18,446,744,073,709,551,615 bytes long",
    ),
    "empty key": (raw_file((pair(b"", 0, b"\1"),)), "is 0 bytes long"),
    "key not UTF-8": (raw_file((pair(b"a\xff", 0, b"\1"),)), "not valid UTF-8"),
    "duplicate key": (raw_file((pair(b"a", 0, b"\1"), pair(b"a", 0, b"\1"))), "'a' appears twice"),
    "unknown value type": (raw_file((pair(b"a", 13, b"\1"),)), "unknown type 13"),
    "unknown array type": (raw_file((pair(b"a", ARRAY, array(99, 1, b"\1")),)), "unknown type 99"),
    "array of arrays": (raw_file((pair(b"a", ARRAY, array(ARRAY, 1)),)), "array of arrays"),
    "array past the end": (raw_file((pair(b"a", ARRAY, array(UINT32, 10_000)),)), "needs 40,000 bytes"),
    "array whose size overflows": (raw_file((pair(b"a", ARRAY, array(UINT32, 2**62)),)), "the file ends at"),
    "billions of strings": (raw_file((pair(b"a", ARRAY, array(STRING, 2**40)),)), "claims 1,099,511,627,776 strings"),
    "string past the end": (raw_file((pair(b"a", STRING, struct.pack("<Q", 1_000)),)), "past the end"),
    "string of 2^64 bytes": (raw_file((pair(b"a", STRING, struct.pack("<Q", 2**64 - 1)),)), "past the end"),
    "string in an array past the end": (
        raw_file((pair(b"a", ARRAY, array(STRING, 2, text(b"x") + b"\xff" * 8)),)),
        "past the end",
    ),
    "alignment 0": (
        raw_file((pair(b"general.alignment", UINT32, struct.pack("<I", 0)),)),
        "is 0, expected a power of two",
    ),
    "alignment 24": (
        raw_file((pair(b"general.alignment", UINT32, struct.pack("<I", 24)),)),
        "is 24, expected a power of two",
    ),
    "alignment 2^31": (
        raw_file((pair(b"general.alignment", UINT32, struct.pack("<I", 2**31)),)),
        "expected a power of two",
    ),
    "alignment of another type": (raw_file((pair(b"general.alignment", 5, struct.pack("<I", 32)),)), "wrong type"),
    "truncated data": (raw_file((), (entry(),), data=127), "not fully downloaded"),
    "data cut off": (raw_file((), (entry(),), data=0)[:60], "not fully downloaded"),
    "offset past the end": (raw_file((), (entry(offset=2**40),)), "not fully downloaded"),
    "offset that overflows": (raw_file((), (entry(offset=2**64 - 32),)), "not fully downloaded"),
    "misaligned": (raw_file((), (entry(shape=(8,), offset=4),)), "not a multiple of 32"),
    "overlapping": (raw_file((), (entry(b"a"), entry(b"b", offset=96)), data=256), "'a' and 'b' overlap"),
    "same place": (raw_file((), (entry(b"a"), entry(b"b"))), "overlap"),
    "duplicate tensor": (raw_file((), (entry(), entry(offset=128)), data=256), "'t' appears twice"),
    "tensor name not UTF-8": (raw_file((), (entry(b"\xc3\x28"),)), "not valid UTF-8"),
    "another engine's type, of no size": (raw_file((), (entry(type_id=137),), data=0), "IQ2_K has 0 bytes before"),
    "another engine's type, in part": (raw_file((), (entry(shape=(256, 64), type_id=137),)), "do not divide into rows"),
    "tensor type 2^31": (raw_file((), (entry(type_id=2**31),)), "unknown type"),
    "five axes": (raw_file((), (entry(shape=(2, 2, 2, 2, 2)),)), "5 axes"),
    "billions of axes": (raw_file((), (entry(n_dims=2**32 - 1),)), "axes, expected at most 4"),
    "size that overflows": (raw_file((), (entry(shape=(2**62, 2**62)),)), "not fully downloaded"),
    "rows that end inside a block": (raw_file((), (entry(shape=(33,), type_id=8),)), "not a multiple of Q8_0's 32"),
    "header ends in the tensor table": (
        raw_file((), (entry(b"t" * 40),), n_tensors=2, data=0, alignment=1),
        "the file ends at",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_lies_is_a_format_error_that_names_it(attack: str, tmp_path: Path) -> None:
    content, message = ATTACKS[attack]
    path = tmp_path / "liar.gguf"
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        GGUFFile.open(path)
    assert time.perf_counter() - started < 1
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_counts_that_a_sparse_file_could_hold_are_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    for content in (
        raw_file(n_pairs=60_000_000),
        raw_file(n_tensors=60_000_000),
        raw_file((pair(b"a", ARRAY, array(STRING, 1_000_000_000)),)),
    ):
        path.write_bytes(content)
        os.truncate(path, 1 << 35)
        started = time.perf_counter()
        with pytest.raises(FormatError, match="more than the file can hold"):
            GGUFFile.open(path)
        assert time.perf_counter() - started < 1


def test_what_is_odd_but_sound_opens(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    entries = (
        entry(b"b", offset=128),
        entry(b"a"),
        entry(b"none", shape=(0, 7), offset=256),
        entry(b"scalar", shape=(), offset=256),
    )
    pairs = (pair(b"bad text", STRING, text(b"\xff")), pair(b"b", 7, b"\x02"), pair(b"e", ARRAY, array(STRING, 0)))
    path.write_bytes(raw_file(pairs, entries, version=2, data=256 + 4))
    with GGUFFile.open(path) as file:
        assert file.version == 2
        assert [tensor.n_bytes for tensor in file.tensors.values()] == [128, 128, 0, 4]
        assert [pair.value for pair in file.metadata.values()] == ["\ufffd", True, []]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    pairs = (
        pair(b"general.architecture", STRING, text(b"qwen3moe")),
        pair(b"tokens", ARRAY, array(STRING, 3, text(b"a") + text(b"") + text(b"ccc"))),
        pair(b"numbers", ARRAY, array(5, 2, bytes(8))),
        pair(b"general.alignment", UINT32, struct.pack("<I", 32)),
    )
    path.write_bytes(raw_file(pairs, (entry(b"a", (32, 2), 8), entry(b"b", (4, 2), 0, 96)), data=128))
    with GGUFFile.open(path) as file:
        assert len(file.tensors) == 2
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_the_header_can_do_worse_than_a_format_error(small_file: bytes, tmp_path: Path, data: Any) -> None:
    content = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            replacement = data.draw(
                st.sampled_from([bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", struct.pack("<Q", 1 << 32)])
            )
            content[position : position + 8] = replacement
    del content[data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content) :]
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile.open(path)
    except FormatError:
        return
    with file:
        for found in file.metadata.values():
            assert found.value is not None
        for tensor in file.tensors.values():
            assert file.data(tensor).nbytes == tensor.n_bytes


# ---- paths that are not files


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        GGUFFile.open(tmp_path / "absent.gguf")


def test_a_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        GGUFFile.open(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a pipe"):
        GGUFFile.open(tmp_path / "pipe")


def test_a_device_and_an_impossible_name_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a device"):
        GGUFFile.open("/dev/null")
    with pytest.raises(UsageError, match="cannot be opened"):
        GGUFFile.open("a\0b")
    with pytest.raises(UsageError, match="cannot be opened"):
        GGUFFile.open(tmp_path / ("n" * 300))


def test_no_descriptor_stays_open_when_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "liar.gguf"
    path.write_bytes(raw_file(version=9))
    descriptors = Path("/dev/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        with pytest.raises(FormatError):
            GGUFModel.open(path)
    assert len(list(descriptors.iterdir())) <= before


def test_reading_past_the_end_of_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_file((), (entry(),)))
    with GGUFFile.open(path) as file:
        size = file.size
        assert file.read_range(size - 8, 8) == bytes(8)
        with pytest.raises(FormatError, match="was longer when it was opened"):
            file.read_range(size - 8, 9)


# ---- split models


def write_shard(path: Path, number: int, count: int, names: list[bytes], total: int) -> None:
    pairs = (
        pair(b"general.architecture", STRING, text(b"llama")),
        pair(b"split.no", 2, struct.pack("<H", number)),
        pair(b"split.count", 2, struct.pack("<H", count)),
        pair(b"split.tensors.count", 5, struct.pack("<i", total)),
    )
    entries = tuple(entry(name, offset=128 * index) for index, name in enumerate(names))
    content = raw_file(pairs, entries, data=0)
    path.write_bytes(content + b"".join(bytes([number * 16 + index]) * 128 for index in range(len(names))))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"big-{index + 1:05d}-of-00003.gguf" for index in range(3)]
    for number, path in enumerate(paths):
        write_shard(path, number, 3, [f"t{number}a".encode(), f"t{number}b".encode()], 6)
    return paths


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_shard_opens_the_whole_split_model(shards: list[Path], which: int) -> None:
    with GGUFModel.open(shards[which]) as model:
        assert [file.path for file in model.files] == shards
        assert list(model.tensors) == ["t0a", "t0b", "t1a", "t1b", "t2a", "t2b"]
        assert bytes(model.data(model.tensors["t2b"])) == b"\x21" * 128
        assert model.size == sum(path.stat().st_size for path in shards)
        assert model.get("split.no") == 0


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(FormatError, match=r"big-00002-of-00003\.gguf: is missing"):
        GGUFModel.open(shards[0])


def test_a_shard_under_another_name_says_why_the_others_are_not_found(shards: list[Path], tmp_path: Path) -> None:
    shutil.copy(shards[0], tmp_path / "renamed.gguf")
    with pytest.raises(FormatError, match="one of 3 shards, but its name"):
        GGUFModel.open(tmp_path / "renamed.gguf")


def test_shards_of_different_models_are_refused(shards: list[Path]) -> None:
    write_shard(shards[1], 2, 3, [b"t1a", b"t1b"], 6)
    with pytest.raises(FormatError, match="says it is shard 3 of 3, expected 2 of 3"):
        GGUFModel.open(shards[0])
    write_shard(shards[1], 1, 3, [b"t0a", b"t1b"], 6)
    with pytest.raises(FormatError, match="'t0a' is also in big-00001"):
        GGUFModel.open(shards[0])
    write_shard(shards[1], 1, 3, [b"t1a"], 6)
    with pytest.raises(FormatError, match="hold 5 tensors, expected 6"):
        GGUFModel.open(shards[0])
