"""Run inside the child process of `reap.engine.quantize`: reads one job from standard input, writes lines of JSON to
standard output.

python _quantize_child.py FOLDERS THAT HOLD reap
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any


def values_of(matrix: Any, name: str) -> Any:
    """float32: the mean square of each column's activations, as llama-quantize computes it from sums and counts
    (load_imatrix)."""
    import numpy as np

    raw, counts = matrix.values(name)
    sums = np.frombuffer(raw, dtype="<f4")
    if isinstance(counts, int):
        return sums / np.float32(counts) if counts > 0 else sums
    rows = sums.reshape(len(counts) // 4, -1)
    per_row = np.rint(np.frombuffer(counts, dtype="<f4")).astype(np.float32)[:, None]
    means = np.divide(
        rows, per_row, out=np.ones_like(rows), where=per_row > 0
    )  # an expert that was never seen: all columns alike
    return means.ravel()


def read_job(job: dict[str, Any], core: Any) -> Any:
    """The engine's options."""
    from reap.gguf.imatrix import read_imatrix

    options = core.QuantizeOptions()
    for name in (
        "input",
        "type",
        "threads",
        "allow_requantize",
        "pure",
        "quantize_output",
        "output_tensor_type",
        "token_embedding_type",
    ):
        setattr(options, name, job[name])
    options.tensor_types = [(pattern, kind) for pattern, kind in job["tensor_types"]]
    options.output = job["output"] or ""
    if job["imatrix"] is not None:
        with read_imatrix(job["imatrix"]) as found:
            matrix = found.serving(job["weights"])
            for name in matrix.entries:
                options.set_imatrix(name, values_of(matrix, name))
            dataset, chunks = matrix.origin()
            # what llama-quantize notes in the output, in its order
            noted: list[tuple[str, str | bytes | int]] = [("quantize.imatrix.file", os.fsencode(job["imatrix_name"]))]
            noted += [("quantize.imatrix.dataset", dataset)] if dataset is not None else []
            noted += [("quantize.imatrix.entries_count", len(found.entries))]
            noted += [("quantize.imatrix.chunks_count", chunks)] if chunks > 0 else []
            options.metadata = noted
    return options


def work(job: dict[str, Any], answers: IO[str]) -> None:
    """Do the job and say how it goes: {"begun", "total"} for each tensor, then {"result"} or {"error"}."""
    from reap.engine import native
    from reap.errors import ReapError

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    core = native.load()
    try:
        options = read_job(job, core)
        if job["output"] is None:
            say(result=core.quantized_size(options))
        else:
            done = core.quantize(options, lambda begun, total: say(begun=begun, total=total))
            say(result=0, **done)
    except ReapError as error:
        say(error=str(error))


def main() -> None:
    # in place of this file's own directory, whose modules must not be found by their bare names
    sys.path[0:1] = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the engine prints itself
    work(json.load(sys.stdin), answers)


if __name__ == "__main__":
    main()
