"""reap prune --imatrix: the importance matrix is cut to the experts that stay, value by value, in both of its forms."""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from helpers.gguf_builder import build_moe
from helpers.imatrices import (
    matrix_values,
    read_gguf_imatrix,
    read_legacy_imatrix,
    sizes_of,
    write_gguf_imatrix,
    write_legacy_imatrix,
)
from helpers.llama_tools import require_tool
from reap.errors import FormatError, MismatchError, OutputError, UsageError
from reap.gguf.imatrix import Experts, other_forms, read_imatrix
from reap.gguf.model_info import inspect
from reap.pruning import verification
from reap.pruning.gguf import prune
from reap.scores.plan import PrunePlan

KEPT = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6)}


def plan_for(path: Path) -> PrunePlan:
    info = inspect(path)
    return PrunePlan({"n_experts": info.n_experts, "fingerprint": info.fingerprint}, "reap", 4, dict(KEPT))


def kept_of(name: str) -> list[int] | None:
    return list(KEPT[int(name.split(".")[1])]) if "_exps." in name else None


def test_a_gguf_matrix_is_cut_like_the_model(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", shared_expert=True)
    matrix = write_gguf_imatrix(tmp_path / "m.imatrix.gguf", sizes_of(source))
    report = prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=matrix)
    output = tmp_path / "s.imatrix.gguf"
    assert report.files == {tmp_path / "s.gguf": (tmp_path / "s.gguf").stat().st_size, output: output.stat().st_size}
    assert report.output == tmp_path / "s.gguf"
    before, after = read_gguf_imatrix(matrix), read_gguf_imatrix(output)
    assert list(after) == list(before)
    for name, values in before.items():
        rows = kept_of(name)
        np.testing.assert_array_equal(after[name], values if rows is None else values[rows])
    assert {
        key: field.contents() for key, field in GGUFReader(output).fields.items() if not key.startswith("GGUF.")
    } == {key: field.contents() for key, field in GGUFReader(matrix).fields.items() if not key.startswith("GGUF.")}


def test_a_legacy_matrix_is_cut_like_the_model(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    matrix = write_legacy_imatrix(tmp_path / "m.dat", sizes_of(source))
    prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=matrix)
    before, tail = read_legacy_imatrix(matrix)
    after, same_tail = read_legacy_imatrix(tmp_path / "s.imatrix")
    assert list(after) == list(before)
    assert same_tail == tail
    for name, (calls, values) in before.items():
        rows = kept_of(name)
        assert after[name][0] == calls
        np.testing.assert_array_equal(after[name][1], values if rows is None else values.reshape(8, -1)[rows].ravel())


def test_where_all_experts_were_counted_together_the_count_stays(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", n_layers=1)
    writer = GGUFWriter(str(tmp_path / "i.gguf"), "")
    sums = np.arange(256, dtype=np.float32)
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", sums.reshape(1, 256))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.full((1, 1), 9, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plan = PrunePlan({"n_experts": 8}, "reap", 4, {0: KEPT[0]})
    report = prune(source, tmp_path / "s.gguf", plan, imatrix=tmp_path / "i.gguf")
    after = read_gguf_imatrix(tmp_path / "s.imatrix.gguf")
    assert after["blk.0.ffn_up_exps.weight.counts"].tolist() == [[9]]
    assert after["blk.0.ffn_up_exps.weight.in_sum2"].tolist() == [sums.reshape(8, 32)[list(KEPT[0])].ravel().tolist()]
    assert any("says nothing about 2 tensors of experts" in warning for warning in report.warnings)


def test_a_matrix_of_another_model_is_refused_and_nothing_written(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    other = build_moe(tmp_path / "o.gguf", n_experts=16)
    dense = build_moe(tmp_path / "d.gguf", n_experts=0)
    for write in (write_gguf_imatrix, write_legacy_imatrix):
        with pytest.raises(MismatchError, match=r"has 512 values, but the model's has 8 experts of 32"):
            prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=write(tmp_path / "i", sizes_of(other)))
        with pytest.raises(MismatchError, match="holds nothing about any expert"):
            prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=write(tmp_path / "i", sizes_of(dense)))
    with pytest.raises(FormatError, match=r"no tensor's name ends in \.in_sum2"):
        prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=other)
    assert not list(tmp_path.glob("s*"))


def test_paths_of_a_matrix(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    matrix = write_gguf_imatrix(tmp_path / "i.gguf", sizes_of(source))
    plan = plan_for(source)
    with pytest.raises(UsageError, match="is the input"):
        prune(source, tmp_path / "s.gguf", plan, imatrix=matrix, imatrix_output=matrix, force=True)
    with pytest.raises(UsageError, match="is the input"):
        prune(source, matrix, plan, imatrix=matrix, force=True)
    with pytest.raises(UsageError, match="needs an imatrix"):
        prune(source, tmp_path / "s.gguf", plan, imatrix_output=tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="is the output for the model as well"):
        prune(source, tmp_path / "s.gguf", plan, imatrix=matrix, imatrix_output=tmp_path / "s.gguf")
    (tmp_path / "there.gguf").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        prune(source, tmp_path / "s.gguf", plan, imatrix=matrix, imatrix_output=tmp_path / "there.gguf")
    assert not (tmp_path / "s.gguf").exists()
    prune(source, tmp_path / "s.gguf", plan, imatrix=matrix, imatrix_output=tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").exists()


@pytest.mark.parametrize("write", [write_gguf_imatrix, write_legacy_imatrix])
def test_a_damaged_cut_matrix_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    source = build_moe(tmp_path / "m.gguf")
    matrix = write(tmp_path / "i", {name: size for name, size in sizes_of(source).items() if "_exps" in name})
    real = verification.Check.__call__

    def spoil(check: Any, temporaries: list[Path]) -> None:
        with open(temporaries[1], "r+b") as file:
            file.seek(-600, 2)
            file.write(b"\xab")
        real(check, temporaries)

    monkeypatch.setattr(verification.Check, "__call__", spoil)
    with pytest.raises(OutputError, match="differs from the matrix's"):
        prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=matrix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "m.gguf"]


def entry(name: bytes, n_values: int, values: bytes | None = None, calls: int = 1) -> bytes:
    return (
        struct.pack("<i", len(name))
        + name
        + struct.pack("<ii", calls, n_values)
        + (bytes(4 * n_values) if values is None else values)
    )


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "no entries": (struct.pack("<i", 0) + bytes(40), "no importance matrix"),
    "negative entries": (struct.pack("<i", -1) + bytes(40), "no importance matrix"),
    "billions of entries": (struct.pack("<i", 2**31 - 1) + bytes(40), "no importance matrix"),
    "a text": (b"to be or not to be, that is the question", "no importance matrix"),
    "name of no bytes": (struct.pack("<i", 1) + entry(b"", 1), "length of its name is 0"),
    "name of negative length": (struct.pack("<ii", 1, -5) + bytes(40), "length of its name is -5"),
    "name past the end": (struct.pack("<ii", 1, 60_000) + bytes(40), "runs past the end"),
    "name not UTF-8": (struct.pack("<i", 1) + entry(b"\xff\xfe", 4), "not valid UTF-8"),
    "negative values": (struct.pack("<i", 1) + entry(b"a", -4, bytes(16)), "number of values is -4"),
    "billions of values": (struct.pack("<i", 1) + entry(b"a", 2**31 - 1, bytes(16)), "runs past the end"),
    "one entry too few": (struct.pack("<i", 2) + entry(b"a" * 20, 4), "past the end"),
    "a name twice": (struct.pack("<i", 2) + entry(b"a", 4) * 2, "appears twice"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_legacy_matrix_is_a_format_error(tmp_path: Path, attack: str) -> None:
    content, message = ATTACKS[attack]
    (tmp_path / "i.dat").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        read_imatrix(tmp_path / "i.dat")
    assert time.perf_counter() - started < 1
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'i.dat'}: ")


def test_a_hostile_gguf_matrix_is_a_format_error(tmp_path: Path) -> None:
    path = write_gguf_imatrix(tmp_path / "i.gguf", {"a.weight": (4, 8)})
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"a.weight.counts", b"b.weight.counts"))
    with pytest.raises(FormatError, match=r"does not have both \.in_sum2 and \.counts"):
        read_imatrix(path)
    path.write_bytes(
        sound.replace(struct.pack("<QI", 8, 0), struct.pack("<QI", 8, 24)).replace(
            struct.pack("<QQI", 8, 4, 0), struct.pack("<QQI", 8, 4, 26)
        )
    )
    with pytest.raises(FormatError, match=r"is not of F32 numbers"):
        read_imatrix(path)
    path.write_bytes(sound.replace(struct.pack("<QQI", 8, 4, 0), struct.pack("<QQI", 2, 16, 0)))
    with read_imatrix(path) as matrix, pytest.raises(FormatError, match="cannot be shared by 4 experts"):
        matrix.cut({"a.weight": Experts(8, 4, (0, 1))})


def test_the_cut_matrix_quantises_the_pruned_model_as_llama_cpp_would(tmp_path: Path) -> None:
    """A pruned F16 model quantised with the cut matrix has the kept experts of the whole one quantised with the whole
    matrix."""
    tool = require_tool("llama-quantize")
    sizes = dict(n_embd=256, n_ff=256, n_vocab=32, n_layers=2)
    source = build_moe(tmp_path / "m.gguf", expert_type=GGMLQuantizationType.F16, **sizes)
    for write, suffix in ((write_gguf_imatrix, ".imatrix.gguf"), (write_legacy_imatrix, ".imatrix")):
        matrix = write(tmp_path / f"m{suffix}", sizes_of(source), seed=5)
        pruned = tmp_path / "s.gguf"
        prune(source, pruned, plan_for(source), imatrix=matrix, force=True)
        for model, its_matrix in ((source, matrix), (pruned, tmp_path / f"s{suffix}")):
            command = [str(tool), "--imatrix", str(its_matrix), str(model), str(model.with_suffix(".q")), "Q4_K", "1"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        whole = {tensor.name: tensor for tensor in GGUFReader(source.with_suffix(".q")).tensors}
        cut = {tensor.name: tensor for tensor in GGUFReader(pruned.with_suffix(".q")).tensors}
        n_compared = 0
        for name, tensor in cut.items():
            rows = kept_of(name)
            if rows is not None:
                assert tensor.tensor_type == whole[name].tensor_type
                assert tensor.tensor_type not in (GGMLQuantizationType.F16, GGMLQuantizationType.F32)
                np.testing.assert_array_equal(tensor.data, whole[name].data[rows])
                n_compared += 1
        assert n_compared == 6
    command = [str(tool), str(pruned), str(tmp_path / "plain.q"), "Q4_K", "1"]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    plain = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "plain.q").tensors}
    assert any(not np.array_equal(tensor.data, plain[name].data) for name, tensor in cut.items()), (
        "the matrix had no effect"
    )


def test_the_random_matrix_has_an_expert_that_was_never_seen() -> None:
    sums, counts = matrix_values({"a": (4, 8)})["a"]
    assert counts[1] == 0
    assert not sums[1].any()


FORMS = {"merged": True, "separate": False}


@pytest.mark.parametrize("of_model", FORMS)
@pytest.mark.parametrize("write", [write_gguf_imatrix, write_legacy_imatrix])
def test_gate_and_up_in_one_tensor_or_two(of_model: str, write: Any, tmp_path: Path) -> None:
    """A matrix of the model converted in the other way is cut, and quantises to types that cannot do without one."""
    sizes = dict(n_embd=256, n_ff=256, n_vocab=32, n_layers=2)
    merged = FORMS[of_model]
    source = build_moe(tmp_path / "m.gguf", expert_type=GGMLQuantizationType.F16, fused=merged, **sizes)
    other = build_moe(tmp_path / "o.gguf", expert_type=GGMLQuantizationType.F16, fused=not merged, **sizes)
    suffix = ".imatrix.gguf" if write is write_gguf_imatrix else ".imatrix"
    matrix = write(tmp_path / f"m{suffix}", sizes_of(other), seed=5)
    report = prune(source, tmp_path / "s.gguf", plan_for(source), imatrix=matrix, verify="full")
    assert not [warning for warning in report.warnings if "says nothing" in warning]

    with read_imatrix(matrix) as before, read_imatrix(tmp_path / f"s{suffix}") as after:
        expected = {tensor.name for tensor in GGUFReader(tmp_path / "s.gguf").tensors if "_exps.weight" in tensor.name}
        assert expected <= set(after.entries)
        for name in expected:
            was = next(form for form in (name, *other_forms(name)) if form in before.entries)
            rows = np.frombuffer(before.values(was)[0], dtype="<f4").reshape(8, -1)
            assert after.values(name)[0] == rows[kept_of(name)].tobytes()
            assert after.entries[name].n_values == len(KEPT[0]) * rows.shape[1]
        assert after.origin() == before.origin()

    for model, its_matrix in ((source, matrix), (tmp_path / "s.gguf", tmp_path / f"s{suffix}")):
        done = reap.quantize(model, tmp_path / "q.gguf", "IQ2_XXS", imatrix=its_matrix, force=True)
        assert done.tensor_types["IQ2_XXS"] > 0
    tool = require_tool("llama-quantize")
    command = [str(tool), "--imatrix", str(tmp_path / f"s{suffix}"), str(tmp_path / "s.gguf"), str(tmp_path / "l.gguf")]
    made = subprocess.run([*command, "IQ2_XXS", "1"], capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    ours = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tmp_path / "q.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "l.gguf").tensors:
        np.testing.assert_array_equal(ours[tensor.name], tensor.data)
