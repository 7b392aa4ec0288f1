"""What an evaluation found, in numbers and in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from reap.evaluation.loops import LoopMetrics
from reap.evaluation.quality_metrics import QualityMetrics


@dataclass(frozen=True, kw_only=True)
class Evaluation(QualityMetrics):
    """How well a model predicts a text: of all its scored tokens, and of each domain."""

    model: str
    """The model's file."""
    text: tuple[str, ...]
    """The text's files."""
    plan: dict[str, Any] | None
    """ "metric", "keep" and "n_experts" of the plan in force; None for the model as it is."""
    reference: str | None
    """The file that the model is compared with; None where there is none."""
    windows: int
    """Windows of the text, each of ctx_size tokens."""
    ctx_size: int
    """Tokens of a window."""
    dropped_tokens: int
    """Tokens of the text that are in no window."""
    domains: dict[str, QualityMetrics]
    """Domain -> the same of its tokens; empty where the text names none."""
    loops: LoopMetrics | None
    """What the loop probe found; None where it was not asked for."""
    seconds: float
    """How long the call took."""
    warnings: tuple[str, ...] = ()
    """Sentences worth reading."""

    @property
    def meaning(self) -> str:
        """What the figures say, in sentences."""
        return " ".join((_meaning(self), *_domains_meaning(self.domains), *_loops_meaning(self.loops)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "text": list(self.text), "warnings": list(self.warnings), "meaning": self.meaning}


# ---- the figures in words


def _meaning(result: Evaluation) -> str:
    experts = (
        "" if result.plan is None else f" with {result.plan['keep']} of {result.plan['n_experts']} experts a layer"
    )
    if result.perplexity_ratio is None or result.kl_mean is None or result.top1 is None or result.halved is None:
        return (
            f"The model{experts} predicts a token of this text as if it chose among {result.perplexity:.4g} equally"
            f" probable ones (± {result.stderr:.2g}); compare that only with figures of the same text, tokenizer and"
            " window length."
        )
    change = (result.perplexity_ratio - 1) * 100
    return (
        f"Beside the reference, the model{experts} has a perplexity {abs(change):.3g} %"
        f" {'higher' if change >= 0 else 'lower'} (± {(result.ratio_stderr or 0) * 100:.2g} %): {result.perplexity:.4g}"
        f" instead of {result.reference_perplexity:.4g}. Both hold the same token most probable at {result.top1:.1%} of"
        f" the positions; {result.halved:.1%} of the tokens are at most half as probable as before; the divergence is"
        f" {result.kl_mean:.3g} nats a token (0: the same predictions), and above {result.kl_p99:.3g} at one in a"
        " hundred."
    )


def _domains_meaning(domains: dict[str, QualityMetrics]) -> Iterator[str]:
    compared = {name: found.perplexity_ratio for name, found in domains.items() if found.perplexity_ratio is not None}
    if len(compared) > 1:
        worst = max(compared, key=lambda name: compared[name])
        yield f'"{worst}" loses most: its perplexity is {(compared[worst] - 1) * 100:+.3g} %.'


def _loops_meaning(loops: LoopMetrics | None) -> Iterator[str]:
    if loops is None:
        return
    text = f"Left to itself, the model ends {loops.looping:.0%} of {loops.prompts} continuations in a loop"
    text += f" (95 %: {_interval(loops.looping_interval)})"
    if loops.reference_looping is not None and loops.reference_looping_interval is not None:
        text += f", the reference {loops.reference_looping:.0%} ({_interval(loops.reference_looping_interval)}"
        text += f"; p = {loops.looping_p_value or 0:.2g})"
    text += f"; {loops.repeated:.0%} of its 4-grams are repetitions"
    if loops.reference_repeated is not None:
        text += f" (the reference {loops.reference_repeated:.0%})"
    yield text + "."
    for who, calls in (("the model's", loops.tool_calls), ("the reference's", loops.reference_tool_calls)):
        if calls is not None:
            yield (
                f"Of {who} {calls.calls} tool calls, in {calls.called} of {calls.prompts} answers, {calls.parsed} can"
                f" be read and {calls.matched} match the tool's schema."
            )


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
