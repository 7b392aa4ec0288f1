"""profile(): run a model over calibration text and sum up, expert by expert, what each contributes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from reap.engine import native
from reap.engine.options import PROFILE_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.engine.session import SessionTokenizer, open_session
from reap.errors import CalibrationError, EngineError, Interrupted, UnsupportedModelError, UsageError
from reap.gguf.model_info import ModelInfo, inspect, require_moe
from reap.profiling.resume import Checkpoint, State, identify_calibration
from reap.profiling.run import SHARED_SEQUENCES, Run, total
from reap.progress import ProgressCallback
from reap.scores.profile import Profile
from reap.text.calibration import Calibration
from reap.version import version

if TYPE_CHECKING:
    from typing_extensions import Unpack


@shows_engine_options(ctx_size=PROFILE_CTX_SIZE)
def profile(
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    chat_template: str | os.PathLike[str] = "none",
    mask: str = "all",
    parse_special: bool = True,
    max_tokens: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    progress: ProgressCallback | None = None,
    **engine: Unpack[EngineArguments],
) -> Profile:
    """Measure what each expert of `model` (a GGUF file) contributes on `calibration` (JSON Lines, text, "-", or
    dictionaries).

    For the tokens routed to an expert the profile sums g, ‖f‖, g·‖f‖ and (g·‖f‖)², where g is the gate that multiplies
    the expert's output f (Lasby et al., "REAP the Experts", arXiv:2510.13999). The engine's options are those of
    `reap.engine.options.EngineOptions`, those of the text are `Calibration`'s; `max_tokens` stops after that many
    tokens. `checkpoint` names a file that keeps what was measured, at most every `checkpoint_seconds`; with `resume` a
    run goes on from it, to the same result. A sample that the engine fails on is left out whole and named in
    `profile.calibration["failed_samples"]`.

    Raises:
        UsageError: an option, a file that is not there, a checkpoint of another run (MismatchError).
        FormatError, UnsupportedModelError: the model is damaged, dense, or of a kind that cannot be profiled.
        CalibrationError: the calibration has no usable sample, or a line that cannot be read; it names file and line.
        EngineError: llama.cpp failed.
        Interrupted: Ctrl-C with a checkpoint, which was saved. Without one it is KeyboardInterrupt, answered within one
        layer.
    """
    options = EngineOptions.of(engine, ctx_size=PROFILE_CTX_SIZE)
    info = inspect(model)
    require_moe(info)
    source = Calibration(
        calibration,
        ctx_size=options.ctx_size or info.context_length,
        chat_template=chat_template,
        mask=mask,
        parse_special=parse_special,
        max_tokens=max_tokens,
    )
    keeper = None
    if checkpoint is not None:
        keeper = Checkpoint(checkpoint, _identity(info, options, source), seconds=checkpoint_seconds, resume=resume)
    elif resume:
        raise UsageError("resume needs a checkpoint to go on from")
    state = keeper.load() if keeper else None
    try:
        session = open_session(
            model,
            options,
            n_sequences=SHARED_SEQUENCES,
            n_bytes=info.n_bytes,
            head_on_host=True,
            prediction_layer=_prediction_layer(info),
        )
        session.start_profile(list(info.moe_layers), info.n_experts)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{info.path}: {info.architecture} cannot be profiled: {error}") from error
    run = Run(session, SessionTokenizer(session), source, keeper, progress)
    try:
        run.go(state or State())
    except KeyboardInterrupt as interrupt:
        if keeper is None:
            raise
        keeper.save(run.state())
        raise Interrupted(
            f"stopped after {session.units} samples, which {keeper.path} keeps; --resume (resume=True) goes on from"
            " there"
        ) from interrupt
    if keeper:
        keeper.save(run.state())
    return _to_profile(info, options, source, run)


def _prediction_layer(info: ModelInfo) -> int | None:
    """The multi-token-prediction block with experts, which only a context of its own runs; None where there is none."""
    layers = [layer for layer in info.moe_layers if layer >= info.n_layers - info.n_prediction_layers]
    if len(layers) > 1:
        named = ", ".join(map(str, layers))
        raise UnsupportedModelError(
            f"the layers {named} predict further tokens; the engine can run only one such layer with experts"
        )
    return layers[0] if layers else None


def _identity(info: ModelInfo, options: EngineOptions, source: Calibration) -> dict[str, Any]:
    """What makes two runs the same run."""
    model = {"fingerprint": info.fingerprint, "router_fingerprint": info.router_fingerprint, "n_bytes": info.n_bytes}
    texts = {"chat_template": source.chat_template, "mask": source.mask, "parse_special": source.parse_special}
    return {
        "model": model,
        "calibration": identify_calibration(source.paths),
        "options": {**options.record(), **texts, "max_tokens": source.max_tokens},
        "reap": version(),
    }


def _to_profile(info: ModelInfo, options: EngineOptions, source: Calibration, run: Run) -> Profile:
    summary = source.summary()
    groups = {domain: run.session.sums(group) for group, domain in enumerate(run.domains)}
    if not any(int(sums["total_tokens"].sum()) for sums in groups.values()):
        reason = next(iter(run.failed.values()), None)
        if reason:
            raise EngineError(reason)
        raise CalibrationError(
            f"{', '.join(summary['files'])}: no token of the calibration was counted, so nothing was measured"
        )
    failed = [run.failed[unit] for unit in sorted(run.failed)]
    return Profile.from_sums(
        layers=np.asarray(info.moe_layers, dtype=np.int64),
        **total(list(groups.values())),
        model=_model_record(info),
        calibration={**summary, "failed": len(failed), "failed_samples": failed},
        engine={"reap": version(), "llama_cpp": native.load().__llama_cpp_commit__, "options": options.record()},
        domains={domain: sums for domain, sums in groups.items() if domain is not None},
    )


def _model_record(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name or info.path.stem,
        "architecture": info.architecture,
        "fingerprint": info.fingerprint,
        "router_fingerprint": info.router_fingerprint,
        "n_layers": info.n_layers,
        "n_embd": info.n_embd,
        "n_experts": info.n_experts,
        "n_experts_used": info.n_experts_used,
        "n_groups": info.n_groups,
        "n_groups_used": info.n_groups_used,
    }
