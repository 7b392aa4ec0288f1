"""Make the distribution `reap-moe-cuda` out of a wheel that was built with GGML_CUDA: the CUDA backend alone, for every
Python.

    python packaging/cuda_addon.py wheelhouse/reap_moe-0.1.0-cp312-cp312-manylinux_2_28_x86_64.whl -o wheelhouse

On PyPI a distribution has one file for each Python and platform, so CUDA cannot be a second reap-moe. The backend is a
module that knows no Python: one file serves all of them. It is installed into the package's folder beside the other
backends, where reap finds it, and it depends on the very version of reap-moe that it was built with and on NVIDIA's
libraries (`reap-moe[cuda]`). It refuses to write a file that PyPI would not take.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

LIBRARY = "reap/libggml-cuda.so"
LICENCES = ("reap/licenses/llama.cpp.LICENSE", "LICENSE")
MOST_BYTES = 100 * 1000 * 1000  # PyPI's limit for a file, unless a project is granted more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("wheelhouse"), help="folder")
    parser.add_argument("--max-bytes", type=int, default=MOST_BYTES)
    args = parser.parse_args()
    try:
        made = make_addon(args.wheel, args.output, args.max_bytes)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")
    return 0


def make_addon(wheel: Path, folder: Path, max_bytes: int = MOST_BYTES) -> Path:
    """The path of the new wheel. Raises ValueError for a wheel without CUDA, and for a result that is too large."""
    match = re.fullmatch(r"reap_moe-([^-]+)-cp\d+-cp\d+t?-(.+)\.whl", wheel.name)
    if match is None:
        raise ValueError(f"{wheel.name}: is not a wheel of reap-moe")
    version, platform = match.groups()
    with zipfile.ZipFile(wheel) as source:
        if LIBRARY not in source.namelist():
            raise ValueError(f"{wheel.name}: has no {LIBRARY}; build it with -C cmake.define.GGML_CUDA=ON")
        info = f"reap_moe_cuda-{version}.dist-info"
        files = {
            LIBRARY: source.read(LIBRARY),
            f"{info}/METADATA": metadata(version),
            f"{info}/WHEEL": wheel_file(platform),
        }
        for name in source.namelist():
            if name.endswith(LICENCES):
                files[f"{info}/licenses/{Path(name).name}"] = source.read(name)
    record = "".join(f"{name},sha256={digest(content)},{len(content)}\n" for name, content in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"reap_moe_cuda-{version}-py3-none-{platform}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as sink:
        for name, content in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if name == LIBRARY else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            sink.writestr(entry, content)
    size = target.stat().st_size
    if size > max_bytes:
        target.unlink()
        raise ValueError(
            f"{target.name}: {size / 1e6:.0f} MB where PyPI takes {max_bytes / 1e6:.0f}; name fewer CUDA architectures"
        )
    return target


def metadata(version: str) -> bytes:
    return (
        f"Metadata-Version: 2.4\nName: reap-moe-cuda\nVersion: {version}\nSummary: The CUDA backend of"
        " reap-moe\nLicense-Expression: MIT\nLicense-File: LICENSE\nLicense-File: llama.cpp.LICENSE\nRequires-Python:"
        f" >=3.10\nRequires-Dist: reap-moe[cuda]=={version}\nDescription-Content-Type: text/markdown\n\nThe CUDA"
        " backend of reap-moe, of the same version. `pip install reap-moe-cuda` installs both\nand NVIDIA's libraries;"
        " the driver is the machine's own. Where there is none, reap works on the processor, and `reap devices`\nsays"
        " why.\n"
    ).encode()


def wheel_file(platform: str) -> bytes:
    tags = "".join(f"Tag: py3-none-{part}\n" for part in platform.split("."))
    return f"Wheel-Version: 1.0\nGenerator: reap packaging/cuda_addon.py\nRoot-Is-Purelib: false\n{tags}".encode()


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
