"""profile(): run a model over calibration text and sum up, expert by expert, what each contributes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from reap.engine import native
from reap.engine.options import PROFILE_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.engine.session import SessionTokenizer, open_session
from reap.errors import ReapWarning, UnsupportedModelError, UsageError
from reap.files.arguments import divide, shows
from reap.files.atomic import check_distinct
from reap.files.paths import PathLike
from reap.files.version import version
from reap.gguf.missing_keys import sentences
from reap.gguf.model_info import ModelInfo, inspect, require_moe
from reap.gguf.shards import model_paths
from reap.profiling.record import make_profile
from reap.profiling.resume import SECONDS, ResumeFile, identify
from reap.profiling.run import SHARED_SEQUENCES, measure
from reap.profiling.until import Until, UntilArguments
from reap.progress import ProgressCallback
from reap.scores.hash_routing import HASH_ROUTING, to_record
from reap.scores.profile import Profile
from reap.text.sources import Source
from reap.text.windows import Calibration, TextArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack


_NOTHING_NEW = (
    "the run went on from a resume file and had no token left to measure, so the profile does not say who takes a"
    " removed expert's place in the layers that choose experts by token id; profile without --resume to prune the model"
)


class Arguments(EngineArguments, TextArguments, UntilArguments, total=False):
    """How a model is run (`EngineOptions`), the text is read (`Calibration`), and when it is enough (`Until.of`)."""


@shows((TextArguments, Calibration), (UntilArguments, Until.of))
@shows_engine_options(ctx_size=PROFILE_CTX_SIZE)
def profile(
    model: PathLike,
    calibration: Source,
    *,
    prediction_layers: bool = True,
    checkpoint: PathLike | None = None,
    resume: bool = False,
    checkpoint_seconds: float = SECONDS,
    progress: ProgressCallback | None = None,
    **options: Unpack[Arguments],
) -> Profile:
    """Measure what each expert of `model` (a GGUF file) contributes on `calibration` (JSON Lines, text, "-", or
    dictionaries).

    For the tokens routed to an expert the profile sums g, ‖f‖, g·‖f‖ and (g·‖f‖)², where g is the gate that multiplies
    the expert's output f (Lasby et al., "REAP the Experts", arXiv:2510.13999). A sample that the engine fails on is
    left out whole and named in `profile.calibration["failed_samples"]`. What the engine warns of is a ReapWarning, and
    in `profile.engine["warnings"]`. `ctx_size` is 2,048 by default, or what the model was trained with where that is
    less.

    Args:
        model: a GGUF file, the first one where it is split.
        calibration: what is read; `Calibration` explains it and the options of the text.
        prediction_layers: profile a multi-token-prediction block with experts as well.
        checkpoint: a file that keeps what was measured, whatever ends the run.
        resume: go on from that file, to the same result.
        checkpoint_seconds: between two savings, at least.
        progress: told after each batch how far the run is.
        options: those of the text (`Calibration`) and of the engine (`reap.engine.options.EngineOptions`), and
            `until`, `keep`, `metric`: with until=0.98, keep=0.5 the run ends once another profile of as much text
            would keep 98 % of the same half of the experts (`Profile.stability`), all domains together.

    Raises:
        UsageError: an option, a file that is not there, a resume file that is in the way or of another run
            (MismatchError).
        FormatError, UnsupportedModelError: the model is damaged, dense, or of a kind that cannot be profiled.
        CalibrationError: the calibration has no usable sample, or a line that cannot be read; it names file and line.
        EngineError: llama.cpp failed.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP with a checkpoint, which was saved. Without one Ctrl-C is
            KeyboardInterrupt. It is answered within one layer.
    """
    for_engine, for_text, for_until = divide("profile", options, EngineArguments, TextArguments, UntilArguments)
    engine = EngineOptions.of(for_engine, ctx_size=PROFILE_CTX_SIZE)
    info = inspect(model)
    require_moe(info)
    engine = engine.within(for_engine, info.context_length)
    source = Calibration(calibration, ctx_size=engine.ctx_size or info.context_length, **for_text)
    until = Until.of(info.record(), **for_until)
    layers, prediction = _layers(info, prediction_layers)
    keeper = None
    if checkpoint is not None:
        check_distinct([checkpoint], (*model_paths(model), *source.inputs))
        prints = {"fingerprint": info.fingerprint, "router_fingerprint": info.router_fingerprint}
        identity = identify({**prints, "n_bytes": info.n_bytes, "layers": layers}, engine.record(), source)
        shape = (len(layers), info.n_experts)
        keeper = ResumeFile(checkpoint, identity, shape=shape, resume=resume, seconds=checkpoint_seconds)
    elif resume:
        raise UsageError("resume needs a checkpoint to go on from")
    source.check()  # before a model is loaded for nothing
    try:
        session = open_session(
            model,
            engine,
            n_sequences=SHARED_SEQUENCES,
            n_bytes=info.n_bytes,
            head_on_host=True,
            prediction_layer=prediction,
        )
        session.start_profile(layers, info.n_experts)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{info.path}: {info.architecture} cannot be profiled: {error}") from error
    said = [*sentences(info.missing_keys, engine.given_metadata()), *session.warnings()]
    for warning in said:
        warnings.warn(warning, ReapWarning, stacklevel=2)
    result = measure(session, SessionTokenizer(session), source, keeper, progress, until)
    ran_by = {"reap": version(), "llama_cpp": native.load().__llama_cpp_commit__, "options": engine.record()}
    if said:
        ran_by["warnings"] = said
    record = info.record()
    if info.hash_layers:
        likeness = session.router_likeness()
        record[HASH_ROUTING] = to_record(likeness)
        if not all(n_tokens for n_tokens, _, _ in likeness.values()):
            del record[HASH_ROUTING]
            warnings.warn(_NOTHING_NEW, ReapWarning, stacklevel=2)
    return make_profile(result, source, layers=layers, model=record, engine=ran_by, until=until)


def _layers(info: ModelInfo, prediction_layers: bool) -> tuple[list[int], int | None]:
    """The MoE layers to profile, and that of them which only a context of its own runs: a multi-token-prediction
    block."""
    first = info.n_layers - info.n_prediction_layers
    trunk = [layer for layer in info.moe_layers if layer < first]
    prediction = [layer for layer in info.moe_layers if layer >= first]
    if not prediction_layers or not prediction:
        return trunk, None
    if len(prediction) > 1:
        named = ", ".join(map(str, prediction))
        raise UnsupportedModelError(
            f"{info.path}: the layers {named} predict further tokens; the engine can run only one such layer with"
            " experts (--no-prediction-layers, prediction_layers=False, profiles the others)"
        )
    return [*trunk, prediction[0]], prediction[0]
