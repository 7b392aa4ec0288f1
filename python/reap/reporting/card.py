"""model_card(): what a pruned model's card should say, from what the file itself says and from what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import MismatchError, UsageError
from reap.evaluation.answer_files import read_answers
from reap.evaluation.sweep_table import Sweep
from reap.files.atomic import check_distinct, paths_of, write_whole
from reap.files.formatting import bytes_text, ranges_text
from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.files.paths import PathLike
from reap.files.strict_json import Node, read_json
from reap.gguf.expert_tensors import gates_depend_on_all
from reap.gguf.model_info import ModelInfo, inspect
from reap.gguf.reader import GGUFModel
from reap.reporting.answers_section import loop_rows, recommended_settings
from reap.reporting.benchmarks import COLUMNS, EXPLAINED, is_of_tasks, task_rows
from reap.reporting.gpu_fit import describe_fit
from reap.reporting.page import environment
from reap.scores.identity import Record, compare_records, compare_with_pruned, crosses_over
from reap.scores.plan import experts_digest
from reap.scores.profile import Profile

_MAX_BYTES = 64 << 20
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&$])")


def model_card(
    pruned: PathLike,
    output: PathLike,
    *,
    source: PathLike | None = None,
    profile: Profile | PathLike | None = None,
    evaluations: Sequence[PathLike] = (),
    answers: Sequence[PathLike] = (),
    sweep: Sweep | PathLike | None = None,
    base_model: str | None = None,
    license: str | None = None,
    force: bool = False,
) -> Path:
    """Write a model card (Markdown with the front matter of model hubs) for a file that `prune` wrote. Returns its
    path.

    Args:
        pruned: what was removed is read from its own reap.* keys
        source: the model before: its size, checked by fingerprint
        profile: what the plan was made of: names the calibration
        evaluations: files of `reap evaluate --json`, of texts or tasks, of the pruned model and of its source
        answers: files of `reap generate`: how often they end in a loop; of one model in several settings, which loops
            less, where that is clear
        sweep: what `reap.sweep` returned, or the file of it
        base_model: name of the source on a hub; license: its identifier there
        force: replace an output that exists

    Raises UsageError for a file that no `prune` wrote or that cannot be read, MismatchError for a source of another
    model, FormatError for a damaged file, OutputError.
    """
    check_distinct([output], paths_of(pruned, source, profile, sweep, *evaluations, *answers))
    info = inspect(pruned)
    origin = _Origin.of(info)
    before = None if source is None else inspect(source)
    measured = None if profile is None else Profile.of(profile)
    table = sweep if sweep is None or isinstance(sweep, Sweep) else Sweep.load(sweep)
    _check_origin(info, origin, before, measured, table)
    judged = [read_json(path, what="evaluation", max_bytes=_MAX_BYTES) for path in evaluations]
    answered = [read_answers(path) for path in answers]
    text = environment().get_template("card.md.j2").render(
        base_model=None if base_model is None else json.dumps(base_model),
        license=None if license is None else json.dumps(license),
        title=escape(_own_name(info, before)),
        summary=_summary(info, origin, before),
        source_size=None if before is None else bytes_text(before.n_bytes),
        size=bytes_text(info.n_bytes),
        n_layers=len(info.moe_layers),
        n_source=origin.n_experts,
        n_kept=info.n_experts,
        facts=list(_facts(info)),
        how=list(_how(info, origin, measured)),
        evaluations=[row for root in judged if not is_of_tasks(root) for row in _evaluation(root, info, origin)],
        loops=[sentence for root in judged for sentence in _loops(root)],
        task_columns=COLUMNS,
        tasks_explained=EXPLAINED,
        tasks=[
            [escape(cell) for cell in row]
            for root in judged
            if is_of_tasks(root)
            for row in task_rows(root, {origin.experts_sha256: f"{info.path.name}, before it was written"})
        ],
        answers=[[escape(cell) for cell in row] for row in loop_rows(answered)],
        settings=[escape(sentence) for sentence in recommended_settings(answered)],
        sweep=[] if table is None else _sweep_rows(table, info.n_experts, origin.n_experts),
        cautions=list(_cautions(info)),
        layers=list(_layers(info, origin)),
    )  # fmt: skip
    return write_whole(output, re.sub(r"\n{3,}", "\n\n", text).encode("utf-8", "backslashreplace"), force=force)


def escape(text: object) -> str:
    """A stranger's text as plain words of Markdown: on one line, and without a meaning to it or to HTML."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split())).replace(r"\<", "&lt;").replace(r"\&", "&amp;")


def _own_name(info: ModelInfo, before: ModelInfo | None) -> str:
    """What tells the pruned model from its source: the name that `prune` gave it, or that of its file."""
    named = info.name if before is not None and info.name != before.name else None
    return named or info.path.name.removesuffix(".gguf")


def _check_origin(
    info: ModelInfo, origin: _Origin, before: ModelInfo | None, profile: Profile | None, sweep: Sweep | None
) -> None:
    """Raise MismatchError where what is said to be of the model before pruning is of another one.

    Fingerprints are compared, and, since siblings share them, the routers of the experts that were kept. A profile that
    a file was cut by although it is of another model (`allow_mismatch`) is let through: the file says so.
    """
    older: Sequence[str] = ()
    if before is not None:
        older = before.older_fingerprints
        _require_origin(f"{before.path} is not", before.record(), info, origin, None, older)
    if profile is not None and "reap.mismatch" not in (info.provenance or {}):
        _require_origin("the profile is not of", profile.model, info, origin, before, older)
    if sweep is not None:
        _require_origin("the sweep is not of", sweep.model, info, origin, before, older)


def _require_origin(
    what: str, record: Record, info: ModelInfo, origin: _Origin, before: ModelInfo | None, older: Sequence[str]
) -> None:
    said = record.get("fingerprint") or origin.fingerprint
    found: tuple[str, ...] = ()
    if before is not None:
        found = compare_records(record, before.record(), ("it", before.path.name), older).differences
    elif origin.fingerprint not in (said, *older) and not (
        record.get("routers") and crosses_over(record, info.record())
    ):
        found = (f"its fingerprint is {said}",)
    found = found or compare_with_pruned(record, info.routers, origin.kept)
    if found:
        raise MismatchError(f"{what} the model that {info.path} was pruned from: {'; '.join(found)}")


@dataclass(frozen=True)
class _Origin:
    """What a pruned file says of the original model, before any pruning."""

    metric: str
    fingerprint: str
    n_experts: int
    kept: dict[int, list[int]]
    calibration: tuple[str, ...]
    version: str

    @property
    def experts_sha256(self) -> str:
        """As `PrunePlan.experts_sha256` of a plan that keeps the same."""
        return experts_digest(self.kept)

    @classmethod
    def of(cls, info: ModelInfo) -> _Origin:
        said = info.provenance or {}
        fingerprint, n_experts = said.get("reap.source.fingerprint"), said.get("reap.source.expert_count")
        kept = {layer: said.get(f"reap.kept.{layer}") for layer in info.moe_layers}
        if (
            not info.is_moe
            or not isinstance(fingerprint, str)
            or type(n_experts) is not int
            or not all(isinstance(ids, list) for ids in kept.values())
        ):
            raise UsageError(
                f"{info.path}: does not say what was removed (reap.* keys): a model card is made of a file that reap"
                " prune wrote"
            )
        calibration = said.get("reap.calibration.sha256")
        digests = tuple(calibration.split(",")) if isinstance(calibration, str) else ()
        ids = {layer: [int(expert) for expert in found or ()] for layer, found in kept.items()}
        return cls(
            str(said.get("reap.metric") or "unknown"),
            fingerprint,
            n_experts,
            ids,
            digests,
            str(said.get("reap.version") or "unknown"),
        )


def _summary(info: ModelInfo, origin: _Origin, before: ModelInfo | None) -> str:
    removed = origin.n_experts - info.n_experts
    of = f" of {escape(before.name)}" if before is not None and before.name else ""
    return (
        f"A pruned version{of} ({escape(info.architecture)}): {removed} of {origin.n_experts} experts,"
        f" {removed / origin.n_experts:.0%}, were removed from each of its {len(info.moe_layers)} MoE layers."
    )


def _facts(info: ModelInfo) -> Iterator[tuple[str, str]]:
    yield "experts that a token uses", str(info.n_experts_used)
    yield "parameters", f"{info.n_parameters:,}"
    yield "tensor types", ", ".join(f"{count} {name}" for name, count in info.tensor_types.items())
    yield "weights fit into", describe_fit(info.n_bytes)
    yield "fingerprint", f"`{info.fingerprint}`"


def _how(info: ModelInfo, origin: _Origin, profile: Profile | None) -> Iterator[str]:
    yield (
        f"With reap {escape(origin.version)}: every expert was scored by `{escape(origin.metric)}` on a calibration "
        f"text, and each layer kept {info.n_experts}. The source has the fingerprint `{escape(origin.fingerprint)}`."
    )
    if profile is not None:
        record = profile.calibration
        files = ", ".join(escape(Path(name).name) for name in record.get("files") or ()) or "not named"
        tokens = record.get("counted_tokens") or record.get("tokens") or int(profile.total_tokens.max())
        domains = f" in the domains {', '.join(escape(name) for name in profile.domains)}" if profile.domains else ""
        yield f"Calibration: {files}, {tokens:,} tokens{domains}."
        if not profile.trusted:
            yield "**The profile was written by llama-expert-profile, whose scores are not to be trusted.**"
    if origin.calibration:
        yield "sha256 of the calibration: " + ", ".join(f"`{escape(digest)}`" for digest in origin.calibration) + "."


def _cautions(info: ModelInfo) -> Iterator[str]:
    if mismatch := (info.provenance or {}).get("reap.mismatch"):
        yield f"**The experts were chosen by a profile of another model**: {escape(mismatch)}."
    with GGUFModel.open(info.path) as model:
        if gates_depend_on_all(model, info.architecture):
            yield (
                "The router's gates are not normalised over the chosen experts: those that stay now count for more than"
                " they did."
            )


def _layers(info: ModelInfo, origin: _Origin) -> Iterator[tuple[int, str, str]]:
    for layer in info.moe_layers:
        kept = origin.kept[layer]
        removed = sorted(set(range(origin.n_experts)) - set(kept))
        yield layer, ranges_text(removed), ranges_text(kept)


def _evaluation(root: Node, info: ModelInfo, origin: _Origin) -> Iterator[list[str]]:
    """Rows of the table: the whole text, and each domain of it. What was judged virtually goes by the pruned model's
    name where it is the same choice."""
    said: Any = root["text"].value
    texts = (
        [root["text"].entry(index).string() for index in range(len(said))]
        if isinstance(said, list)
        else [root["text"].string()]
    )
    model, text = escape(Path(root["model"].string()).name), ", ".join(escape(Path(name).name) for name in texts)
    plan = root.members().get("plan")
    if isinstance(plan, dict) and plan.get("experts_sha256") == origin.experts_sha256:
        model = f"{escape(info.path.name)}, before it was written"
    elif isinstance(plan, dict):
        model += f", as if pruned to {escape(plan.get('keep'))} by {escape(plan.get('metric'))}"
    parts = [
        (text, root),
        *((escape(name), node) for name, node in (root["domains"].items() if "domains" in root else ())),
    ]
    for name, node in parts:
        perplexity, stderr, ratio, kl, top1 = (
            _number(node, key) for key in ("perplexity", "stderr", "perplexity_ratio", "kl_mean", "top1")
        )
        figures = [f"{number(perplexity, 5)} ± {number(stderr, 2)}", number(ratio), number(kl, 3), percent(top1, 1)]
        yield [model, name, *figures, f"{root['ctx_size'].integer():,}", f"{node['tokens'].integer():,}"]


def _loops(root: Node) -> Iterator[str]:
    """What the loop probe found, where the evaluation has one."""
    if root.members().get("loops") is None:
        return
    found = root["loops"]
    looping, before, repeated = (_number(found, key) for key in ("looping", "reference_looping", "repeated"))
    beside = "" if before is None else f"; of the reference's {percent(before)}"
    interval = found.members().get("looping_interval")
    if isinstance(interval, list) and len(interval) == 2:
        low, high = (found["looping_interval"].entry(index).number() for index in range(2))
        beside = f" (95 %: {percent(low, 1)} to {percent(high, 1)}){beside}"
    yield (
        f"Of {found['prompts'].integer()} greedy continuations by {escape(Path(root['model'].string()).name)}, "
        f"{percent(looping)} ended in a loop{beside}. "
        f"{percent(repeated)} of its runs of four tokens had occurred before."
    )


def _number(node: Node, key: str) -> float | None:
    value: Any = node.members().get(key)
    if value is not None and type(value) not in (int, float):
        node[key].fail("should be a number")
    return None if value is None else float(value)


def _sweep_rows(table: Sweep, keep: int, n_source: int) -> list[list[str]]:
    """Of this size, and of the whole model where the sweep has it."""
    rows = [row for row in table.rows if row.keep in (keep, n_source) and row.experts_used is None]
    return [
        [
            escape(row.metric if row.keep < n_source else "all experts"),
            str(row.keep),
            escape(row.domain or "all"),
            number(row.perplexity, 5),
            number(row.stderr, 2),
        ]
        for row in rows
    ]
