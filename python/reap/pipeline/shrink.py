"""shrink(): from a model to a smaller one, with what it costs, as one job in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reap.engine.options import PROFILE_CTX_SIZE, shows_engine_options
from reap.errors import Interrupted
from reap.evaluation.sweep_table import Sweep
from reap.files.arguments import shows
from reap.files.atomic import check_distinct
from reap.files.atomic_directory import check_apart
from reap.files.paths import PathLike
from reap.files.strict_json import read_json
from reap.pipeline.job_folder import JobFolder, Step, opened
from reap.pipeline.shrink_options import Goal, ShrinkArguments, ShrinkOptions, shows_shrink_options
from reap.pipeline.shrink_result import ShrinkResult, StepReport, result_of
from reap.pipeline.shrink_steps import EVALUATION, SWEEP, ShrinkSteps, chosen_row
from reap.profiling.interrupts import endings_as_interrupts
from reap.progress import ProgressCallback
from reap.scores.ranking import Keep
from reap.text.evaluation_text import Text
from reap.text.sources import Source
from reap.text.windows import Calibration, TextArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORM = "reap.shrink"


@shows((TextArguments, Calibration))
@shows_engine_options(ctx_size=PROFILE_CTX_SIZE)
@shows_shrink_options
def shrink(
    model: PathLike,
    output_dir: PathLike,
    *,
    calibration: Source,
    text: Text,
    keep: Keep | None = None,
    target_size: int | str | None = None,
    max_ppl_increase: float | str | None = None,
    force: bool = False,
    on_step: Callable[[str], None] | None = None,
    progress: ProgressCallback | None = None,
    **options: Unpack[ShrinkArguments],
) -> ShrinkResult:
    """Make `model` smaller: profile it, compare criteria, choose, prune, and judge the result.

    Every step leaves its ordinary file in `output_dir`, and `shrink.json` there says what each was made of. The same
    call again goes on where an earlier one stopped, and runs only the steps whose inputs (by content) or options
    changed, or whose file is gone.

    The held-out text is divided before anything starts: of each domain every other window (`text-choose.jsonl`)
    compares criteria and sizes, the others (`text-judge.jsonl`) judge the pruned file and had no part in the choice.

    Args:
        model: a GGUF file.
        output_dir: a folder, made where it is not there. Files in it that are not this job's are left alone.
        calibration: as of `reap.profile`, from files.
        text: held-out text, as of `reap.evaluate`; at least two windows of each domain.
        keep: a number of experts, or a fraction: `resolve_keep`. Give this or one of the two limits.
        target_size: bytes, or a text like "12G" (10^9), that the new file may have.
        max_ppl_increase: 0.05 or "5%": the fewest experts at which the perplexity on the first part rises by no more.
        force: write anew what was changed since this job wrote it.
        on_step: told the name of each step that is run, before it begins.
        progress: told how far the step is.
        options: how the experts are chosen (`SelectionArguments`), how the calibration is read (`Calibration`), and
            those of the engine (`EngineOptions`); a `ctx_size` holds for the calibration and for the text.

    Returns:
        The new file, what it costs, how clearly the criterion won, and what to try next.

    Raises:
        UsageError: an option, a file that is not there, a file in the folder that is in the way or was changed, a
            folder that another process works in.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the same call goes on from there.
        FormatError, UnsupportedModelError, CalibrationError, EngineError, OutputError: as the steps.
    """
    goal = Goal.of(keep, target_size, max_ppl_increase)
    given = ShrinkOptions.of(model, calibration, text, goal, dict(options))
    folder_path = Path(output_dir)
    check_apart(folder_path, given.inputs)
    with endings_as_interrupts(), opened(folder_path, FORM) as folder:
        steps = ShrinkSteps(given, folder, progress)
        check_distinct([folder_path / name for step in steps.all() for name in step.outputs], given.inputs)
        folder.check(steps.all(), force=force)
        done = [_run(folder, step, on_step) for step in steps.all()]
        table = Sweep.load(folder_path / SWEEP)
        evaluation = read_json(folder_path / EVALUATION, what="evaluation").members()
        return result_of(given, folder_path, chosen_row(table, given), table, evaluation, done)


def _run(folder: JobFolder, step: Step, on_step: Callable[[str], None] | None) -> StepReport:
    started = time.perf_counter()
    try:
        identity = step.identity()
        if folder.is_done(step, identity):
            folder.clean(step)
            return StepReport(step.name, False, time.perf_counter() - started)
        if on_step is not None:
            on_step(step.name)
        folder.run(step, identity)
    except (KeyboardInterrupt, Interrupted) as stop:
        raise Interrupted(
            f"stopped in the step {step.name}; {folder.path} keeps what is done, and the same command goes on from"
            " there"
        ) from stop
    return StepReport(step.name, True, time.perf_counter() - started)
