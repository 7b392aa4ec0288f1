"""Every benchmark: what it measures against what, how it is called, and which lines of its output are its figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = r"([+-]?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?)"


@dataclass(frozen=True)
class Figure:
    """One figure of an output."""

    what: str
    """What the number says, as the table of measurements has it."""
    pattern: str
    """A regular expression; `#` stands for a number. Several matches give the range of each number."""
    form: str = "{0}"
    """The figure in words, with the numbers in the pattern's order."""

    def read(self, output: str) -> str | None:
        """The figure in words; None where the output does not have it."""
        found = re.findall(self.pattern.replace("#", _NUMBER), output)
        rows = [row if isinstance(row, tuple) else (row,) for row in found]
        return self.form.format(*map(_range, zip(*rows, strict=True))) if rows else None


def _range(values: tuple[str, ...]) -> str:
    numbers = sorted(set(values), key=lambda text: float(text.replace(",", "")))
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder, or tests that print what they compared."""

    name: str
    what: str
    against: str
    minutes: float
    """On two idle cores."""
    command: str
    """Words after the interpreter."""
    figures: tuple[Figure, ...]
    measures: tuple[str, ...]
    """Folders and files whose change makes the figures old."""
    quick: str | None = None
    """The same in seconds, to see that it works; None where it has no such form."""
    needs: str = ""
    """What the machine has to have beyond reap and the extra `test`."""


def _rise(keep: int, calibration: str, metric: str) -> Figure:
    """What the table of the benchmark `quality` says of a choice, in each domain."""
    name = metric.partition(",")[0]
    return Figure(
        f"rise of perplexity with {keep} % of the experts kept by {name}, calibrated on {calibration}",
        rf"keep {keep}%, calibrated on {calibration}:[\s\S]*?\n{metric} +#% ± #% +#% ± #% +#% ± #%",
        "C {0} % ± {1} %, English {2} % ± {3} %, Python {4} % ± {5} %",
    )


_ENGINE = ("csrc", "vendor/llama.cpp/pin.cmake")
_PROFILING = (*_ENGINE, "python/reap/profiling", "python/reap/engine")
_JUDGING = (*_ENGINE, "python/reap/evaluation")

BENCHMARKS = (
    Benchmark(
        "torch_oracle",
        "sums and logits of nine small models",
        "PyTorch on the same weights, and an oracle that knows nothing of reap",
        6,
        "-m pytest -m torch -rP tests/profiling/test_torch_oracle.py",
        (
            Figure(
                "against PyTorch on the same weights, nine models of eight families: Σ g, Σ ‖f‖ and Σ g·‖f‖",
                r"gate_sum #, norm_sum #, gated_norm_sum #,",
                "counts equal; differ by {0}, {1} and {2} at most",
            ),
            Figure("logits of the pruned file against the sliced model", r"logits differ by # where", "{0}"),
        ),
        (*_PROFILING, "python/reap/pruning", "python/reap/gguf"),
        needs="the extra hf",
    ),
    Benchmark(
        "prune_families",
        "checkpoints of thirteen families, pruned",
        "the original with the same experts masked in PyTorch",
        8,
        "-m pytest -m torch -rP tests/hf/test_hf_prune_families.py",
        (Figure("checkpoints pruned, against the original with experts masked: logits", r"logits differ by #", "{0}"),),
        ("python/reap/hf",),
        needs="the extra hf",
    ),
    Benchmark(
        "profile_speed",
        "reap.profile at the dimensions of Qwen3-30B-A3B and Nemotron-3-Nano",
        "the engine's own forward passes, in turn",
        25,
        "benchmarks/profile_speed.py",
        (
            Figure(
                "profiling against a pass that yields all logits, at full depth",
                r"layers: all #, last #",
                "{0} times as fast; against the one that yields the last {1}",
            ),
            Figure("the callback's share of the time", r"callback #% of the time", "{0} %"),
            Figure("memory that profiling takes beyond that of a forward pass", r"for all logits: # MB", "{0} MB"),
        ),
        _PROFILING,
        quick="benchmarks/profile_speed.py --models qwen3 --types Q4_K --threads 2 --repeats 1",
        needs="12 GB of memory, 6 GB of disk",
    ),
    Benchmark(
        "prune_speed",
        "reap.prune of 2.7 GB to half",
        "cp of the result, and the gguf package with numpy.take",
        5,
        "benchmarks/prune_speed.py",
        (
            Figure(
                "pruning against cp, source in memory, both with fsync", r"source in memory\s*: prune.*ratio #", "{0}"
            ),
            Figure("the same with the source on the disk", r"source not in memory\s*: prune.*ratio #", "{0}"),
            Figure("peak memory of pruning 16 GB", r"16\.0 GB ->.*peak\s+# MB", "{0} MB"),
            Figure("reap inspect of a vocabulary of 152k tokens", r"merges.*command # s, # MB", "{0} s, {1} MB"),
        ),
        ("python/reap/pruning", "python/reap/gguf", "python/reap/files"),
        quick="benchmarks/prune_speed.py --quick --pairs 1",
        needs="8 GB of disk",
    ),
    Benchmark(
        "hf_prune_speed",
        "reap.hf.prune of 9.7 GB to half",
        "cp, and the safetensors package",
        12,
        "benchmarks/hf_prune_speed.py",
        (
            Figure("pruning a checkpoint against cp, source in memory", r"source in memory\s*: prune.*ratio #", "{0}"),
            Figure("the same checkpoint from the disk", r"source not in memory\s*: prune.*ratio #", "{0}"),
            Figure("its peak memory", r"verify fast.*peak\s+# MB", "{0} MB"),
        ),
        ("python/reap/hf/disk", "python/reap/files"),
        quick="benchmarks/hf_prune_speed.py --quick --pairs 1",
        needs="25 GB of disk",
    ),
    Benchmark(
        "quality",
        "which criterion keeps the right experts of the embedded model",
        "random choices, and two mistakes of published profilers",
        20,
        "benchmarks/quality.py --refine 10m --refine-passes 40 --figure docs/images/quality.svg",
        (
            Figure(
                "rise of perplexity with half of the experts kept",
                r"keep 50%: reap \+#%, random \+#%",
                "{0} % by REAP, {1} % at random",
            ),
            *(_rise(50, "all", metric) for metric in ("reap", "frequency", "weighted_ean_sum", "random, 5 seeds")),
            *(_rise(25, text, metric) for text in ("all", "c") for metric in ("reap", "weighted_ean_sum")),
        ),
        (*_JUDGING, "python/reap/scores"),
        quick="benchmarks/quality.py --no-traps --keep 0.5 --seeds 1",
        needs="reap-dump-nodes (the preset tools)",
    ),
    Benchmark(
        "virtual_pruning",
        "a plan tried virtually",
        "the whole model, and the pruned file",
        2,
        "benchmarks/virtual_pruning.py",
        (
            Figure("a window virtually pruned, of the whole model's time", r"virtually pruned: # of that"),
            Figure("the same with the divergence", r"with the divergence: # of that"),
            *(
                Figure(
                    f"perplexity with {keep} of 32 experts",
                    rf"\n{keep} experts, virtually: perplexity #,.*\n{keep} experts, from the file: perplexity #,",
                    "{0} virtually and {1} from the file",
                )
                for keep in (16, 8)
            ),
        ),
        _JUDGING,
        quick="benchmarks/virtual_pruning.py --windows 2 --rounds 1",
    ),
    Benchmark(
        "defaults_difference",
        "a profile with the default options",
        "the exact one: an F32 cache, no flash attention",
        1,
        "benchmarks/defaults_difference.py --max-tokens 60000",
        (
            Figure(
                "default options against exact ones, embedded model",
                r"reap-demo\S* \| [\d,]+ \| # \| # \| # \|",
                "{1} of {0} routings moved, REAP within {2}",
            ),
        ),
        _PROFILING,
        quick="benchmarks/defaults_difference.py --max-tokens 2000",
    ),
    Benchmark(
        "device_traffic",
        "bytes that cross to a device and back",
        "reading whole outputs and running the whole graph",
        1,
        "benchmarks/device_traffic.py --vocab 151936",
        (
            Figure(
                "bytes back from a device, a token, at a vocabulary of 152k", r"head on the host\s+[\d,]+\s+#", "{0}"
            ),
            Figure("the same with whole outputs", r"whole graph\s+[\d,]+\s+#"),
        ),
        _PROFILING,
        quick="benchmarks/device_traffic.py --vocab 2048 --tokens 64",
    ),
    Benchmark(
        "stability",
        "the overlap that Profile.stability promises, for six metrics, three numbers kept and three amounts of text",
        "the overlap with other profiles of as much text, over 200 random divisions of the calibration",
        12,
        "benchmarks/stability.py",
        (
            Figure(
                "promised against observed overlap with another profile, means of 200 divisions of the calibration",
                r"largest difference of the means # points",
                "at most {0} points apart",
            ),
        ),
        (*_PROFILING, "python/reap/scores"),
        quick="benchmarks/stability.py --splits 3",
    ),
    Benchmark(
        "refine_noise",
        "what a search should measure",
        "the surprise at the token that came",
        2,
        "benchmarks/refine_noise.py",
        (
            Figure(
                "an expert's worth in standard errors",
                r"median distance.*−ln p #, KL #",
                "{1} by KL divergence, {0} by the surprise",
            ),
        ),
        _JUDGING,
        quick="benchmarks/refine_noise.py --moves 2",
    ),
    Benchmark(
        "refine_safety",
        "plan --refine over seeds and budgets, on held-out text",
        "the best plain criterion",
        90,
        "benchmarks/refine_safety.py",
        (
            Figure(
                "searches that made things worse",
                r"worse than the start by more than a standard error: # of #; the worst # standard errors; # of",
                "{0} of {1}; {3} took what was found",
            ),
        ),
        _JUDGING,
        quick="benchmarks/refine_safety.py --seeds 1 --passes 1 --every 20",
    ),
    Benchmark(
        "report_speed",
        "the page of 60 layers of 512 experts",
        "a fresh browser",
        1,
        "benchmarks/report_speed.py",
        (
            Figure("the page of 60 layers of 512 experts", r"written in # s, # MB", "{1} MB"),
            Figure("drawn in a fresh browser, and again", r"drawn after # ms", "{0} ms"),
        ),
        ("python/reap/reporting",),
        quick="benchmarks/report_speed.py --runs 1",
        needs="chromium and its driver",
    ),
    Benchmark(
        "torch_hooks",
        "a small F32 model profiled by reap",
        "PyTorch hooks",
        2,
        "benchmarks/torch_hooks.py",
        (
            Figure("the time of PyTorch hooks on routed experts, in reap's", r"torch, routed experts.*\s# times"),
            Figure("on all experts", r"torch, all experts.*\s# times"),
        ),
        _PROFILING,
        quick="benchmarks/torch_hooks.py --repeats 1",
        needs="the extra hf",
    ),
    Benchmark(
        "hf_speed",
        "reap.hf.profile",
        "a plain forward pass, hooks on all experts, llm-compressor",
        4,
        "benchmarks/hf_speed.py",
        (
            Figure("a plain forward pass, of reap.hf.profile's time", r"forward, grouped_mm.*\s# times the time"),
            Figure("hooks on all experts, of reap.hf.profile's time", r"all experts .*\s# times the time"),
            Figure("llm-compressor, of reap.hf.profile's time", r"llm-compressor  .*\s# times the time"),
            Figure("the GGUF half, of reap.hf.profile's time", r"reap, GGUF .*\s# times the time"),
        ),
        ("python/reap/hf/memory", "python/reap/profiling"),
        quick="benchmarks/hf_speed.py --repeats 1",
        needs="the extra hf",
    ),
    Benchmark(
        "llm_compressor_agreement",
        "the experts that llm-compressor keeps",
        "those that reap keeps",
        10,
        "benchmarks/llm_compressor_agreement.py --python OTHER/bin/python",
        (
            Figure(
                "experts that llm-compressor and reap both keep, layer by layer", r"both: # of # layer", "{0} of {1}"
            ),
        ),
        ("python/reap/hf/memory",),
        needs="an environment with llm-compressor, named by REAP_BENCH_OTHER",
    ),
    Benchmark(
        "wheel_speed",
        "a wheel with the CPU's variants",
        "a source build on the same machine",
        5,
        "benchmarks/wheel_speed.py --wheel WHEEL/bin/python --source SOURCE/bin/python",
        (Figure("a wheel, of the source build's speed", r"the wheel runs at #"),),
        _ENGINE,
        needs="two environments, named by REAP_BENCH_WHEEL and REAP_BENCH_SOURCE",
    ),
    Benchmark(
        "wheel_variants",
        "a wheel's CPU variants",
        "a source build, token by token",
        5,
        "benchmarks/wheel_variants.py --wheel WHEEL/bin/python --source SOURCE/bin/python",
        (Figure("routings that another instruction set flips", r": # of 8,192 routings flipped", "{0} of 8,192"),),
        _ENGINE,
        needs="two environments, named by REAP_BENCH_WHEEL and REAP_BENCH_SOURCE",
    ),
    Benchmark(
        "streaming_memory",
        "the memory of a process that reads a large calibration",
        "300 MB",
        5,
        "benchmarks/streaming_memory.py",
        (
            Figure("memory to read a JSON array of 5 GB", r"JSON array, through a pipe +# +# +#", "{2} MB"),
            Figure("memory to read Parquet of 2 GB, one row group", r"Parquet, one row group +# +# +#", "{2} MB"),
            Figure("memory to read JSON Lines of 2 GB, .zst", r"JSON Lines, \.zst +# +# +#", "{2} MB"),
        ),
        ("python/reap/text",),
        quick="benchmarks/streaming_memory.py --scale 0.02",
        needs="Linux, 5 GB of disk",
    ),
    Benchmark(
        "fuzz",
        "everything that reads a file of someone else's",
        "a second and 200 MB an input",
        15,
        "benchmarks/fuzz.py --runs 1000000",
        (Figure("fuzzed inputs without a crash or a hang", r"# inputs in all", "{0}"),),
        ("python/reap/files", "python/reap/gguf", "python/reap/scores", "python/reap/hf/disk", "python/reap/text"),
        quick="benchmarks/fuzz.py --runs 2000",
        needs="atheris",
    ),
)


def find(names: list[str]) -> Iterator[Benchmark]:
    """The named ones, in the registry's order; all where none is named. KeyError for a name that is not there."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    unknown = set(names) - known.keys()
    if unknown:
        raise KeyError(", ".join(sorted(unknown)))
    yield from (benchmark for benchmark in BENCHMARKS if not names or benchmark.name in names)
