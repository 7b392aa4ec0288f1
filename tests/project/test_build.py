"""What the build must have done: the AMX stores kept, the pin fetched safely, licences and libraries in what is
installed."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import reap._core
from helpers.paths import ROOT

FETCH = ROOT / "vendor" / "llama.cpp" / "fetch.py"


def compile_commands() -> list[Path]:
    return sorted(ROOT.glob("build/*/compile_commands.json"))


@pytest.mark.skipif(
    not compile_commands() and not os.environ.get("CI"), reason="no build folder: reap was not built from this tree"
)
def test_gcc_keeps_the_stores_of_the_tile_configuration() -> None:
    """Without these flags GCC deletes stores that the first AMX tile instruction needs, and the process dies with
    SIGILL."""
    assert compile_commands(), "CI builds from this tree, so its compile commands must be here"
    for path in compile_commands():
        commands = [c["command"] for c in json.loads(path.read_text()) if c["file"].endswith("ggml-cpu/amx/mmq.cpp")]
        assert commands, f"{path} does not compile amx/mmq.cpp"
        cache = (path.parent / "CMakeCache.txt").read_text()
        if "clang" in re.findall(r"CMAKE_CXX_COMPILER:\w+=(.*)", cache)[0]:
            continue
        for command in commands:
            assert "-fno-tree-dse" in command.split()
            assert "-fno-dse" in command.split()


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reap_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHOLE = """
vpxor  %xmm0,%xmm0,%xmm0
mov    0x10aa67(%rip),%rdx
vmovdqa64 %zmm0,0xc0(%rsp)
vmovdqa 0x10aa47(%rip),%xmm0
movb   $0x1,0xc0(%rsp)
mov    %rdx,0xf0(%rsp)
vmovdqa %xmm0,0xd0(%rsp)
ldtilecfg 0xc0(%rsp)
"""


def test_the_check_of_the_machine_code_sees_a_store_that_is_missing() -> None:
    """What GCC 12 makes with the flags, and without them: the rows and the widths of the tiles stay zero."""
    amx_stores = load_script(ROOT / "packaging" / "amx_stores.py")
    lines = WHOLE.split("\n")[1:-1]
    assert amx_stores.missing_bytes(lines) == {}
    without = [line for line in lines if "0xf0" not in line and "0xd0" not in line]
    assert amx_stores.missing_bytes(without) == {"ldtilecfg 0xc0(%rsp)": [*range(16, 32, 2), *range(48, 56)]}
    not_even_zeros = [line for line in without if "zmm0" not in line]
    assert len(amx_stores.missing_bytes(not_even_zeros)["ldtilecfg 0xc0(%rsp)"]) == 63


def cpu_backends() -> list[Path]:
    folders = {Path(reap._core.__file__).parent, *(path.parent for path in ROOT.glob("build/*/bin/libggml-cpu*.so"))}
    return sorted(path for folder in folders for path in folder.glob("libggml-cpu*.so"))


@pytest.mark.skipif(shutil.which("objdump") is None and not os.environ.get("CI"), reason="no objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_every_tile_configuration_that_was_built_is_whole() -> None:
    """In the machine code: also of a wheel's AMX variant, which may never have run where it is built."""
    amx_stores = load_script(ROOT / "packaging" / "amx_stores.py")
    libraries = cpu_backends()
    assert libraries
    for library in libraries:
        assert amx_stores.missing_bytes(amx_stores.disassemble(library)) == {}, library


def test_the_extra_has_the_cuda_that_the_backend_is_built_with() -> None:
    toolkit = (ROOT / "packaging" / "cuda_toolkit.py").read_text()
    extra = re.findall(r"^cuda = .*$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    for package in ("nvidia-cublas", "nvidia-cuda-runtime"):
        built = re.findall(rf'"{package}==(\d+)\.(\d+)', toolkit)[0]
        assert f"{package}>={built[0]}.{built[1]},<{int(built[0]) + 1}" in extra


def test_the_cuda_distribution_holds_the_backend_alone(tmp_path: Path) -> None:
    cuda_addon = load_script(ROOT / "packaging" / "cuda_addon.py")
    wheel = tmp_path / "reap_moe-1.2.3-cp312-cp312-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("reap/__init__.py", "reap/libggml-cuda.so", "reap/libllama.so", "reap/licenses/llama.cpp.LICENSE"):
            archive.writestr(name, f"content of {name}")
        archive.writestr("reap_moe-1.2.3.dist-info/licenses/LICENSE", "ours")
    made = cuda_addon.make_addon(wheel, tmp_path / "out")
    assert made.name == "reap_moe_cuda-1.2.3-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        assert {name for name in names if not name.startswith("reap_moe_cuda-1.2.3.dist-info/")} == {
            "reap/libggml-cuda.so"
        }
        assert {"llama.cpp.LICENSE", "LICENSE"} == {Path(name).name for name in names if "/licenses/" in name}
        assert b"Requires-Dist: reap-moe[cuda]==1.2.3\n" in archive.read("reap_moe_cuda-1.2.3.dist-info/METADATA")
    with pytest.raises(ValueError, match=r"MB where PyPI takes .*; name fewer CUDA architectures"):
        cuda_addon.make_addon(wheel, tmp_path / "out", max_bytes=100)
    assert not made.exists()


def test_what_is_installed_carries_its_libraries_and_licences() -> None:
    folder = Path(reap._core.__file__).parent
    names = {path.name for path in folder.iterdir()}
    assert any(name.startswith("libllama.") for name in names)
    assert "MIT License" in (folder / "licenses" / "llama.cpp.LICENSE").read_text()
    assert (folder / "_converter" / "convert_hf_to_gguf.py").is_file()
    assert (folder / "_converter" / "LICENSE").is_file()
    assert (folder / "_converter" / "gguf-py" / "gguf" / "constants.py").is_file()


def test_the_wheel_is_tried_with_tests_that_exist() -> None:
    script = load_script(ROOT / "packaging" / "try_wheel.py")
    missing = [name for name in (*script.QUICK, *script.NEEDS_THE_TREE) if not (ROOT / name).is_file()]
    assert not missing


def test_the_pin_is_the_module_s_own() -> None:
    pin = (ROOT / "vendor" / "llama.cpp" / "pin.cmake").read_text()
    commit = re.findall(r"REAP_LLAMA_CPP_COMMIT (\w+)", pin)[0]
    assert reap._core.__llama_cpp_commit__ in (commit, "own checkout")


# --- fetching the pinned tree ---


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reap_fetch", FETCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path / "cache"))
    return module


def make_archive(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


TREE = {
    "p-1/vendor/llama.cpp/CMakeLists.txt": b"project(x)",
    "p-1/vendor/llama.cpp/src/a.cpp": b"int a;",
    "p-1/vendor/llama.cpp/.git": b"gitdir: elsewhere",
    "p-1/vendor/llama.cpp/../../../escape": b"!",
    "p-1/setup.py": b"!",
}


def test_only_the_tree_is_unpacked(fetch: ModuleType, tmp_path: Path) -> None:
    sha256 = make_archive(tmp_path / "p.tar.gz", TREE)
    tree = fetch.fetch("p", "1", sha256, tmp_path / "p.tar.gz")
    found = sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())
    assert found == ["CMakeLists.txt", "src/a.cpp"]
    assert not (tmp_path / "escape").exists()
    # what is there is reused: the archive is not needed again
    (tmp_path / "p.tar.gz").unlink()
    assert fetch.fetch("p", "1", sha256, tmp_path / "p.tar.gz") == tree


def test_a_tampered_archive_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    sha256 = make_archive(tmp_path / "p.tar.gz", TREE)
    make_archive(tmp_path / "p.tar.gz", {**TREE, "p-1/vendor/llama.cpp/src/a.cpp": b"int b;"})
    with pytest.raises(fetch.FetchError, match=rf"p\.tar\.gz: sha256 is \w+ where the pin says {sha256}"):
        fetch.fetch("p", "1", sha256, tmp_path / "p.tar.gz")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_damaged_or_foreign_archive_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "p.tar.gz"
    make_archive(archive, TREE)
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(fetch.FetchError, match="cannot be unpacked"):
        fetch.fetch("p", "1", hashlib.sha256(archive.read_bytes()).hexdigest(), archive)
    sha256 = make_archive(archive, {"p-1/setup.py": b"!"})
    with pytest.raises(fetch.FetchError, match=r"has no folder vendor/llama\.cpp"):
        fetch.fetch("p", "2", sha256, archive)


def test_a_failed_download_is_one_sentence(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    with pytest.raises(fetch.FetchError, match=r"could not download p 1 with pip .*REAP_LLAMA_CPP_SDIST"):
        fetch.fetch("p", "1", "0" * 64, None)


def test_two_builds_at_once_do_not_break_each_other(fetch: ModuleType, tmp_path: Path) -> None:
    sha256 = make_archive(tmp_path / "p.tar.gz", {**TREE, "p-1/vendor/llama.cpp/big": os.urandom(4 << 20)})
    command = [
        sys.executable,
        str(FETCH),
        "--package",
        "p",
        "--version",
        "1",
        "--sha256",
        sha256,
        "--sdist",
        str(tmp_path / "p.tar.gz"),
    ]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    trees = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0, 0, 0]
    assert len(trees) == 1
    assert (Path(trees.pop()) / "big").stat().st_size == 4 << 20


# --- the source distribution


def test_the_source_distribution_leaves_environments_and_builds_out() -> None:
    """A clone has them in its folder, and one of these folders once made it 140 MB."""
    excluded = re.findall(r"^sdist\.exclude = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    assert {'"/.venv"', '"/build"', '"/dist"', '"/wheelhouse"'} <= set(excluded.split(", "))
