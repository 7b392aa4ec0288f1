"""repair(): an adapter that gives back what the removed experts did, as far as those that were kept can."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.engine.session import open_session, open_vocabulary
from reap.errors import CalibrationError, MismatchError, UsageError
from reap.evaluation.paired_difference import Floats, standard_error
from reap.evaluation.quality_metrics import Predictions, divergence
from reap.files.arguments import divide as divide_arguments
from reap.files.arguments import shows
from reap.files.atomic import check_output, paths_of, write
from reap.files.paths import PathLike
from reap.files.version import version
from reap.gguf.adapter import MODEL_KEY, new_adapter
from reap.gguf.model_info import ModelInfo, inspect, require_moe
from reap.gguf.reader import GGUFModel
from reap.gguf.tensor_types import ValueType
from reap.gguf.writer import NewFile, encode_pair
from reap.profiling.interrupts import endings_as_interrupts
from reap.progress import Progress, ProgressCallback
from reap.repairing.captured import Divided, Windows, capture_streams, capture_tokens, divide, measure_scale
from reap.repairing.solve import Correction, Tokens, fit_layer
from reap.text.sources import Source
from reap.text.windows import Calibration, TextArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from reap import _core

RANK = 16
#: Of arrays that are captured at a time; the models' own memory is not in it.
MEMORY = 4 << 30
#: Windows that have fewer tokens say little, and none of them would be left for each part.
FEWEST_WINDOWS = 20
#: Tokens told apart at a position, for the divergence.
_N_TOP = 64
_COPIES = 3  # of what enters the down projections, while a layer is fitted


@dataclass(frozen=True)
class LayerRepair:
    """What came out for one layer."""

    ridge: float
    """λ, as a share of the mean of the diagonal of an expert's second moments; 0 where there is no correction."""
    left: float
    """The share of the squared difference of the hidden states that is left on tokens which the fit had not seen."""
    scale: float
    """What the layer multiplies its experts' outputs by on their way into the hidden states."""


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did."""

    model: Path
    """The pruned model that was repaired."""
    source: Path
    """The whole one."""
    output: Path | None
    """The adapter; None where the repair did not help, and nothing was written."""
    rank: int
    """Of each expert's correction."""
    layers: Mapping[int, LayerRepair]
    """GGUF block index -> what came out for it."""
    tokens: int
    """That the corrections were fitted on."""
    checked_tokens: int
    """That had no part in the fit, and on which the divergences were measured."""
    kl_before: float
    """Mean KL(whole ‖ pruned) on these, in nats."""
    kl_after: float
    """The same with the adapter."""
    kl_stderr: float
    """Standard error of the difference of the two."""
    n_bytes: int
    """Size of the adapter."""
    seconds: float
    """That the call took."""
    warnings: tuple[str, ...] = ()
    """Sentences worth reading."""

    @property
    def helps(self) -> bool:
        """Whether the divergence fell."""
        return self.kl_after < self.kl_before

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        paths = {"model": str(self.model), "source": str(self.source), "output": self.output and str(self.output)}
        layers = {str(layer): asdict(found) for layer, found in self.layers.items()}
        return {**asdict(self), **paths, "helps": self.helps, "layers": layers}


@dataclass(frozen=True)
class _Judged:
    """Mean divergence from the whole model without the adapter and with it, and the error of their difference."""

    before: float
    after: float
    stderr: float

    @classmethod
    def of(cls, before: Sequence[Floats], after: Sequence[Floats]) -> _Judged:
        """From the divergences at the positions of each window. The error is that of the windows' means."""
        means = [float(np.concatenate(side).mean()) for side in (before, after)]
        change = np.array([theirs.mean() - ours.mean() for ours, theirs in zip(before, after, strict=True)])
        return cls(means[0], means[1], standard_error(change[:, None]))


class Arguments(EngineArguments, TextArguments, total=False):
    """How the models are run (`EngineOptions`) and the text is read (`Calibration`)."""


@shows((TextArguments, Calibration))
@shows_engine_options(ctx_size=EVALUATION_CTX_SIZE)
def repair(
    model: PathLike,
    *,
    source: PathLike,
    calibration: Source,
    output: PathLike,
    rank: int = RANK,
    memory: int = MEMORY,
    type: str = "F16",
    force: bool = False,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    **options: Unpack[Arguments],
) -> RepairReport:
    """Fit an adapter for the pruned `model`, and write it where it brings the model nearer to the whole one.

    Layer by layer, in the pruned model as it is repaired so far, corrections of low rank of the kept experts' down
    projections are fitted to what the whole model's hidden states have and the pruned one's have not
    (`reap.repairing.solve`). No byte of the model changes: `llama-server -m small.gguf --lora repair.gguf` runs both. A
    tenth of the calibration's windows has no part in the fit; where the divergence from the whole model does not fall
    on them, nothing is written.

    Args:
        model: a GGUF file that `prune` wrote.
        source: the model that it was pruned from.
        calibration: what the corrections are fitted on; as in `profile`.
        output: the adapter to write.
        rank: of each expert's correction.
        memory: bytes for what is captured at a time; with less, the whole model is run more often, and where one layer
            does not fit, on fewer windows.
        type: "F16" or "F32", of the adapter's tensors.
        force: replace an output that exists.
        allow_mismatch: go on where the model does not say that it is of this source.
        progress: called with tokens run.
        options: those of the text (`Calibration`) and of the engine (`EngineOptions`). ctx_size is 512 by default, or
            what the model was trained with where that is less.

    Raises:
        UsageError, FormatError, CalibrationError, EngineError: as `profile`; a calibration of few windows.
        MismatchError: the model was not pruned from this source.
        UnsupportedModelError: an architecture whose experts cannot be corrected so.
    """
    started = time.perf_counter()
    for_engine, for_text = divide_arguments("repair", options, EngineArguments, TextArguments)
    engine = EngineOptions.of(for_engine, ctx_size=EVALUATION_CTX_SIZE)
    _check_options(rank, memory, type)
    target = Path(output)
    check_output(target, [Path(path) for path in paths_of(model, source, calibration)], force=force)
    small, whole = inspect(model), inspect(source)
    require_moe(small)
    warnings = _check_pair(small, whole, allow_mismatch=allow_mismatch)
    engine = engine.within(for_engine, whole.context_length)
    reader = Calibration(calibration, ctx_size=engine.ctx_size or whole.context_length, **for_text)
    reader.check()
    with endings_as_interrupts(), tempfile.TemporaryDirectory(prefix="reap-repair-") as folder:
        job = _Job(small, whole, engine, rank, memory, Path(folder), progress)
        job.read(reader)
        job.fit()
        judged = job.check()
        file = job.adapter(type)
    result = RepairReport(
        model=small.path,
        source=whole.path,
        output=target,
        rank=rank,
        layers=job.layers,
        tokens=job.windows.n_tokens,
        checked_tokens=sum(map(len, job.windows.checked)),
        kl_before=judged.before,
        kl_after=judged.after,
        kl_stderr=judged.stderr,
        n_bytes=file.n_bytes,
        seconds=time.perf_counter() - started,
        warnings=(*warnings, *job.warnings),
    )
    if not result.helps:
        return replace(result, output=None)
    write(target, file, force=force)
    return result


def _check_options(rank: int, memory: int, type: str) -> None:
    for name, value in (("rank", rank), ("memory", memory)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} is {value!r}, expected a whole number of at least 1")
    if type not in ("F16", "F32"):
        raise UsageError(f"type is {type!r}, expected F16 or F32")


def _check_pair(small: ModelInfo, whole: ModelInfo, *, allow_mismatch: bool) -> list[str]:
    """Sentences on what does not fit, where that is allowed; MismatchError where it is not."""
    said = (small.provenance or {}).get("reap.source.fingerprint")
    if said is None:
        found = f"{small.path} does not say what it was pruned from"
    elif said not in (whole.fingerprint, *whole.older_fingerprints):
        found = f"{small.path} was pruned from a model with fingerprint {said}, {whole.path} has {whole.fingerprint}"
    else:
        found = ""
    for name in ("architecture", "n_layers", "n_embd", "vocab_size", "moe_layers"):
        ours, theirs = getattr(small, name), getattr(whole, name)
        if ours != theirs:  # nothing could be compared
            raise MismatchError(f"{small.path} and {whole.path} differ in {name}: {ours} and {theirs}")
    if found and not allow_mismatch:
        raise MismatchError(f"{found}; allow_mismatch=True (--allow-mismatch) goes on all the same")
    return [found] if found else []


@dataclass
class _Job:
    """The steps of a repair, in their order: read, fit, check, adapter."""

    small: ModelInfo
    whole: ModelInfo
    engine: EngineOptions
    rank: int
    memory: int
    folder: Path
    progress: ProgressCallback | None
    layers: dict[int, LayerRepair] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    corrections: dict[int, Correction] = field(default_factory=dict)
    session: _core.Session | None = None
    _done: int = 0
    _total: int = 0

    def read(self, source: Calibration) -> None:
        """Cut the calibration into windows and deal them out."""
        tokenizer = open_vocabulary(self.whole.path)
        windows: Windows = [window.tokens for window in source.windows(tokenizer) if len(window.tokens) > 1]
        if len(windows) < FEWEST_WINDOWS:
            raise CalibrationError(
                f"the calibration has {len(windows)} windows of at most {source.ctx_size} tokens, expected at least"
                f" {FEWEST_WINDOWS}: some are kept out of the fit"
            )
        most = self.memory // self._layer_bytes()
        n_tokens = sum(map(len, windows))
        if n_tokens > most:
            step = n_tokens / max(most, 1)
            windows = [windows[int(index * step)] for index in range(int(len(windows) / step))]
            if len(windows) < FEWEST_WINDOWS:
                raise UsageError(f"memory is {self.memory:,} bytes; one layer of {FEWEST_WINDOWS} windows needs more")
            self.warnings.append(
                f"{n_tokens:,} tokens of one layer do not fit the memory of {self.memory:,} bytes; every"
                f" {step:.1f}th window was used"
            )
        self.windows: Divided = divide(windows)

    def _layer_bytes(self) -> int:
        """Bytes of one layer for a token, at the most: hidden states, and what enters the down projections."""
        with GGUFModel.open(self.small.path) as model:
            widths = [t.shape[0] for name, t in model.tensors.items() if name.endswith(".ffn_down_exps.weight")]
        return 4 * (3 * self.small.n_embd + _COPIES * self.small.n_experts_used * max(widths, default=0))

    def fit(self) -> None:
        """Fit the layers in groups whose hidden states fit the memory beside what one of them needs."""
        n_trunk = self.small.n_layers - self.small.n_prediction_layers
        layers = [layer for layer in self.small.moe_layers if layer < n_trunk]
        spare = self.memory - self.windows.n_tokens * self._layer_bytes()
        size = 1 + max(0, spare // (4 * self.windows.n_tokens * self.small.n_embd))
        groups = [layers[start : start + size] for start in range(0, len(layers), size)]
        self._total = self.windows.n_tokens * (len(groups) + len(layers)) + 3 * sum(map(len, self.windows.checked))
        small: _core.Session | None = None
        for group in groups:
            whole = self._open(self.whole)
            streams = capture_streams(whole, self.windows.fitted, group, self.small.n_embd, self._told)
            if group is groups[0]:
                self.expected = [_predict(whole, window, self._told) for window in self.windows.checked]
            del whole
            small = small or self._open(self.small)
            for layer in group:
                self._fit_layer(small, layer, streams.pop(layer))
        self.session = small

    def _open(self, info: ModelInfo) -> _core.Session:
        return open_session(info.path, replace(self.engine, batch_size=None), n_bytes=info.n_bytes)

    def _told(self, n_tokens: int) -> None:
        self._done += n_tokens
        if self.progress is not None:
            self.progress(Progress(self._done, self._total))

    def _fit_layer(self, session: _core.Session, layer: int, whole: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        tokens = capture_tokens(session, self.windows.fitted, layer, whole, self._told)
        fit = fit_layer(tokens, self.windows.is_unseen, self.small.n_experts, self.rank)
        scale = 1.0
        if fit.correction is not None:
            scale = self._add(session, layer, fit.correction, tokens)
        self.layers[layer] = LayerRepair(fit.ridge, fit.left, scale)

    def _add(self, session: _core.Session, layer: int, correction: Correction, tokens: Tokens) -> float:
        """Put a correction into force, as strong as the layer lets it reach the hidden states."""
        window = self.windows.fitted[0]
        before = session.capture(window, [layer], False)[layer]["stream"]
        self.corrections[layer] = correction
        self._apply(session)
        change = session.capture(window, [layer], False)[layer]["stream"] - before
        scale = measure_scale(tokens.first(len(window)), change, correction, layer)
        if abs(scale - 1) > 0.02:
            self.corrections[layer] = Correction(correction.a, correction.b / np.float32(scale))
            self._apply(session)
        return scale

    def _apply(self, session: _core.Session) -> None:
        path = self.folder / "fitted.gguf"
        write(path, self.adapter("F32"), force=True)
        session.set_adapters([path])

    def check(self) -> _Judged:
        """The divergence from the whole model on the windows that were kept out, without the adapter and with it."""
        session = self.session
        assert session is not None
        found = []
        for adapters in ([], [self.folder / "fitted.gguf"] if self.corrections else []):
            session.set_adapters(adapters)
            found.append(
                [
                    divergence(_predict_ids(session, window, expected, self._told), expected)
                    for window, expected in zip(self.windows.checked, self.expected, strict=True)
                ]
            )
        return _Judged.of(*found)

    def _kept(self) -> dict[str, list[int]]:
        """Layer -> the source's experts that the pruned model has, as its file says."""
        said = self.small.provenance or {}
        found = {layer: said.get(f"reap.kept.{layer}") for layer in self.corrections}
        return {str(layer): [int(expert) for expert in ids] for layer, ids in found.items() if ids is not None}

    def adapter(self, type_name: str) -> NewFile:
        """What was fitted so far, as a file to write."""
        text = ValueType.STRING
        pairs = [
            encode_pair("general.name", f"repair of {self.small.name or self.small.path.stem}", text),
            encode_pair("reap.version", version(), text),
            encode_pair("reap.repair.rank", self.rank, ValueType.UINT32),
            encode_pair("reap.repair.kept", json.dumps(self._kept()), text),
            encode_pair(MODEL_KEY, json.dumps(self.small.record()), text),
        ]
        factors = {f"blk.{layer}.ffn_down_exps.weight": (it.a, it.b) for layer, it in self.corrections.items()}
        return new_adapter(self.small.architecture, factors, pairs, type_name)


def _predict(session: _core.Session, window: np.ndarray[Any, Any], told: Callable[[int], None]) -> Predictions:
    n_top = min(_N_TOP, session.n_vocab)
    found = session.predict_top(window, 1, n_top)
    told(len(window))
    ids = found["ids"] if n_top < session.n_vocab else None
    return Predictions(found["next"], found["best"], ids, found["log_probs"], found["rest"])


def _predict_ids(
    session: _core.Session, window: np.ndarray[Any, Any], expected: Predictions, told: Callable[[int], None]
) -> Predictions:
    if expected.ids is None:
        return _predict(session, window, told)
    found = session.predict_ids(window, 1, expected.ids)
    told(len(window))
    return Predictions(found["next"], found["best"], expected.ids, found["log_probs"], found["rest"])
