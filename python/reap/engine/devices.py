"""The devices that can run a model, the backends that drive them, and RPC servers."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reap.engine import native
from reap.engine.options import usable_cores
from reap.errors import EngineError, ReapError, UsageError


@dataclass(frozen=True)
class Device:
    """What can run a model."""

    name: str
    """For the option `devices`."""
    description: str
    """What the engine calls it, for people."""
    kind: str
    """ "cpu", "gpu", "igpu" or "accel"."""
    buffer_type: str
    """Name of its buffers, for the option `override_tensors`."""
    memory_free: int
    """Bytes that are free."""
    memory_total: int
    """Bytes in all."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


def devices() -> list[Device]:
    """The devices of this machine that the engine can use, the processor among them; and those of RPC servers that were
    used and answer."""
    core = native.load()
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
    """A part of the engine that drives one kind of device."""

    name: str
    """ "CPU", "CUDA", "RPC", ..."""
    library: str
    """File name of its library."""
    n_devices: int
    """Devices that it found."""
    problem: str | None = None
    """Why it cannot be used here; None: it can."""


def backends() -> list[Backend]:
    """The backends that are installed, those among them that cannot be used here with the reason."""
    core = native.load()
    # a server that was added is a backend as well, but of no file
    loaded = [
        Backend(found["name"], Path(found["library"]).name, found["n_devices"])
        for found in core.backends()
        if found["library"]
    ]
    idle = [
        replace(backend, problem="no device was found") if not backend.n_devices and backend.name != "RPC" else backend
        for backend in loaded
    ]
    names = {backend.library for backend in loaded}
    folder = native.backend_folder(core)
    absent = [path for path in sorted(folder.glob("libggml-*.so")) if path.name not in names and is_backend(path.name)]
    return [
        *idle,
        *(Backend(path.stem.removeprefix("libggml-").upper(), path.name, 0, load_problem(path)) for path in absent),
    ]


def is_backend(library: str) -> bool:
    """Whether a library is a backend of its own: neither ggml's common part nor a variant of the CPU's, of which one is
    enough."""
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

    The protocol trusts anyone who connects: it must not be reachable from outside. Raises UsageError for a port that
    cannot be, or where something else listens.
    """
    if not 0 < port < 65536:
        raise UsageError(f"port is {port}, expected 1 to 65535")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port} ({error.strerror or error})") from error
    native.load().serve_rpc(f"{host}:{port}", threads or usable_cores())
    raise EngineError(f"the RPC server at {host}:{port} ended by itself")


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
