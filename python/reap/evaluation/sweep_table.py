"""What a sweep found: a table of quality against size, and the file that holds it. Needs no native module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reap.evaluation.sweep_winner import Winner, find_winner, winning_plan
from reap.files.atomic import write_whole
from reap.files.paths import PathLike
from reap.files.strict_json import EXPERT_LIMIT, Node, json_bytes, read_json
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile
from reap.scores.ranking import Keep
from reap.scores.records import MOST_TOKENS, check_calibration, check_format, check_model

FORMAT = "reap.sweep"
VERSION = 1
BASELINE = "baseline"
CLEAR = 2.0  # a margin of so many standard errors is called clear
LIMITS = ("size", "perplexity")
_MAX_BYTES = 64 << 20
_MOST_BYTES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One candidate on the whole text, or on one domain of it."""

    metric: str
    """What chose the experts; "baseline" for the model as it is, a plan's own for a plan that was given."""
    seed: int | None
    """Of the metric random; None for every other."""
    keep: int
    """Experts in each layer."""
    bytes: int
    """Exact size of the pruned file."""
    domain: str | None
    """None: the whole text."""
    tokens: int
    """Tokens that were scored."""
    perplexity: float
    """By llama-perplexity's rule."""
    stderr: float
    """Standard error of the perplexity, by the same rule."""
    kl_mean: float
    """Mean KL divergence from the model as it is, in nats per token."""
    top1: float
    """Share of tokens for which it and the model as it is have the same first choice."""
    loss_increase: float
    """Mean over the tokens of −ln p, less that of the model as it is, in nats; exp of it is the ratio of the
    perplexities."""
    loss_increase_stderr: float
    """Standard error of that mean, from the differences token by token: much smaller than the errors of the two
    perplexities."""
    experts_sha256: str | None = None
    """`PrunePlan.experts_sha256` of the choice, on the row of the whole text; None where it is not known."""
    experts_used: int | None = None
    """Experts of each token, where they are fewer than the model uses itself; None: as many."""

    def __getitem__(self, name: str) -> Any:
        """row["bytes"] is row.bytes, as in the file."""
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The best criterion at one size, on the whole text or on one domain."""

    keep: int
    """Experts in each layer."""
    domain: str | None
    """None: the whole text."""
    metric: str
    """The criterion with the lowest loss; of random the mean over its seeds."""
    runner_up: str
    """The one with the next lowest."""
    margin: float
    """By how much the best one's loss is lower, in nats per token; exp(margin) − 1 is the relative difference of the
    perplexities."""
    spread: float
    """Standard error of the margin, from differences token by token; of a mean over seeds, their scatter included."""
    clear: bool
    """Whether the margin is more than twice the spread; otherwise there is no clear winner."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a limit allows one criterion: the largest file of at most so many bytes, or the smallest file whose
    perplexity rises by no more than a share."""

    kind: str
    """ "size" or "perplexity"."""
    limit: float
    """Bytes for a size; for a perplexity, the share by which it may exceed that of the model as it is."""
    metric: str
    """The criterion."""
    keep: int
    """Experts in each layer of the file that was found."""
    bytes: int
    """Its exact size."""
    perplexity: float
    """Its perplexity on the whole text."""


@dataclass(frozen=True)
class Sweep:
    """Quality against size for many choices of experts, all on one text."""

    rows: tuple[SweepRow, ...]
    """The model as it is first, then each candidate: the whole text, then each domain."""
    verdicts: tuple[Verdict, ...] = ()
    """The best criterion for each size at which there are two or more."""
    targets: tuple[Target, ...] = ()
    """Answers to limits on size or perplexity."""
    model: dict[str, Any] = field(default_factory=dict)
    """ "name", "architecture", "fingerprint", "n_experts", ... as in a profile; "bytes": of the model as it is."""
    text: dict[str, Any] = field(default_factory=dict)
    """ "files", "sha256", "domains", scored "tokens", "windows" and "ctx_size" of the held-out text."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """ "files" and "sha256" of what the profile saw."""
    engine: dict[str, Any] = field(default_factory=dict)
    """What measured it: the engine and its options."""
    complete: bool = True
    """False where the sweep was interrupted."""
    warnings: tuple[str, ...] = ()
    """Sentences worth reading."""
    choice: dict[str, Any] = field(default_factory=dict)
    """How the candidates were made: "profile", the file, where it was one; "protect", "protect_super_experts" and
    "blend", for all of them; "plans", the names of plans that were given."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the text, in the order of the rows."""
        return tuple(dict.fromkeys(row.domain for row in self.rows if row.domain is not None))

    @property
    def metrics(self) -> tuple[str, ...]:
        """What chose the experts, in the order of the rows, without the baseline."""
        return tuple(dict.fromkeys(row.metric for row in self.rows if row.metric != BASELINE))

    @property
    def baseline(self) -> SweepRow:
        """The model as it is, on the whole text."""
        return self.select(metric=BASELINE)[0]

    @property
    def experts_used(self) -> tuple[int, ...]:
        """Numbers of experts of each token that were tried besides the model's own, the largest first."""
        return tuple(sorted({row.experts_used for row in self.rows if row.experts_used is not None}, reverse=True))

    def select(
        self,
        *,
        metric: str | None = None,
        keep: int | None = None,
        domain: str | None = None,
        experts_used: int | None = None,
    ) -> tuple[SweepRow, ...]:
        """The rows of one domain (None: of the whole text), of any metric and size unless they are given, with as many
        experts of each token as the model uses itself unless `experts_used` is given."""
        return tuple(
            row
            for row in self.rows
            if row.domain == domain
            and row.experts_used == experts_used
            and (metric is None or row.metric == metric)
            and (keep is None or row.keep == keep)
        )

    def best(self, domain: str | None = None) -> dict[int, Verdict]:
        """keep -> the best criterion there and how sure that is, on the whole text or one domain; the largest size
        first."""
        return {
            verdict.keep: verdict
            for verdict in sorted(self.verdicts, key=lambda item: -item.keep)
            if verdict.domain == domain
        }

    def winner(self, keep: Keep | None = None) -> Winner:
        """The best choice at `keep`, within the limit that was set, or at the only size: `find_winner`. Raises
        UsageError where that leaves more than one."""
        return find_winner(self, keep)

    def plan(self, profile: Profile | PathLike | None = None, *, keep: Keep | None = None) -> PrunePlan:
        """The winner's plan: `winning_plan`. `profile`: that the sweep was made with; None: the file that it names."""
        return winning_plan(self, profile, keep=keep)

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes; what is not finite is null."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "model": self.model,
            "text": self.text,
            "calibration": self.calibration,
            "choice": self.choice,
            "engine": self.engine,
            "warnings": list(self.warnings),
            "rows": row_documents(self.rows),
            "best": row_documents(self.verdicts),
            "targets": row_documents(self.targets),
        }

    def save(self, path: PathLike, *, force: bool = True) -> Path:
        """Write the sweep as JSON, one line a row, whole or not at all; `force=False` refuses to replace a file.

        Raises OutputError where it cannot be written, UsageError where a file is there and may not be replaced.
        """
        return write_whole(path, json_bytes(self.to_dict()), force=force)

    @classmethod
    def load(cls, path: PathLike) -> Sweep:
        """Read a sweep. UsageError where the file cannot be read, FormatError where any field of it is wrong."""
        root = read_json(path, what="sweep", max_bytes=_MAX_BYTES)
        check_format(root, FORMAT, VERSION)
        records = {
            name: root[name].members() if name in root else {}
            for name in ("model", "text", "calibration", "choice", "engine")
        }
        check_model(Node(records["model"], f"{root.where}: model"))
        check_calibration(Node(records["calibration"], f"{root.where}: calibration"))
        _check_choice(Node(records["choice"], f"{root.where}: choice"))
        rows = tuple(load_row(node) for node in _nodes(root["rows"]))
        if not any((row.metric, row.domain, row.experts_used) == (BASELINE, None, None) for row in rows):
            root["rows"].fail(f"should begin with the model as it is, but none has the metric {BASELINE!r}")
        return cls(
            rows=rows,
            verdicts=tuple(_load_verdict(node) for node in _optional(root, "best")),
            targets=tuple(_load_target(node) for node in _optional(root, "targets")),
            **records,
            complete=root["complete"].flag() if "complete" in root else True,
            warnings=tuple(node.string() for node in _optional(root, "warnings")),
        )


def row_documents(items: Iterable[SweepRow | Verdict | Target]) -> list[dict[str, Any]]:
    return [{name: _or_none(value) for name, value in asdict(item).items()} for item in items]


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- reading


def _nodes(parent: Node) -> list[Node]:
    return [parent.entry(index) for index in range(len(parent.entries()))]


def _optional(root: Node, key: str) -> list[Node]:
    return _nodes(root[key]) if key in root else []


def _check_choice(node: Node) -> None:
    for name in ("protect", "plans"):
        if name in node:
            for item in _nodes(node[name]):
                item.string()
    for name in ("blend", "profile"):
        if name in node:
            node[name].string()
    if "protect_super_experts" in node:
        node["protect_super_experts"].flag()


def load_row(node: Node) -> SweepRow:
    numbers = {name: _number(node, name) for name in ("perplexity", "stderr", "kl_mean", "top1")}
    for name, value in numbers.items():
        if value < 0:
            node[name].fail(f"should not be negative, found {value:g}")
    if numbers["top1"] > 1:
        node["top1"].fail(f"should be a share of at most 1, found {numbers['top1']:g}")
    return SweepRow(
        metric=node["metric"].string(),
        seed=node["seed"].integer() if "seed" in node and node["seed"].value is not None else None,
        keep=node["keep"].integer(1, EXPERT_LIMIT),
        bytes=node["bytes"].integer(1, _MOST_BYTES),
        domain=_optional_string(node, "domain"),
        tokens=node["tokens"].integer(0, MOST_TOKENS) if "tokens" in node else 0,
        **numbers,
        **{name: _number(node, name) for name in ("loss_increase", "loss_increase_stderr")},
        experts_sha256=_optional_string(node, "experts_sha256"),
        experts_used=(
            node["experts_used"].integer(1, EXPERT_LIMIT)
            if "experts_used" in node and node["experts_used"].value is not None
            else None
        ),
    )


def _load_verdict(node: Node) -> Verdict:
    return Verdict(
        keep=node["keep"].integer(1, EXPERT_LIMIT),
        domain=_optional_string(node, "domain"),
        metric=node["metric"].string(),
        runner_up=node["runner_up"].string(),
        margin=_number(node, "margin"),
        spread=_number(node, "spread"),
        clear=node["clear"].flag(),
    )


def _load_target(node: Node) -> Target:
    kind = node["kind"].string()
    if kind not in LIMITS:
        node["kind"].fail(f"should be one of {', '.join(LIMITS)}, found {kind!r}")
    return Target(
        kind=kind,
        limit=_number(node, "limit"),
        metric=node["metric"].string(),
        keep=node["keep"].integer(1, EXPERT_LIMIT),
        bytes=node["bytes"].integer(1, _MOST_BYTES),
        perplexity=_number(node, "perplexity"),
    )


def _optional_string(node: Node, key: str) -> str | None:
    return node[key].string() if key in node and node[key].value is not None else None


def _number(node: Node, key: str) -> float:
    """NaN where the file says null or nothing."""
    return math.nan if key not in node or node[key].value is None else node[key].number()
