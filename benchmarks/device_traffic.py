"""How many bytes cross to a device and back while profiling: all of the connection, counted by a proxy between us and
an RPC server.

    python benchmarks/device_traffic.py [--vocab 32768] [--tokens 512]

Builds a small random Qwen3-MoE, serves it on loopback, and runs the same batch four ways: the whole expert outputs read
and the graph run to its end (what a plain eval callback does), norms reduced on the device, the graph stopped after the
last MoE layer, and the output head kept on the host as well. Weights are loaded before counting begins.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.gguf_builder import build_moe
from reap.engine import native

N_LAYERS, N_EXPERTS, N_USED, N_EMBD = 4, 32, 4, 512
WAYS = [
    ("whole outputs, whole graph", {"reduce_on_device": False, "stop_early": False}),
    ("norms on the device", {"stop_early": False}),
    ("and stopped early", {}),
    ("and the head on the host", {"head_on_host": True}),
]


class CountingProxy:
    """Forwards connections to a port and counts the bytes, out (to the server) and back."""

    def __init__(self, target: int) -> None:
        self.counts = {"out": 0, "back": 0}
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pump, args=(client, server, "out"), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, "back"), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        while block := source.recv(1 << 20):
            self.counts[way] += len(block)
            sink.sendall(block)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def total(self) -> tuple[int, int]:
        return self.counts["out"], self.counts["back"]


def start_server() -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "reap", "rpc-server", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        time.sleep(0.1)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    return process, port


def measure(model: Path, proxy: CountingProxy, n_tokens: int, changes: dict[str, bool]) -> tuple[float, float, float]:
    """Bytes a token: out, back, and of these read by the collector."""
    core = native.load()
    options = core.SessionOptions()
    options.model_path, options.rpc = str(model), [f"127.0.0.1:{proxy.port}"]
    options.ctx_size, options.ubatch_size, options.flash_attn = n_tokens, n_tokens, "off"
    for name, value in changes.items():
        setattr(options, name, value)
    session = core.Session(options)
    session.start_profile(list(range(N_LAYERS)), N_EXPERTS)
    tokens = (np.arange(n_tokens, dtype=np.int32) * 37) % session.n_vocab
    zeros = np.zeros(n_tokens, np.int32)
    batch = (tokens, np.arange(n_tokens, dtype=np.int32), zeros, zeros)
    session.profile_batch(*batch)  # graphs are allocated and weights cached
    before, read = proxy.total(), session.collector_stats()["bytes_read"]
    session.profile_batch(*batch)
    after = proxy.total()
    collected = (session.collector_stats()["bytes_read"] - read) / n_tokens
    return (after[0] - before[0]) / n_tokens, (after[1] - before[1]) / n_tokens, collected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    process, port = start_server()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = build_moe(
                Path(folder) / "m.gguf",
                n_layers=N_LAYERS,
                n_experts=N_EXPERTS,
                n_used=N_USED,
                n_embd=N_EMBD,
                n_ff=64,
                n_heads=8,
                n_heads_kv=2,
                n_head_dim=64,
                n_vocab=args.vocab,
                n_ctx=2048,
            )
            print(
                f"{N_LAYERS} layers, {N_EXPERTS} experts, top-{N_USED}, hidden {N_EMBD}, vocabulary {args.vocab},"
                f" {args.tokens} tokens"
            )
            print(f"{'bytes a token':32} {'out':>12} {'back':>12} {'collector':>12} {'a layer and expert':>20}")
            for name, changes in WAYS:
                out, back, collected = measure(model, CountingProxy(port), args.tokens, changes)
                print(f"{name:32} {out:12,.0f} {back:12,.0f} {collected:12,.0f} {collected / N_LAYERS / N_USED:20,.1f}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
