"""demo: `reap shrink` on the small model that comes with reap."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import reap
from reap.cli.next_step import command_line
from reap.cli.show import print_table, say
from reap.cli.shrink import print_result, step_bars
from reap.cli.sweep_text import rise_text
from reap.errors import OutputError, ReapError, UsageError
from reap.files.formatting import bytes_text

KEEPS = (0.75, 0.5, 0.25)
DOMAINS = ("python", "c", "english")
HELDOUT_BYTES = 16_000  # of each domain: thirteen models are run on half of them within a minute
# The model is so small that threads mostly wait for each other: on a busy two-core machine two of them took ten times
# as long as one.
THREADS = 1
CTX_SIZE = 512


@dataclass(frozen=True)
class Files:
    """What the demo works on, all in one folder."""

    out: Path
    """The folder."""

    @property
    def model(self) -> Path:
        """The whole model."""
        return self.out / "model.gguf"

    @property
    def calibration(self) -> Path:
        """Text of three domains to profile."""
        return self.out / "sample_calibration.jsonl"

    @property
    def profile(self) -> Path:
        """The profile once more, by the name that other tools' users know."""
        return self.out / "expert_stats_reap.json"

    @property
    def texts(self) -> dict[str, Path]:
        """Domain -> held-out text."""
        return {domain: self.out / f"heldout-{domain}.txt" for domain in DOMAINS}

    @property
    def small(self) -> Path:
        """The folder of the job."""
        return self.out / "small"


def demo(out: Path) -> None:
    """Do it all in the directory `out`, and say what is done."""
    work = Files(out)
    unpack(work)
    info = reap.inspect(work.model)
    experts = f"{len(info.moe_layers)} layers of {info.n_experts} experts, of which a token uses {info.n_experts_used}"
    say(f"A model of {bytes_text(info.n_bytes)}: {experts}.")
    texts = [word for path in work.texts.values() for word in ("--text", path)]
    also = ",".join(str(keep) for keep in KEEPS if keep != 0.5)
    sizes = ["--keep", "0.5", "--also-keep", also, "-c", CTX_SIZE, "-t", THREADS]
    command = ["reap", "shrink", work.model, "--calibration", work.calibration, *texts, *sizes, "-o", work.small]
    say(f"$ {command_line(*command)}")
    with step_bars() as bars:
        result = reap.shrink(
            work.model,
            work.small,
            calibration=work.calibration,
            text=list(work.texts.values()),
            keep=0.5,
            also_keep=[keep for keep in KEEPS if keep != 0.5],
            ctx_size=CTX_SIZE,
            threads=THREADS,
            on_step=bars.begin,
            progress=bars.move,
        )
    shutil.copyfile(work.small / "profile.json", work.profile)
    print_rises(reap.Sweep.load(work.small / "sweep.json"))
    print_result(result)
    say(f"next: open {command_line(work.small / 'report.html')} in a browser")


def print_rises(table: reap.Sweep) -> None:
    """By how much perplexity rises by each criterion at each size, on each domain."""
    n_experts = table.baseline.keep
    candidates = [row for row in table.select() if row.keep < n_experts]
    parts = {(row.metric, row.keep, row.domain): row for row in table.rows}
    rows = [
        (
            f"{row.keep / n_experts:.0%} by {row.metric}",
            bytes_text(row.bytes),
            rise_text(row),
            *(rise_text(parts[row.metric, row.keep, domain]) for domain in table.domains),
        )
        for row in sorted(candidates, key=lambda row: -row.keep)
    ]
    print_table(["experts", "size", "perplexity rises by", *table.domains], rows)


def unpack(work: Files) -> None:
    """The model and its texts into the folder.

    Raises UsageError where another file has the name of one of them, OutputError where they cannot be written.
    """
    data = files("reap") / "data"
    models = sorted((item for item in data.iterdir() if item.name.endswith(".gguf")), key=lambda item: item.name)
    if not models:
        raise ReapError("this installation of reap lacks the demo's model (reap/data/*.gguf); reinstall it")
    contents = {work.model: models[0].read_bytes(), work.calibration: (data / "calibration.jsonl").read_bytes()}
    for domain, path in work.texts.items():
        text = (data / "heldout" / f"{domain}.txt").read_bytes()[:HELDOUT_BYTES]
        contents[path] = text[: text.rfind(b"\n") + 1]
    try:
        work.out.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            if path.exists() and path.read_bytes() != content:
                raise UsageError(f"{path}: is there and is not the demo's; choose another folder with --out")
            if not path.exists():
                path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{work.out}: cannot be written: {error.strerror or error}") from error
