"""How a model is run: the engine's options as users give them, checked, and the session they open.

What can be checked is checked here, before llama.cpp sees it: it aborts the process where it meets what it did not expect.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reap import _native
from reap.errors import EngineError, ReapError, UsageError

if TYPE_CHECKING:
    from reap import _core

FLASH_ATTENTION = ("auto", "on", "off")
DEFAULT_UBATCH = 512


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options that go through to llama.cpp, with its own names.

    ctx_size: tokens of one sequence; 0: what the model was trained with. batch_size: tokens of one decode (None: ubatch_size).
    ubatch_size: tokens of one pass through the graph. threads: None: the cores that this process may use. gpu_layers: negative: all.
    devices: names as `reap devices` prints them; None: all there are. override_tensors: (regular expression, buffer type).
    rpc: "host:port" of servers. type_k, type_v: types of the KV cache. flash_attn: "auto", "on" or "off".
    """

    ctx_size: int = 2048
    batch_size: int | None = None
    ubatch_size: int = DEFAULT_UBATCH
    threads: int | None = None
    gpu_layers: int = -1
    devices: Sequence[str] | None = None
    override_tensors: Sequence[tuple[str, str]] = ()
    rpc: Sequence[str] = ()
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "auto"

    def __post_init__(self) -> None:
        for name in ("ctx_size", "batch_size", "ubatch_size", "threads"):
            value = getattr(self, name)
            least = 0 if name == "ctx_size" else 1
            if value is not None and (type(value) is not int or not least <= value < 2**31):
                raise UsageError(f"{name} is {value!r}, expected a whole number of at least {least}")
        if self.batch_size is not None and self.batch_size < self.ubatch_size:
            raise UsageError(f"batch_size is {self.batch_size}, less than ubatch_size, which is {self.ubatch_size}")
        if self.flash_attn not in FLASH_ATTENTION:
            raise UsageError(f"flash_attn is {self.flash_attn!r}, expected one of {', '.join(FLASH_ATTENTION)}")

    def record(self) -> dict[str, Any]:
        """What a profile keeps of them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Device:
    """What can run a model: its name for `devices`, its kind ("cpu", "gpu", "igpu", "accel"), the buffer type's name for
    `override_tensors`, and its memory in bytes."""

    name: str
    description: str
    kind: str
    buffer_type: str
    memory_free: int
    memory_total: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


def devices() -> list[Device]:
    """The devices of this machine that the engine can use, the processor among them; and those of RPC servers that were used and answer."""
    core = _native.load()
    answering = [endpoint for endpoint in core.rpc_servers() if _answers(endpoint)]
    return [
        Device(
            name=found["name"],
            description=found["description"],
            kind=found["kind"],
            buffer_type=found["buffer_type"],
            memory_free=found["free_bytes"],
            memory_total=found["total_bytes"],
        )
        for found in core.devices(answering)
    ]


@dataclass(frozen=True)
class Backend:
    """A part of the engine that drives one kind of device: its name ("CPU", "CUDA", "RPC", ...), its library's file name, how many
    devices it found, and why it cannot be used here (None: it can)."""

    name: str
    library: str
    n_devices: int
    problem: str | None = None


def backends() -> list[Backend]:
    """The backends that are installed, those among them that cannot be used here with the reason."""
    core = _native.load()
    # a server that was added is a backend as well, but of no file
    loaded = [Backend(found["name"], Path(found["library"]).name, found["n_devices"]) for found in core.backends() if found["library"]]
    idle = [
        replace(backend, problem="no device was found") if not backend.n_devices and backend.name != "RPC" else backend
        for backend in loaded
    ]
    names = {backend.library for backend in loaded}
    folder = _native.backend_folder(core)
    absent = [path for path in sorted(folder.glob("libggml-*.so")) if path.name not in names and is_backend(path.name)]
    return [*idle, *(Backend(path.stem.removeprefix("libggml-").upper(), path.name, 0, load_problem(path)) for path in absent)]


def is_backend(library: str) -> bool:
    """Whether a library is a backend of its own: neither ggml's common part nor a variant of the CPU's, of which one is enough."""
    return not library.startswith(("libggml-base", "libggml-cpu"))


def load_problem(library: Path) -> str:
    """Why a backend's library cannot be loaded, in words for the person who installed it."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        reason = str(error).replace(f"{library}: ", "")
    else:
        return "it refuses this machine"
    if "libcuda.so" in reason:
        return "there is no NVIDIA driver (libcuda.so.1 was not found)"
    if "libcublas" in reason or "libcudart" in reason:
        return f"NVIDIA's libraries are missing ({reason}); `pip install 'reap-moe[cuda]'` brings them"
    return reason


def serve_rpc(host: str, port: int, threads: int | None = None) -> None:
    """Lend this machine's devices to others over llama.cpp's RPC protocol, until the process is ended.

    The protocol trusts whoever connects: it must not be reachable from outside. Raises UsageError for a port that cannot be, or where
    something else listens.
    """
    if not 0 < port < 65536:
        raise UsageError(f"port is {port}, expected 1 to 65535")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port} ({error.strerror or error})") from error
    _native.load().serve_rpc(f"{host}:{port}", threads or usable_cores())
    raise EngineError(f"the RPC server at {host}:{port} ended by itself")


def usable_cores() -> int:
    """Cores that this process may use, as the scheduler sees it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(
    path: str | os.PathLike[str],
    options: EngineOptions,
    *,
    n_sequences: int = 1,
    n_bytes: int | None = None,
    head_on_host: bool = False,
    prediction_layer: int | None = None,
) -> _core.Session:
    """Load a model into the engine.

    n_sequences: how many may share a batch, fewer where the model does not allow it. n_bytes: of the model's files (None: of `path`).
    head_on_host: leave the output head out of the devices, for a session that never reaches it.
    prediction_layer: the multi-token-prediction block whose experts are profiled as well, run in a context of its own.

    Raises EngineError with the end of the engine's log, UsageError for an option that cannot work, NativeModuleMissing.
    """
    core = _native.load()
    native = core.SessionOptions()
    native.model_path = os.fspath(path)
    native.model_bytes = n_bytes if n_bytes is not None else os.stat(path).st_size
    native.ctx_size = options.ctx_size
    native.batch_size = options.batch_size or 0
    native.ubatch_size = options.ubatch_size
    native.n_sequences = n_sequences
    native.threads = options.threads or usable_cores()
    native.gpu_layers = options.gpu_layers
    native.devices = list(options.devices or ())
    native.override_tensors = [(pattern, buffer) for pattern, buffer in options.override_tensors]
    native.rpc = list(options.rpc)
    native.type_k = options.type_k
    native.type_v = options.type_v
    native.flash_attn = options.flash_attn
    native.head_on_host = head_on_host
    native.prediction_layer = -1 if prediction_layer is None else prediction_layer
    check_servers(options.rpc)
    return core.Session(native)


def _answers(endpoint: str) -> bool:
    with suppress(ReapError):
        check_servers([endpoint], timeout_seconds=1.0)
        return True
    return False


def check_servers(endpoints: Sequence[str], timeout_seconds: float = 5.0) -> None:
    """Make sure that something answers at each "host:port": the engine ends the process where it cannot connect."""
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"rpc server {endpoint!r} is not of the form host:port")
        try:
            socket.create_connection((host, int(port)), timeout=timeout_seconds).close()
        except (OSError, OverflowError) as error:
            raise EngineError(f"nothing answers at the RPC server {endpoint} ({error})") from error


class SessionTokenizer:
    """The model's own tokenizer, as `reap.calibration.Tokenizer` wants it."""

    def __init__(self, session: _core.Session) -> None:
        self._session = session
        self.n_vocab = session.n_vocab
        self.has_tokenizer = session.has_tokenizer
        self.add_bos = session.add_bos
        self.bos: int | None = session.bos if session.bos >= 0 else None
        self.eos: int | None = session.eos if session.eos >= 0 else None
        self.chat_template = session.chat_template

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = np.asarray(self._session.tokenize(text.encode("utf-8"), add_special, parse_special)).tolist()
        return ids

    def token_text(self, token: int) -> bytes:
        """The bytes of a token, special tokens included."""
        return self._session.token_text(token)
