"""What a run counted, as a profile: the one place that makes its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reap.errors import CalibrationError, EngineError
from reap.profiling.resume import Arrays
from reap.profiling.run import RunResult
from reap.scores.profile import Profile
from reap.text.windows import Calibration


def make_profile(
    result: RunResult,
    source: Calibration,
    *,
    layers: Sequence[int],
    model: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> Profile:
    """The profile of a run that has ended.

    Args:
        result: what was counted.
        source: the calibration, read to its end.
        layers: the MoE layers' block indices, in the order of the sums' rows.
        model: the profile's record of the model.
        engine: its record of what ran the model.

    Raises:
        EngineError, CalibrationError: no token was counted; of a sample that failed it says why.
    """
    summary = source.summary()
    if not result.groups:
        if result.failed:
            raise EngineError(result.failed[0])
        raise CalibrationError(
            f"{', '.join(summary['files'])}: no token of the calibration was counted, so nothing was measured"
        )
    return Profile.from_sums(
        layers=np.asarray(layers, dtype=np.int64),
        **add_up(result.groups[domain] for domain in sorted(result.groups, key=lambda name: (name is not None, name))),
        model=model,
        calibration={**summary, "failed": len(result.failed), "failed_samples": list(result.failed)},
        engine=engine,
        domains={domain: sums for domain, sums in result.groups.items() if domain is not None},
    )


def add_up(groups: Iterable[Arrays]) -> dict[str, Any]:
    """The sums over all groups; of the largest norm the largest."""
    together: dict[str, Any] = {}
    for sums in groups:
        for name, values in sums.items():
            if name not in together:
                together[name] = values
            else:
                combine = np.maximum if name == "norm_max" else np.add
                together[name] = combine(together[name], values)
    return together
