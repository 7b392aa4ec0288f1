"""Lets lm-evaluation-harness know the model "reap" without importing reap.

The harness looks for models in its own package alone. `reap_lm_eval.pth`, which lies beside this module, imports it
when Python starts; nothing happens until something imports `lm_eval.models`, and then its registry gets one name.
"""

import sys

_MODELS = "lm_eval.models"


class _Finder:
    """Stands aside for every module except that one, and for that one adds a line to what its loader does."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from lm_eval.api.registry import model_registry

    if "reap" not in model_registry:
        model_registry.register("reap", target="reap.evaluation.harness_model:HarnessModel")


sys.meta_path.insert(0, _Finder())
