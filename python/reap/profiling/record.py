"""What a run counted, as a profile: the one place that makes its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reap.errors import CalibrationError, EngineError
from reap.profiling.run import RunResult
from reap.profiling.until import Until
from reap.scores.profile import Profile
from reap.scores.records import add_up
from reap.scores.replicates import with_replicates
from reap.text.windows import Calibration


def make_profile(
    result: RunResult,
    source: Calibration,
    *,
    layers: Sequence[int],
    model: Mapping[str, Any],
    engine: Mapping[str, Any],
    until: Until | None = None,
) -> Profile:
    """The profile of a run that has ended.

    Args:
        result: what was counted.
        source: the calibration, read to its end.
        layers: the MoE layers' block indices, in the order of the sums' rows.
        model: the profile's record of the model.
        engine: its record of what ran the model.
        until: what ended the run, or did not.

    Raises:
        EngineError, CalibrationError: no token was counted; of a sample that failed it says why.
    """
    summary = source.summary()
    if not result.parts:
        if result.failed:
            raise EngineError(result.failed[0])
        raise CalibrationError(
            f"{', '.join(summary['files'])}: no token of the calibration was counted, so nothing was measured"
        )
    groups = result.groups
    profile = Profile.from_sums(
        layers=np.asarray(layers, dtype=np.int64),
        **add_up(groups[domain] for domain in sorted(groups, key=lambda name: (name is not None, name))),
        model=model,
        calibration={
            **summary,
            "failed": len(result.failed),
            "failed_samples": list(result.failed),
            **({} if until is None else {"until": until.record()}),
        },
        engine=engine,
        domains={domain: sums for domain, sums in groups.items() if domain is not None},
    )
    return with_replicates(profile, result.parts)
