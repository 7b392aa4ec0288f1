"""preview(): what a calibration is for a model, from its tokenizer alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from reap.engine.options import PROFILE_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.engine.session import open_session, open_vocabulary
from reap.errors import UsageError
from reap.files.arguments import divide, shows
from reap.files.paths import PathLike
from reap.gguf.model_info import ModelInfo, inspect, require_moe
from reap.profiling.gguf import Arguments
from reap.progress import ProgressCallback
from reap.text.preview import Preview, preview_text
from reap.text.sources import Source
from reap.text.windows import Calibration, TextArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NOT_COUNTED = -1
_MEASURED_SECONDS = 3.0
_MOST_BATCHES = 20


@shows((TextArguments, Calibration))
@shows_engine_options(ctx_size=PROFILE_CTX_SIZE)
def preview(
    model: PathLike,
    calibration: Source,
    *,
    show: int = 3,
    measure_time: bool = False,
    progress: ProgressCallback | None = None,
    **options: Unpack[Arguments],
) -> Preview:
    """Say what a calibration is before hours are spent on it. Of the model only the tokenizer is read.

    Args:
        model: a GGUF file.
        calibration: as of `reap.profile`: a path, "-", a folder, paths, a mapping of domains to them, dictionaries.
        show: how many samples to keep as the engine gets them, from the first.
        measure_time: load the model and run some batches, to estimate how long a profile takes.
        progress: told how many tokens were read.
        options: those of the text and of the engine, as of `reap.profile`. Lines that cannot be used are counted,
            unless `skip_bad_lines` is False: then the first one is an error.

    Raises:
        UsageError: an option, or a file that is not there.
        FormatError, UnsupportedModelError: the model is damaged, or `measure_time` is asked of a dense one.
        CalibrationError: the calibration has no usable sample.
        EngineError: the tokenizer cannot be read.
    """
    if type(show) is not int or show < 0:
        raise UsageError(f"show is {show!r}, expected a whole number of at least 0")
    for_engine, for_text = divide("preview", options, EngineArguments, TextArguments)
    engine = EngineOptions.of(for_engine, ctx_size=PROFILE_CTX_SIZE)
    info = inspect(model)
    engine = engine.within(for_engine, info.context_length)
    for_text = {"skip_bad_lines": True, **for_text}
    source = Calibration(calibration, ctx_size=engine.ctx_size or info.context_length, **for_text)
    tokenizer = open_vocabulary(model)
    keep = max(show, int(measure_time))
    seen = preview_text(source, tokenizer, model=info.name or info.path.name, show=keep, progress=progress)
    if info.is_moe:
        seen.n_experts = info.n_experts
        seen.tokens_per_expert = seen.counted_tokens * info.n_experts_used / info.n_experts
    if measure_time:
        tokens = [token for sample in seen.shown for token in sample.tokens]
        seen.tokens_per_second = _measure_speed(info, engine, tokens)
        seen.seconds = seen.tokens / seen.tokens_per_second
        del seen.shown[show:]
    return seen


def _measure_speed(info: ModelInfo, options: EngineOptions, tokens: list[int]) -> float:
    """Tokens a second of full batches of such tokens, as a profile runs them."""
    require_moe(info)
    session = open_session(info.path, options, n_bytes=info.n_bytes, head_on_host=True)
    trunk = [layer for layer in info.moe_layers if layer < info.n_layers - info.n_prediction_layers]
    session.start_profile(trunk, info.n_experts)
    size = min(session.batch_size, session.ctx_size)
    ids = np.resize(np.asarray(tokens, dtype=np.int32), size)
    positions = np.arange(size, dtype=np.int32)
    nowhere = np.full(size, _NOT_COUNTED, dtype=np.int32)
    n_batches = 0
    for is_warm in (False, True):
        started, n_batches = time.monotonic(), 0
        while n_batches < (_MOST_BATCHES if is_warm else 1) and time.monotonic() - started < _MEASURED_SECONDS:
            session.profile_batch(ids, positions, np.zeros(size, dtype=np.int32), nowhere)
            session.discard()
            n_batches += 1
        seconds = time.monotonic() - started
    return n_batches * size / max(seconds, 1e-9)
