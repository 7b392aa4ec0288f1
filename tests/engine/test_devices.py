"""The device path: the same scores as on the processor, and few bytes for them. On llama.cpp's RPC backend over
loopback, or, where this machine has graphics devices, on each of these. With Mesa's lavapipe, a Vulkan device on a
processor:

    GGML_VK_VISIBLE_DEVICES=0 GGML_VK_DISABLE_F16=1 pytest tests/engine/test_devices.py

(without the second variable that backend multiplies in 16 bits, and routings that are close move)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.gguf_builder import build_moe
from helpers.sums import SUMS
from reap.cli import main
from reap.engine import native
from reap.engine.devices import devices
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import EngineError, UsageError
from reap.profiling.gguf import profile
from reap.pruning.gguf import prune
from reap.scores.plan import PrunePlan

EXACT = EngineOptions(ctx_size=512, type_k="f32", type_v="f32", flash_attn="off", threads=1, devices=("none",))
N_USED = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(300):
        time.sleep(0.1)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return


def graphics() -> list[str]:
    """Names of this machine's own devices other than processors."""
    return [device.name for device in devices() if device.kind in ("gpu", "igpu") and ":" not in device.description]


@pytest.fixture(scope="module", params=graphics() or ["rpc"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an RPC server, or the name of a device of this machine."""
    if request.param != "rpc":
        yield request.param
        return
    port = free_port()
    command = [sys.executable, "-m", "reap", "rpc-server", "--port", str(port), "--threads", "1"]
    # the server lends the processor, whatever else this machine has
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GGML_VK_")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_moe(
        tmp_path_factory.mktemp("devices") / "m.gguf", n_layers=3, n_experts=32, n_used=N_USED, n_embd=64, n_vocab=512
    )


def sums_of(session, layers=(0, 1, 2), n_experts=32, n_tokens=300):
    session.start_profile(list(layers), n_experts)
    tokens = (np.arange(n_tokens, dtype=np.int32) * 37) % 512
    read = session.collector_stats()["bytes_read"]
    session.profile_batch(
        tokens, np.arange(n_tokens, dtype=np.int32), np.zeros(n_tokens, np.int32), np.zeros(n_tokens, np.int32)
    )
    session.commit(1)
    return session.sums(0), session.collector_stats()["bytes_read"] - read


def tolerance(server: str) -> float:
    """RPC computes with the processor's own kernels; a graphics device has its own exponentials and sums."""
    return 2e-5 if ":" in server else 5e-4


def place(server: str) -> dict[str, list[str]]:
    return {"rpc": [server]} if ":" in server else {"devices": [server]}


def on_device(server: str, **changes) -> EngineOptions:
    return EngineOptions(**{**EXACT.record(), "devices": None, **place(server), **changes})


def test_the_same_sums_as_on_the_processor(server: str, model: Path) -> None:
    expected, _ = sums_of(open_session(model, EXACT))
    found, n_bytes = sums_of(open_session(model, on_device(server), head_on_host=True))
    assert (found["counts"] == expected["counts"]).all()
    for name in SUMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance(server), err_msg=name)
    # ids, gates and norms: 12 bytes; the whole output would be 64 x 4
    assert 0 < n_bytes <= 16 * 300 * 3 * N_USED


def test_norms_reduced_on_the_device_are_those_of_the_outputs_read_back(server: str, model: Path) -> None:
    """The same device, so the same outputs: what is compared is the three-node graph that reduces them."""
    core = native.load()
    found = []
    for reduced in (True, False):
        options = core.SessionOptions()
        options.model_path, options.ctx_size, options.reduce_on_device = str(model), 512, reduced
        options.type_k, options.type_v, options.flash_attn, options.threads = "f32", "f32", "off", 1
        for name, value in place(server).items():
            setattr(options, name, value)
        found.append(sums_of(core.Session(options)))
    (reduced_there, few), (read_back, many) = found
    assert (reduced_there["counts"] == read_back["counts"]).all()
    np.testing.assert_allclose(reduced_there["norm_sum"], read_back["norm_sum"], rtol=1e-6)
    np.testing.assert_allclose(reduced_there["gated_norm_sum"], read_back["gated_norm_sum"], rtol=1e-6)
    assert few < many / 10


def test_experts_on_the_processor_and_the_rest_on_the_device(server: str, model: Path) -> None:
    expected, _ = sums_of(open_session(model, EXACT))
    options = on_device(server, override_tensors=[("ffn_.*_exps", "CPU")])
    found, _ = sums_of(open_session(model, options, head_on_host=True))
    assert (found["counts"] == expected["counts"]).all()
    np.testing.assert_allclose(found["gated_norm_sum"], expected["gated_norm_sum"], rtol=tolerance(server))


def test_some_layers_on_the_device(server: str, model: Path) -> None:
    expected, _ = sums_of(open_session(model, EXACT))
    found, n_bytes = sums_of(open_session(model, on_device(server, gpu_layers=2), head_on_host=True))
    assert (found["counts"] == expected["counts"]).all()
    np.testing.assert_allclose(found["gated_norm_sum"], expected["gated_norm_sum"], rtol=tolerance(server))
    assert n_bytes > 0


def test_several_ubatches_on_the_device(server: str, model: Path) -> None:
    expected, _ = sums_of(open_session(model, EXACT))
    found, _ = sums_of(open_session(model, on_device(server, ubatch_size=64, batch_size=512), head_on_host=True))
    assert found["total_tokens"].tolist() == [300, 300, 300]
    assert (found["counts"] == expected["counts"]).all()
    np.testing.assert_allclose(found["gated_norm_sum"], expected["gated_norm_sum"], rtol=tolerance(server))


@pytest.mark.parametrize(
    "changes",
    [{}, {"gpu_layers": 2}, {"override_tensors": [("ffn_.*_exps", "CPU")]}, {"ubatch_size": 64, "batch_size": 512}],
)
def test_virtual_pruning_on_the_device(server: str, model: Path, tmp_path: Path, changes: dict) -> None:
    kept = {layer: sorted(np.random.default_rng(layer).permutation(32)[:12].tolist()) for layer in range(3)}
    prune(
        model,
        tmp_path / "small.gguf",
        PrunePlan({"n_experts": 32}, "reap", 12, {layer: tuple(ids) for layer, ids in kept.items()}),
    )
    tokens = (np.arange(300, dtype=np.int32) * 37) % 512
    expected = open_session(tmp_path / "small.gguf", on_device(server, **changes)).logits(tokens, 0)
    session = open_session(model, on_device(server, **changes))
    whole = session.logits(tokens, 0)
    session.set_kept(kept)
    found = session.logits(tokens, 0)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found - whole).max() > 0.1
    session.set_kept(None)
    assert np.array_equal(session.logits(tokens, 0), whole)


def test_profile_through_the_api(server: str, model: Path) -> None:
    lines = [{"tokens": ((np.arange(n) * 11) % 512).tolist()} for n in (40, 90, 250)]
    exact = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
    there = profile(model, lines, **place(server), **exact)
    # after it: a server that was added once is not used by those who did not name it
    here = profile(model, lines, **exact, **({} if ":" in server else {"devices": ["none"]}))
    assert (here.counts == there.counts).all()
    np.testing.assert_allclose(there.gated_norm_sum, here.gated_norm_sum, rtol=tolerance(server))


def test_nothing_at_the_address_is_an_error_and_no_abort(model: Path) -> None:
    with pytest.raises(EngineError, match=r"nothing answers at the RPC server 127\.0\.0\.1:\d+"):
        open_session(model, EngineOptions(rpc=[f"127.0.0.1:{free_port()}"]))
    with pytest.raises(UsageError, match="is not of the form host:port"):
        open_session(model, EngineOptions(rpc=["nowhere"]))


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["rpc-server", "--port", str(other.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err


def test_a_device_by_name(server: str, model: Path) -> None:
    expected, _ = sums_of(open_session(model, EXACT))
    open_session(model, on_device(server))
    name = next(device.name for device in devices() if server in (device.description, device.name))
    found, n_bytes = sums_of(open_session(model, on_device(server, devices=[name]), head_on_host=True))
    assert (found["counts"] == expected["counts"]).all()
    assert n_bytes > 0


def test_a_server_that_is_gone_is_not_asked(model: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "reap", "rpc-server", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        script = f"""
import sys
from reap.engine.devices import devices
from reap.engine.options import EngineOptions
from reap.engine.session import open_session, open_vocabulary
open_session({str(model)!r}, EngineOptions(rpc=["127.0.0.1:{port}"]))
assert any("127.0.0.1:{port}" in device.description for device in devices())
print("used", flush=True)
sys.stdin.readline()
assert not any("127.0.0.1:{port}" in device.description for device in devices())
assert open_vocabulary({str(model)!r}).n_vocab
print("listed")
"""
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as user:
            assert user.stdin is not None
            assert user.stdout is not None
            assert user.stdout.readline() == "used\n"
            process.kill()
            process.wait()
            assert user.communicate("\n", timeout=60)[0] == "listed\n"
            assert user.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_devices_lists_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert any(device.kind == "cpu" for device in devices())
    assert main(["devices"]) == 0
    assert "CPU" in capsys.readouterr().out
