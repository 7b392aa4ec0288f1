"""quantize(): a GGUF file in another type, by llama.cpp's own quantiser.

It runs in a process of its own, through `_quantize_child.py`: llama.cpp aborts where an assertion fails, and cannot be
asked to stop. So an abort becomes an error, and Ctrl-C works at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

import reap
from reap.engine import native
from reap.engine.options import MOST_THREADS, usable_cores
from reap.errors import EngineError, FormatError, MismatchError, OutputError, UnsupportedModelError, UsageError
from reap.files.arguments import divide, shows
from reap.files.atomic import check_output, check_space, written_elsewhere
from reap.files.paths import PathLike
from reap.gguf.expert_tensors import read_architecture
from reap.gguf.imatrix import Imatrix, read_imatrix
from reap.gguf.model_info import engine_refusal
from reap.gguf.reader import GGUFModel
from reap.gguf.tensor_types import TENSOR_TYPES
from reap.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
_SLACK_BYTES = 1 << 20  # the size estimated is exact to a hundredth of a MiB
_MOST_LOG_BYTES = 4096
_RULES = re.compile("={4,}")  # lines across the page, in the engine's log


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did, or would do."""

    source: Path
    """The model, as it was given."""
    output: Path
    """The new file."""
    type: str
    """The file type, in llama-quantize's spelling."""
    n_bytes_before: int
    """Bytes of the source, all shards."""
    n_bytes_after: int
    """Bytes of the new file; of a dry run an estimate, exact to 1 MiB."""
    tensor_types: dict[str, int]
    """ggml type name -> number of tensors of the new file."""
    dry_run: bool
    """Whether nothing was written."""
    seconds: float
    """How long the call took."""
    warnings: tuple[str, ...]
    """Sentences worth reading."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "source": str(self.source), "output": str(self.output)}


class TypeArguments(TypedDict, total=False):
    """Keyword arguments that `quantize` hands on to `TypeChoice`, where they are explained."""

    allow_requantize: bool
    pure: bool
    quantize_output: bool
    output_tensor_type: str | None
    token_embedding_type: str | None
    tensor_types: Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class TypeChoice:
    """Which tensors get which type, by llama-quantize's options."""

    allow_requantize: bool = False
    """Quantise what is quantised already, which loses quality."""
    pure: bool = False
    """Give every matrix the type itself instead of the mixture that its name stands for."""
    quantize_output: bool = True
    """False: leave output.weight as it is."""
    output_tensor_type: str | None = None
    """ggml type of output.weight; None: what the file's type says."""
    token_embedding_type: str | None = None
    """ggml type of the embedding; None: what the file's type says."""
    tensor_types: Mapping[str, str] | Iterable[tuple[str, str]] = ()
    """Regular expression of tensor names -> ggml type of what it finds."""

    def settings(self, known: Sequence[str]) -> dict[str, Any]:
        """What the native module takes. UsageError for a type that is not one of the `known`."""
        single = {"output_tensor_type": self.output_tensor_type, "token_embedding_type": self.token_embedding_type}
        return {
            "allow_requantize": self.allow_requantize,
            "pure": self.pure,
            "quantize_output": self.quantize_output,
            **{key: "" if text is None else _check_type(text, known, "tensor type") for key, text in single.items()},
            "tensor_types": [(key, _check_type(text, known, "tensor type")) for key, text in _pairs(self.tensor_types)],
        }


@shows((TypeArguments, TypeChoice))
def quantize(
    source: PathLike,
    output: PathLike,
    type: str,
    *,
    imatrix: PathLike | None = None,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    **options: Unpack[TypeArguments],
) -> QuantizeReport:
    """Write the GGUF model `source` (of a split one, any of its files) as one file in another type.

    Args:
        output: appears whole or not at all; `force` replaces a file that is there
        type: a name of llama-quantize: Q4_K_M, Q8_0, IQ2_XS, MXFP4_MOE, F16, COPY ...; case does not matter
        imatrix: an importance matrix of this model, in either form; a pruned model needs a pruned matrix
            (`reap.prune(imatrix=...)`)
        threads: None: the cores that this process may use
        dry_run: check everything, estimate the size, write nothing
        progress: called with tensors begun, of tensors in all
        options: allow_requantize (quantise what is quantised already, which loses quality); pure (give every matrix the
            type itself instead of the mixture that its name stands for); quantize_output (False: leave output.weight
            as it is); output_tensor_type, token_embedding_type, tensor_types (a type for output.weight, for the
            embedding, for what a regular expression finds)

    The result is that of llama-quantize with the same options, byte for byte. Raises UsageError (paths, options,
    types), MismatchError (a matrix of another model), FormatError (a damaged file), EngineError with the end of
    llama.cpp's log, OutputError (could not write).
    """
    started = time.perf_counter()
    choice = TypeChoice(**divide("quantize", options, TypeArguments)[0])
    core = native.load()
    kind = _check_type(type, core.quantize_types(), "type")
    settings = choice.settings(core.tensor_types())
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}, expected 1 to {MOST_THREADS}")
    target = Path(output)
    with ExitStack() as stack:
        model = stack.enter_context(GGUFModel.open(source))
        matrix = None if imatrix is None else stack.enter_context(read_imatrix(imatrix))
        inputs = [file.path for file in model.files] + ([] if matrix is None else [matrix.file.path])
        check_output(target, inputs, force=force)
        _check_model(model, kind, allow_requantize=choice.allow_requantize)
        weights = [] if matrix is None else list(matrix.serving(model.tensors).taken)
        warnings = [] if matrix is None else _check_imatrix(model, matrix.serving(weights))
        n_bytes_before, n_tensors, first_file = model.size, len(model.tensors), os.path.abspath(model.files[0].path)
    job: dict[str, Any] = {
        # links are not followed: llama.cpp finds the shards of a split model by the first one's name
        "input": first_file,
        "type": kind,
        "threads": threads or usable_cores(),
        **settings,
    }
    job["imatrix"] = None if imatrix is None else os.path.abspath(imatrix)
    job["weights"] = weights
    job["imatrix_name"] = None if imatrix is None else os.fspath(imatrix)
    if dry_run:
        size = int(_run({**job, "output": None}, Path(source), None)["result"])
        types: dict[str, int] = {}
    else:
        with written_elsewhere(target, force=force) as temporary:
            needed = _run({**job, "output": None}, Path(source), None)["result"]
            check_space(target, int(needed) + _SLACK_BYTES)
            done = _run({**job, "output": str(temporary)}, Path(source), progress)
            warnings += _describe_fallbacks(done["fallbacks"])
            types, size = _read_back(temporary, target, n_tensors)
    return QuantizeReport(
        source=Path(source),
        output=target,
        type=kind,
        n_bytes_before=n_bytes_before,
        n_bytes_after=size,
        tensor_types=types,
        dry_run=dry_run,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


# ---- checks before anything runs


def _pairs(tensor_types: Mapping[str, str] | Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return tensor_types.items() if isinstance(tensor_types, Mapping) else tensor_types


def _check_type(text: str, known: Iterable[str], what: str) -> str:
    """The engine's spelling of a type."""
    names = {name.upper(): name for name in known}
    if text.upper() not in names:
        raise UsageError(f"unknown {what} {text!r}; known: {', '.join(names.values())}")
    return names[text.upper()]


def _check_model(model: GGUFModel, kind: str, *, allow_requantize: bool) -> None:
    read_architecture(model)
    if refusal := engine_refusal(model):
        raise UnsupportedModelError(refusal)
    quantised = [
        tensor
        for tensor in model.tensors.values()
        if tensor.type_name not in _FLOATS and TENSOR_TYPES[tensor.type].block_size > 1
    ]
    if quantised and kind != "COPY" and not allow_requantize:
        first = quantised[0]
        raise UsageError(
            f"{model.path}: {len(quantised)} of its tensors are quantised already ({first.name} is {first.type_name});"
            " quantise the file that it was made of, or lose quality with --allow-requantize (allow_requantize=True)"
        )


def _check_imatrix(model: GGUFModel, matrix: Imatrix) -> list[str]:
    """Sentences about what the matrix lacks. MismatchError where its sizes are not the model's."""
    n_found = 0
    for name, entry in matrix.entries.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            continue
        n_found += 1
        expected = tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        if entry.n_values != expected and name != "token_embd.weight":
            raise MismatchError(
                f"{matrix.file.path}: {name} has {entry.n_values:,} values, but the model's tensor {list(tensor.shape)}"
                f" needs {expected:,}; a pruned model needs a pruned matrix (reap prune --imatrix)"
            )
    if not n_found:
        raise MismatchError(f"{matrix.file.path}: speaks of no tensor of {model.path}")
    n_absent = len(matrix.entries) - n_found
    return [f"the importance matrix speaks of {n_absent} tensors that the model does not have"] if n_absent else []


def _read_back(temporary: Path, target: Path, n_tensors: int) -> tuple[dict[str, int], int]:
    """(tensor type -> number of tensors, size) of what was written, which must be a sound file of as many tensors."""
    try:
        with GGUFModel.open(temporary) as written:
            if len(written.tensors) != n_tensors:
                raise FormatError(f"has {len(written.tensors)} tensors, expected {n_tensors}")
            types: dict[str, int] = {}
            for tensor in written.tensors.values():
                types[tensor.type_name] = types.get(tensor.type_name, 0) + 1
            return types, written.size
    except FormatError as error:
        raise OutputError(f"{target}: was not written as it should be: {error}") from None


def _describe_fallbacks(fallbacks: Sequence[Sequence[str]]) -> list[str]:
    """A sentence for each type that some tensors should have got and could not. fallbacks: (tensor, wanted, got)."""
    counts = Counter((wanted, got) for _, wanted, got in fallbacks)
    return [
        f"{n} tensors are {got.upper()} and not {wanted.upper()}, because their rows do not divide into its blocks"
        f" (the first is {next(name for name, *types in fallbacks if tuple(types) == (wanted, got))})"
        for (wanted, got), n in counts.items()
    ]


# ---- the child


def _run(job: Mapping[str, Any], source: Path, progress: ProgressCallback | None) -> dict[str, Any]:
    """Let a child do the job; what it answered, "result" among it. Raises EngineError for what it complains of."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("_quantize_child.py")),
        *(os.path.dirname(path) for path in reap.__path__),
    ]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8") as child,
    ):
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(job))
            child.stdin.close()
            answer = _listen(child.stdout, progress)
            status = child.wait()
        except BaseException:  # Ctrl-C, or `progress` raised: do not leave a process behind
            child.kill()
            raise
        if "result" in answer and status == 0:
            return answer
        raise EngineError(
            " ".join(_RULES.sub(" ", answer.get("error", "")).split())
            or f"{source}: could not be quantised: {_last_words(log, status)}"
        )


def _listen(lines: IO[str], progress: ProgressCallback | None) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for line in lines:
        answer = json.loads(line)
        if "begun" in answer and progress is not None:
            progress(Progress(answer["begun"], answer["total"], "tensors"))
    return answer


def _last_words(log: IO[bytes], status: int) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _MOST_LOG_BYTES))
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    end = f"the engine was ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    asserted = [line for line in lines if "GGML_ASSERT" in line or "rror" in line]
    return " / ".join([*(asserted or lines)[-1:], end])
