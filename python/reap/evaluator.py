"""evaluate(): perplexity of a model on a text, by llama-perplexity's rule."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.engine import EngineOptions, SessionTokenizer, open_session
from reap.errors import CalibrationError, UsageError
from reap.inspector import inspect
from reap.progress import Progress, ProgressCallback

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    perplexity: exp of the mean negative log-likelihood of the scored tokens. stderr: its standard error, in the same unit.
    tokens: scored tokens. windows: of ctx_size tokens each. dropped_tokens: the rest of the text, shorter than a window.
    """

    model: str
    text: str
    perplexity: float
    stderr: float
    tokens: int
    windows: int
    ctx_size: int
    dropped_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    ctx_size: int = 512,
    batch_size: int | None = None,
    ubatch_size: int = 512,
    threads: int | None = None,
    gpu_layers: int = -1,
    devices: Sequence[str] | None = None,
    override_tensors: Sequence[tuple[str, str]] = (),
    rpc: Sequence[str] = (),
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: str = "auto",
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Perplexity of `model` (a GGUF file) on the file `text`, comparable with what llama-perplexity prints.

    The text is tokenised whole (special tokens in it are not parsed) and cut into windows of `ctx_size`; the first token of each
    is replaced by BOS where the model adds one; of each window the positions ctx_size/2 + 1 to ctx_size − 1 are scored; what is left
    at the end is dropped.

    Raises:
        UsageError: an option, or a file that is not there. FormatError: the model is damaged.
        CalibrationError: the text is shorter than one window, or no UTF-8.
        EngineError: llama.cpp failed. KeyboardInterrupt: Ctrl-C.
    """
    if ctx_size < 4:
        raise UsageError(f"ctx_size is {ctx_size}, expected at least 4 tokens in a window")
    started = time.perf_counter()
    info = inspect(model)  # what can be checked is checked before the engine sees the file
    options = EngineOptions(
        ctx_size=ctx_size,
        batch_size=batch_size,
        ubatch_size=ubatch_size,
        threads=threads,
        gpu_layers=gpu_layers,
        devices=devices,
        override_tensors=override_tensors,
        rpc=rpc,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn,
    )
    content = read_text(text)
    session = open_session(model, options, n_bytes=info.n_bytes)
    tokenizer = SessionTokenizer(session)
    tokens = tokenizer.tokenize(content, add_special=True, parse_special=False)
    n_windows = len(tokens) // ctx_size
    if n_windows == 0:
        raise CalibrationError(f"{os.fspath(text)}: has {len(tokens)} tokens, expected at least one window of {ctx_size}")
    report = progress or (lambda _: None)
    scored = []
    for index, window in enumerate(windows(tokens, ctx_size, tokenizer)):
        scored.append(session.log_probs(window, ctx_size // 2))
        report(Progress((index + 1) * ctx_size, n_windows * ctx_size))
    perplexity, stderr = perplexity_of(np.concatenate(scored))
    return Evaluation(
        model=os.fspath(model),
        text=os.fspath(text),
        perplexity=perplexity,
        stderr=stderr,
        tokens=sum(len(part) for part in scored),
        windows=n_windows,
        ctx_size=ctx_size,
        dropped_tokens=len(tokens) % ctx_size,
        seconds=time.perf_counter() - started,
    )


def windows(tokens: Sequence[int], ctx_size: int, tokenizer: SessionTokenizer) -> Iterator[NDArray[np.int32]]:
    """Whole windows int32 [ctx_size], each beginning with BOS where the model adds one."""
    for start in range(0, len(tokens) - ctx_size + 1, ctx_size):
        window = np.asarray(tokens[start : start + ctx_size], dtype=np.int32)
        if tokenizer.add_bos and tokenizer.bos is not None:
            window[0] = tokenizer.bos
        yield window


def perplexity_of(log_probs: Floats) -> tuple[float, float]:
    """(perplexity, standard error) of natural log-probabilities [n]; the error is that of the mean, carried through exp."""
    loss = -float(log_probs.mean())
    perplexity = math.exp(loss) if loss < 700 else math.inf
    if len(log_probs) < 2:
        return perplexity, math.nan
    return perplexity, perplexity * math.sqrt(float(log_probs.var()) / (len(log_probs) - 1))


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, whole. UsageError where it cannot be read, CalibrationError where it is no UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{os.fspath(path)}: is no UTF-8 text (byte {error.start})") from error
