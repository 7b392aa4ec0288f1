"""A Hugging Face checkpoint -> a GGUF file, by llama.cpp's own converter in a process of its own.

The converter is a script with a folder `conversion/` and a `gguf-py` of its own. It is not a library: it exits, logs
and changes global state, and its `gguf` package is newer than the published one. So it runs as a child, through
`_convert_child.py`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import reap
from reap.errors import EngineError, MissingExtraError, ReapError, UsageError
from reap.files.atomic import check_output, written_elsewhere
from reap.files.paths import PathLike
from reap.files.recognise import absent_text

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
    hf_dir: PathLike,
    output: PathLike,
    *,
    outtype: str = "f16",
    pre: str | None = None,
    converter: PathLike | None = None,
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

    Killed, it takes the converter with it.

    Raises UsageError for a directory, output or option that cannot work (a `pre` that no llama.cpp would load among
    them), MissingExtraError without torch, transformers
    or a converter, EngineError with the end of the converter's log when it fails.
    """
    source, target = Path(hf_dir), Path(output)
    _check_call(source, outtype, pre)
    check_output(target, [source], force=force)
    _check_extra()
    tree = find_converter(converter)
    if pre is not None:
        _check_pre(pre, tree)
    _check_weights(source)
    command = [sys.executable, str(Path(__file__).with_name("_convert_child.py")), "--tree", str(tree)]
    command += ["--pre", pre] if pre is not None else []
    has_prediction, keys = _look(source)
    command += [] if prediction and has_prediction else ["--no-prediction"]
    command += ["--trust-remote-code"] if trust_remote_code else []
    with written_elsewhere(target, force=force) as temporary:
        # its name alone, from inside its directory: the converter fills in {templates} in what it is given
        command += ["--", str(source.resolve()), "--outfile", temporary.name, "--outtype", outtype]
        status, lines = _run(command, keys, temporary.parent, trust_remote_code, log)
        if status != 0 or not temporary.stat().st_size:
            raise EngineError(f"{source}: llama.cpp's converter failed: {_quote(lines, status)}{_hint(lines)}")
    return target


convert = convert_checkpoint  # as `reap` calls it


def find_converter(converter: PathLike | None = None) -> Path:
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
        found = absent_text(source) if not source.exists() else "no directory"
        raise UsageError(f"{source}: {found}, where a Hugging Face checkpoint was expected")
    if not (source / "config.json").is_file():
        raise UsageError(f"{source}: no Hugging Face checkpoint, it has no config.json")


def _check_pre(pre: str, tree: Path) -> None:
    from reap.hf.disk.pre_tokenizers import PRE_TOKENIZERS, like, read_pre_tokenizers

    known = PRE_TOKENIZERS | read_pre_tokenizers(tree)
    if pre not in known:
        raise UsageError(
            f"pre is {pre!r}, which is none of the {len(known)} pre-tokenizers that llama.cpp knows ({like(pre, known)}"
            " ...): the file would not load"
        )


def _check_weights(source: Path) -> None:
    """Links that lead out; and two sets of weights, of which llama.cpp's converter would take the other one."""
    from reap.hf.disk.discovery import INDEX, SINGLE, check_folder, other_weights

    check_folder(source)
    if others := other_weights(source):
        raise UsageError(
            f"{source}: has two sets of weights, {SINGLE} and those that {INDEX} names ({others[0]} ...); the converter"
            " would read the second, all else reads the first: remove one of them"
        )


def _look(source: Path) -> tuple[bool, dict[str, Any]]:
    """(whether it may have prediction layers, which the converter takes for granted in some families; keys that say
    what pruning kept)."""
    from reap.files.strict_json import LAYER_LIMIT
    from reap.hf.disk.checkpoint_files import Checkpoint  # which takes numpy along
    from reap.hf.disk.info import provenance_keys
    from reap.hf.disk.layout import checkpoint_layers, is_of_prediction

    try:
        checkpoint = Checkpoint.open(source, trust="named")
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
    """Tell the child which keys to add and run it to its end; its status and the last lines it wrote.

    The pipe to it stays open for as long as we live: the child ends where it closes.
    """
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    if not online:
        environment["HF_HUB_OFFLINE"] = "1"  # everything it needs is in the directory
    lines: deque[str] = deque(maxlen=_LINES_KEPT)
    with ExitStack() as stack:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = stack.enter_context(
            subprocess.Popen(command, cwd=directory, env=environment, encoding="utf-8", errors="replace", **streams)
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it ended at once, and its status and lines say why
                child.stdin.write(json.dumps(keys) + "\n")
                child.stdin.flush()
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
