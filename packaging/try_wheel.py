"""Try an installed reap outside the source tree: what it says of itself, the demo, and the tests.

    python packaging/try_wheel.py CLONE [--all]

The tests are copied out of the clone, so that nothing of the tree can stand in for what the wheel lacks. Without --all:
those that run the native module, the first contact and the readers, a minute's worth. No compiler is needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

QUICK = (
    "tests/engine/test_engine.py",
    "tests/engine/test_devices.py",
    "tests/profiling/test_golden.py",
    "tests/profiling/test_profiler.py",
    "tests/evaluation/test_evaluator.py",
    "tests/project/test_first_contact.py",
    "tests/pruning/test_pruner.py",
    "tests/scores/test_plan.py",
    "tests/scores/test_profile.py",
    "tests/cli/test_cli.py",
)
NEEDS_THE_TREE = tuple(
    f"tests/project/test_{name}.py" for name in ("benchmarks", "build", "docs", "package", "pages_run", "pin")
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--all", action="store_true", help="all tests that need no PyTorch and no program of llama.cpp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("tests", "docs"):
            shutil.copytree(args.clone / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(args.clone / "pyproject.toml", work)  # pytest's settings
        tests = ["tests", *(f"--ignore={name}" for name in NEEDS_THE_TREE)] if args.all else list(QUICK)
        reap = [sys.executable, "-m", "reap"]
        for command in (
            [*reap, "--version"],
            [*reap, "devices"],
            [*reap, "demo", "--out", str(work / "demo")],
            [sys.executable, "-m", "pytest", "-q", "-m", "not torch and not tasks", "-p", "no:cacheprovider", *tests],
        ):
            print("$", *command[1:], flush=True)
            environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTHONPATH")}
            code = subprocess.run(command, cwd=work, env=environment, check=False).returncode
            if code:
                print(f"{' '.join(command[1:])}: exit code {code}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
