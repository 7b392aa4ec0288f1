"""Move the pin to another llama.cpp: fetch, hash, say what changed, build, run the architecture table and the tests
that stand on names.

    python vendor/llama.cpp/bump.py 0.3.37              # everything; leaves a changed pin.cmake, CHANGELOG.md and
                                                        docs/architectures.md
    python vendor/llama.cpp/bump.py 0.3.37 --no-build   # stop after saying what changed in the source

The version is that of the PyPI package that carries llama.cpp's tree (pin.cmake). Its source distribution is downloaded
with pip, its sha256 taken, and the upstream commit read from the submodule that it records. What reap relies on by name
is compared first: a renamed node, tensor or key ends the bump with a sentence before anything is built. Nothing is
committed.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fetch
import source_facts

ROOT = Path(__file__).resolve().parents[2]
PIN = Path(__file__).parent / "pin.cmake"
FIELDS = ("PACKAGE", "VERSION", "SHA256", "COMMIT")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of the package that pin.cmake names")
    parser.add_argument(
        "--no-build", action="store_true", help="change nothing: say what the new source changes, and stop"
    )
    args = parser.parse_args()
    try:
        return bump(args.version, build=not args.no_build)
    except (fetch.FetchError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(
            f"{' '.join(map(str, error.cmd))}: failed; pin.cmake names {args.version} now, `git diff` shows what was"
            " changed",
            file=sys.stderr,
        )
        return 1


def bump(version: str, *, build: bool) -> int:
    old = read_pin(PIN)
    with tempfile.TemporaryDirectory() as folder:
        archive = download(old["PACKAGE"], version, Path(folder))
        new = {
            "PACKAGE": old["PACKAGE"],
            "VERSION": version,
            "SHA256": sha256_of(archive),
            "COMMIT": commit_of(archive),
        }
        before = fetch.fetch(old["PACKAGE"], old["VERSION"], old["SHA256"], None)
        after = fetch.fetch(new["PACKAGE"], version, new["SHA256"], archive)
    print(
        f"{old['PACKAGE']} {old['VERSION']} -> {version}\nllama.cpp {old['COMMIT']}\n       -> {new['COMMIT']}\nsha256"
        f" {new['SHA256']}"
    )
    facts = source_facts.read_facts(after)
    for line in differences(source_facts.read_facts(before), facts) or ["no name changed"]:
        print(line)
    found = source_facts.problems(facts)
    for sentence in found:
        print(f"PROBLEM: {sentence}")
    if found or not build:
        return int(bool(found))
    write_pin(PIN, new)
    changes = ROOT / "CHANGELOG.md"
    changes.write_text(with_change(changes.read_text(encoding="utf-8"), new), encoding="utf-8")
    build_and_test()
    subprocess.run(["git", "--no-pager", "diff", "--stat"], cwd=ROOT, check=True)
    print("Read `git diff docs/architectures.md`, run .ci/run, and commit.")
    return 0


def build_and_test() -> None:
    """The module, llama.cpp's programs, the table of architectures, and the tests that know the engine best."""
    python = sys.executable
    for command in (
        [python, "-m", "pip", "install", "--no-build-isolation", "-e", ".[test]", "-C", "build-dir=build/editable"],
        ["cmake", "--preset", "tools"],
        ["cmake", "--build", "--preset", "tools"],
        [python, "benchmarks/architecture_table.py"],
        [
            python,
            "-m",
            "pytest",
            "-q",
            "tests/project/test_pin.py",
            "tests/project/test_build.py",
            "tests/engine/test_engine.py",
            "tests/engine/test_architectures.py",
        ],
    ):
        print("$", " ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)


def read_pin(path: Path) -> dict[str, str]:
    """PACKAGE, VERSION, SHA256, COMMIT."""
    found = dict(re.findall(r"set\(REAP_LLAMA_CPP_(\w+) (\S+)\)", path.read_text(encoding="utf-8")))
    if found.keys() != set(FIELDS):
        raise ValueError(f"{path}: sets {sorted(found)} where {sorted(FIELDS)} are expected")
    return found


def write_pin(path: Path, pin: Mapping[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for name in FIELDS:
        text = re.sub(rf"(set\(REAP_LLAMA_CPP_{name}) \S+\)", rf"\1 {pin[name]})", text)
    path.write_text(text, encoding="utf-8")


def with_change(changelog: str, pin: Mapping[str, str]) -> str:
    """The changelog with a line for the new pin, under "Unreleased"."""
    line = (
        f"- llama.cpp is pinned to {pin['COMMIT']} (from the source distribution of {pin['PACKAGE']} {pin['VERSION']})."
    )
    head, found, rest = changelog.partition("## Unreleased\n\n")
    if found:
        return f"{head}{found}{line}\n{rest}"
    head, found, rest = changelog.partition("## ")
    return f"{head}## Unreleased\n\n{line}\n\n{found}{rest}"


def differences(before: source_facts.Facts, after: source_facts.Facts) -> list[str]:
    """A line for each kind of name that came or went."""
    lines = []
    for kind in ("architectures", "keys", "nodes", "tensors"):
        old, new = set(getattr(before, kind)), set(getattr(after, kind))
        parts = [f"{sign} {', '.join(sorted(names))}" for sign, names in (("+", new - old), ("-", old - new)) if names]
        if parts:
            lines.append(f"{kind}: {'; '.join(parts)}")
    return lines


def download(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
    result = subprocess.run(
        [*command, f"{package}=={version}", "-d", str(folder)], capture_output=True, text=True, check=False
    )
    archives = sorted(folder.glob("*.tar.gz"))
    if result.returncode or not archives:
        raise fetch.FetchError(f"could not download {package} {version} with pip: {result.stderr.strip()[-500:]}")
    return archives[0]


def sha256_of(archive: Path) -> str:
    with archive.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def commit_of(archive: Path) -> str:
    """The upstream commit that the package's submodule points at, read from the repository inside the archive."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as tar:
        top = tar.getnames()[0].split("/")[0]
        member = next((tar.getmember(name) for name in (f"{top}/.git/index",) if name in tar.getnames()), None)
        source = tar.extractfile(member) if member else None
        if source is None:
            raise ValueError(
                f"{archive.name}: has no .git/index, so the commit of its llama.cpp must be looked up and set by hand"
            )
        git = Path(folder) / ".git"
        subprocess.run(["git", "init", "-q", folder], check=True)
        (git / "index").write_bytes(source.read())
        listed = subprocess.run(
            ["git", "--git-dir", str(git), "ls-files", "-s", "/".join(fetch.SUBTREE)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    match = re.match(r"160000 ([0-9a-f]{40}) ", listed)
    if match is None:
        raise ValueError(f"{archive.name}: records no submodule {'/'.join(fetch.SUBTREE)}")
    return match[1]


if __name__ == "__main__":
    sys.exit(main())
