"""demo: the whole pipeline on the small model that comes with reap."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reap
from reap.cli.show import print_table, progress_bar, say
from reap.errors import OutputError, ReapError
from reap.files.formatting import bytes_text, number_text

if TYPE_CHECKING:
    from reap.evaluation.result import Evaluation
    from reap.evaluation.sweep_table import SweepRow
    from reap.scores.profile import Profile

KEEPS = (0.75, 0.5, 0.25)
METRICS = ("reap", "frequency", "random")
DOMAINS = ("python", "c", "english")
HELDOUT_BYTES = 16_000  # of each domain: ten models are evaluated on all of them within a minute
# The model is so small that threads mostly wait for each other: on a busy two-core machine two of them took ten times
# as long as one.
THREADS = 1


@dataclass(frozen=True)
class _Row:
    """A model and what it predicts how well: what chose its experts, how many there are, and its perplexity by
    domain."""

    metric: str
    keep: int
    n_bytes: int
    evaluations: dict[str, Evaluation]
    seconds: float

    @property
    def sweep_rows(self) -> list[SweepRow]:
        """As the rows of a sweep; what was not measured is NaN."""
        from reap.evaluation.sweep_table import SweepRow

        unknown = dict.fromkeys(("kl_mean", "top1", "loss_increase", "loss_increase_stderr"), math.nan)
        seed = 0 if self.metric == "random" else None
        same: dict[str, Any] = {
            "metric": self.metric,
            "seed": seed,
            "keep": self.keep,
            "bytes": self.n_bytes,
            **unknown,
        }
        return [
            SweepRow(domain=name, tokens=it.tokens, perplexity=it.perplexity, stderr=it.stderr, **same)
            for name, it in self.evaluations.items()
        ]


@dataclass(frozen=True)
class _Files:
    """What the demo works on, all in one folder."""

    out: Path

    @property
    def model(self) -> Path:
        return self.out / "model.gguf"

    @property
    def calibration(self) -> Path:
        return self.out / "sample_calibration.jsonl"

    @property
    def profile(self) -> Path:
        return self.out / "expert_stats_reap.json"

    def heldout(self, domain: str) -> Path:
        return self.out / f"heldout-{domain}.txt"

    def plan(self, keep: float) -> Path:
        return self.out / f"plan-{keep:.0%}.json".replace("%", "")

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def pruned(self, keep: float) -> Path:
        return self.out / f"reap-{keep:.0%}.gguf".replace("%", "")


def demo(out: Path) -> None:
    """Do it all in the directory `out`, and say what is done."""
    started = time.perf_counter()
    work = _Files(out)
    _unpack(work)
    info = reap.inspect(work.model)
    experts = f"{len(info.moe_layers)} layers of {info.n_experts} experts, of which a token uses {info.n_experts_used}"
    say(f"A model of {bytes_text(info.n_bytes)}: {experts}.")
    say(f"\n$ reap profile {work.model} {work.calibration} -o {work.profile} -c 512 -t {THREADS} --force")
    with progress_bar("profiling") as progress:
        profile = reap.profile(work.model, work.calibration, ctx_size=512, threads=THREADS, progress=progress)
    profile.save(work.profile)
    say(f"  {profile.calibration['tokens']:,} tokens in {time.perf_counter() - started:.1f} s")
    rows = [_evaluate("baseline", info.n_experts, work, work.model)]
    for keep in KEEPS:
        rows += _prune_and_evaluate(work, profile, keep)
    say(f"\n$ reap report {work.profile} --plan {work.plan(0.5)} --model {work.model} -o {work.report} --force")
    table = reap.Sweep(rows=tuple(row for model in rows for row in model.sweep_rows))
    reap.report(profile, work.report, plan=work.plan(0.5), model=work.model, sweep=table, force=True)
    columns = ["model", "size", *(f"perplexity, {domain}" for domain in DOMAINS), "seconds"]
    say("")
    print_table(columns, [_cells(row, info.n_experts) for row in rows])
    say(f"Open {work.report} in a browser; `reap inspect {work.pruned(0.5)}` says what was kept.")
    say(f"Everything is in {out}. {time.perf_counter() - started:.0f} seconds in all.")


def _unpack(work: _Files) -> None:
    data = files("reap") / "data"
    models = sorted((item for item in data.iterdir() if item.name.endswith(".gguf")), key=lambda item: item.name)
    if not models:
        raise ReapError("this installation of reap lacks the demo's model (reap/data/*.gguf); reinstall it")
    try:
        work.out.mkdir(parents=True, exist_ok=True)
        for source, target in ((models[0], work.model), (data / "calibration.jsonl", work.calibration)):
            with source.open("rb") as read, open(target, "wb") as write:
                shutil.copyfileobj(read, write)
        for domain in DOMAINS:
            text = (data / "heldout" / f"{domain}.txt").read_bytes()[:HELDOUT_BYTES]
            work.heldout(domain).write_bytes(text[: text.rfind(b"\n") + 1])
    except OSError as error:
        raise OutputError(f"{work.out}: cannot be written: {error.strerror or error}") from error


def _prune_and_evaluate(work: _Files, profile: Profile, keep: float) -> list[_Row]:
    """By REAP, the file stays; by the others, for comparison only, it does not."""
    say(f"\n$ reap plan {work.profile} --keep {keep} -o {work.plan(keep)} --force")
    say(f"$ reap prune {work.model} --plan {work.plan(keep)} -o {work.pruned(keep)} --force")
    for domain in DOMAINS:
        say(f"$ reap evaluate {work.pruned(keep)} {work.heldout(domain)} -t {THREADS}")
    rows = []
    for metric in METRICS:
        plan = reap.plan(profile, keep=keep, metric=metric)
        is_kept = metric == "reap"
        target = work.pruned(keep) if is_kept else work.out / ".compared.gguf"
        if is_kept:
            plan.save(work.plan(keep))
        reap.prune(work.model, target, plan, force=True)
        rows.append(_evaluate(metric, plan.keep, work, target))
        if not is_kept:
            target.unlink()
    return rows


def _evaluate(metric: str, keep: int, work: _Files, model: Path) -> _Row:
    started = time.perf_counter()
    evaluations = {domain: reap.evaluate(model, work.heldout(domain), threads=THREADS) for domain in DOMAINS}
    return _Row(metric, keep, model.stat().st_size, evaluations, time.perf_counter() - started)


def _cells(row: _Row, n_experts: int) -> list[str]:
    name = "all experts" if row.keep == n_experts else f"{row.keep / n_experts:.0%} by {row.metric}"
    figures = [number_text(row.evaluations[domain].perplexity) for domain in DOMAINS]
    return [name, bytes_text(row.n_bytes), *figures, f"{row.seconds:.1f}"]
