"""profile(): run a model over calibration text and sum up, expert by expert, what each contributes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np

from reap import _native
from reap.calibration import Calibration, Tokenizer, Window
from reap.checkpoint import Arrays, Checkpoint, State, identify_calibration
from reap.engine import EngineOptions, SessionTokenizer, open_session
from reap.errors import CalibrationError, EngineError, Interrupted, UnsupportedModelError, UsageError
from reap.inspector import ModelInfo, inspect, require_moe
from reap.progress import Progress, ProgressCallback
from reap.scores import Profile
from reap.version import version

NOT_COUNTED = -1
# short samples that may share one batch, as separate sequences
SHARED_SEQUENCES = 32
# this many failures and no success: the fault is not the sample's
HOPELESS = 10


def profile(
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    ctx_size: int = 2048,
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
    chat_template: str | os.PathLike[str] = "none",
    mask: str = "all",
    parse_special: bool = True,
    max_tokens: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    progress: ProgressCallback | None = None,
) -> Profile:
    """Measure what each expert of `model` (a GGUF file) contributes on `calibration` (JSON Lines, text, "-", or dictionaries).

    For the tokens routed to an expert the profile sums g, ‖f‖, g·‖f‖ and (g·‖f‖)², where g is the gate that multiplies the expert's
    output f (Lasby et al., "REAP the Experts", arXiv:2510.13999). Engine options are those of `EngineOptions`, those of the text
    are `Calibration`'s; `max_tokens` stops after that many tokens. `checkpoint` names a file that keeps what was measured, at most
    every `checkpoint_seconds`; with `resume` a run goes on from it, to the same result. A sample that the engine fails on is left out
    whole and named in `profile.calibration["failed_samples"]`.

    Raises:
        UsageError: an option, a file that is not there, a checkpoint of another run (MismatchError).
        FormatError, UnsupportedModelError: the model is damaged, dense, or of a kind that cannot be profiled.
        CalibrationError: the calibration has no usable sample, or a line that cannot be read; it names file and line.
        EngineError: llama.cpp failed.
        Interrupted: Ctrl-C with a checkpoint, which was saved. Without one it is KeyboardInterrupt, answered within one layer.
    """
    info = inspect(model)
    require_moe(info)
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
    source = Calibration(
        calibration,
        ctx_size=ctx_size or info.context_length,
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
            f"stopped after {session.units} samples, which {keeper.path} keeps; --resume (resume=True) goes on from there"
        ) from interrupt
    if keeper:
        keeper.save(run.state())
    return _to_profile(info, options, source, run)


class Run:
    """Feeds windows to a session. What belongs together (a unit: a sample, or one window of a text file) is counted whole or not.

    session  `reap._core.Session`, or an object with the part of it that is used here
    """

    def __init__(
        self,
        session: Any,
        tokenizer: Tokenizer,
        source: Calibration,
        keeper: Checkpoint | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.session = session
        self._tokenizer = tokenizer
        self.domains: list[str | None] = []
        self.failed: dict[int, str] = {}
        self._source = source
        self._keeper = keeper
        self._progress = progress or (lambda _: None)
        self._waiting: list[list[Window]] = []  # short units that will share a batch
        self._tokens_done = 0

    def go(self, state: State) -> None:
        """Run the whole calibration, from where `state` left off."""
        for group, sums in enumerate(state.groups):
            self.session.restore(group, dict(sums), state.units)
        if not state.groups:
            self.session.commit(state.units)
        self.domains = list(state.domains)
        self.failed = dict(state.failed)
        done = state.units
        for unit, windows in groupby(self._source.windows(self._tokenizer), key=lambda window: window.unit):
            if unit < done:
                self._tokens_done += sum(len(window.tokens) for window in windows)
            else:
                self._add(unit, windows)
        self._flush()

    def state(self) -> State:
        """What is committed, for a checkpoint."""
        groups: list[Arrays] = [self.session.sums(group) for group in range(min(len(self.domains), self.session.n_groups))]
        units = self.session.units
        failed = {unit: reason for unit, reason in self.failed.items() if unit < units}
        return State(units, self.domains[: len(groups)], groups, failed)

    def _add(self, unit: int, windows: Iterator[Window]) -> None:
        head: list[Window] = []
        for window in windows:
            head.append(window)
            if not self._fits(head):
                self._flush()
                self._run_long(unit, chain(head, windows))
                return
        if not self._fits([window for waiting in self._waiting for window in waiting] + head):
            self._flush()
        self._waiting.append(head)

    def _fits(self, windows: Sequence[Window]) -> bool:
        n_tokens = sum(len(window.tokens) for window in windows)
        return bool(n_tokens <= self.session.batch_size and len(windows) <= self.session.n_sequences)

    def _run_long(self, unit: int, windows: Iterator[Window]) -> None:
        """A unit that fills more than one batch."""
        try:
            for window in windows:
                for start in range(0, len(window.tokens), self.session.batch_size):
                    self._run_batch([window], start)
        except EngineError as error:
            self._fail(unit, window, error)
        self._commit(1)

    def _flush(self) -> None:
        """Run the units that wait, in one batch; where that fails each alone, to find the one at fault."""
        units, self._waiting = self._waiting, []
        if not units:
            return
        try:
            self._run_batch([window for unit in units for window in unit], 0)
        except EngineError as error:
            if len(units) > 1:
                for unit in units:
                    self._waiting = [unit]
                    self._flush()
                return
            self._fail(units[0][0].unit, units[0][0], error)
        self._commit(len(units))

    def _run_batch(self, windows: Sequence[Window], start: int) -> None:
        """One batch: of a window the tokens from `start` on, of several windows all tokens, each a sequence of its own."""
        part = slice(start, start + self.session.batch_size)
        tokens = [window.tokens[part] for window in windows]
        positions = [np.arange(start, start + len(ids), dtype=np.int32) for ids in tokens]
        sequences = [np.full(len(ids), index, np.int32) for index, ids in enumerate(tokens)]
        groups = [np.where(window.counted[part], self._group(window.domain), NOT_COUNTED).astype(np.int32) for window in windows]
        batch = [np.concatenate(arrays) for arrays in (tokens, positions, sequences, groups)]
        self.session.profile_batch(*batch)
        self._tokens_done += len(batch[0])
        self._progress(Progress(self._tokens_done, self._source.estimated_tokens()))

    def _fail(self, unit: int, window: Window, error: EngineError) -> None:
        self.session.discard()
        self.failed[unit] = f"{window.where}: {error}"
        if len(self.failed) >= HOPELESS and len(self.failed) > self.session.units:
            raise EngineError(f"{window.where}: {error} (and so did each of the {len(self.failed) - 1} samples before it)") from error

    def _commit(self, n_units: int) -> None:
        self.session.commit(n_units)
        if self._keeper and self._keeper.is_due():
            self._keeper.save(self.state())

    def _group(self, domain: str | None) -> int:
        if domain not in self.domains:
            self.domains.append(domain)
        return self.domains.index(domain)


def _prediction_layer(info: ModelInfo) -> int | None:
    """The multi-token-prediction block with experts, which only a context of its own runs; None where there is none."""
    layers = [layer for layer in info.moe_layers if layer >= info.n_layers - info.n_prediction_layers]
    if len(layers) > 1:
        named = ", ".join(map(str, layers))
        raise UnsupportedModelError(f"the layers {named} predict further tokens; the engine can run only one such layer with experts")
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
        raise CalibrationError(f"{', '.join(summary['files'])}: no token of the calibration was counted, so nothing was measured")
    failed = [run.failed[unit] for unit in sorted(run.failed)]
    return Profile.from_sums(
        layers=np.asarray(info.moe_layers, dtype=np.int64),
        **total(list(groups.values())),
        model=_model_record(info),
        calibration={**summary, "failed": len(failed), "failed_samples": failed},
        engine={"reap": version(), "llama_cpp": _native.load().__llama_cpp_commit__, "options": options.record()},
        domains={domain: sums for domain, sums in groups.items() if domain is not None},
    )


def total(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums over all groups; of the largest norm the largest."""
    total = dict(groups[0])
    for sums in groups[1:]:
        for name, values in sums.items():
            total[name] = np.maximum(total[name], values) if name == "norm_max" else total[name] + values
    return total


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
