"""Measure what each expert of a Mixture-of-Experts GGUF model contributes, and remove the ones that contribute least.

    profile = reap.profile("model.gguf", "calibration.jsonl")
    plan = reap.plan(profile, keep=0.5)
    reap.prune("model.gguf", "small.gguf", plan)
    reap.evaluate("small.gguf", "heldout.txt").perplexity

Everything loads on first use: `import reap` needs neither numpy nor the compiled module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap.combining import Comparison as Comparison
    from reap.combining import compare as compare
    from reap.combining import merge as merge
    from reap.errors import CalibrationError as CalibrationError
    from reap.errors import EngineError as EngineError
    from reap.errors import FormatError as FormatError
    from reap.errors import Interrupted as Interrupted
    from reap.errors import MismatchError as MismatchError
    from reap.errors import MissingExtraError as MissingExtraError
    from reap.errors import NativeModuleMissing as NativeModuleMissing
    from reap.errors import OutputError as OutputError
    from reap.errors import ReapError as ReapError
    from reap.errors import ReapWarning as ReapWarning
    from reap.errors import UnsupportedModelError as UnsupportedModelError
    from reap.errors import UsageError as UsageError
    from reap.evaluator import Evaluation as Evaluation
    from reap.evaluator import evaluate as evaluate
    from reap.hf.converter import convert as convert
    from reap.html_report.card import model_card as model_card
    from reap.html_report.comparison import comparison_report as comparison_report
    from reap.html_report.profile_report import report as report
    from reap.inspector import ModelInfo as ModelInfo
    from reap.inspector import inspect as inspect
    from reap.planner import PrunePlan as PrunePlan
    from reap.planner import plan as plan
    from reap.planner import super_experts as super_experts
    from reap.profiler import profile as profile
    from reap.progress import Progress as Progress
    from reap.pruner import PruneReport as PruneReport
    from reap.pruner import prune as prune
    from reap.quantizer import QuantizeReport as QuantizeReport
    from reap.quantizer import quantize as quantize
    from reap.refiner import refine as refine
    from reap.scores import METRICS as METRICS
    from reap.scores import Profile as Profile
    from reap.sweep_table import Sweep as Sweep
    from reap.sweeper import sweep as sweep

    __version__: str

_HOME = {
    "combining": ("Comparison", "compare", "merge"),
    "errors": (
        "CalibrationError",
        "EngineError",
        "FormatError",
        "Interrupted",
        "MismatchError",
        "MissingExtraError",
        "NativeModuleMissing",
        "OutputError",
        "ReapError",
        "ReapWarning",
        "UnsupportedModelError",
        "UsageError",
    ),
    "evaluator": ("Evaluation", "evaluate"),
    "hf.converter": ("convert",),
    "html_report.card": ("model_card",),
    "html_report.comparison": ("comparison_report",),
    "html_report.profile_report": ("report",),
    "inspector": ("ModelInfo", "inspect"),
    "planner": ("PrunePlan", "plan", "super_experts"),
    "profiler": ("profile",),
    "progress": ("Progress",),
    "pruner": ("PruneReport", "prune"),
    "quantizer": ("QuantizeReport", "quantize"),
    "refiner": ("refine",),
    "scores": ("METRICS", "Profile"),
    "sweep_table": ("Sweep",),
    "sweeper": ("sweep",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted((*_MODULE_OF, "__version__"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("reap.version").version()
    elif name in _MODULE_OF:
        value = getattr(import_module(f"reap.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'reap' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
