"""report(): all that a profile, a plan, a sweep and a model say, as one page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from reap.errors import MismatchError
from reap.evaluation.sweep_table import Sweep, Verdict
from reap.files.formatting import bytes_text
from reap.gguf.model_info import ModelInfo, inspect
from reap.pruning.sizing import ModelSize, measure_size
from reap.reporting import plots as figures
from reap.reporting.gpu_fit import Fit, describe_fit, fits
from reap.reporting.page import Page, Section, Table, number, packed, percent, write_page
from reap.reporting.sweep_points import SweepPoint, points_of
from reap.scores.plan import PrunePlan, super_experts
from reap.scores.profile import Profile
from reap.scores.statistics import (
    FEW_TOKENS,
    Mask,
    best_share,
    busiest_share,
    effective_experts,
    find_cut,
    gini,
    kept_mask,
    kept_share,
    known_metrics,
    low_by_every_metric,
    lowest_of,
    mask_by,
    mean_of,
    overlaps,
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

PathLike = str | os.PathLike[str]


def report(
    profile: Profile | PathLike,
    output: PathLike,
    *,
    plan: PrunePlan | PathLike | None = None,
    sweep: Sweep | PathLike | None = None,
    model: PathLike | None = None,
) -> Path:
    """Write one HTML file that shows what a profile says; it opens without a connection. Returns its path.

    plan   the experts that stay; without one the page shows, and says so, what half of them by REAP would be
    sweep  what `reap.sweep` returned, or the file of it: adds quality against size
    model  the GGUF file: adds sizes before and after by kind of tensor, and which memory they fit into

    Raises UsageError where a file cannot be read, FormatError where one is damaged, MismatchError where they are not of
    one model, OutputError where the page cannot be written.
    """
    source = profile if isinstance(profile, Profile) else Profile.load(profile)
    given = plan if plan is None or isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    if given is not None:
        require_plan_of(source, given)
    table = sweep if sweep is None or isinstance(sweep, Sweep) else Sweep.load(sweep)
    ours, theirs = source.model.get("fingerprint"), None if table is None else table.model.get("fingerprint")
    if ours and theirs and theirs != ours:
        raise MismatchError(f"the profile is of a model with fingerprint {ours}, but the sweep of one with {theirs}")
    made = given or plan_of_half(source)
    info = None if model is None else inspect(model)
    if info is not None:
        _require_model_of(source, info)
    size = None if model is None or info is None else measure_size(model, None if info.refusals else made)
    name = None if isinstance(profile, Profile) else Path(profile).name
    return write_page(_Report(source, made, given is None, table, info, size, name).page(), output)


def _require_model_of(profile: Profile, info: ModelInfo) -> None:
    ours = profile.model.get("fingerprint")
    if ours and ours != info.fingerprint:
        raise MismatchError(
            f"the profile is of a model with fingerprint {ours}, but {info.path} has {info.fingerprint}"
        )
    if profile.n_experts != info.n_experts:
        raise MismatchError(
            f"the profile is of a model with {profile.n_experts} experts, but {info.path} has {info.n_experts}"
        )


@dataclass(frozen=True)
class _Report:
    """What the sections are made of. is_example: nobody gave the plan."""

    profile: Profile
    plan: PrunePlan
    is_example: bool
    sweep: Sweep | None
    info: ModelInfo | None
    size: ModelSize | None
    file_name: str | None

    @cached_property
    def mask(self) -> Mask:
        return kept_mask(self.profile, self.plan.layers)

    @property
    def removes(self) -> bool:
        return self.plan.keep < self.profile.n_experts

    @cached_property
    def metric(self) -> str:
        """The score that the page cuts: the plan's own, where the profile holds it and it says something."""
        return (
            self.plan.metric
            if self.plan.metric in known_metrics(self.profile) and self.plan.metric != "random"
            else "reap"
        )

    @property
    def layers(self) -> list[str]:
        return [str(layer) for layer in self.profile.layers.tolist()]

    def page(self) -> Page:
        model = self.profile.model
        name = str(model.get("name") or model.get("architecture") or self.file_name or "profile")
        by = (
            f"{self.plan.keep} of {self.profile.n_experts} experts in each of {self.profile.n_layers} layers, by"
            f" {self.plan.metric}"
        )
        subtitle = f"{'An example: what keeping ' if self.is_example else 'The plan keeps '}{by}" + (
            " would mean" if self.is_example else ""
        )
        if not self.removes:
            subtitle = (
                f"{self.profile.n_experts} experts in each of {self.profile.n_layers} layers; the router leaves nothing"
                " to remove"
            )
        warnings = [UNTRUSTED] if not self.profile.trusted else []
        if self.is_example and self.removes:
            subtitle += ". Give a plan with --plan to see yours"
        return Page(name, subtitle + ".", list(self.facts()), list(self.sections()), warnings, self.data())

    def facts(self) -> Iterator[tuple[str, str]]:
        profile, record = self.profile, self.profile.calibration
        if self.removes:
            total = profile.gated_norm_sum
            kept, blind = (
                mean_of(kept_share(total, self.mask)),
                mean_of(random_share(total, self.plan.keep, profile.n_groups)[0]),
            )
            yield percent(kept), f"of Σ g·‖f‖ kept; at random it would be {percent(blind)}"
        if self.size is not None:
            yield bytes_text(self.size.n_bytes_after), f"after, {bytes_text(self.size.n_bytes_before)} before"
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

    def sections(self) -> Iterator[Section]:
        yield self.experts()
        yield self.layer()
        yield self.distribution()
        yield self.inequality()
        yield self.load()
        if self.removes:
            yield self.kept_mass()
        if self.sweep is not None:
            yield from self.quality(self.sweep)
        if self.size is not None:
            yield self.sizes(self.size)
            yield self.memory(self.size)
        yield self.criteria()
        if len(self.profile.domains) > 1:
            yield self.domains()
        yield self.low()
        if self.profile.trusted:
            yield self.super_experts()
        yield self.provenance()

    # ---- the map, and one layer of it

    def data(self) -> dict[str, Any]:
        profile = self.profile
        shares = {
            name: part.counts / np.maximum(part.total_tokens, 1)[:, None]
            for name, part in list(profile.parts.items())[:_MOST_DOMAINS]
        }
        experts = {
            "layers": profile.layers.tolist(),
            "n_experts": profile.n_experts,
            "metric": self.metric,
            "metrics": {
                metric: packed(profile.score(metric)) for metric in known_metrics(profile) if metric != "random"
            },
            "counts": packed(np.minimum(profile.counts, 2**31 - 1)),
            "kept": packed(self.mask) if self.removes else None,
            "norm_max": packed(profile.norm_max) if profile.trusted else None,
            "domains": {name: packed(share) for name, share in shares.items()},
        }
        return {"experts": experts, "scale": figures.SCALE}

    def experts(self) -> Section:
        struck = " A line through a cell means that the expert is removed." if self.removes else ""
        alt = (
            f"Heat map of {self.profile.n_layers} layers and {self.profile.n_experts} experts, coloured by the chosen "
            "metric; brighter is higher, "
            f"grey is not defined.{struck}"
        )
        lead = (
            "Every expert of every layer. Scores compare experts of one layer; between layers the sizes of outputs"
            " differ, so the colour is relative."
        )
        return Section("experts", "Experts", lead, "experts", alt)

    def layer(self) -> Section:
        lead = (
            "A steep fall means that few experts matter; a flat line that the choice hardly does. A click on the map"
            " chooses the layer."
        )
        alt = "The experts of one layer in the order of the metric chosen above" + (
            ", kept ones as dots, removed ones as crosses." if self.removes else "."
        )
        return Section("layer", "One layer", lead, "layer", alt)

    # ---- by layer

    def distribution(self) -> Section:
        score, cut = self.profile.score(self.metric), find_cut(self.profile.score(self.metric), self.mask)
        quartiles = np.array(
            [
                np.nanquantile(row, [0, 0.25, 0.5, 0.75, 1]) if np.isfinite(row).any() else np.full(5, np.nan)
                for row in score
            ]
        )
        columns = ["layer", "lowest", "quarter", "median", "three quarters", "highest"]
        rows = [[layer, *map(number, values)] for layer, values in zip(self.layers, quartiles.tolist(), strict=True)]
        if self.removes:
            columns += ["lowest kept", "highest removed"]
            for row, kept, removed in zip(rows, cut.lowest_kept.tolist(), cut.highest_removed.tolist(), strict=True):
                row += [number(kept), number(removed)]
        lead = f"How {self.metric} is spread in each layer" + (", and where the plan cuts." if self.removes else ".")
        alt = f"Boxes of {self.metric} by layer" + (
            ", with the lowest kept and the highest removed score marked as triangles." if self.removes else "."
        )
        figure = figures.distribution(self.profile, self.metric, self.mask)
        return Section("distribution", "Scores", lead, figure, alt, Table(columns, rows))

    def inequality(self) -> Section:
        score = self.profile.score(self.metric)
        columns, values = (
            ["layer", f"Gini of {self.metric}", "Gini of the load"],
            [gini(score), gini(self.profile.counts)],
        )
        if self.removes:
            columns.append("gap at the cut")
            values.append(find_cut(score, self.mask).gap)
        rows = [[layer, *(number(column[index], 3) for column in values)] for index, layer in enumerate(self.layers)]
        alt = (
            f"Mean Gini of {self.metric}: {number(mean_of(values[0]), 2)}; of the load: {number(mean_of(values[1]), 2)}"
        )
        alt += (
            f"; mean gap at the cut: {percent(mean_of(values[2]), 1)} of the lowest kept score."
            if self.removes
            else "."
        )
        lead = (
            "Gini 0: all experts alike; near 1: few have nearly all. The gap says how far the score falls at the cut: "
            "near 0 the experts on "
            "either side are interchangeable, below 0 something else than this score chose as well."
        )
        figure = figures.inequality(self.profile, self.metric, self.mask)
        return Section("inequality", "Gini and gap", lead, figure, alt, Table(columns, rows))

    def load(self) -> Section:
        profile = self.profile
        effective, busiest, never = (
            effective_experts(profile.counts),
            busiest_share(profile.counts),
            profile.never_routed.sum(axis=1),
        )
        seen = np.median(profile.counts, axis=1)
        rows = [
            [
                layer,
                f"{int(profile.total_tokens[i]):,}",
                number(effective[i], 3),
                percent(busiest[i], 1),
                str(never[i]),
                f"{seen[i]:,.0f}",
            ]
            for i, layer in enumerate(self.layers)
        ]
        few = int(((profile.counts > 0) & (profile.counts < FEW_TOKENS)).sum())
        notes = (
            [
                f"{few:,} experts were seen with fewer than {FEW_TOKENS} tokens: their means say little, and more"
                " calibration text would."
            ]
            if few
            else []
        )
        lead = (
            "Effective experts is the exponential of the load's entropy: as many as would be in use if all were used"
            " alike."
        )
        mean = mean_of(effective)
        alt = (
            f"On average {number(mean, 3)} of {profile.n_experts} experts are effectively in use, and the busiest tenth"
            f" gets {percent(mean_of(busiest))} of the routings."
        )
        columns = [
            "layer",
            "tokens",
            "effective experts",
            "busiest tenth gets",
            "never routed to",
            "tokens of the median expert",
        ]
        return Section("load", "Load", lead, figures.load(profile), alt, Table(columns, rows), notes)

    def kept_mass(self) -> Section:
        profile, keep = self.profile, self.plan.keep
        total = profile.gated_norm_sum
        kept, best = kept_share(total, self.mask), best_share(total, keep, profile.n_groups)
        mean, deviation = random_share(total, keep, profile.n_groups)
        routed = kept_share(profile.counts.astype(np.float64), self.mask)
        rows = [
            [
                layer,
                percent(kept[i], 1),
                f"{percent(mean[i], 1)} ± {percent(deviation[i], 1)}",
                percent(best[i], 1),
                percent(routed[i], 1),
            ]
            for i, layer in enumerate(self.layers)
        ]
        low = lowest_of(kept, profile.layers)
        where = f"; the least in layer {low[1]}, {percent(low[0])}" if low else ""
        alt = (
            f"The plan keeps {percent(mean_of(kept))} of Σ g·‖f‖ on average{where}. A blind choice would keep"
            f" {percent(mean_of(mean))}."
        )
        lead = (
            "What the kept experts contributed on the calibration text, of all that was contributed. It says how much"
            " is touched, not how much worse the model gets: the router sends the removed experts' tokens to others."
        )
        columns = [
            "layer",
            "kept of Σ g·‖f‖",
            "at random (± standard deviation)",
            "the most possible",
            "kept of the routings",
        ]
        return Section("mass", "Kept mass", lead, figures.mass(profile, self.mask), alt, Table(columns, rows))

    # ---- quality and size

    def quality(self, sweep: Sweep) -> Iterator[Section]:
        known = [(domain, points) for domain in (None, *sweep.domains) if (points := points_of(sweep, domain))]
        for index, (domain, points) in enumerate(known):
            whole = [
                point.perplexity for group in points.values() for point in group if point.keep >= self.profile.n_experts
            ]
            curves = {
                metric: group
                for metric, group in points.items()
                if any(point.keep < self.profile.n_experts for point in group)
            }
            title = "Quality and size" + (f": {domain}" if domain is not None else "")
            verdicts = [verdict for verdict in sweep.verdicts if verdict.domain == domain]
            yield Section(
                "quality" if index == 0 else f"quality-{index}",
                title,
                "" if index else _QUALITY_LEAD,
                figures.sweep_curve(curves or points, whole[0] if whole else None),
                _best_by_size(points, verdicts),
                _points_table(points),
                () if index else sweep.warnings,
                navigation="" if index else "Quality and size",
            )

    def sizes(self, size: ModelSize) -> Section:
        rows = [
            [item.name, bytes_text(item.n_bytes_before), bytes_text(item.n_bytes_after), str(item.n_tensors)]
            for item in size.classes
        ]
        rows.append(
            [
                "in all",
                bytes_text(size.n_bytes_before),
                bytes_text(size.n_bytes_after),
                str(sum(item.n_tensors for item in size.classes)),
            ]
        )
        alt = (
            f"{size.n_bytes_before:,} bytes before, {size.n_bytes_after:,} after. After:"
            f" {describe_fit(size.n_bytes_after)}."
        )
        notes = []
        if self.info is not None and self.info.refusals:
            notes.append(f"This model cannot be pruned: {self.info.refusals[0]}")
        lead = "Of the file, to the byte. Only experts and routers shrink."
        return Section(
            "sizes", "Sizes", lead, figures.sizes(size), alt, Table(["kind", "before", "after", "tensors"], rows), notes
        )

    def memory(self, size: ModelSize) -> Section:
        both = zip(fits(size.n_bytes_before), fits(size.n_bytes_after), strict=True)
        rows = [
            [f"{pair[0].gb} GB", *(f"{fit.verdict}, {bytes_text(abs(fit.bytes_left))} {_left(fit)}" for fit in pair)]
            for pair in both
        ]
        lead = (
            "Whether the weights go into one device's memory, of as many times 2³⁰ bytes, as memories are sold. Fits"
            " means that they leave a tenth of it free, tight that they leave less. The cache grows with the context"
            " and is not counted; experts may also stay in the computer's own memory, which is slower but removes"
            " nothing."
        )
        return Section("memory", "Memory", lead, table=Table(["memory", "before", "after"], rows))

    # ---- agreement

    def criteria(self) -> Section:
        names = [metric for metric in known_metrics(self.profile) if metric != "random"]
        masks = [mask_by(self.profile, metric, self.plan.keep) for metric in names]
        chance = self.plan.keep / self.profile.n_experts
        values = overlaps([*masks, self.mask])
        labels = [*names, "the example" if self.is_example else "the plan"]
        alt = (
            "Of the experts that one metric keeps, the share that another keeps as well. Two blind choices would share"
            f" {percent(chance)}."
        )
        lead = (
            f"Would another metric have kept the same {self.plan.keep} experts? Where two agree, the choice between"
            " them hardly matters; where they do not, a sweep on held-out text decides. None is best everywhere."
        )
        table = Table(
            ["", *labels], [[label, *map(percent, row)] for label, row in zip(labels, values.tolist(), strict=True)]
        )
        return Section(
            "criteria",
            "Metrics",
            lead,
            figures.matrix(labels, values, chance, "of the kept experts in common"),
            alt,
            table,
        )

    def domains(self) -> Section:
        profile, keep = self.profile, self.plan.keep
        names = list(profile.domains)
        parts = [profile.domain(name) for name in names]
        masks = [mask_by(part, self.metric, keep) for part in parts]
        values = overlaps(masks)
        kept = [mean_of(kept_share(part.gated_norm_sum, self.mask)) for part in parts]
        rows = [
            [name, f"{int(part.total_tokens.max()):,}", percent(share, 1), *map(percent, row)]
            for name, part, share, row in zip(names, parts, kept, values.tolist(), strict=True)
        ]
        chance = keep / profile.n_experts
        worst = int(np.argmin(np.nan_to_num(kept, nan=1)))
        alt = (
            "Of the experts that one domain alone would keep, the share that another would; two blind choices would "
            f"share {percent(chance)}. "
            f"Of all domains the plan serves {names[worst]} least: it keeps {percent(kept[worst])} of its Σ g·‖f‖."
        )
        lead = "Domains that need other experts pull a plan apart. What the calibration lacks, a plan does not protect."
        table = Table(["domain", "tokens", "kept of its Σ g·‖f‖", *names], rows)
        return Section(
            "domains",
            "Domains",
            lead,
            figures.matrix(names, values, chance, "of the kept experts in common"),
            alt,
            table,
        )

    # ---- lists

    def low(self) -> Section:
        profile = self.profile
        low, never = low_by_every_metric(profile), profile.never_routed
        rows = [
            [
                layer,
                _ids(np.flatnonzero(never[i])),
                _ids(np.flatnonzero(low[i] & ~never[i])),
                f"{int((low[i] & ~self.mask[i]).sum())} of {int(low[i].sum())}",
            ]
            for i, layer in enumerate(self.layers)
        ]
        lead = (
            "Experts that were never routed to, and those in the lowest quarter of their layer by every metric:"
            " removing them is the safest bet, for this calibration text."
        )
        everywhere = np.flatnonzero(low.all(axis=0))
        notes = []
        if profile.n_layers > 1:
            named = (
                f"Low in every layer: expert {_ids(everywhere)}. "
                if everywhere.size
                else "No expert id is low in every layer. "
            )
            notes.append(
                named
                + "Ids of different layers have nothing to do with each other, so one that is low everywhere points "
                "at the measurement more than at the expert."
            )
        columns = ["layer", "never routed to", "low by every metric", "removed of these"]
        return Section("low", "Low experts", lead, table=Table(columns, rows, is_words=True), notes=notes)

    def super_experts(self) -> Section:
        found = super_experts(self.profile)
        lead = (
            "Experts whose largest output dwarfs the others' of their layer. Removing one tends to break a model, "
            "however rarely it is chosen; "
            "reap plan --super-experts protects them."
        )
        if not found:
            return Section("super-experts", "Super experts", lead + " None was found here.")
        rows = [
            [f"layer {item.layer}, expert {item.expert}", number(item.norm_max), f"{item.ratio:.0f}",
             "kept" if item.expert in self.plan.layers[item.layer] else "REMOVED"]
            for item in found[:_MOST_LISTED]
        ]  # fmt: skip
        return Section(
            "super-experts",
            "Super experts",
            lead,
            table=Table(["", "largest ‖f‖", "times the median", "the plan"], rows),
        )

    def provenance(self) -> Section:
        rows = [[name, value] for name, value in self._provenance() if value not in ("", "None")]
        lead = "What was measured, on what, with what."
        return Section("provenance", "Provenance", lead, table=Table([], rows, is_words=True))

    def _provenance(self) -> Iterator[tuple[str, str]]:
        model, record, engine = self.profile.model, self.profile.calibration, self.profile.engine
        yield "profile", self.file_name or ""
        for key in ("name", "architecture", "fingerprint", "router_fingerprint", "n_experts_used", "n_groups"):
            yield f"model: {key.replace('_', ' ')}", str(model.get(key, ""))
        yield "calibration files", ", ".join(map(str, record.get("files") or ()))
        yield "their sha256", ", ".join(map(str, record.get("sha256") or ()))
        for key in (
            "samples",
            "tokens",
            "counted_tokens",
            "windows",
            "skipped",
            "failed",
            "ctx_size",
            "chat_template",
            "mask",
        ):
            value = record.get(key, "")
            yield f"calibration: {key.replace('_', ' ')}", f"{value:,}" if type(value) is int else str(value)
        yield "measured by", ", ".join(f"{key} {engine[key]}" for key in ("tool", "reap", "llama_cpp") if key in engine)
        options = engine.get("options")
        if isinstance(options, dict):
            yield (
                "engine options",
                ", ".join(f"{key}={value}" for key, value in options.items() if value not in (None, [], {})),
            )
        yield (
            "plan",
            f"{self.plan.keep} of {self.profile.n_experts}, by {self.plan.metric}"
            + (" (an example)" if self.is_example else ""),
        )
        plan_options = {
            key: value for key, value in self.plan.options.items() if key not in ("super_experts", "protected")
        }
        yield "plan options", ", ".join(f"{key}={value}" for key, value in plan_options.items())
        protected = self.plan.options.get("protected")
        if isinstance(protected, dict) and protected:
            yield "protected", ", ".join(f"layer {layer}: {ids}" for layer, ids in protected.items())
        if self.info is not None:
            yield "model file", f"{self.info.path.name}, {self.info.n_bytes:,} bytes"


_QUALITY_LEAD = (
    "Perplexity on held-out text against size. Bars are standard errors, or the range over the seeds. Models on one"
    " text make mostly the same mistakes, so a difference smaller than its bar can be real; it can also be luck."
)


def _left(fit: Fit) -> str:
    return "missing" if fit.bytes_left < 0 else "left"


def _best_by_size(points: dict[str, list[SweepPoint]], verdicts: Sequence[Verdict]) -> str:
    """For each size the metric with the lowest perplexity, and by how much: as the sweep itself judged, where it
    did."""
    if verdicts:
        words = [
            f"{item.keep} experts: {item.metric} before {item.runner_up} by {number(item.margin, 2)} ± "
            f"{number(item.spread, 2)} nats a token" + ("" if item.clear else " (no clear winner)")
            for item in sorted(verdicts, key=lambda item: -item.keep)
        ]
        return "Best at " + "; ".join(words) + "."
    by_keep: dict[int, list[SweepPoint]] = {}
    for group in points.values():
        for point in group:
            by_keep.setdefault(point.keep, []).append(point)
    sentences = []
    for keep, candidates in sorted(by_keep.items(), reverse=True):
        ranked = sorted(candidates, key=lambda point: point.perplexity)
        if len(ranked) > 1:
            margin = ranked[1].perplexity - ranked[0].perplexity
            error = f", standard error {number(ranked[0].stderr, 2)}" if ranked[0].stderr > 0 else ""
            sentences.append(
                f"{keep} experts: {ranked[0].metric}, by {number(margin, 2)} before {ranked[1].metric}{error}"
            )
    return ("Lowest perplexity at " + "; ".join(sentences) + ".") if sentences else "Perplexity by size."


def _points_table(points: dict[str, list[SweepPoint]]) -> Table:
    rows = [
        [
            metric,
            str(point.keep),
            bytes_text(point.n_bytes),
            f"{number(point.perplexity, 5)} ± {number(point.stderr, 2)}",
            "–" if point.spread is None else f"{number(point.spread[0])} to {number(point.spread[1])}",
            f"{percent(point.rise, 2)} ± {percent(point.rise_error, 2)}",
            number(point.kl_mean, 3),
            percent(point.top1, 1),
        ]
        for metric, group in points.items()
        for point in group
    ]
    columns = [
        "metric",
        "experts",
        "size",
        "perplexity",
        "over the seeds",
        "rise over all experts",
        "mean KL divergence",
        "top-1 agreement",
    ]
    return Table(columns, rows)


def _ids(found: Any) -> str:
    listed = ", ".join(map(str, found[:_MOST_LISTED].tolist()))
    return (listed + (f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else "")) or "–"
