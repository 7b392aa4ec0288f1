"""Writes docs/architecture-survey.md: every architecture with experts in the pinned llama.cpp and in the installed
transformers, and what reap does with each.

    python benchmarks/architecture_survey.py            # a few minutes; needs torch and transformers
    python benchmarks/architecture_survey.py --check    # lists what the page lacks, and fails where that is anything

What an engine or a library has learnt since the page was written is a failing row: "NEW". The engine's columns are
those of docs/architectures.md (benchmarks/architecture_table.py). A family of transformers is built as its default
configuration says, without memory (device "meta") and with few layers; a checkpoint of its tensors' names and shapes is
what `reap hf prune` is asked about.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]

from helpers.architectures import DENSE, MOE, NOT_GENERATED, REFUSED, SHARES_CODE  # noqa: E402
from helpers.engine_architectures import (  # noqa: E402
    converted_classes,
    families_with_experts,
    source_directory,
    with_experts,
)

TARGET = ROOT / "docs" / "architecture-survey.md"
ENGINE_COLUMNS = ("architecture", "profiles", "exact", "prunes", "loads")
FAMILY_COLUMNS = ("family", "class", "`reap hf prune`", "converts")
NEW = "**NEW**"


class EngineRow(NamedTuple):
    """An architecture of llama.cpp's."""

    name: str
    profiles: str
    exact: str
    prunes: str
    loads: str


class FamilyRow(NamedTuple):
    """A family of transformers'."""

    name: str
    model_class: str
    prunes: str
    converts: str


# ---- the engine


def engine_rows(source: Path) -> list[EngineRow]:
    """By name; the answers are those of docs/architectures.md."""
    answers = read_answers((ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"))
    return [_engine_row(name, answers) for name in sorted(with_experts(source))]


def read_answers(page: str) -> dict[str, list[str]]:
    """Architecture -> its cells in the first table of docs/architectures.md."""
    table = page[page.index("## The table") : page.index("## Prediction blocks")]
    return {match[1]: match[2].split(" | ") for match in re.finditer(r"^\| `([^`]+)` \| (.*) \|$", table, re.M)}


def _engine_row(name: str, answers: Mapping[str, list[str]]) -> EngineRow:
    if name in REFUSED:
        return EngineRow(name, *(["refused by name"] * 4))
    if name in answers:
        _, profiles, exact, loads, same, virtual = answers[name]
        return EngineRow(name, profiles, exact, "yes" if same == virtual == "yes" else f"{same} / {virtual}", loads)
    if name in NOT_GENERATED:
        return EngineRow(name, *([f"not tried: {NOT_GENERATED[name]}"] * 4))
    if name in (*DENSE, *SHARES_CODE):
        why = "without experts" if name in DENSE else f"without experts; shares the code of {SHARES_CODE[name]}"
        return EngineRow(name, *([why] * 4))
    known = name in MOE
    return EngineRow(name, *(["not in docs/architectures.md" if known else NEW] * 4))


# ---- transformers


def family_rows() -> list[FamilyRow]:
    """By name."""
    converted = converted_classes(ROOT / "python" / "reap" / "_converter")
    return [_family_row(name, converted) for name in families_with_experts()]


def _family_row(name: str, converted: frozenset[str]) -> FamilyRow:
    found = _model_class(name)
    if found is None:
        return FamilyRow(name, "no causal language model", "-", "-")
    model_class, config = found
    with tempfile.TemporaryDirectory() as folder:
        answer = _ask(model_class, config, Path(folder))
    converts = "yes" if model_class.__name__ in converted else "no"
    return FamilyRow(name, model_class.__name__, answer, converts)


def _model_class(family: str) -> tuple[Any, Any] | None:
    """The class that writes text, and its default configuration."""
    import importlib

    from transformers import PreTrainedModel

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, PreTrainedModel) and item.__module__ == module.__name__
    ]
    for ending in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"):
        for item in classes:
            if item.__name__.endswith(ending) and item.config_class is not None:
                return item, item.config_class
    return None


def _ask(model_class: Any, config_class: Any, folder: Path) -> str:
    from reap.errors import ReapError
    from reap.hf.disk.checkpoint_files import Checkpoint
    from reap.hf.disk.layout import read_checkpoint_layout

    try:
        write_names(model_class, config_class(), folder)
    except Exception as error:  # of a library's own code, for a configuration that it does not expect
        return f"not tried: its default configuration does not build ({type(error).__name__})"
    try:
        with Checkpoint.open(folder) as checkpoint:
            refusals = read_checkpoint_layout(checkpoint).refusals
    except ReapError as error:
        return "refused: " + _shorten(str(error).replace(str(folder), "it").removeprefix("it: "))
    return (
        "yes" if not refusals else "refused: " + _shorten(refusals[0].replace(str(folder), "it").removeprefix("it: "))
    )


def _shorten(text: str, most: int = 160) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1] + "…"


def write_names(model_class: Any, config: Any, folder: Path) -> None:
    """A checkpoint with the names and shapes of the model's tensors, which holds nothing: a file of holes."""
    import torch

    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "num_hidden_layers", 0):
            few_layers(part)
    with torch.device("meta"):
        model = model_class(config)
    tensors, at = {}, 0
    for name, tensor in model.state_dict().items():
        n_bytes = 2 * tensor.numel()
        tensors[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)
    document = config.to_dict() | {"architectures": [model_class.__name__]}
    (folder / "config.json").write_text(json.dumps(document, default=str))


def few_layers(config: Any) -> None:
    """As few layers as show dense ones and ones with experts, and lists of layers as long."""
    before = config.num_hidden_layers
    dense = [getattr(config, key, 0) for key in ("first_k_dense_replace", "num_dense_layers")]
    steps = [getattr(config, key, 1) for key in ("decoder_sparse_step", "moe_layer_freq")]
    wanted = [n + 2 for n in dense if isinstance(n, int)] + [2 * n for n in steps if isinstance(n, int)]
    after = min(before, max(8, *wanted))
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, key, value[:after])
    config.num_hidden_layers = after


# ---- the page


def page_of(engine: list[EngineRow], families: list[FamilyRow], versions: Mapping[str, str]) -> str:
    """The whole page."""
    lines = [
        "# Every architecture with experts",
        "",
        f"Written by `benchmarks/architecture_survey.py`; do not edit. llama.cpp {versions['llama.cpp']}, transformers"
        f" {versions['transformers']}.",
        "",
        "Every architecture with experts that the engine and the library know, whether reap knows it or not. What one",
        "of them has learnt since is a failing row when the script runs again, and a failing test.",
        "",
        "## llama.cpp",
        "",
        "The answers are those of [architectures.md](architectures.md), which says what they mean.",
        "",
        *_table(ENGINE_COLUMNS, engine),
        "",
        "## transformers",
        "",
        "Each family is built as its default configuration says, without weights. `yes`: the experts, the router and",
        "all that depends on them are found, and nothing forbids pruning. Families whose pruned models are run and",
        "compared, tensor by tensor and logit by logit, are in `tests/helpers/torch_models.py`, `torch_more_models.py`",
        "and `checkpoint_models.py`. `converts`: llama.cpp's converter knows the class.",
        "",
        *_table(FAMILY_COLUMNS, families),
        "",
    ]
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: list[Any]) -> list[str]:
    cells = [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *cells]


def lacking(page: str, names: Mapping[str, str]) -> list[str]:
    """The names that no row of the page has, each with whose it is."""
    return [f"{name} ({whose}): {NEW}" for name, whose in names.items() if f"| `{name}` |" not in page]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; list what the page lacks")
    args = parser.parse_args()
    source = source_directory()
    if source is None:
        print("the pinned llama.cpp's source is not there; configure the build first", file=sys.stderr)
        return 1
    names = dict.fromkeys(sorted(with_experts(source)), "llama.cpp") | dict.fromkeys(
        families_with_experts(), "transformers"
    )
    if args.check:
        missing = lacking(TARGET.read_text(encoding="utf-8"), names)
        print("\n".join(missing) or "nothing is new")
        return int(bool(missing))
    import transformers

    pin = (ROOT / "vendor/llama.cpp/pin.cmake").read_text(encoding="utf-8")
    commit = re.search(r"COMMIT\W+([0-9a-f]{40})\b", pin)
    assert commit is not None
    rows, families = engine_rows(source), family_rows()
    versions = {"llama.cpp": f"`{commit[1][:12]}`", "transformers": transformers.__version__}
    TARGET.write_text(page_of(rows, families, versions), encoding="utf-8")
    new = [row.name for row in rows if NEW in row]
    print(f"{len(rows)} architectures, {len(families)} families; new: {', '.join(new) or 'none'}")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
