"""What an evaluation found, in words: of a text, and of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap.cli.show import print_facts, print_table, say
from reap.files.formatting import number_text, percent_text

if TYPE_CHECKING:
    from reap.evaluation.loops import LoopMetrics
    from reap.evaluation.result import Evaluation
    from reap.evaluation.tasks import TaskEvaluation, TaskResult


def print_tasks(result: TaskEvaluation) -> None:
    """A table of the tasks' figures, beside the whole model's where it answered as well."""
    compared = ["whole model", "difference", "McNemar p"] if result.reference else []
    print_table(["task", "metric", "questions", "value", *compared], map(_task_row, result.results))
    print_facts([*(("note", warning) for warning in result.warnings), ("time", f"{result.seconds:.1f} s")])


def _task_row(found: TaskResult) -> list[str]:
    metric = found.metric if found.filter == "none" else f"{found.metric} ({found.filter})"
    row = [found.task, metric, f"{found.questions:,}", f"{found.value:.4f} ± {number_text(found.stderr)}"]
    if found.whole is None:
        return row
    difference = f"{found.whole.difference:+.4f} ± {number_text(found.whole.stderr)}"
    return [*row, f"{found.whole.value:.4f}", difference, number_text(found.whole.p_value)]


def print_evaluation(result: Evaluation) -> None:
    """The figures, a table of the domains, and what they mean."""
    facts: list[tuple[str, object]] = [
        ("perplexity", f"{result.perplexity:.4f} ± {number_text(result.stderr)}"),
        ("tokens", f"{result.tokens:,} scored in {result.windows} windows of {result.ctx_size}"),
        (
            "experts",
            (
                f"{result.plan['keep']} of {result.plan['n_experts']} ({result.plan['metric']}), virtually"
                if result.plan
                else None
            ),
        ),
    ]
    if result.perplexity_ratio is not None:
        quantiles = (
            (50, result.kl_median),
            (90, result.kl_p90),
            (95, result.kl_p95),
            (99, result.kl_p99),
            (100, result.kl_max),
        )
        facts += [
            ("reference", f"{result.reference}, perplexity {number_text(result.reference_perplexity)}"),
            ("perplexity ratio", f"{result.perplexity_ratio:.4f} ± {number_text(result.ratio_stderr)}"),
            ("KL divergence", f"mean {number_text(result.kl_mean)} ± {number_text(result.kl_stderr)} nats"),
            ("its quantiles", ", ".join(f"{share} % {number_text(value)}" for share, value in quantiles)),
            ("same top token", percent_text(result.top1, 1)),
            ("halved", f"{percent_text(result.halved, 1)} of the tokens are at most half as probable"),
        ]
    if result.loops is not None:
        facts += _loop_facts(result.loops)
    facts += [("note", warning) for warning in result.warnings]
    print_facts([*facts, ("time", f"{result.seconds:.1f} s")])
    if result.domains:
        columns = ["domain", "tokens", "perplexity", "ratio", "mean KL", "same top token", "halved"]
        rows = [
            (name, f"{found.tokens:,}", f"{found.perplexity:.4f}", number_text(found.perplexity_ratio),
            number_text(found.kl_mean),
             percent_text(found.top1, 1), percent_text(found.halved, 1))
            for name, found in result.domains.items()
        ]  # fmt: skip
        print_table(columns, rows)
    say(result.meaning)


def _loop_facts(loops: LoopMetrics) -> list[tuple[str, object]]:
    def beside(value: float, reference: float | None) -> str:
        return percent_text(value, 1) + ("" if reference is None else f" (reference {percent_text(reference, 1)})")

    def between(interval: tuple[float, float]) -> str:
        return f"{percent_text(interval[0], 1)} to {percent_text(interval[1], 1)}"

    interval = between(loops.looping_interval)
    if loops.reference_looping_interval is not None:
        interval += (
            f" (reference {between(loops.reference_looping_interval)}), p = {number_text(loops.looping_p_value)}"
        )
    facts: list[tuple[str, object]] = [
        ("continuations", f"{loops.prompts} of up to {loops.new_tokens} tokens"),
        ("repeated 4-grams", beside(loops.repeated, loops.reference_repeated)),
        ("end in a loop", beside(loops.looping, loops.reference_looping)),
        ("its 95 % interval", interval),
        ("unfinished", beside(loops.unfinished, loops.reference_unfinished)),
    ]
    for name, calls in (("tool calls", loops.tool_calls), ("of the reference", loops.reference_tool_calls)):
        if calls is not None:
            facts.append(
                (
                    name,
                    f"{calls.calls} in {calls.called} of {calls.prompts} answers; {percent_text(calls.parsed_share, 1)}"
                    f" can be read, {percent_text(calls.matched_share, 1)} match the schema",
                )
            )
    return facts
