"""The only importer of the native module, so that everything else in reap works where it was never built."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, cast

from reap.errors import NativeModuleMissing

if TYPE_CHECKING:
    from reap import _core

    class Core:
        """What `load` returns: the names of `_core.pyi`."""

        SessionOptions: type[_core.SessionOptions]
        Session: type[_core.Session]

        def devices(self) -> list[dict[str, Any]]: ...
        def serve_rpc(self, endpoint: str, threads: int) -> None: ...

        __llama_cpp_commit__: str


def load() -> Core:
    """The native module.

    Raises:
        NativeModuleMissing: it was not built, or it cannot be loaded here; the message says what to do.
    """
    if importlib.util.find_spec("reap._core") is None:
        raise NativeModuleMissing(
            "this step runs the model and needs reap's native module, which was not built for this Python; "
            "run `pip install .` in a clone of reap (inspect, plan, prune, merge and compare work without it)"
        )
    try:
        return cast("Core", importlib.import_module("reap._core"))
    except ImportError as error:
        raise NativeModuleMissing(
            f"reap's native module is there but cannot be loaded ({error}); reinstall it with `pip install --force-reinstall .`"
        ) from error
