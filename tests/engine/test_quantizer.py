"""reap.quantize against llama-quantize, byte for byte; what is refused before anything runs; a child that dies."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import reap
from gguf import GGMLQuantizationType, GGUFReader
from helpers.gguf_builder import build_moe
from helpers.imatrices import sizes_of, write_gguf_imatrix, write_legacy_imatrix
from helpers.llama_tools import missing, require_tool
from reap.cli import main
from reap.engine import native
from reap.engine import quantize as quantizer
from reap.errors import EngineError, MismatchError, NativeModuleMissing, OutputError, UsageError
from reap.progress import Progress
from reap.scores.plan import PrunePlan

KEPT = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6)}


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    try:
        native.load()
    except NativeModuleMissing as error:
        missing(str(error))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantizer")
    return build_moe(
        directory / "m.gguf", expert_type=GGMLQuantizationType.F16, n_embd=256, n_ff=256, n_vocab=32, n_layers=2
    )


def by_tool(model: Path, kind: str, *options: str) -> bytes:
    """What llama-quantize makes of it, with one thread."""
    output = model.with_name("by-tool.gguf")
    command = [str(require_tool("llama-quantize")), *options, str(model), str(output), kind, "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return output.read_bytes()


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "IQ4_XS", "Q2_K", "MXFP4_MOE", "F32", "COPY"])
def test_output_is_that_of_llama_quantize(model: Path, tmp_path: Path, kind: str) -> None:
    steps: list[Progress] = []
    report = reap.quantize(model, tmp_path / "q.gguf", kind.lower(), threads=2, progress=steps.append)
    written = (tmp_path / "q.gguf").read_bytes()
    assert written == by_tool(model, kind)
    assert (report.type, report.n_bytes_after, report.n_bytes_before) == (kind, len(written), model.stat().st_size)
    n_tensors = len(GGUFReader(model).tensors)
    assert sum(report.tensor_types.values()) == n_tensors
    assert [(step.done, step.total, step.unit) for step in steps] == [
        (i + 1, n_tensors, "tensors") for i in range(n_tensors)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]


@pytest.mark.parametrize("write", [write_gguf_imatrix, write_legacy_imatrix])
@pytest.mark.parametrize("kind", ["IQ2_XXS", "Q4_K_M"])
def test_with_an_importance_matrix(model: Path, tmp_path: Path, write: Any, kind: str) -> None:
    matrix = write(tmp_path / "m.imatrix", sizes_of(model), seed=5)
    reap.quantize(model, tmp_path / "q.gguf", kind, imatrix=matrix)
    assert (tmp_path / "q.gguf").read_bytes() == by_tool(model, kind, "--imatrix", str(matrix))
    plain = by_tool(model, "Q4_K_M")
    reap.quantize(model, tmp_path / "plain.gguf", "Q4_K_M")
    assert (tmp_path / "plain.gguf").read_bytes() == plain != (tmp_path / "q.gguf").read_bytes()


def test_a_split_model_becomes_one_file(model: Path, tmp_path: Path) -> None:
    """Whichever file is named, through links as a cache of models has them."""
    plan = PrunePlan({"n_experts": 8}, "reap", 4, KEPT)
    report = reap.prune(model, tmp_path / "s.gguf", plan, split_max_size="800K")
    assert len(report.files) > 1
    (tmp_path / "links").mkdir()
    for number, path in enumerate(report.files):
        blob = path.rename(tmp_path / f"blob{number}")
        (tmp_path / "links" / path.name).symlink_to(blob)
    first, *_, last = sorted((tmp_path / "links").iterdir())
    reap.quantize(last, tmp_path / "q.gguf", "Q4_K_M")
    output = tmp_path / "by-tool.gguf"
    subprocess.run(
        [str(require_tool("llama-quantize")), str(first), str(output), "Q4_K_M", "1"], capture_output=True, check=True
    )
    assert (tmp_path / "q.gguf").read_bytes() == output.read_bytes()


def test_options_are_those_of_llama_quantize(model: Path, tmp_path: Path) -> None:
    reap.quantize(
        model,
        tmp_path / "q.gguf",
        "Q4_K_M",
        output_tensor_type="q8_0",
        token_embedding_type="Q5_K",
        tensor_types={"ffn_down_exps": "q6_K", "blk.1.attn": "q3_K"},
    )
    options = ["--output-tensor-type", "q8_0", "--token-embedding-type", "q5_K"]
    options += ["--tensor-type", "ffn_down_exps=q6_K", "--tensor-type", "blk.1.attn=q3_K"]
    assert (tmp_path / "q.gguf").read_bytes() == by_tool(model, "Q4_K_M", *options)
    reap.quantize(model, tmp_path / "pure.gguf", "Q4_K_M", pure=True, quantize_output=False)
    assert (tmp_path / "pure.gguf").read_bytes() == by_tool(model, "Q4_K_M", "--pure", "--leave-output-tensor")
    reap.quantize(tmp_path / "pure.gguf", tmp_path / "again.gguf", "Q2_K", allow_requantize=True)
    assert (tmp_path / "again.gguf").read_bytes() == by_tool(tmp_path / "pure.gguf", "Q2_K", "--allow-requantize")


def test_pruned_and_quantised_with_the_pruned_matrix(model: Path, tmp_path: Path) -> None:
    """The experts that stay are those of the whole model, quantised with the whole matrix."""
    matrix = write_gguf_imatrix(tmp_path / "m.imatrix.gguf", sizes_of(model), seed=5)
    reap.prune(model, tmp_path / "s.gguf", PrunePlan({"n_experts": 8}, "reap", 4, KEPT), imatrix=matrix)
    with pytest.raises(
        MismatchError, match=r"has 2,048 values, but .* needs 1,024; a pruned model needs a pruned matrix"
    ):
        reap.quantize(tmp_path / "s.gguf", tmp_path / "q.gguf", "Q4_K_M", imatrix=matrix)
    reap.quantize(
        tmp_path / "s.gguf", tmp_path / "small.gguf", "Q4_K_M", imatrix=tmp_path / "s.imatrix.gguf", pure=True
    )
    reap.quantize(model, tmp_path / "whole.gguf", "Q4_K_M", imatrix=matrix, pure=True)
    whole = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "whole.gguf").tensors}
    small = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "small.gguf").tensors}
    compared = [name for name in small if "_exps." in name]
    assert len(compared) == 6
    for name in compared:
        assert (small[name] == whole[name][list(KEPT[int(name.split(".")[1])])]).all()
    provenance = reap.inspect(tmp_path / "small.gguf").provenance
    assert provenance is not None
    assert provenance["reap.kept.1"] == list(KEPT[1])


def test_dry_run_foretells_the_size(model: Path, tmp_path: Path) -> None:
    dry = reap.quantize(model, tmp_path / "q.gguf", "Q4_K_M", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = reap.quantize(model, tmp_path / "q.gguf", "Q4_K_M")
    assert abs(dry.n_bytes_after - wet.n_bytes_after) < 1 << 20
    assert (dry.dry_run, wet.dry_run) == (True, False)


def test_what_is_refused_before_anything_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = write_gguf_imatrix(tmp_path / "i.gguf", {"blk.7.ffn_up.weight": (1, 8)})
    (tmp_path / "there.gguf").write_text("precious")
    ready = tmp_path / "q8.gguf"
    reap.quantize(model, ready, "Q8_0")
    monkeypatch.setattr(quantizer, "_run", lambda *_: pytest.fail("the engine was called"))
    calls: list[tuple[Path, Path, str, dict[str, Any], str]] = [
        (model, tmp_path / "q.gguf", "Q9_K", {}, "unknown type 'Q9_K'; known: .*Q4_K_M"),
        (model, tmp_path / "q.gguf", "Q4_K", {"output_tensor_type": "q9"}, "unknown tensor type 'q9'"),
        (model, tmp_path / "q.gguf", "Q4_K", {"tensor_types": {"a": "b"}}, "unknown tensor type 'b'"),
        (model, tmp_path / "q.gguf", "Q4_K", {"threads": 0}, "threads is 0"),
        (model, model, "Q4_K", {"force": True}, "is the input"),
        (model, matrix, "Q4_K", {"force": True, "imatrix": matrix}, "is the input"),
        (model, tmp_path / "there.gguf", "Q4_K", {}, "exists already"),
        (model, tmp_path / "no" / "q.gguf", "Q4_K", {}, "there is no directory"),
        (ready, tmp_path / "q.gguf", "Q4_K", {}, r"quantised already \(.* is Q8_0\)"),
        (model, tmp_path / "q.gguf", "Q4_K", {"imatrix": matrix}, "speaks of no tensor"),
        (tmp_path / "absent.gguf", tmp_path / "q.gguf", "Q4_K", {}, "absent.gguf"),
    ]
    for source, output, kind, options, message in calls:
        with pytest.raises(UsageError, match=message):
            reap.quantize(source, output, kind, **options)
    assert (tmp_path / "there.gguf").read_text() == "precious"
    assert not (tmp_path / "q.gguf").exists()


def test_the_engine_s_own_refusal_is_quoted(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="requires an importance matrix") as raised:
        reap.quantize(model, tmp_path / "q.gguf", "IQ2_XXS")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_dies_is_an_error_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    (tmp_path / "out").mkdir()
    script = (
        "import json, os, sys\njob = json.load(sys.stdin)\n"
        "if job['output'] is None:\n    print(json.dumps({'result': 1}))\n"
        "else:\n    open(job['output'], 'w').write('half')\n"
        "    print('/llama.cpp/ggml.c:1: GGML_ASSERT(n > 0) failed', file=sys.stderr, flush=True)\n    os.abort()\n"
    )
    child.write_text(script)
    monkeypatch.setattr(quantizer, "__file__", str(tmp_path / "quantizer.py"))
    child.rename(tmp_path / "_quantize_child.py")
    with pytest.raises(
        EngineError, match=r"could not be quantised: .*GGML_ASSERT\(n > 0\) failed / the engine was ended by SIGABRT$"
    ):
        reap.quantize(model, tmp_path / "out" / "q.gguf", "Q4_K")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interruption_ends_the_child_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    before = children()

    def interrupt(step: Progress) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reap.quantize(model, tmp_path / "q.gguf", "Q4_K", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert children() == before


def children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    if not tasks.exists():
        return set()
    return {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


def test_a_full_disk_is_foreseen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_free(output: Path, n_bytes: int) -> None:
        raise OutputError(f"{output}: needs {n_bytes:,} bytes, but only 0 are free there")

    monkeypatch.setattr(quantizer, "check_space", none_free)
    with pytest.raises(OutputError, match="only 0 are free"):
        reap.quantize(model, tmp_path / "q.gguf", "Q4_K")
    assert list(tmp_path.iterdir()) == []


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["quantize", str(model), str(tmp_path / "q.gguf"), "Q4_K_M"]
    assert main([*call, "--json", "--tensor-type", "ffn_down_exps=q8_0", "-t", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["n_bytes_after"] == (tmp_path / "q.gguf").stat().st_size
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "q.gguf").tensors}
    assert types["blk.0.ffn_down_exps.weight"] == types["blk.1.ffn_down_exps.weight"] == GGMLQuantizationType.Q8_0
    assert document["tensor_types"]["Q8_0"] == list(types.values()).count(GGMLQuantizationType.Q8_0)
    assert main(call) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*call, "--force"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main([*call, "--force", "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert main([*call, "--force", "--tensor-type", "q8_0"]) == 2
    assert "PATTERN=TYPE" in capsys.readouterr().err
