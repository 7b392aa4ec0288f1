"""report(): all that a profile, a plan, a sweep and a model say, as one page."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reap.errors import MismatchError, ReapWarning, UsageError
from reap.evaluation.answer_files import read_answers
from reap.evaluation.sweep_table import Sweep
from reap.files.atomic import check_distinct, paths_of
from reap.files.formatting import bytes_text
from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.files.paths import PathLike
from reap.files.strict_json import MAX_BYTES, Node, read_json
from reap.gguf.model_info import ModelInfo, inspect
from reap.pruning.sizing import measure_size
from reap.reporting import plots
from reap.reporting.answers_section import answers_section
from reap.reporting.benchmarks import is_of_tasks, tasks_section
from reap.reporting.choice_sections import criteria, domains, low, provenance, super_experts_section
from reap.reporting.cost_sections import cost_facts, quality
from reap.reporting.experts_sections import distribution, experts, inequality, kept_mass, layer, load
from reap.reporting.judged import Judged
from reap.reporting.page import Page, Section, packed, write_page
from reap.reporting.report_sources import Sources
from reap.reporting.size_sections import memory, sizes
from reap.reporting.stability_section import stability
from reap.scores.identity import compare_records, require_same
from reap.scores.plan import PrunePlan, super_experts
from reap.scores.profile import Profile
from reap.scores.statistics import (
    gini,
    kept_share,
    known_metrics,
    mean_of,
    plan_of_half,
    random_share,
    require_plan_of,
)

UNTRUSTED = (
    "This profile was written by llama-expert-profile, which misreads which experts were chosen: its counts and scores "
    "are not to be trusted, "
    "and nothing on this page is. Profile again with reap profile."
)
#: Domains whose share of each expert's tokens the page carries.
_MOST_DOMAINS = 8
_MOST_LISTED = 60


def report(
    profile: Profile | PathLike,
    output: PathLike,
    *,
    plan: PrunePlan | PathLike | None = None,
    sweep: Sweep | PathLike | None = None,
    model: PathLike | None = None,
    evaluations: Sequence[PathLike] = (),
    answers: Sequence[PathLike] = (),
    force: bool = False,
) -> Path:
    """Write one HTML file that shows what a profile says; it opens without a connection. Returns its path.

    Args:
        plan: the experts that stay; without one the page shows, and says so, what half of them by REAP would be
        sweep: what `reap.sweep` returned, or the file of it: adds quality against size
        model: the GGUF file: adds sizes before and after by kind of tensor, and which memory they fit into
        evaluations: files of `reap evaluate -o`: of `--tasks` the benchmarks; of the plan's model with `--reference`,
            on text that had no part in the choice, what it costs there
        answers: two files of `reap generate`, of the whole model and of the pruned one: shows them side by side
        force: replace an output that exists

    Raises UsageError where a file cannot be read or replaced, FormatError where one is damaged, MismatchError where
    they are not of one model, OutputError where the page cannot be written.
    A plan that is not the sweep's winner is a ReapWarning, and on the page.
    """
    check_distinct([output], paths_of(profile, plan, sweep, model, *evaluations, *answers))
    source = Profile.of(profile)
    given = None if plan is None else PrunePlan.of(plan)
    if given is not None:
        require_plan_of(source, given)
    table = sweep if sweep is None or isinstance(sweep, Sweep) else Sweep.load(sweep)
    if table is not None:
        verdict = compare_records(source.model, table.model, ("the profile", "the sweep"))
        require_same(
            verdict,
            "the sweep is not of the profile's model",
            allow_mismatch=bool(source.model.get("mismatch")),
            advice="",
        )
    made = given or plan_of_half(source)
    info = None if model is None else inspect(model)
    if info is not None:
        _require_model_of(source, info)
    size = None
    if model is not None and info is not None:  # of one model, as was just found, or as the profile says of itself
        size = measure_size(model, None if info.refusals else made, allow_mismatch=True)
    name = None if isinstance(profile, Profile) else Path(profile).name
    benchmarks, judged = _sorted(evaluations)
    found = tuple(map(read_answers, answers))
    sources = Sources(source, made, given is None, table, info, size, name, benchmarks, found, judged)
    written = write_page(page_of(sources), output, force=force)
    if sources.remark is not None:
        warnings.warn(sources.remark, ReapWarning, stacklevel=2)
    return written


def _sorted(evaluations: Sequence[PathLike]) -> tuple[tuple[Node, ...], Judged | None]:
    """(those of tasks, the one of a text). UsageError where there are several of texts."""
    roots = [read_json(path, what="evaluation", max_bytes=MAX_BYTES) for path in evaluations]
    texts = [root for root in roots if not is_of_tasks(root)]
    if len(texts) > 1:
        raise UsageError(
            f"{texts[1].where}: is an evaluation of a text, and {texts[0].where} is another; the page shows one"
        )
    return tuple(root for root in roots if is_of_tasks(root)), Judged.of(texts[0]) if texts else None


def _require_model_of(profile: Profile, info: ModelInfo) -> None:
    verdict = compare_records(profile.model, info.record(), ("the profile", info.path.name), info.older_fingerprints)
    require_same(
        verdict,
        f"the profile is of another model than {info.path}",
        allow_mismatch=bool(profile.model.get("mismatch")),
        advice="",
    )
    if profile.n_experts != info.n_experts:
        raise MismatchError(
            f"the profile is of a model with {profile.n_experts} experts, but {info.path} has {info.n_experts}"
        )


def page_of(sources: Sources) -> Page:
    model = sources.profile.model
    name = str(model.get("name") or model.get("architecture") or sources.file_name or "profile")
    profile = sources.profile
    everywhere = f"{profile.n_experts} experts in each of {profile.n_layers} layers"
    by = f"{sources.plan.keep} of {everywhere}, by {sources.plan.metric}"
    subtitle = f"An example: what keeping {by} would mean" if sources.is_example else f"The plan keeps {by}"
    if not sources.removes:
        subtitle = f"{everywhere}; the router leaves nothing to remove"
    cautions = [UNTRUSTED] if not sources.profile.trusted else []
    cautions += _engine_warnings(sources.profile)
    cautions += [sources.remark] if sources.remark is not None else []
    if sources.is_example and sources.removes:
        subtitle += ". Give a plan with --plan to see yours"
    return Page(name, subtitle + ".", list(facts(sources)), list(sections(sources)), cautions, data(sources))


def _engine_warnings(profile: Profile) -> list[str]:
    """What the engine warned of while it measured; of merged profiles, in each of the runs, once."""
    runs = [profile.engine, *(profile.engine.get("merged") or ())]
    found = (run.get("warnings") for run in runs if isinstance(run, dict))
    return list(dict.fromkeys(str(line) for lines in found if isinstance(lines, list) for line in lines))


def facts(sources: Sources) -> Iterator[tuple[str, str]]:
    """The answers first; without a sweep what the profile alone says."""
    profile, record = sources.profile, sources.profile.calibration
    answers = list(cost_facts(sources))
    yield from answers
    if sources.size is not None:
        yield bytes_text(sources.size.n_bytes_after), f"after, {bytes_text(sources.size.n_bytes_before)} before"
    if sources.removes:
        total = profile.gated_norm_sum
        kept, blind = (
            mean_of(kept_share(total, sources.mask)),
            mean_of(random_share(total, sources.plan.keep, profile.n_groups)[0]),
        )
        yield percent(kept), f"of Σ g·‖f‖ kept; at random it would be {percent(blind)}"
    if sources.stability is not None:
        yield percent(sources.stability.overlap), "of the kept experts another profile of as much text would keep too"
    if answers:
        return
    never = int(profile.never_routed.sum())
    yield f"{never:,}", f"of {profile.counts.size:,} experts were never routed to"
    yield number(mean_of(gini(profile.counts)), 2), "Gini of the load, mean over the layers; 0 is even"
    if profile.trusted:
        yield str(len(super_experts(profile))), "super experts"
    tokens = record.get("counted_tokens") or record.get("tokens") or int(profile.total_tokens.max())
    yield (
        f"{tokens:,}",
        "tokens of calibration" + (f" in {len(profile.domains)} domains" if profile.domains else ""),
    )


def sections(sources: Sources) -> Iterator[Section]:
    """What it costs and what it gains first, what explains it after."""
    cost = None if sources.sweep is None else quality(sources, sources.sweep)
    if cost is not None:
        yield cost
    if sources.size is not None:
        yield sizes(sources, sources.size)
        yield memory(sources, sources.size)
    if sources.benchmarks:
        yield tasks_section(sources.benchmarks)
    if sources.answers:
        yield answers_section(sources.answers)
    yield experts(sources)
    yield layer(sources)
    yield distribution(sources)
    yield inequality(sources)
    yield load(sources)
    if sources.removes:
        yield kept_mass(sources)
        if (sure := stability(sources)) is not None:
            yield sure
    yield criteria(sources)
    if len(sources.profile.domains) > 1:
        yield domains(sources)
    yield low(sources)
    if sources.profile.trusted:
        yield super_experts_section(sources)
    yield provenance(sources)


def data(sources: Sources) -> dict[str, Any]:
    profile = sources.profile
    shares = {
        name: part.counts / np.maximum(part.total_tokens, 1)[:, None]
        for name, part in list(profile.parts.items())[:_MOST_DOMAINS]
    }
    experts = {
        "layers": profile.layers.tolist(),
        "n_experts": profile.n_experts,
        "metric": sources.metric,
        "metrics": {metric: packed(profile.score(metric)) for metric in known_metrics(profile) if metric != "random"},
        "counts": packed(np.minimum(profile.counts, 2**31 - 1)),
        "kept": packed(sources.mask) if sources.removes else None,
        "norm_max": packed(profile.norm_max) if profile.trusted else None,
        "domains": {name: packed(share) for name, share in shares.items()},
    }
    return {"experts": experts, "scale": plots.SCALE}
