"""What somebody meets first: the version, the devices, help, completion, the cost of an import, and a module that will
not load."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import reap
from reap.cli import main
from reap.engine import devices as engine
from reap.engine import native
from reap.engine.devices import Backend, Device
from reap.errors import NativeModuleMissing

PACKAGE = Path(native.__file__).parent.parent


# ---- the version


def test_the_version_names_the_engine_and_its_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    first, engine_line, backends = capsys.readouterr().out.splitlines()
    assert first == f"reap {reap.__version__}"
    assert engine_line == f"llama.cpp {native.load().__llama_cpp_commit__}"
    assert re.search(r"backends: .*\bCPU \(libggml-cpu[\w.-]*\.(so|dylib)\)", backends)
    assert "RPC" in backends


def test_the_version_without_an_engine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"reap {reap.__version__}"
    assert second.startswith("no engine: this step runs the model and needs reap's native module")


# ---- the devices


def test_every_backend_that_is_loaded_is_a_file_beside_the_module() -> None:
    folder = native.backend_folder(native.load())
    usable = [backend for backend in engine.backends() if backend.problem is None]
    assert {"CPU", "RPC"} <= {backend.name for backend in usable}
    for backend in usable:
        assert (folder / backend.library).is_file(), backend


def test_a_backend_that_cannot_be_used_is_named_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Backend("CPU", "libggml-cpu.so", 1), Backend("CUDA", "libggml-cuda.so", 0, "there is no NVIDIA driver")]
    cpu = Device("CPU", "a processor", "cpu", "CPU", 1, 2)
    monkeypatch.setattr(engine, "backends", lambda: found)
    # not asked for: other tests leave servers behind that are gone, and the engine ends the process where it asks one
    # for its memory
    monkeypatch.setattr(engine, "devices", lambda: [cpu])
    assert main(["devices"]) == 0
    assert "CUDA is installed and not used: there is no NVIDIA driver" in capsys.readouterr().out
    assert main(["devices", "--json"]) == 0
    out, err = capsys.readouterr()
    assert any(device["kind"] == "cpu" for device in json.loads(out))
    assert "CUDA is installed and not used" in err


LOADER_MESSAGES = {
    "libcuda.so.1: cannot open shared object file: No such file or directory": "there is no NVIDIA driver",
    "libcublas.so.13: cannot open shared object file: No such file or directory": r"pip install 'reap-moe\[cuda\]'",
    "libnowhere.so.7: cannot open shared object file: No such file or directory": (
        "^libnowhere.so.7: cannot open shared object file"
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's messages are those of Linux")
@pytest.mark.parametrize("message", LOADER_MESSAGES)
def test_why_a_library_cannot_be_loaded(message: str, tmp_path: Path) -> None:
    """A real library, made here, that needs a library that is nowhere."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    needed = tmp_path / message.partition(":")[0]
    library = tmp_path / "libggml-x.so"
    empty = tmp_path / "empty.c"
    empty.write_text("int x;\n")
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-Wl,-soname,{needed.name}", "-o", str(needed), str(empty)], check=True
    )
    command = [compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", str(library), str(empty), str(needed)]
    subprocess.run(command, check=True)
    needed.unlink()
    assert re.search(LOADER_MESSAGES[message], engine.load_problem(library))


# ---- a module that is broken, or another Python's


def copy_of_the_package(folder: Path, *, core: str | None, content: bytes = b"") -> None:
    (folder / "reap" / "engine").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "engine/__init__.py", "engine/native.py"):
        shutil.copy(PACKAGE / name, folder / "reap" / name)
    if core:
        (folder / "reap" / core).write_bytes(content)


def load_in(folder: Path) -> str:
    script = "from reap.engine import native\nfrom reap.errors import NativeModuleMissing\ntry: native.load()\n"
    script += "except NativeModuleMissing as error: print(error)"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_broken_module_says_what_to_do(tmp_path: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    copy_of_the_package(tmp_path, core=f"_core{suffix}", content=b"\x7fELF and then nothing")
    message = load_in(tmp_path)
    assert re.search(
        rf"^{re.escape(str(tmp_path))}\S+_core\S+: reap's native module is there but cannot be loaded \(.+\)", message
    )
    assert "pip install --force-reinstall --no-deps reap-moe" in message
    assert len(message.splitlines()) == 1


def test_a_module_of_another_python_says_so(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path, core="_core.cpython-39-x86_64-linux-gnu.so")
    assert "is there for another Python (_core.cpython-39-x86_64-linux-gnu.so; this one wants _core." in load_in(
        tmp_path
    )


def test_a_module_that_was_never_built_says_so(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path, core=None)
    assert "was not built for this Python; run `pip install .`" in load_in(tmp_path)


def test_a_module_of_a_newer_system_says_so() -> None:
    remedy = native._remedy("/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found")
    assert "built for a newer system" in remedy
    assert "--no-binary reap-moe" in remedy


def test_the_error_is_one_of_reap_s() -> None:
    assert issubclass(NativeModuleMissing, reap.ReapError)


# ---- what an import costs


def test_importing_takes_less_than_50_milliseconds() -> None:
    """As `-X importtime` counts it: the median of several runs, with bytecode in place. Neither numpy nor the native
    module is loaded (tests/project/test_package.py::test_import_is_lazy)."""
    times = []
    for _ in range(9):
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import reap"], capture_output=True, text=True, check=True
        )
        line = next(line for line in result.stderr.splitlines() if line.rstrip().endswith("| reap"))
        times.append(int(line.split("|")[1]))
        assert "numpy" not in result.stderr
        assert "_core" not in result.stderr
    assert statistics.median(times) < 50_000, f"microseconds: {sorted(times)}"


# ---- help and completion


def test_the_help_is_a_short_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "reap inspect",
        "reap profile",
        "reap plan",
        "reap prune",
        "reap evaluate",
        "Calibration",
        "Exit codes",
        "130",
        "stderr",
    ):
        assert word in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    words = {"bash": {"COMP_WORDS": "reap pr", "COMP_CWORD": "1"}}
    other = {"_TYPER_COMPLETE_ARGS": "reap pr", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {**os.environ, "_REAP_COMPLETE": f"complete_{shell}", **words.get(shell, other)}
    result = subprocess.run(
        [sys.executable, "-m", "reap"], env=environment, capture_output=True, text=True, check=False
    )
    assert {"profile", "prune"} <= set(re.findall(r"[\w-]+", result.stdout)), result
    assert "inspect" not in result.stdout
