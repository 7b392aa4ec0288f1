"""python -m benchmarks: list what can be measured, run it, and tabulate what was found.

python -m benchmarks                          # the list
python -m benchmarks run virtual_pruning      # one or several; all without a name
python -m benchmarks run --quick              # each that has a quick form, to see that it works; records nothing
python -m benchmarks table                    # the figures on record, in Markdown
python -m benchmarks fill                     # the figures of README and docs from those on record
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time

from benchmarks import results
from benchmarks.registry import Benchmark, find

PLACES = {"OTHER": "REAP_BENCH_OTHER", "WHEEL": "REAP_BENCH_WHEEL", "SOURCE": "REAP_BENCH_SOURCE"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", default="list", choices=("list", "run", "read", "table", "fill"))
    parser.add_argument("names", nargs="*", help="of benchmarks")
    parser.add_argument("--quick", action="store_true", help="run the quick forms; record nothing")
    arguments = parser.parse_intermixed_args()
    try:
        chosen = list(find(arguments.names))
    except KeyError as error:
        parser.error(f"there is no benchmark {error.args[0]}; `python -m benchmarks` lists them")
    if arguments.action == "table":
        print(results.table())
    elif arguments.action == "fill":
        for page in results.pages():
            page.write_text(results.filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    elif arguments.action == "list":
        show(chosen)
    elif arguments.action == "read":
        for benchmark in chosen:
            read(benchmark)
    else:
        return run_all(chosen, quick=arguments.quick)
    return 0


def show(chosen: list[Benchmark]) -> None:
    for benchmark in chosen:
        result = results.load(benchmark.name)
        state = (
            "not on record"
            if result is None
            else f"{result.date}{' (old)' if results.is_old(result, benchmark) else ''}"
        )
        print(f"{benchmark.name:26}{benchmark.minutes:3g} min  {state}")
        print(f"    {benchmark.what}\n    against {benchmark.against}")
        if benchmark.needs:
            print(f"    needs {benchmark.needs}")


def run_all(chosen: list[Benchmark], *, quick: bool) -> int:
    """0 where every one ran and its figures were found in what it printed."""
    failed = []
    for benchmark in chosen:
        command = benchmark.quick if quick else benchmark.command
        if command is None:
            continue
        print(f"== {benchmark.name}: {command}", flush=True)
        problem = run(benchmark, command, record=not quick)
        if problem:
            print(f"   failed: {problem}")
            failed.append(benchmark.name)
    print(f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run(benchmark: Benchmark, command: str, *, record: bool) -> str:
    """Why it failed; empty where it did not."""
    words = shlex.split(command)
    for place, variable in PLACES.items():
        if any(word.startswith(f"{place}/") for word in words):
            if variable not in os.environ:
                return f"it needs {benchmark.needs}"
            words = [word.replace(f"{place}/", f"{os.environ[variable]}/") for word in words]
    started = time.monotonic()
    lines = []
    with subprocess.Popen(
        [sys.executable, *words], cwd=results.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if record:
                print("   " + line, end="", flush=True)
    output = "".join(lines)
    if process.returncode:
        return f"it ended with {process.returncode}: {output[-1500:]}"
    if record:
        results.make(benchmark, command, time.monotonic() - started, output).save(output)
    return ""


def read(benchmark: Benchmark) -> None:
    """Read the figures once more out of what a run printed, after a pattern of the registry has changed."""
    result = results.load(benchmark.name)
    if result is not None:
        output = (results.FOLDER / f"{benchmark.name}.txt").read_text(encoding="utf-8")
        figures = {figure.what: value for figure in benchmark.figures if (value := figure.read(output)) is not None}
        results.Result(**{**vars(result), "figures": figures}).save(output)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    raise SystemExit(main())
