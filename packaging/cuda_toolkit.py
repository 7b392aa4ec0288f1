"""Put a CUDA toolkit for building together: an nvcc that is there (or NVIDIA's packages of it), cuBLAS from PyPI, a
stub of the driver.

    python packaging/cuda_toolkit.py build/cuda-toolkit [--base /usr/local/cuda]

prints the options to hand to CMake. The versions below are one CUDA release; the extra `cuda` in pyproject.toml must
allow the same one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

CUBLAS = "nvidia-cublas==13.0.2.14"
COMPILER = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
FOLDER = Path("nvidia", "cu13")  # where NVIDIA's packages of CUDA 13 put their files

# What ggml-cuda asks of the driver (`nm -D --undefined-only libggml-cuda.so`). The real libcuda.so.1 comes with the
# user's driver and is never shipped; the linker needs something of that name.
DRIVER_FUNCTIONS = (
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the toolkit")
    parser.add_argument(
        "--base", type=Path, help="a toolkit that has nvcc and the runtime; without it they come from PyPI as well"
    )
    args = parser.parse_args()
    root = make_toolkit(args.folder.resolve(), args.base)
    print(f"-DCUDAToolkit_ROOT={root} -DCMAKE_CUDA_COMPILER={root}/bin/nvcc")
    return 0


def make_toolkit(folder: Path, base: Path | None) -> Path:
    """The root of a toolkit below `folder`."""
    packages = (CUBLAS,) if base else (*COMPILER, CUBLAS)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--upgrade",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, *packages], check=True, stdout=sys.stderr)
    root = folder / FOLDER
    if base:
        link_tree(base.resolve(), root)
    for library in sorted((root / "lib").glob("*.so.*")):
        plain = library.with_name(library.name.split(".so")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
    if not (root / "lib64").exists():
        (root / "lib64").symlink_to("lib")
    make_driver_stub(root / "lib" / "stubs")
    return root


def link_tree(source: Path, target: Path) -> None:
    """Give `target` a link to each file of `source` that it lacks."""
    for path in sorted(source.iterdir()):
        link = target / path.name
        if path.name == "targets":  # the same folders once more, where CMake would look first
            continue
        if path.is_dir() and not path.is_symlink() and path.name in ("bin", "include", "lib"):
            link.mkdir(parents=True, exist_ok=True)
            link_tree(path, link)
        elif not os.path.lexists(link):
            link.symlink_to(path.resolve())


def make_driver_stub(folder: Path) -> None:
    """A libcuda.so to link with; it is not loaded by anything."""
    folder.mkdir(exist_ok=True)
    source = folder / "cuda_stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 3; }}\n" for name in DRIVER_FUNCTIONS))
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so"), str(source)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
