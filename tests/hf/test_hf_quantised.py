"""Checkpoints that are published quantised: profiled as what their numbers stand for, or refused with the way that
works."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.checkpoint_builder import build, config, qwen
from helpers.torch_needs import absent
from reap import hf
from reap.errors import EngineError, UnsupportedModelError

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="session", autouse=True)
def needs() -> None:
    for module in ("torch", "transformers", "safetensors", "accelerate"):
        try:
            __import__(module)
        except ImportError:
            absent(f"{module} is not installed: pip install 'reap-moe[hf]' accelerate")


def samples() -> list[dict[str, Any]]:
    from helpers import torch_models

    return [{"tokens": tokens} for tokens in torch_models.samples()]


def profiled(source: Any, **options: Any) -> Any:
    if isinstance(source, Path):
        options |= {"device": "cpu", "dtype": "float32"}
    return hf.profile(source, samples(), ctx_size=256, **options)


def check_same(found: Any, expected: Any) -> None:
    """The same routings, and sums to the last bits."""
    assert np.array_equal(found.counts, expected.counts)
    assert expected.counts.sum() > 100
    for name in ("gated_norm_sum", "norm_sum", "gate_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


def checkpoint(family: str, directory: Path) -> Path:
    from helpers import checkpoint_models

    return checkpoint_models.save(checkpoint_models.build(family), directory)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("family", "form"), [("qwen3moe", "to_fp8"), ("deepseek_v3", "to_fp8"), ("qwen3moe", "to_int4")]
)
def test_decoded_as_it_is_read(tmp_path: Path, family: str, form: str, stream: bool) -> None:
    """FP8 in blocks, and compressed-tensors' packed four bits, against a checkpoint of the numbers they stand for."""
    from safetensors.torch import save_file

    from helpers import checkpoint_models

    if form == "to_int4":
        try:
            import compressed_tensors  # noqa: F401
        except ImportError:
            absent("compressed-tensors is not installed: pip install compressed-tensors")
    source, plain = (checkpoint(family, tmp_path / name) for name in ("quantised", "plain"))
    quantise: Callable[[Path], dict[str, Any]] = getattr(checkpoint_models, form)
    save_file(quantise(source), plain / "model.safetensors", metadata={"format": "pt"})
    check_same(profiled(source, stream=stream), profiled(plain))


@pytest.mark.parametrize("stream", [False, True])
def test_mxfp4_is_decoded_as_it_is_read(tmp_path: Path, stream: bool) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    from helpers import checkpoint_models

    source = checkpoint("gpt_oss", tmp_path / "quantised")
    checkpoint_models.to_mxfp4(source)
    plain = GptOssForCausalLM.from_pretrained(source, quantization_config=Mxfp4Config(dequantize=True), dtype="float32")
    check_same(profiled(source, stream=stream), profiled(plain.eval()))


def test_in_four_bits_from_fp8(tmp_path: Path) -> None:
    """Decoded first, then quantised again: as from the plain numbers."""
    from safetensors.torch import save_file

    from helpers import checkpoint_models

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        absent("bitsandbytes is not installed: pip install bitsandbytes")
    source, plain = (checkpoint("qwen3moe", tmp_path / name) for name in ("quantised", "plain"))
    save_file(checkpoint_models.to_fp8(source), plain / "model.safetensors", metadata={"format": "pt"})
    check_same(profiled(source, load_in_4bit=True), profiled(plain, load_in_4bit=True))


def test_a_pruned_one_is_profiled_as_well(tmp_path: Path) -> None:
    from helpers import checkpoint_models

    source = checkpoint("qwen3moe", tmp_path / "quantised")
    checkpoint_models.to_fp8(source)
    import reap

    profile = profiled(source)
    hf.prune(source, tmp_path / "small", reap.plan(profile, keep=4))
    assert profiled(tmp_path / "small", stream=True).counts.shape == (len(profile.layers), 4)


WAY = "profile the checkpoint that it was quantised from, or a GGUF file of the same model"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "BF16", "quantised by gptq, which"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "BF16", "quantised by awq, which"),
    "ModelOpt": ({"quantization_config": {"quant_method": "modelopt"}}, "BF16", "quantised by modelopt, which"),
    "no name": ({"quantization_config": {"bits": 4}}, "BF16", "quantised by a method without a name"),
    "MLX": ({"quantization": {"bits": 4, "group_size": 64}}, "BF16", "quantised by MLX"),
    "FP8 without a word": ({}, "F8_E4M3", r"is stored as F8_E4M3 \(8 bits\), and config.json does not say"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_with_the_way(tmp_path: Path, case: str, stream: bool) -> None:
    document, dtype, message = REFUSED[case]
    build(tmp_path / "in", qwen(dtype=dtype), config(**document))
    (tmp_path / "in" / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        profiled(tmp_path / "in", stream=stream)
    assert WAY in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "document", "said"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("quantize_config.json", {"bits": 4}, "4 bits"),
        ("quant_config.json", [], "as it is"),
    ],
)
def test_a_file_beside_says_it(tmp_path: Path, name: str, document: Any, said: str) -> None:
    build(tmp_path / "in", qwen(), config())
    (tmp_path / "in" / "tokenizer.json").unlink()
    (tmp_path / "in" / name).write_text(json.dumps(document))
    with pytest.raises(UnsupportedModelError, match=rf"{name} says that its weights are quantised \({said}\)"):
        profiled(tmp_path / "in")


@pytest.mark.parametrize("stream", [False, True])
def test_scales_that_are_not_used_are_refused(tmp_path: Path, stream: bool) -> None:
    """Static scales under another name than the method's: the weights would be read as they stand."""
    from safetensors.torch import load_file, save_file

    from helpers import checkpoint_models

    source = checkpoint("qwen3moe", tmp_path / "quantised")
    checkpoint_models.to_fp8(source)
    path = source / "model.safetensors"
    tensors = {name.replace("_scale_inv", "_scale_0"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"weight_scale_0 belongs to a quantised weight, and transformers"):
        profiled(source, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_weights_that_are_missing_are_named(tmp_path: Path, stream: bool) -> None:
    """transformers would run on random numbers."""
    from safetensors.torch import load_file, save_file

    source = checkpoint("qwen3moe", tmp_path / "in")
    path = source / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "layers.1.input_layernorm" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"has no weights for .*layers\.1\.input_layernorm\.weight"):
        profiled(source, stream=stream)


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import checkpoint_models

    source = checkpoint("qwen3moe", tmp_path / "quantised")
    checkpoint_models.to_int4(source)
    for name in ("compressed_tensors", "compressed_tensors.compressors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"compressed.tensors"):
        profiled(source)
