"""What `reap evaluate --tasks --json` printed, as rows of a table for the page and the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from reap.files.formatting import number_text as number
from reap.files.strict_json import Node
from reap.reporting.page import Section, Table

COLUMNS = (
    "model",
    "task",
    "questions",
    "value",
    "whole model",
    "difference",
    "only this, only the whole",
    "McNemar's p",
)
EXPLAINED = (
    "By lm-evaluation-harness. Both models answered the same questions, so the difference, with the standard error of"
    " the questions' differences, says more than two values with errors of their own. Of answers that are right or"
    " wrong: how many questions only one of the two answered rightly, and how probable so uneven a split is where"
    " neither is better."
)


def is_of_tasks(evaluation: Node) -> bool:
    """Whether an evaluation is one of tasks, and not of a text."""
    return "results" in evaluation and "text" not in evaluation


def task_rows(evaluation: Node, names: Mapping[str, str] | None = None) -> Iterator[list[str]]:
    """Rows under `COLUMNS`: text, not escaped; names: what a choice of experts goes by, by its digest. FormatError for
    a file that is damaged."""
    model = Path(evaluation["model"].string()).name
    plan = evaluation.members().get("plan")
    known = (names or {}).get(str(plan.get("experts_sha256"))) if isinstance(plan, dict) else None
    if known is not None:
        model = known
    elif plan is not None:
        keep = evaluation["plan"]["keep"].integer()
        model += f", as if pruned to {keep} by {evaluation['plan']['metric'].string()}"
    results = evaluation["results"]
    for index in range(len(results.entries())):
        yield [model, *_row(results.entry(index))]


def _row(result: Node) -> list[str]:
    filtered = result["filter"].string()
    metric = result["metric"].string() + ("" if filtered == "none" else f" ({filtered})")
    row = [f"{result['task'].string()}: {metric}", f"{result['questions'].integer():,}"]
    row.append(_with_error(result["value"].number(), _optional(result, "stderr")))
    if result.members().get("whole") is None:
        return [*row, "–", "–", "–", "–"]
    whole = result["whole"]
    gained, lost = whole.members().get("gained"), whole.members().get("lost")
    counted = "–" if gained is None else f"{whole['gained'].integer():,}, {whole['lost'].integer():,}"
    difference = _with_error(whole["difference"].number(), _optional(whole, "stderr"), signed=True)
    return [*row, number(whole["value"].number()), difference, counted if lost is not None else "–",
            number(_optional(whole, "p_value"), 2)]  # fmt: skip


def _optional(node: Node, key: str) -> float | None:
    return None if node.members().get(key) is None else node[key].number()


def _with_error(value: float, stderr: float | None, *, signed: bool = False) -> str:
    text = f"{value:+.4g}" if signed else number(value)
    return text if stderr is None else f"{text} ± {number(stderr, 2)}"


def tasks_section(evaluations: Sequence[Node]) -> Section:
    """The page's section about benchmarks."""
    rows = [row for evaluation in evaluations for row in task_rows(evaluation)]
    return Section("tasks", "Benchmarks", EXPLAINED, table=Table(COLUMNS, rows))
