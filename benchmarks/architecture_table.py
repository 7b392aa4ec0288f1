"""Writes docs/architectures.md: what reap does with every MoE architecture of the pinned llama.cpp.

    cmake --preset tools && cmake --build build/tools --target reap-llama-tools
    python benchmarks/architecture_table.py            # about two minutes on two cores; --check compares and writes
                                                       nothing

The checks are those of tests/engine/test_architectures.py.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers.architecture_check import LEAST_GAP, Outcome, check  # noqa: E402
from helpers.architectures import (  # noqa: E402
    DENSE,
    GROUPED,
    MOE,
    N_EXPERTS,
    NOT_GENERATED,
    PREDICTING,
    REFUSED,
    WITH_PREDICTION,
)
from helpers.llama_tools import find_tool  # noqa: E402

TARGET = ROOT / "docs" / "architectures.md"
PROGRAMS = ("test-llama-archs", "reap-dump-nodes")
COLUMNS = (
    "architecture",
    "MoE layers",
    "profiles",
    "counts exact",
    "loads after pruning",
    "same as removal by hand",
    "virtual = physical",
)

INTRODUCTION = f"""# Architectures

Written by `benchmarks/architecture_table.py`; do not edit. llama.cpp {{commit}}.

llama.cpp's own test suite writes a tiny random model of each of its architectures (`test-llama-archs -o DIR`; 2
experts, top-2, no
tokenizer). For the {{n_moe}} that have experts, the experts are repeated with noise to {N_EXPERTS}
(`tests/architectures.py`, with the
`gguf` package; {{grouped}} with a router of two groups), and each model is put to these questions:

- **profiles**: `reap.profile` gives statistics for every MoE layer, each token of each layer is counted exactly top-k
  times, REAP is
  finite and positive wherever there are counts, and four ways of cutting the same tokens into batches and ubatches
  agree.
- **counts exact**: the counts are those of the graph's own nodes, read by an independent program
  (`tests/tools/dump_nodes.cpp`), and all
  sums agree with these nodes to 1e-5. There the gate is known to be the right one because gate × output is what the
  graph goes on with,
  and output and expert belong together because the output is computed again from the file's weights.
- **loads after pruning**: `reap.prune` to {N_EXPERTS // 2} experts writes exactly the tensors that slicing by hand
  gives, the engine
  loads them, and the logits are finite.
- **same as removal by hand**: those logits equal, to 1e-5 of the largest, the logits of the whole model in which the
  same independent
  program writes −inf over the removed experts' router values.
- **virtual = physical**: those logits equal, to 1e-5 of the largest, the logits of reap's own virtual pruning
  (`Session.set_kept`), with
  the same four ways of cutting batches, with the logits of all tokens and of the second half alone; lifted, it leaves
  nothing behind.

Only samples count in which the last expert selected is ahead of the first one not selected by {LEAST_GAP:g}
everywhere, so that equal
counts are not a matter of luck.
"""


def measure(names: Sequence[str]) -> list[Outcome]:
    """Every model in a process of its own, two at a time."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        outcomes = []
        for outcome in pool.map(lambda name: check(name, Path(directory)), names):
            status = "refused" if outcome.refusal else "passed" if outcome.passed else "; ".join(outcome.problems)
            print(f"{outcome.name}: {status}", file=sys.stderr)
            outcomes.append(outcome)
        return outcomes


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    stages = (outcome.profiles, outcome.exact, outcome.loads_pruned, outcome.as_removed, outcome.virtual)
    words = {True: "yes", False: "**no**", None: "refused" if outcome.refusal and not outcome.problems else "**no**"}
    return (f"`{outcome.name}`", str(outcome.n_layers), *(words[stage] for stage in stages))


def table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def bullets(reasons: dict[str, str]) -> Iterator[str]:
    return (f"- `{name}`: {reason}" for name, reason in reasons.items())


def document(outcomes: Sequence[Outcome], commit: str) -> str:
    """The whole page."""
    plain = [outcome for outcome in outcomes if not outcome.name.endswith(WITH_PREDICTION)]
    predicting = [outcome for outcome in outcomes if outcome.name.endswith(WITH_PREDICTION)]
    passed = sum(outcome.passed for outcome in plain)
    refused = sum(bool(outcome.refusal) for outcome in plain)
    grouped = ", ".join(f"`{name}`" for name in sorted(GROUPED))
    lines = [INTRODUCTION.format(commit=f"`{commit[:12]}`", n_moe=len(plain), grouped=grouped)]
    lines += ["## The table", "", f"{passed} of {len(plain)} pass everything, {refused} are refused by name.", ""]
    lines += table(cells(outcome) for outcome in plain)
    lines += ["", PREDICTION, ""]
    lines += table(cells(outcome) for outcome in predicting)
    lines += [
        "",
        "## Refused",
        "",
        "`reap.profile` and `reap.prune` raise `UnsupportedModelError` with the name and the reason:",
        "",
        *bullets(REFUSED),
    ]
    lines += [
        "",
        "## Not generated",
        "",
        "Architectures with experts that llama.cpp's program cannot write. Nothing is claimed for them:",
        "",
    ]
    lines += bullets(NOT_GENERATED)
    dense = " and ".join(f"`{name}`" for name in DENSE)
    lines += [
        "",
        (
            f"The program's models of {dense} are called MoE, but hold no experts: `reap.profile` says that they are"
            " dense."
        ),
    ]
    lines += ["", "## Notes", "", *NOTES]
    return "\n".join(lines) + "\n"


PREDICTION = """## Prediction blocks

The program writes no multi-token-prediction blocks. Where llama.cpp can run one with experts, a copy of another block
is added as one
(`add_prediction_block`), and the same questions are put to that model: the block is profiled in a context of its own,
fed as in
llama.cpp's speculative decoding, which leaves out the first token of each sample. The logits do not depend on it; that
it loads and runs
after pruning is seen by profiling the pruned model again."""

NOTES = (
    "- `llama4` multiplies the experts' input by the gate. Its output already holds the gate, so g·‖f‖ is ‖f‖ there.",
    (
        "- `llada-moe` and `rnd1` are diffusion models, which must see a whole sample at once: batch and ubatch are"
        " raised to the context."
    ),
    "- Mixtral is `llama` with experts, DeepSeek-V3 is `deepseek2`, GLM-4-MoE is `glm4moe`.",
)


def pinned_commit() -> str:
    """The commit of vendor/llama.cpp/pin.cmake."""
    pin = (ROOT / "vendor" / "llama.cpp" / "pin.cmake").read_text(encoding="utf-8")
    return pin.split("set(REAP_LLAMA_CPP_COMMIT ", 1)[1].split(")", 1)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/architectures.md and write nothing")
    options = parser.parse_args()
    for program in PROGRAMS:
        if find_tool(program) is None:
            print(f"{program} was not built; see {Path(__file__).name}'s first lines", file=sys.stderr)
            return 2
    outcomes = measure([*MOE, *(name + WITH_PREDICTION for name in PREDICTING)])
    text = document(outcomes, pinned_commit())
    if options.check:
        same = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print("as written" if same else f"{TARGET.name} differs")
        return 0 if same else 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} written on {platform.machine()}")
    return 0 if all(outcome.passed or outcome.refusal for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
