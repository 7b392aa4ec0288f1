"""profile(): run a model over calibration text and sum up, expert by expert, what each contributes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reap import _native
from reap.calibration import Calibration, Window
from reap.engine import EngineOptions, SessionTokenizer, open_session
from reap.errors import CalibrationError
from reap.inspector import ModelInfo, inspect, require_moe
from reap.progress import Progress, ProgressCallback
from reap.scores import Profile
from reap.version import version

if TYPE_CHECKING:
    from reap import _core

NOT_COUNTED = -1


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
    progress: ProgressCallback | None = None,
) -> Profile:
    """Measure what each expert of `model` (a GGUF file) contributes on `calibration` (JSON Lines, text, "-", or dictionaries).

    For the tokens routed to an expert the profile sums g, ‖f‖, g·‖f‖ and (g·‖f‖)², where g is the gate that multiplies the expert's
    output f (Lasby et al., "REAP the Experts", arXiv:2510.13999). Options are those of `EngineOptions` and `Calibration`;
    `max_tokens` stops after that many tokens.

    Raises:
        UsageError: an option, or a file that is not there.
        FormatError, UnsupportedModelError: the model is damaged, dense, or of a kind that cannot be profiled.
        CalibrationError: the calibration has no usable sample, or one that cannot be read; it names file and line.
        EngineError: llama.cpp failed.
        KeyboardInterrupt: Ctrl-C, answered within one layer of the batch under way.
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
    session = open_session(model, options)
    session.start_profile(list(info.moe_layers), info.n_experts)
    run = _Run(session, source, progress)
    run.add_all(source.windows(SessionTokenizer(session)))
    return _to_profile(info, options, source, run)


class _Run:
    """Feeds windows to a session, sample by sample: a sample is counted whole or not at all."""

    def __init__(self, session: _core.Session, source: Calibration, progress: ProgressCallback | None) -> None:
        self.session = session
        self._source = source
        self.domains: list[str | None] = []
        self.tokens = 0
        self._progress = progress or (lambda _: None)

    def add_all(self, windows: Iterable[Window]) -> None:
        sample: int | None = None
        for window in windows:
            if window.sample != sample:
                self.session.commit()
                sample = window.sample
            self._add(window)
        self.session.commit()

    def _add(self, window: Window) -> None:
        group = self._group(window.domain)
        tokens = np.asarray(window.tokens, dtype=np.int32)
        positions = np.arange(len(tokens), dtype=np.int32)
        groups = np.where(window.counted, group, NOT_COUNTED).astype(np.int32)
        for start in range(0, len(tokens), self.session.batch_size):
            part = slice(start, start + self.session.batch_size)
            n_tokens = len(tokens[part])
            self.session.profile_batch(tokens[part], positions[part], np.zeros(n_tokens, np.int32), groups[part])
            self.tokens += n_tokens
            self._progress(Progress(self.tokens, self._source.estimated_tokens()))

    def _group(self, domain: str | None) -> int:
        if domain not in self.domains:
            self.domains.append(domain)
        return self.domains.index(domain)


def _to_profile(info: ModelInfo, options: EngineOptions, source: Calibration, run: _Run) -> Profile:
    summary = source.summary()
    groups = {domain: run.session.sums(group) for group, domain in enumerate(run.domains)}
    if not groups or not any(int(sums["total_tokens"].sum()) for sums in groups.values()):
        raise CalibrationError(f"{', '.join(summary['files'])}: no token of the calibration was counted, so nothing was measured")
    return Profile.from_sums(
        layers=np.asarray(info.moe_layers, dtype=np.int64),
        **_total(list(groups.values())),
        model=_model_record(info),
        calibration=summary,
        engine={"reap": version(), "llama_cpp": _native.load().__llama_cpp_commit__, "options": options.record()},
        domains={domain: sums for domain, sums in groups.items() if domain is not None},
    )


def _total(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        "n_experts": info.n_experts,
        "n_experts_used": info.n_experts_used,
        "n_groups": info.n_groups,
        "n_groups_used": info.n_groups_used,
    }
