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
    from reap.engine.quantize import QuantizeReport as QuantizeReport
    from reap.engine.quantize import quantize as quantize
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
    from reap.evaluation.answers import Answers as Answers
    from reap.evaluation.answers import generate as generate
    from reap.evaluation.evaluate import evaluate as evaluate
    from reap.evaluation.refine import refine as refine
    from reap.evaluation.result import Evaluation as Evaluation
    from reap.evaluation.sweep import sweep as sweep
    from reap.evaluation.sweep_table import Sweep as Sweep
    from reap.evaluation.tasks import TaskEvaluation as TaskEvaluation
    from reap.evaluation.tasks import evaluate_tasks as evaluate_tasks
    from reap.gguf.model_info import ModelInfo as ModelInfo
    from reap.gguf.model_info import inspect as inspect
    from reap.hf.disk.convert import convert as convert
    from reap.pipeline.shrink import shrink as shrink
    from reap.pipeline.shrink_result import ShrinkResult as ShrinkResult
    from reap.profiling.gguf import profile as profile
    from reap.profiling.preview import preview as preview
    from reap.progress import Progress as Progress
    from reap.pruning.gguf import PruneReport as PruneReport
    from reap.pruning.gguf import prune as prune
    from reap.repairing.run import RepairReport as RepairReport
    from reap.repairing.run import repair as repair
    from reap.reporting.card import model_card as model_card
    from reap.reporting.comparison import comparison_report as comparison_report
    from reap.reporting.notebook import plot as plot
    from reap.reporting.profile_report import report as report
    from reap.scores.comparing import Comparison as Comparison
    from reap.scores.comparing import compare as compare
    from reap.scores.merging import merge as merge
    from reap.scores.plan import PrunePlan as PrunePlan
    from reap.scores.plan import plan as plan
    from reap.scores.plan import super_experts as super_experts
    from reap.scores.profile import METRICS as METRICS
    from reap.scores.profile import Profile as Profile
    from reap.scores.stability import Stability as Stability
    from reap.text.preview import Preview as Preview

    __version__: str

_HOME = {
    "engine.quantize": ("QuantizeReport", "quantize"),
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
    "evaluation.answers": ("Answers", "generate"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.refine": ("refine",),
    "evaluation.result": ("Evaluation",),
    "evaluation.sweep": ("sweep",),
    "evaluation.sweep_table": ("Sweep",),
    "evaluation.tasks": ("TaskEvaluation", "evaluate_tasks"),
    "gguf.model_info": ("ModelInfo", "inspect"),
    "hf.disk.convert": ("convert",),
    "pipeline.shrink": ("shrink",),
    "pipeline.shrink_result": ("ShrinkResult",),
    "profiling.gguf": ("profile",),
    "profiling.preview": ("preview",),
    "progress": ("Progress",),
    "pruning.gguf": ("PruneReport", "prune"),
    "repairing.run": ("RepairReport", "repair"),
    "reporting.card": ("model_card",),
    "reporting.comparison": ("comparison_report",),
    "reporting.notebook": ("plot",),
    "reporting.profile_report": ("report",),
    "scores.comparing": ("Comparison", "compare"),
    "scores.merging": ("merge",),
    "scores.plan": ("PrunePlan", "plan", "super_experts"),
    "scores.profile": ("METRICS", "Profile"),
    "scores.stability": ("Stability",),
    "text.preview": ("Preview",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted((*_MODULE_OF, "__version__"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("reap.files.version").version()
    elif name in _MODULE_OF:
        value = getattr(import_module(f"reap.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'reap' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
