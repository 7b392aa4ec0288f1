"""A Hugging Face checkpoint -> a GGUF file, by llama.cpp's own converter in a process of its own.

The converter is a script with a folder `conversion/` and a `gguf-py` of its own. It is not a library: it exits, logs
and changes global state, and its `gguf` package is newer than the published one. So it runs as a child, through
`_convert_child.py`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import reap
from reap.errors import EngineError, MissingExtraError, OutputError, ReapError, UsageError
from reap.files.atomic import check_output

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
SOURCE_VARIABLE = "REAP_LLAMA_CPP_SOURCE"
_SCRIPT = "convert_hf_to_gguf.py"
_LINES_KEPT = 200  # of the child's log
_LINES_QUOTED = 3
_LOG_PREFIX = re.compile(r"^(DEBUG|INFO|WARNING|ERROR):[\w.-]+:")
_HINTS = {
    "pre-tokenizer was not recognized": (
        "give the name of its pre-tokenizer with pre= (--pre), for example 'qwen2' or 'llama-bpe'"
    ),
    "trust_remote_code": (
        "a checkpoint that brings its own Python code needs trust_remote_code=True, which runs that code"
    ),
}


def convert_checkpoint(
    hf_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str = "f16",
    pre: str | None = None,
    converter: str | os.PathLike[str] | None = None,
    prediction: bool = True,
    trust_remote_code: bool = False,
    force: bool = False,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Convert the checkpoint in `hf_dir` to the GGUF file `output`, which appears whole or not at all; returns its
    path.

    `outtype`: the type of the matrices, one of f32, f16, bf16, q8_0, auto (the checkpoint's own 16-bit type).
    `pre`: the name of the tokenizer's regular expression (`tokenizer.ggml.pre`). The converter knows published
    byte-level BPE tokenizers by a hash and refuses all others; with `pre` it takes your word for it, and the name's
    expression must be the tokenizer's own, or the file splits text differently from the checkpoint. `converter`: a
    llama.cpp source tree to take the converter from; default the environment's REAP_LLAMA_CPP_SOURCE, then the one
    installed with reap. `prediction`: convert prediction (MTP) layers, too, where the checkpoint has some.
    `trust_remote_code`: let Python code inside the checkpoint run. `force`: replace an output that exists. `log`
    receives the converter's lines.

    Raises UsageError for a directory, output or option that cannot work, MissingExtraError without torch, transformers
    or a converter, EngineError with the end of the converter's log when it fails.
    """
    source, target = Path(hf_dir), Path(output)
    _check_call(source, outtype, pre)
    check_output(target, source.iterdir(), force=force)
    _check_extra()
    tree = find_converter(converter)
    # a name without the caller's characters: the converter fills in {templates} in names
    real = Path(os.path.realpath(target))
    part = real.parent / f".reap-convert-{os.getpid()}-{secrets.token_hex(4)}.gguf"
    command = [sys.executable, str(Path(__file__).with_name("_convert_child.py")), "--tree", str(tree)]
    command += ["--pre", pre] if pre is not None else []
    has_prediction, keys = _look(source)
    command += [] if prediction and has_prediction else ["--no-prediction"]
    command += ["--trust-remote-code"] if trust_remote_code else []
    command += ["--", str(source.resolve()), "--outfile", part.name, "--outtype", outtype]
    try:
        status, lines = _run(command, keys, real.parent, trust_remote_code, log)
        if status != 0 or not part.is_file():
            raise EngineError(f"{source}: llama.cpp's converter failed: {_quote(lines, status)}{_hint(lines)}")
        _publish(part, real)
    finally:
        part.unlink(missing_ok=True)
    return target


convert = convert_checkpoint  # as `reap` calls it


def find_converter(converter: str | os.PathLike[str] | None = None) -> Path:
    """The directory of the converter's script: the argument, else the environment's, else the one installed with
    reap."""
    asked = converter if converter is not None else os.environ.get(SOURCE_VARIABLE) or None
    if asked is not None:
        tree = Path(asked).resolve()
        if not (tree / _SCRIPT).is_file():
            raise UsageError(f"{asked}: no llama.cpp source tree, it has no {_SCRIPT}")
        return tree
    for package in reap.__path__:  # an editable install has two
        tree = Path(package) / "_converter"
        if (tree / _SCRIPT).is_file():
            return tree
    raise MissingExtraError(
        "llama.cpp's converter was not installed with reap: reinstall reap-moe, or name a llama.cpp source tree in"
        f" {SOURCE_VARIABLE}"
    )


def _check_call(source: Path, outtype: str, pre: str | None) -> None:
    if outtype not in OUTTYPES:
        raise UsageError(f"outtype is {outtype!r} where one of {', '.join(OUTTYPES)} was expected")
    if pre is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", pre):
        raise UsageError(f"pre is {pre!r} where the name of a pre-tokenizer was expected, such as 'qwen2'")
    if not source.is_dir():
        raise UsageError(f"{source}: no directory, where a Hugging Face checkpoint was expected")
    if not (source / "config.json").is_file():
        raise UsageError(f"{source}: no Hugging Face checkpoint, it has no config.json")


def _look(source: Path) -> tuple[bool, dict[str, Any]]:
    """(whether it may have prediction layers, which the converter takes for granted in some families; keys that say
    what pruning kept)."""
    from reap.files.strict_json import LAYER_LIMIT
    from reap.hf.disk.checkpoint_files import Checkpoint  # which takes numpy along
    from reap.hf.disk.info import provenance_keys
    from reap.hf.disk.layout import checkpoint_layers, is_of_prediction

    try:
        checkpoint = Checkpoint.open(source)
    except ReapError:  # pickles, for example; the converter will say what it thinks of them
        return True, {}
    with checkpoint:
        n_layers = checkpoint_layers(checkpoint) or LAYER_LIMIT
        return any(is_of_prediction(tensor.name, n_layers) for tensor in checkpoint.tensors), provenance_keys(
            checkpoint
        )


def _check_extra() -> None:
    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"converting a checkpoint needs {' and '.join(missing)}: pip install 'reap-moe[hf]'")


def _run(
    command: list[str], keys: dict[str, Any], directory: Path, online: bool, log: Callable[[str], None] | None
) -> tuple[int, deque[str]]:
    """Tell the child which keys to add and run it to its end; its status and the last lines it wrote."""
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    environment["PYTHONIOENCODING"] = "utf-8"
    if not online:
        environment["HF_HUB_OFFLINE"] = "1"  # everything it needs is in the directory
    lines: deque[str] = deque(maxlen=_LINES_KEPT)
    with ExitStack() as stack:
        told = stack.enter_context(tempfile.TemporaryFile())
        told.write(json.dumps(keys).encode())
        told.seek(0)
        streams: dict[str, Any] = {"stdin": told, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = stack.enter_context(
            subprocess.Popen(command, cwd=directory, env=environment, encoding="utf-8", errors="replace", **streams)
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                lines.append(line.rstrip())
                if log is not None:
                    log(lines[-1])
            status = child.wait()
        except BaseException:  # Ctrl-C, or `log` raised: do not leave a process behind
            child.kill()
            raise
    return status, lines


def _quote(lines: deque[str], status: int) -> str:
    said = [_LOG_PREFIX.sub("", line).strip() for line in lines]
    said = [line for line in said if line.strip("* ^~")]
    end = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return " / ".join([*said[-_LINES_QUOTED:], *([end] if status < 0 or not said else [])])


def _hint(lines: deque[str]) -> str:
    text = "\n".join(lines)
    hints = [hint for sign, hint in _HINTS.items() if sign in text]
    return f" ({'; '.join(hints)})" if hints else ""


def _publish(part: Path, target: Path) -> None:
    """Bytes to the disk first, the name last."""
    try:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: could not be written: {error.strerror}") from error
