"""The shape of the package: its public names, what importing it costs, and which module may know which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import reap

PACKAGE = Path(reap.__file__).parent
ROOT = Path(__file__).parent.parent
PUBLIC = [
    "CalibrationError",
    "Comparison",
    "EngineError",
    "Evaluation",
    "FormatError",
    "Interrupted",
    "METRICS",
    "MismatchError",
    "MissingExtraError",
    "ModelInfo",
    "NativeModuleMissing",
    "OutputError",
    "Profile",
    "Progress",
    "PrunePlan",
    "PruneReport",
    "QuantizeReport",
    "ReapError",
    "ReapWarning",
    "Sweep",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "compare",
    "comparison_report",
    "convert",
    "evaluate",
    "inspect",
    "merge",
    "model_card",
    "plan",
    "profile",
    "prune",
    "quantize",
    "refine",
    "report",
    "super_experts",
    "sweep",
]

# Each module may import those of lower ranks, and of its own rank those named in SIBLINGS.
RANKS = [
    {"errors", "progress", "version", "wording", "_native", "jsonfile"},
    {"gguf", "ranking", "engine", "agreement", "loops", "memory", "overlap", "pairing"},
    {"scores", "chat", "samples"},
    {"combining", "calibration", "planner", "checkpoint", "sweep_table"},
    {"inspector", "profiler", "pruner", "heldout", "summaries"},
    {"sizing"},
    {"evaluator", "html_report", "hf", "quantizer", "_quantizer_child"},
    {"sweeper", "refiner"},
    {"cli"},
]
SIBLINGS = {
    ("jsonfile", "errors"),
    ("_native", "errors"),
    ("samples", "chat"),
    ("profiler", "inspector"),
    ("pruner", "inspector"),
    ("evaluator", "hf"),
    ("scores", "html_report"),  # upwards: Profile.plot, when it is called
}
PURE = {"scores", "combining", "ranking", "planner", "pruner", "inspector", "gguf", "jsonfile", "samples", "chat", "calibration"}
PURE |= {"summaries", "sizing", "memory", "wording", "html_report", "overlap", "pairing", "sweep_table"}


def test_public_names() -> None:
    assert sorted(reap.__all__) == PUBLIC
    assert dir(reap) == PUBLIC


def test_every_public_name_is_there() -> None:
    for name in PUBLIC:
        assert getattr(reap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        reap.absent  # noqa: B018


def test_the_type_checker_sees_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(PUBLIC)


def modules_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


def test_import_is_lazy() -> None:
    loaded = modules_after("import reap")
    assert not {"numpy", "reap._core", "reap.scores", "jinja2", "plotly", "rich", "typer"} & loaded
    assert "numpy" not in modules_after("import reap; reap.UsageError")


@pytest.mark.parametrize("name", ["Profile", "merge", "plan", "prune", "inspect", "report", "Sweep", "comparison_report", "model_card"])
def test_half_of_it_never_loads_the_native_module(name: str) -> None:
    assert "reap._core" not in modules_after(f"import reap; reap.{name}")


def test_no_module_takes_the_name_of_a_public_function() -> None:
    functions = {name for name in PUBLIC if callable(getattr(reap, name)) and name.islower()}
    functions |= {"sweep", "report", "convert", "quantize"}
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not functions & found


def imported(path: Path) -> Iterator[str]:
    """Names of reap's own modules, first level, that a file imports anywhere but for the type checker."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "reap":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("reap."):
                yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("reap."))


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_converter" not in path.parts)


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_downwards() -> None:
    rank = {name: level for level, names in enumerate(RANKS) for name in names}
    for path in sources():
        module = module_of(path)
        if module in ("__init__", "__main__"):
            continue
        assert module in rank, f"{module}: give it a rank"
        for name in imported(path):
            if name in (module, "__version__"):
                continue
            assert rank[name] < rank[module] or (module, name) in SIBLINGS, f"{path.name} imports reap.{name}"


def test_only_native_imports_the_core_and_nobody_the_command_line() -> None:
    for path in sources():
        names = set(imported(path))
        assert "_core" not in names or path.name == "_native.py", path.name
        assert "cli" not in names or module_of(path) in ("cli", "__main__"), path.name
        if module_of(path) in PURE:
            assert not {"_native", "engine"} & names, f"{path.name} must run where the native module was never built"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in sources():
        if module_of(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit", "quit"), f"{path.name}:{node.lineno}"


NATIVE_RANKS = [
    {"errors"},
    {"saliency", "moe_graph", "tensor_read", "log_sink", "memory_guard"},
    {"router_mask"},
    {"collector", "devices", "quantizer"},
    {"session"},
    {"bindings"},
]
KNOWS_NO_ENGINE = {"errors", "saliency", "moe_graph", "memory_guard", "bindings"}


def test_native_includes_point_downwards() -> None:
    if not (ROOT / "csrc").exists():
        pytest.skip("the tests run outside the source tree")
    rank = {name: level for level, names in enumerate(NATIVE_RANKS) for name in names}
    for path in sorted((ROOT / "csrc").glob("*.*")):
        text = path.read_text()
        names = set(re.findall(r'#include "([\w./-]+)\.h"', text)) - {path.stem}
        ours = names & rank.keys()
        assert all(rank[name] < rank[path.stem] for name in ours), f"{path.name} includes {sorted(ours)}"
        engine = names - ours
        assert all(re.fullmatch(r"llama|gguf|ggml(-\w+)?", name) for name in engine), f"{path.name}: no public header: {sorted(engine)}"
        assert not engine or path.stem not in KNOWS_NO_ENGINE, f"{path.name} includes {sorted(engine)}"
        assert "pybind11" not in text or path.stem == "bindings", path.name
