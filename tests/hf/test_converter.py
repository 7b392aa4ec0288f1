"""convert_checkpoint around a stand-in for llama.cpp's converter: no test here needs PyTorch (test_torch_oracle.py runs
the real one)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from helpers.checkpoint_builder import KEPT, build, config, qwen
from reap.errors import EngineError, FormatError, MissingExtraError, UsageError
from reap.hf import convert_checkpoint, prune
from reap.hf.disk import convert as converter
from reap.scores.plan import PrunePlan

# what the stand-in's tree holds: the names that `_converter_child.py` relies on
TRANSFORMERS = """
class AutoConfig:
    @classmethod
    def from_pretrained(cls, path, trust_remote_code=None):
        return trust_remote_code
class AutoTokenizer(AutoConfig):
    pass
"""
BASE = """
from transformers import AutoConfig

class ModelBase:
    no_mtp = False

class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        return "from the table"
"""
GGUF = """
OWN = "the gguf of the tree"
class GGUFValueType:
    STRING, UINT32, ARRAY, INT32 = "string", "u32", "array", "i32"
class GGUFWriter:
    def add_key_value(self, key, value, type, sub_type=None):
        print("key", key, value, type, sub_type)
    def write_header_to_file(self):
        print("header")
"""
PRELUDE = """
import importlib.util, os, sys
from conversion.base import TextModel
from transformers import AutoConfig, AutoTokenizer
import gguf
source, _, outfile, _, outtype = sys.argv[1:]
print("INFO:hf-to-gguf:Loading model")
"""
WRITE = """
said = [TextModel().get_vocab_base_pre(None), AutoConfig.from_pretrained(source, trust_remote_code=True),
        AutoTokenizer.from_pretrained(source, trust_remote_code=True), outtype, os.environ.get("HF_HUB_OFFLINE"),
        source,
        importlib.util.find_spec("converter"), gguf.OWN, __name__]
open(outfile, "w").write("\\n".join(map(str, said)))
"""


@pytest.fixture(autouse=True)
def extra_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "find_spec", lambda name: object())
    monkeypatch.delenv(converter.SOURCE_VARIABLE, raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text("weights")
    return directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory whose name the converter would take for a template."""
    directory = tmp_path / "{ftype} out"
    directory.mkdir()
    return directory


def make_tree(directory: Path, script: str) -> Path:
    for name, text in {
        "convert_hf_to_gguf.py": PRELUDE + script,
        "transformers.py": TRANSFORMERS,
        "conversion/base.py": BASE,
        "conversion/__init__.py": "",
        "gguf-py/gguf/__init__.py": GGUF,
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def test_conversion(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    tree = make_tree(tmp_path / "tree", WRITE)
    lines: list[str] = []
    written = convert_checkpoint(
        checkpoint, out / "{model}.gguf", outtype="bf16", pre="qwen2", converter=tree, log=lines.append
    )
    assert written == out / "{model}.gguf"
    assert [path.name for path in out.iterdir()] == ["{model}.gguf"]
    assert written.read_text().splitlines() == [
        "qwen2",
        "False",
        "False",
        "bf16",
        "1",
        str(checkpoint.resolve()),
        "None",  # the directory of reap.hf is not on the child's path
        "the gguf of the tree",
        "__main__",
    ]
    assert lines == ["INFO:hf-to-gguf:Loading model"]


CONFIG = """
import json
from conversion import base
class Read(dict):
    def to_dict(self):
        return dict(self)
AutoConfig.from_pretrained = classmethod(lambda cls, path, **options: Read(
    {"kinds": ["renamed"], "added": 1, "nested": {"a": 1, "b": 2}, "absent": 3}))
open(outfile, "w").write(json.dumps([base.AutoConfig.from_pretrained(source).to_dict(), base.TextModel.no_mtp]))
"""


def test_published_entries_win_over_those_that_transformers_makes_of_them(
    tmp_path: Path, checkpoint: Path, out: Path
) -> None:
    published = {"kinds": ["published"], "nested": {"b": 4, "c": 5}, "absent": None}
    (checkpoint / "config.json").write_text(json.dumps(published))
    tree = make_tree(tmp_path / "tree", CONFIG)
    written = convert_checkpoint(checkpoint, out / "a.gguf", converter=tree)
    expected = {"kinds": ["published"], "added": 1, "nested": {"a": 1, "b": 4, "c": 5}, "absent": 3}
    assert json.loads(written.read_text()) == [expected, False]


def test_what_a_pruned_checkpoint_says_of_itself_goes_into_the_file(tmp_path: Path, out: Path) -> None:
    tree = make_tree(tmp_path / "tree", "gguf.GGUFWriter().write_header_to_file()\nopen(outfile, 'w').write('x')")
    build(tmp_path / "whole", qwen(), config())
    plan = PrunePlan({"n_experts": 8}, "frequency", 4, KEPT, {"sha256": ["ab" * 32]})
    prune(tmp_path / "whole", tmp_path / "small", plan)
    lines: list[str] = []
    convert_checkpoint(tmp_path / "small", out / "a.gguf", converter=tree, log=lines.append)
    record = json.loads((tmp_path / "small" / "reap.json").read_text())
    assert [line for line in lines if line.startswith("key ")] == [
        f"key reap.version {record['reap']} string None",
        "key reap.metric frequency string None",
        f"key reap.source.fingerprint {record['source']['fingerprint']} string None",
        "key reap.source.expert_count 8 u32 None",
        f"key reap.calibration.sha256 {'ab' * 32} string None",
        *(f"key reap.kept.{layer} {list(ids)} array i32" for layer, ids in KEPT.items()),
        "header",
    ][:-1]
    assert lines[-1] == "header"  # behind the keys
    (tmp_path / "small" / "reap.json").write_text('{"format": "other"}')
    with pytest.raises(FormatError, match=r"reap\.json: format should be"):
        convert_checkpoint(tmp_path / "small", out / "b.gguf", converter=tree)


def test_prediction_layers_are_expected_only_where_there_are_some(tmp_path: Path, out: Path) -> None:
    tree = make_tree(tmp_path / "tree", CONFIG)
    build(tmp_path / "without", qwen(), config())
    build(tmp_path / "with", {**qwen(), "mtp.fc.weight": ("BF16", (2, 2))}, config())
    build(tmp_path / "behind", qwen((0, 1, 2)), config())
    found = {}
    for name in ("without", "with", "behind"):
        found[name] = json.loads(convert_checkpoint(tmp_path / name, out / name, converter=tree).read_text())[1]
    assert found == {"without": True, "with": False, "behind": False}
    asked = convert_checkpoint(tmp_path / "with", out / "asked", converter=tree, prediction=False)
    assert json.loads(asked.read_text())[1] is True


def test_without_pre_and_with_trust(
    tmp_path: Path, checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(converter.SOURCE_VARIABLE, str(make_tree(tmp_path / "tree", WRITE)))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    written = convert_checkpoint(checkpoint, out / "model.gguf", trust_remote_code=True)
    assert written.read_text().splitlines()[:5] == ["from the table", "True", "True", "f16", "None"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "open(outfile, 'w').write('half'); raise NotImplementedError('no such architecture')",
            "Error: no such architecture$",
        ),
        (
            "print('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr); sys.exit(1)",
            "failed: Loading model / Model X is not",
        ),
        (
            "raise ValueError('BPE pre-tokenizer was not recognized')",
            r"recognized \(give the name of its pre-tokenizer with pre= \(--pre\)",
        ),
        (
            "raise ValueError('Please pass `trust_remote_code=True`')",
            "needs trust_remote_code=True, which runs that code",
        ),
        ("pass", "failed: Loading model"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL$"),  # what the kernel does when memory runs out
    ],
)
def test_failures_quote_the_converter_and_leave_nothing(
    tmp_path: Path, checkpoint: Path, out: Path, script: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        convert_checkpoint(checkpoint, out / "model.gguf", converter=make_tree(tmp_path / "tree", script))
    assert str(raised.value).startswith(f"{checkpoint}: llama.cpp's converter failed: ")
    assert "\n" not in str(raised.value)
    assert list(out.iterdir()) == []


def test_interruption_ends_the_child(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    script = "print(os.getpid(), flush=True)\nopen(outfile, 'w').write('half')\nimport time; time.sleep(60)"
    pids: list[int] = []

    def interrupt(line: str) -> None:
        if line.isdigit():
            pids.append(int(line))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            checkpoint, out / "model.gguf", converter=make_tree(tmp_path / "tree", script), log=interrupt
        )
    assert list(out.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_outputs_that_exist(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    tree = make_tree(tmp_path / "tree", WRITE)
    target = out / "model.gguf"
    target.write_text("before")
    with pytest.raises(UsageError, match="exists already"):
        convert_checkpoint(checkpoint, target, converter=tree)
    assert target.read_text() == "before"
    convert_checkpoint(checkpoint, target, converter=tree, force=True)
    assert target.read_text() != "before"
    with pytest.raises(UsageError, match="is a file of the input"):
        convert_checkpoint(checkpoint, checkpoint / "model.safetensors", converter=tree, force=True)
    assert (checkpoint / "model.safetensors").read_text() == "weights"


def test_an_output_that_appeared_meanwhile_stays(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    """Another process writes it while the converter runs."""
    target = out / "model.gguf"
    script = f"open(outfile, 'w').write('new'); open({str(target)!r}, 'w').write('precious')"
    tree = make_tree(tmp_path / "tree", script)
    with pytest.raises(UsageError, match="exists already; --force"):
        convert_checkpoint(checkpoint, target, converter=tree)
    assert target.read_text() == "precious"
    assert [path.name for path in out.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "with the converter"])
def test_a_killed_conversion_leaves_nothing(tmp_path: Path, checkpoint: Path, out: Path, together: bool) -> None:
    """Killed alone, the converter goes with it and takes what it wrote along; killed together, the next run does."""
    script = "open(outfile, 'w').write('half')\nprint(os.getpid(), flush=True)\nimport time; time.sleep(60)"
    slow, quick = make_tree(tmp_path / "slow", script), make_tree(tmp_path / "quick", WRITE)
    code = (
        "import sys; from reap.hf.disk import convert; convert.find_spec = lambda name: object();"
        "convert.convert_checkpoint(*sys.argv[1:3], converter=sys.argv[3], log=lambda line: print(line, flush=True))"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(out / "model.gguf"), str(slow)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = next(int(line) for line in process.stdout if line.strip().isdigit())
        assert len(list(out.iterdir())) == 1
        if together:
            os.kill(child, signal.SIGSTOP)  # so that it cannot clean up
        process.kill()
        process.wait()
        if together:
            os.kill(child, signal.SIGKILL)
    if not together:
        deadline = time.monotonic() + 10
        while list(out.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(out.iterdir()) == []
    convert_checkpoint(checkpoint, out / "model.gguf", converter=quick)
    assert [path.name for path in out.iterdir()] == ["model.gguf"]


def test_a_pre_tokenizer_that_no_llama_cpp_knows(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    tree = make_tree(tmp_path / "tree", WRITE)
    with pytest.raises(UsageError, match=r"pre is 'quen2', which is none of the \d+ pre-tokenizers .*\(qwen2"):
        convert_checkpoint(checkpoint, out / "model.gguf", pre="quen2", converter=tree)
    (tree / "src").mkdir()
    (tree / "src" / "llama-vocab.cpp").write_text('} else if (tokenizer_pre == "quen2") {')
    convert_checkpoint(checkpoint, out / "model.gguf", pre="quen2", converter=tree)
    assert (out / "model.gguf").read_text().splitlines()[0] == "quen2"


def test_two_sets_of_weights_are_refused(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    """The converter reads what the index names, all else `model.safetensors`."""
    tree = make_tree(tmp_path / "tree", WRITE)
    (checkpoint / "part.safetensors").write_text("others")
    for names, refused in (({"a": "model.safetensors"}, False), ({"a": "part.safetensors"}, True)):
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UsageError, match="has two sets of weights") if refused else nullcontext():
            convert_checkpoint(checkpoint, out / "model.gguf", converter=tree, force=True)


def test_wrong_calls(tmp_path: Path, checkpoint: Path, out: Path) -> None:
    target = out / "model.gguf"
    with pytest.raises(UsageError, match="outtype is 'f8' where one of f32, f16"):
        convert_checkpoint(checkpoint, target, outtype="f8")
    with pytest.raises(UsageError, match="pre is '--mmproj'"):
        convert_checkpoint(checkpoint, target, pre="--mmproj")
    with pytest.raises(UsageError, match="no such file, where a Hugging Face checkpoint"):
        convert_checkpoint(tmp_path / "nowhere", target)
    with pytest.raises(UsageError, match=r"no config\.json"):
        convert_checkpoint(out, target)
    with pytest.raises(UsageError, match=r"no convert_hf_to_gguf\.py"):
        convert_checkpoint(checkpoint, target, converter=tmp_path)


def test_missing_extra(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(MissingExtraError, match=r"needs torch: pip install 'reap-moe\[hf\]'$"):
        convert_checkpoint(checkpoint, out / "model.gguf")


def test_converter_that_was_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(converter.reap, "__path__", [str(tmp_path)])
    with pytest.raises(MissingExtraError, match=converter.SOURCE_VARIABLE):
        converter.find_converter()
    tree = make_tree(tmp_path / "_converter", "")
    assert converter.find_converter() == tree


def test_importing_reap_hf_imports_nothing_heavy() -> None:
    code = (
        "import sys, reap.hf, reap.hf.disk.convert; print(sorted({'torch', 'transformers', 'numpy', 'reap._core'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
