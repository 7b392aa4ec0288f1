"""The only importer of the native module, so that everything else in reap works where it was never built."""

from __future__ import annotations

import importlib
import importlib.util
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reap.errors import NativeModuleMissing

if TYPE_CHECKING:
    from collections.abc import Callable

    from reap import _core

    class Core:
        """What `load` returns: the names of `_core.pyi`."""

        SessionOptions: type[_core.SessionOptions]
        Session: type[_core.Session]
        Vocabulary: type[_core.Vocabulary]
        QuantizeOptions: type[_core.QuantizeOptions]

        def devices(self, answering: list[str]) -> list[dict[str, Any]]: ...
        def rpc_servers(self) -> list[str]: ...
        def backends(self) -> list[dict[str, Any]]: ...
        def load_backends(self, folder: str | Path) -> None: ...
        def kv_cache_types(self) -> list[str]: ...
        def serve_rpc(self, endpoint: str, threads: int) -> None: ...
        def quantize_types(self) -> dict[str, int]: ...
        def tensor_types(self) -> list[str]: ...
        def quantized_size(self, options: _core.QuantizeOptions) -> float: ...
        def quantize(
            self, options: _core.QuantizeOptions, progress: Callable[[int, int], object]
        ) -> dict[str, Any]: ...

        __file__: str
        __llama_cpp_commit__: str


WHAT_WORKS = "inspect, plan, prune, merge and compare work without it"
REINSTALL = (
    "`pip install --force-reinstall --no-deps reap-moe`, or `pip install --force-reinstall .` in a clone of reap"
)


def load() -> Core:
    """The native module, with the engine's backends loaded from the folder that it is in.

    Raises:
        NativeModuleMissing: it was not built, or it cannot be loaded here; the message says what to do.
        EngineError: none of the backends for processors runs on this one.
    """
    spec = importlib.util.find_spec("reap._core")
    if spec is None:
        raise NativeModuleMissing(f"this step runs the model and needs reap's native module, {_absence()}")
    try:
        core = cast("Core", importlib.import_module("reap._core"))
    except ImportError as error:
        raise NativeModuleMissing(
            f"{spec.origin}: reap's native module is there but cannot be loaded ({error}); {_remedy(str(error))}"
        ) from error
    core.load_backends(str(backend_folder(core)))
    return core


def backend_folder(core: Core) -> Path:
    """Where the engine's libraries are: beside the native module."""
    return Path(core.__file__).resolve().parent


def _absence() -> str:
    others = sorted(path.name for path in Path(__file__).parent.parent.glob("_core.*.so"))
    if others:
        wanted = sysconfig.get_config_var("EXT_SUFFIX")
        return (
            f"which is there for another Python ({others[0]}; this one wants _core{wanted}): run {REINSTALL} with this"
            " Python"
        )
    return f"which was not built for this Python; run `pip install .` in a clone of reap ({WHAT_WORKS})"


def _remedy(reason: str) -> str:
    if "GLIBC" in reason or "CXXABI" in reason:
        return (
            "it was built for a newer system than this one, so build it here: "
            f"`pip install --force-reinstall --no-binary reap-moe reap-moe` ({WHAT_WORKS})"
        )
    return f"install it again: {REINSTALL} ({WHAT_WORKS})"
