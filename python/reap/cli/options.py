"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.cli import completion
from reap.errors import ReapError, UsageError
from reap.files.atomic import check_outputs
from reap.text.shapes import parse_columns
from reap.text.sources import split_domain

if TYPE_CHECKING:
    from reap.scores.plan import PrunePlan
    from reap.scores.ranking import Keep


class PathRole(enum.Enum):
    """What becomes of the files that an option names."""

    READS = enum.auto()
    WRITES = enum.auto()  # needs --force where the file exists
    RESUMES = enum.auto()  # read where it exists, and written: the command itself says when it may be replaced
    WRITES_FOLDER = enum.auto()  # likewise


READS, WRITES, RESUMES, WRITES_FOLDER = PathRole


# ---- arguments and options

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file."), READS]
ProfilePath = Annotated[
    Path, typer.Argument(metavar="PROFILE.json", help="A profile, as `reap profile` writes it."), READS
]
HfDir = Annotated[Path, typer.Argument(metavar="HF_DIR", help="A directory with config.json and *.safetensors."), READS]
CalibrationPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="[DOMAIN=]CALIBRATION...",
        help="JSON, CSV, Parquet or text, compressed or not; a folder of these; - is standard input.",
    ),
    READS,
]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write."), WRITES]
OptionalOutput = Annotated[Path | None, typer.Option("--output", "-o", help="File to write."), WRITES]
#: Holds what there is while the command runs, so that --resume may replace it.
ResumableOutput = Annotated[Path | None, typer.Option("--output", "-o", help="File to write."), RESUMES]
GoesOn = Annotated[
    bool, typer.Option("--resume", help="Go on from OUTPUT.resume, which an interrupted run left, and replace OUTPUT.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Go on where the profile or plan is of another model; what is written says so. --force is about outputs.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say the exact size; write nothing.")]
Verify = Annotated[
    str,
    typer.Option(
        "--verify",
        metavar="|".join(completion.VERIFY),
        help="How much of the output to read back.",
        autocompletion=completion.values_of(*completion.VERIFY),
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")
]
SweepPath = Annotated[
    Path | None, typer.Option("--sweep", metavar="SWEEP.json", help="A sweep, as `reap sweep` writes it."), READS
]
METRIC = typer.Option(
    "--metric",
    help="Score to rank experts by: reap, weighted_ean_sum, ean_sum, ean_mean, frequency, gate_sum, reap_l2, msan,"
    " random.",
    autocompletion=completion.metrics(),
)
Metric = Annotated[str, METRIC]
KEEP_FORM = "N|FRACTION|P%"
Protect = Annotated[
    list[str] | None,
    typer.Option("--protect", metavar="LAYER:ID,...", help="Experts to keep regardless of their score."),
]
SuperExperts = Annotated[bool, typer.Option("--super-experts", help="Protect experts with an outlying output as well.")]
BLEND = typer.Option(
    "--blend",
    metavar="|".join(completion.BLENDS),
    help="All tokens together, or the worst-served domain first; sum by default.",
    autocompletion=completion.values_of(*completion.BLENDS),
)
Seed = Annotated[int, typer.Option("--seed", help="Seed of the metric random.")]


TemplateVariables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs", metavar="JSON", help='More for the template to read: {"enable_thinking": false}'
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", metavar="ROLE=NAME,...", help="Names of the data's columns, as in text=story."),
]
SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be used, and count them.")
]


# ---- families of options, each of which a command receives as one object


@dataclass(frozen=True)
class TextOptions:
    """How a calibration is read."""

    chat_template: Annotated[
        str,
        typer.Option(
            "--chat-template",
            metavar="none|auto|FILE",
            help="How prompt and response are joined.",
            autocompletion=completion.values_of(*completion.TEMPLATES),
        ),
        READS,
    ] = "none"
    chat_template_kwargs: TemplateVariables = None
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            metavar="|".join(completion.MASKS),
            help="Tokens that are counted.",
            autocompletion=completion.values_of(*completion.MASKS),
        ),
    ] = "all"
    no_parse_special: Annotated[
        bool, typer.Option("--no-parse-special", help="Read special tokens in texts as plain text.")
    ] = False
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Stop after N tokens.")] = None
    columns: Columns = None
    skip_bad_lines: SkipBadLines = False

    def arguments(self) -> dict[str, Any]:
        """As `profile` takes them."""
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": parse_variables(self.chat_template_kwargs),
            "mask": self.mask,
            "parse_special": not self.no_parse_special,
            "max_tokens": self.max_tokens,
            "columns": parse_columns(self.columns or ()) or None,
            "skip_bad_lines": self.skip_bad_lines,
        }


def calibration_source(values: Sequence[str]) -> Any:
    """What [DOMAIN=]CALIBRATION... names, as `profile` takes it."""
    parts = [split_domain(value) for value in values]
    if any(domain is not None for domain, _ in parts):
        return parts
    return list(values) if len(values) > 1 else values[0]


@dataclass(frozen=True)
class ResumeOptions:
    """Where a run keeps what is done."""

    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="FILE",
            help="Keep what is done in FILE; beside the output by default.",
        ),
        RESUMES,
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run kept.")] = False

    def file_of(self, output: Path) -> Path | None:
        """The file of a run that is to write `output`: the one given, or one beside the output."""
        from reap.profiling.resume import beside  # which takes numpy along

        return self.checkpoint or beside(output)

    def arguments(self, output: Path) -> dict[str, Any]:
        """As `profile` takes them."""
        return {"checkpoint": self.file_of(output), "resume": self.resume}

    @contextmanager
    def until_written(self, output: Path) -> Iterator[None]:
        """Around the writing of the output: the file goes when what it holds is there, and is named where that
        fails."""
        path = self.file_of(output)
        try:
            yield
        except ReapError as error:
            if path is not None and path.exists():
                error.args = (f"{error}; {path} keeps what was measured, and --resume goes on from it",)
            raise
        if path is not None:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class UntilOptions:
    """When a calibration has been enough."""

    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="98%",
            help="End the run once another profile of as much text would keep this share of the same experts.",
        ),
    ] = None
    keep: Annotated[
        str | None, typer.Option("--keep", metavar=KEEP_FORM, help="How many experts --until expects to be kept.")
    ] = None
    metric: Annotated[str | None, METRIC] = None

    def arguments(self) -> dict[str, Any]:
        """As `profile` takes them."""
        if self.until is None:
            given = "--keep" if self.keep is not None else "--metric" if self.metric is not None else None
            if given is not None:
                raise UsageError(
                    f"{given} is for --until; which experts are kept is decided by `reap plan`, afterwards"
                )
            return {}
        if self.keep is None:
            raise UsageError("--until needs --keep: how many experts are to be kept decides how much text is enough")
        metric = parse_metric(self.metric)
        return {
            "until": parse_share("--until", self.until),
            "keep": parse_keep(self.keep),
            **({} if metric is None else {"metric": metric}),
        }


@dataclass(frozen=True)
class PlanChoice:
    """The plan that a pruning follows: a file, or a profile and how many experts to keep by which score."""

    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="PLAN.json", help="A plan, as `reap plan` writes it."), READS
    ] = None
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="PROFILE.json", help="A profile to plan by, with --keep."), READS
    ] = None
    keep: Annotated[str | None, typer.Option("--keep", metavar=KEEP_FORM, help="Experts to keep, with --profile.")] = (
        None
    )
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="Score to rank experts by, with --profile; reap by default.",
            autocompletion=completion.metrics(),
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As `hf.prune` takes it. UsageError where it is not one of the two."""
        if self.plan is not None and not (self.profile or self.keep or self.metric):
            return {"plan": self.plan}
        if self.plan is None and self.profile is not None and self.keep is not None:
            metric = parse_metric(self.metric) or "reap"
            return {"profile": self.profile, "keep": parse_keep(self.keep), "metric": metric}
        raise UsageError("give either --plan, or --profile and --keep (and --metric)")

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return self.plan is None and self.profile is None and self.keep is None and self.metric is None

    def choose(self) -> PrunePlan | Path:
        """What was asked for. UsageError where it is not one of the two."""
        import reap

        given = self.arguments()
        return given["plan"] if "plan" in given else reap.plan(**given)


def check_resumable(output: Path | None, *, force: bool, resume: bool) -> None:
    """UsageError where an output exists and neither --force nor --resume, with something to go on from, says that it
    may be replaced."""
    from reap.evaluation.resume_file import resume_path  # which takes numpy along

    if resume and output is None:
        raise UsageError("--resume goes on from the file beside --output, which is missing")
    if output is not None:
        check_outputs([output], force=force or (resume and resume_path(output).exists()))


# ---- values


_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%", re.ASCII)


def parse_keep(text: str) -> Keep:
    """A number of experts (64), or a fraction of them (0.5, or 50%)."""
    percent = _PERCENT.fullmatch(text.strip())
    try:
        if percent:
            return float(percent[1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(
            f"--keep should be a number of experts (64) or a fraction of them (0.5 or 50%), found {text!r}"
        ) from None


def parse_count(option: str, text: str) -> int:
    """A whole number from 1 on."""
    if not re.fullmatch("[1-9][0-9]{0,8}", text.strip(), re.ASCII):
        raise UsageError(f"{option} should be whole numbers from 1 on, with commas between them, found {text!r}")
    return int(text)


def parse_share(option: str, text: str) -> float:
    """A share above 0 and up to 1: 98%, or 0.98."""
    percent = _PERCENT.fullmatch(text.strip())
    try:
        share = float(percent[1]) / 100 if percent else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"{option} should be a share such as 98% or 0.98, found {text!r}")
    return share


def parse_variables(text: str | None) -> dict[str, Any] | None:
    """The names and values of --chat-template-kwargs."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f'--chat-template-kwargs should be a JSON object, such as {{"enable_thinking": false}}, found {text!r}'
        )
    return value


def parse_metric(text: str | None) -> str | None:
    """The name of a score, in upper or lower case."""
    return None if text is None else text.strip().lower()


_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*([smh]?)", re.ASCII)


def parse_time(text: str) -> float:
    """Seconds: 90, 90s, 10m, 1.5h."""
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise UsageError(f"{text!r} is not a time such as 90s, 10m or 1.5h")
    return seconds


def split_list(values: Sequence[str] | None, separator: str = ",") -> list[str]:
    """An option given several times, or once with commas (what matches `separator`)."""
    return [part.strip() for value in values or () for part in re.split(separator, value) if part.strip()]
