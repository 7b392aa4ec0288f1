"""The shape of the package: its public names, what importing it costs, and which module may know which."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.paths import ROOT

PACKAGE = Path(reap.__file__).parent

PUBLIC = [
    "Answers",
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
    "Preview",
    "Profile",
    "Progress",
    "PrunePlan",
    "PruneReport",
    "QuantizeReport",
    "ReapError",
    "ReapWarning",
    "RepairReport",
    "ShrinkResult",
    "Stability",
    "Sweep",
    "TaskEvaluation",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "compare",
    "comparison_report",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "inspect",
    "merge",
    "model_card",
    "plan",
    "plot",
    "preview",
    "profile",
    "prune",
    "quantize",
    "refine",
    "repair",
    "report",
    "shrink",
    "super_experts",
    "sweep",
]

# Which room may know which: each may import those named, and what they may import; docs/architecture.md prints this
# table.
MAY_IMPORT = {
    "errors": "",
    "progress": "",
    "files": "errors progress",
    "text": "files",
    "gguf": "files",
    "engine": "gguf",
    "scores": "gguf text",
    "pruning": "scores",
    "profiling": "engine scores",
    "evaluation": "profiling pruning",
    "repairing": "evaluation",
    "reporting": "evaluation",
    "pipeline": "reporting",
    "hf": "evaluation",
    "cli": "hf pipeline repairing",
}
# These run where the native module was never built.
PURE = ("files", "text", "gguf", "scores", "pruning", "reporting", "hf.disk")
# Imports torch wherever it likes; all else only when it is called.
NEEDS_TORCH = ("hf.memory",)


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
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_is_lazy() -> None:
    loaded = modules_after("import reap")
    assert not {"numpy", "reap._core", "reap.scores.profile", "jinja2", "plotly", "rich", "typer"} & loaded
    assert "numpy" not in modules_after("import reap; reap.UsageError")


@pytest.mark.parametrize(
    "name", ["Profile", "merge", "plan", "prune", "inspect", "report", "Sweep", "comparison_report", "model_card"]
)
def test_half_of_it_never_loads_the_native_module(name: str) -> None:
    assert "reap._core" not in modules_after(f"import reap; reap.{name}")


def test_no_module_takes_the_name_of_a_public_function() -> None:
    functions = {name for name in PUBLIC if callable(getattr(reap, name)) and name.islower()}
    functions |= {"sweep", "report", "convert", "quantize"}
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not functions & found


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names within reap that a file imports, and whether as it is itself imported (else: when something is
    called)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "reap" or (node.module or "").startswith("reap."):
                module = node.module.removeprefix("reap").removeprefix(".")
                for alias in node.names:
                    yield _module_named(module, alias.name), id(node) not in late
        elif isinstance(node, ast.Import):
            yield from ((a.name[5:], id(node) not in late) for a in node.names if a.name.startswith("reap."))


def _module_named(module: str, name: str) -> str:
    """`name` where it is a module of the package `module`, else the module."""
    inner = f"{module}.{name}".removeprefix(".")
    is_module = (PACKAGE / f"{inner.replace('.', '/')}.py").exists() or (PACKAGE / inner.replace(".", "/")).is_dir()
    return inner if is_module or not module else module


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_converter" not in path.parts)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.partition(".")[0]


def reachable(room: str) -> set[str]:
    return {inner for name in MAY_IMPORT[room].split() for inner in (name, *reachable(name))}


def test_rooms_know_only_those_below_them() -> None:
    for path in sources():
        room = room_of(dotted(path))
        if room in ("__init__", "__main__"):
            continue
        assert room in MAY_IMPORT, f"{room}: give it a line in MAY_IMPORT"
        for module, _ in imported(path):
            other = room_of(module)
            if other not in (room, "__version__", "_core"):
                assert other in reachable(room), f"{dotted(path)} imports reap.{module}"


def test_imports_make_no_circle() -> None:
    graph = {
        dotted(path): {module for module, early in imported(path) if early and module != dotted(path)}
        for path in sources()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle of imports: {' -> '.join((*above, module))}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_table_of_rooms_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room, others in MAY_IMPORT.items():
        row = f"| `{room}` | {', '.join(f'`{name}`' for name in others.split()) or 'nothing'} |"
        assert row in page, f"docs/architecture.md lacks the row {row}"


def test_only_native_imports_the_core_and_nothing_the_command_line() -> None:
    for path in sources():
        names = {module for module, _ in imported(path)}
        assert "_core" not in names or dotted(path) == "engine.native", dotted(path)
        assert "cli" not in map(room_of, names) or room_of(dotted(path)) in ("cli", "__main__"), dotted(path)
        if dotted(path).startswith(PURE):
            assert "engine" not in map(room_of, names), (
                f"{dotted(path)} must run where the native module was never built"
            )


def test_only_some_modules_import_torch() -> None:
    for path in sources():
        if dotted(path).startswith(NEEDS_TORCH) or path.name == "_convert_child.py":
            continue
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {"torch", "transformers"} & {name.partition(".")[0] for name in names}, dotted(path)


def test_a_newcomer_sees_the_rooms() -> None:
    built = {"_converter", "licenses", "__pycache__"}
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in built and ".so" not in path.name]
    assert len(entries) <= 20, entries
    for path in sources():
        assert len(path.read_text().splitlines()) <= 450, f"{dotted(path)} is too long"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= 60, f"{dotted(path)}: {node.name} has {length} lines"


def own_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names that a call may give; what goes through as one set (`**options`, an object of a command's options)
    counts as what it is, and self as nothing."""
    arguments = function.args
    names = [it.arg for it in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [arguments.vararg.arg] if arguments.vararg else []
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_no_function_takes_more_than_twelve_parameters() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = own_parameters(node)
                assert len(names) <= 12, f"{dotted(path)}: {node.name} takes {len(names)}: {', '.join(names)}"


def fields_of(cls: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    """Each public field of a dataclass or named tuple, and whether a string below it says what it holds."""
    made_by = [ast.unparse(node) for node in (*cls.decorator_list, *cls.bases)]
    if not any(name.partition("(")[0] in ("dataclass", "NamedTuple") for name in made_by):
        return
    for field, below in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and not (name := ast.unparse(field.target)).startswith("_"):
            value = below.value if isinstance(below, ast.Expr) else None
            yield name, isinstance(value, ast.Constant) and isinstance(value.value, str)


def test_every_field_is_explained() -> None:
    """The command line's families of options have typer's help instead, and private classes are for those who read
    them."""
    explained = 0
    for path in sources():
        if room_of(dotted(path)) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for name, has_string in fields_of(node):
                    assert has_string, f"{dotted(path)}: {node.name}.{name} has no string below it"
                    explained += 1
    assert explained > 400


def test_the_type_of_a_path_is_spelled_once() -> None:
    spelled = [dotted(path) for path in sources() if "str | os.PathLike[str]" in path.read_text()]
    assert spelled == ["files.paths"]


def hand_on() -> Iterator[tuple[Any, Any]]:
    """Each set of keyword arguments that functions hand on, and what explains them and has their defaults."""
    from reap.engine.generation import Sampling
    from reap.engine.options import EngineArguments, EngineOptions
    from reap.engine.quantize import TypeArguments, TypeChoice
    from reap.evaluation.answers import SamplingArguments
    from reap.evaluation.plan_options import PlanArguments
    from reap.hf.memory.loading import LoadArguments, LoadOptions
    from reap.scores.plan import plan
    from reap.text.asked import PromptArguments, Prompts
    from reap.text.windows import Calibration, TextArguments

    yield from ((SamplingArguments, Sampling), (PromptArguments, Prompts))
    yield from ((EngineArguments, EngineOptions), (TypeArguments, TypeChoice), (PlanArguments, plan))
    yield from ((LoadArguments, LoadOptions), (TextArguments, Calibration))


def test_arguments_that_are_handed_on_are_those_that_are_taken() -> None:
    for arguments, taken_by in hand_on():
        names, parameters = list(arguments.__annotations__), inspect.signature(taken_by).parameters
        assert all(parameters[name].default is not inspect.Parameter.empty for name in names), arguments
        if isinstance(taken_by, type) and is_dataclass(taken_by):
            assert names == list(parameters)


def test_only_the_command_line_prints_or_exits() -> None:
    for path in sources():
        if room_of(dotted(path)) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit", "quit"), f"{path.name}:{node.lineno}"


NATIVE_RANKS = [
    {"assertion_guard", "errors", "free_memory", "log_sink", "node_names"},
    {"devices", "memory_guard", "moe_graph", "quantizer", "router_likeness", "saliency", "tensor_read"},
    {"big_stack", "capture", "router_mask", "session_options"},
    {"collector", "tokenizer"},
    {"context"},
    {"prediction_block"},
    {"session"},
    {"casts", "generation", "scoring", "vocabulary"},
    {"bindings"},
]
KNOWS_NO_ENGINE = {
    "big_stack",
    "bindings",
    "casts",
    "errors",
    "free_memory",
    "memory_guard",
    "node_names",
    "router_likeness",
    "saliency",
}


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
        assert all(re.fullmatch(r"llama|gguf|ggml(-\w+)?", name) for name in engine), (
            f"{path.name}: no public header: {sorted(engine)}"
        )
        assert not engine or path.stem not in KNOWS_NO_ENGINE, f"{path.name} includes {sorted(engine)}"
        assert "pybind11" not in text or path.stem in ("bindings", "casts"), path.name
