"""reap.hf.profile against every expert computed on every token, family by family, whatever implements the experts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.sums import SUMS
from helpers.torch_needs import absent
from reap import hf
from reap.errors import EngineError, Interrupted, MismatchError, ReapWarning, UnsupportedModelError, UsageError
from reap.hf.disk.config import trained_context

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn about themselves

FAMILIES = (
    "nemotronh",
    "nemotronh_latent",
    "qwen3moe",
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "gpt_oss",
    "olmoe",
    "qwen3_next",
    "qwen3_5_moe",
    "granite_moe",
    "lfm2_moe",
    "minimax_m2",
)


@pytest.fixture(scope="session", autouse=True)
def needs() -> None:
    for module in ("torch", "transformers", "safetensors", "accelerate"):
        try:
            __import__(module)
        except ImportError:
            absent(f"{module} is not installed: pip install 'reap-moe[hf]' accelerate")


@cache
def built(name: str) -> Any:
    from helpers import checkpoint_models

    return checkpoint_models.build(name)


@cache
def samples() -> tuple[tuple[int, ...], ...]:
    from helpers import torch_models

    return tuple(map(tuple, torch_models.samples()))


def lines() -> list[dict[str, Any]]:
    return [{"tokens": list(tokens)} for tokens in samples()]


@cache
def truth(name: str) -> dict[int, Any]:
    from helpers import hf_oracle

    return hf_oracle.measure(built(name), samples())


def compare(name: str, profile: reap.Profile, expected: dict[int, Any], tolerance: float = 1e-5) -> None:
    assert profile.layers.tolist() == sorted(expected)
    worst = 0.0
    for row, layer in enumerate(sorted(expected)):
        sums = expected[layer]
        assert profile.counts[row].tolist() == sums["counts"].tolist()
        assert profile.total_tokens[row] == sums["total_tokens"]
        for field in SUMS:
            np.testing.assert_allclose(
                getattr(profile, field)[row], sums[field].numpy(), rtol=tolerance, atol=0, err_msg=field
            )
            ratio = getattr(profile, field)[row][sums["counts"] > 0] / sums[field].numpy()[sums["counts"] > 0]
            worst = max(worst, float(np.abs(ratio - 1).max()))
    print(f"{name}: {profile.counts.sum()} routings equal; the sums differ by {worst:.1e} at most")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- the numbers


@pytest.mark.parametrize("given_as", ["a folder", "in memory"])
def test_the_usual_context_is_at_most_what_the_model_was_trained_for(given_as: str, tmp_path: Path) -> None:
    model = built("qwen3moe")
    trained = model.config.max_position_embeddings
    assert trained == 256
    long = [{"tokens": [1 + i % 90 for i in range(2 * trained + 10)]}]
    if given_as == "a folder":
        model.save_pretrained(tmp_path / "saved")
        model = tmp_path / "saved"
    usual, within = (hf.profile(model, long, **options) for options in ({}, {"ctx_size": trained}))
    assert np.array_equal(usual.gated_norm_sum, within.gated_norm_sum)
    assert "warnings" not in usual.engine
    with pytest.warns(ReapWarning, match="ctx_size is 2,048, but the model was trained for 256 tokens"):
        beyond = hf.profile(model, long, ctx_size=2048)
    assert beyond.engine["warnings"] == ["ctx_size is 2,048, but the model was trained for 256 tokens"]
    assert not np.array_equal(usual.gated_norm_sum, beyond.gated_norm_sum)


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 512}, "vision_config": {"max_position_embeddings": 64}}, 512),
        # scaled positions are trained for; those before the scaling are another key
        ({"max_position_embeddings": 8192, "rope_scaling": {"original_max_position_embeddings": 512}}, 8192),
        ({"max_position_embeddings": 512, "sliding_window": 64}, 512),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "seq_length": 300}, 300),
        ({"max_position_embeddings": "512"}, 0),
        ({}, 0),
    ],
)
def test_what_a_configuration_says_of_its_training(config: dict[str, Any], trained: int) -> None:
    assert trained_context(config) == trained


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_profile_is_that_of_every_expert_on_every_token(family: str, implementation: str) -> None:
    model = built(family)
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        profile = hf.profile(model, lines(), ctx_size=128)
    finally:
        model.set_experts_implementation(before)
    compare(f"{family}, {implementation}", profile, truth(family))
    assert profile.model["n_experts_used"] == model.config.get_text_config().num_experts_per_tok
    assert profile.model["n_groups"] == (4 if family == "deepseek_v3" else 1)


def test_only_routed_experts_compute_and_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that reach the experts' matrices: top-k of each token, once (and a few more that prove the gate, once a
    layer)."""
    import torch

    model = built("mixtral")
    rows = []
    plain = torch.nn.functional.linear

    def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape == model.model.layers[0].mlp.experts.down_proj.shape[1:]:
            rows.append(len(states))
        return plain(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    n_tokens = sum(map(len, samples()))
    hf.profile(model, lines(), ctx_size=128)
    proof = 2 * 2 * 4 * 2  # layers, calls, tokens, top-k
    assert n_tokens * 2 * 2 <= sum(rows) <= n_tokens * 2 * 2 + proof


def test_the_model_is_left_as_it_was(family: str) -> None:
    import torch

    model = built(family)
    tokens = torch.tensor([samples()[1]])
    with torch.no_grad():
        before = model(tokens).logits
    model.train()
    hf.profile(model, lines()[:2], ctx_size=128)
    assert model.training
    model.eval()
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__ or module._forward_hooks]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_the_forward_pass_is_the_model_s(family: str) -> None:
    """What is observed does not change what later layers see."""
    import torch

    from reap.hf.memory.expert_hooks import Observer

    model = built(family)
    layers = list(hf.find_moe_layers(model).values())
    tokens = torch.tensor([samples()[3]])
    with torch.no_grad():
        expected = model(tokens).logits
        with Observer(layers, lambda *_: None).watching():
            observed = model(tokens).logits
    assert float((observed - expected).abs().max()) < 1e-4 * float(expected.std())


def test_windows_masks_and_domains() -> None:
    from helpers import hf_oracle

    model = built("qwen3moe")
    texts = samples()
    given = [{"tokens": list(tokens), "domain": "ab"[number % 2]} for number, tokens in enumerate(texts)]
    profile = hf.profile(model, given, ctx_size=32, batch_size=64)
    # windows stand alone: the oracle gets them as samples
    windows = [
        (number, list(tokens[start : start + 32]))
        for number, tokens in enumerate(texts)
        for start in range(0, len(tokens), 32)
    ]
    compare("windows", profile, hf_oracle.measure(model, [tokens for _, tokens in windows]))
    assert profile.domains == ("a", "b")
    odd = hf_oracle.measure(model, [tokens for _, tokens in windows], lambda window, _: windows[window][0] % 2 == 1)
    compare("domain b", profile.domain("b"), odd)


def test_texts_become_the_tokens_of_transformers(tmp_path: Path) -> None:
    from helpers import hf_oracle, torch_models

    model = built("qwen3moe")
    tokenizer = torch_models.make_tokenizer()
    text, prompt, response = torch_models.TRAINING_TEXT[:3]
    messages = [{"role": "user", "content": "hi <s> there"}, {"role": "assistant", "content": "naïve 東京 🚀"}]
    given = [{"text": text}, {"prompt": prompt, "response": response}, {"messages": messages}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = [tokenizer.encode(string) for string in (text, f"{prompt}\n{response}", rendered)]
    compare("texts", hf.profile(model, given, tokenizer=tokenizer, ctx_size=256), hf_oracle.measure(model, ids))

    counted = [[True] * len(ids[0])]
    for number, head in (
        (1, f"{prompt}\n"),
        (2, tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)),
    ):
        n_head = len(tokenizer.encode(head))
        counted.append([position >= n_head for position in range(len(ids[number]))])
    masked = hf.profile(model, given, tokenizer=tokenizer, ctx_size=256, mask="response")
    compare("responses", masked, hf_oracle.measure(model, ids, lambda sample, token: counted[sample][token]))


def test_a_list_of_modules_is_probed() -> None:
    """Experts that are modules, routing inside of the block: Mixtral's numbers with the block rewritten in that
    form."""
    import copy

    import torch
    from torch import nn

    class Expert(nn.Module):
        def __init__(self, gate_up: Any, down: Any) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

        def forward(self, x: Any) -> Any:
            gate, up = (x @ self.gate_up.T).chunk(2, dim=-1)
            return (nn.functional.silu(gate) * up) @ self.down.T

    class Block(nn.Module):
        def __init__(self, old: Any) -> None:
            super().__init__()
            self.gate = nn.Linear(old.gate.weight.shape[1], len(old.gate.weight), bias=False)
            self.gate.weight.data = old.gate.weight.data
            pairs = zip(old.experts.gate_up_proj.data, old.experts.down_proj.data, strict=True)
            self.experts = nn.ModuleList([Expert(gate_up, down) for gate_up, down in pairs])
            self.shared = nn.Linear(self.gate.in_features, self.gate.in_features)  # has no part in the sums
            self.top_k = 2

        def forward(self, hidden: Any) -> Any:
            x = hidden.reshape(-1, hidden.shape[-1])
            gates, ids = torch.softmax(self.gate(x), dim=-1).topk(self.top_k)
            gates = gates / gates.sum(-1, keepdim=True)
            result = self.shared(x) * 0.01
            for number, expert in enumerate(self.experts):
                slot, token = torch.where(number == ids.T)
                if len(token):
                    result.index_add_(0, token, expert(x[token]) * gates[token, slot, None])
                else:
                    result = result + 0 * expert(torch.zeros_like(x[:1]))
            return result.reshape(hidden.shape)

    fused = copy.deepcopy(built("mixtral"))
    torch.manual_seed(0)
    listed = copy.deepcopy(fused)
    for model in (fused, listed):
        for layer in model.model.layers[1:]:
            layer.mlp.experts.down_proj.data *= 0.5
    listed.model.layers[0].mlp = Block(listed.model.layers[0].mlp)
    found = hf.find_moe_layers(listed)
    assert [layer.is_list for layer in found.values()] == [True, False]
    expected = hf.profile(fused, lines(), ctx_size=128)
    measured = hf.profile(listed, lines(), ctx_size=128)
    np.testing.assert_array_equal(measured.counts[0], expected.counts[0])
    for field in SUMS:
        np.testing.assert_allclose(getattr(measured, field)[0], getattr(expected, field)[0], rtol=1e-5)


def test_a_gate_before_the_experts_is_refused() -> None:
    import copy

    model = copy.deepcopy(built("mixtral"))
    experts = model.model.layers[1].mlp.experts
    plain = experts.forward
    experts.forward = lambda hidden, ids, gates: plain(hidden * gates.sum(-1, keepdim=True), ids, gates)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1\.mlp: its experts' output is not the sum of gate times output"
    ):
        hf.profile(model, lines(), ctx_size=128)


def test_a_dense_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: no layer has a router and experts"):
        hf.profile(LlamaForCausalLM(config), lines())


def test_what_is_not_finite_is_no_statistic() -> None:
    import copy

    model = copy.deepcopy(built("mixtral"))
    model.model.layers[1].mlp.experts.down_proj.data[:] = float("nan")
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp: an expert's output is not a finite number"):
        hf.profile(model, lines(), ctx_size=128)


# ---- folders


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import checkpoint_models

    return checkpoint_models.save(built("nemotronh"), tmp_path_factory.mktemp("nemotronh") / "hf")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return path


def test_a_folder(folder: Path, calibration: Path) -> None:
    profile = hf.profile(folder, calibration, ctx_size=128)
    compare("folder", profile, truth("nemotronh"))
    assert profile.calibration["sha256"][0]
    assert (profile.model["name"], profile.model["architecture"]) == ("hf", "nemotron_h")


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device": "cpu", "dtype": "float32", "threads": 1}])
def test_loading_options(folder: Path, calibration: Path, options: dict[str, Any]) -> None:
    profile = hf.profile(folder, calibration, ctx_size=128, **options)
    exact = options["dtype"] == "float32"
    weights = profile.engine["options"]["weights"]
    # some versions of transformers keep the correction bias in 32 bits
    assert weights == ["float32"] if exact else "bfloat16" in weights and set(weights) <= {"bfloat16", "float32"}
    expected = truth("nemotronh")
    total = np.stack([expected[layer]["norm_sum"].numpy() for layer in sorted(expected)]).sum()
    assert abs(profile.norm_sum.sum() / total - 1) < (1e-6 if exact else 0.05)


@pytest.mark.parametrize("layers", ["cpu", "disk"])
def test_device_map(folder: Path, calibration: Path, layers: str) -> None:
    """accelerate's ways: by itself, and with the layers' weights on disk."""
    names = {name for name, _ in built("nemotronh").model.named_children()}
    split = {**{f"model.{name}": "disk" if name == "layers" else "cpu" for name in names}, "lm_head": "cpu"}
    profile = hf.profile(folder, calibration, ctx_size=128, device_map="auto" if layers == "cpu" else split)
    compare(layers, profile, truth("nemotronh"))


def test_refusals(folder: Path, calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file; a Hugging Face checkpoint was expected"):
        hf.profile(tmp_path / "absent", calibration)
    with pytest.raises(UsageError, match=r"no config\.json"):
        hf.profile(tmp_path, calibration)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UsageError, match=r"holds a pickle \(pytorch_model\.bin\), which reap never loads"):
        hf.profile(tmp_path, calibration)
    for options, message in (
        ({"dtype": "int3"}, "dtype is 'int3', expected one of auto"),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map exclude each other"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"ctx_size": 64, "batch_size": 32}, "expected a whole number of at least ctx_size, 64"),
        ({"threads": 0}, "threads is 0"),
        ({"resume": True}, "resume needs a checkpoint"),
        ({"mask": "none"}, "mask is 'none'"),
    ):
        with pytest.raises(UsageError, match=message):
            hf.profile(folder, calibration, **options)
    with pytest.raises(UsageError, match="a model in memory stays as it is"):
        hf.profile(built("nemotronh"), calibration, dtype="float32")


def test_code_in_the_checkpoint_runs_only_when_asked(
    folder: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copied = Path(shutil.copytree(folder, tmp_path / "hf"))
    (copied / "own_code.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import NemotronHConfig, NemotronHForCausalLM\n"
        "class OwnConfig(NemotronHConfig):\n    pass\n"
        "class OwnModel(NemotronHForCausalLM):\n    config_class = OwnConfig\n"
    )
    document = json.loads((copied / "config.json").read_text())
    document["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copied / "config.json").write_text(json.dumps({**document, "model_type": "own_nemotron"}))
    with pytest.raises(EngineError, match="trust_remote_code"):
        hf.profile(copied, calibration, ctx_size=128)
    (copied / "config.json").write_text(json.dumps(document))
    hf.profile(copied, calibration, ctx_size=128)
    assert not (tmp_path / "ran").exists()


# ---- checkpoints


def test_resume_gives_the_same_bits(folder: Path, calibration: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ctx_size": 64, "checkpoint_seconds": 0.0}
    whole = hf.profile(folder, calibration, ctx_size=64)
    stops = 0
    kept = tmp_path / "run.json"
    while True:
        seen = 0

        def interrupt(_step: reap.Progress) -> None:
            nonlocal seen
            seen += 1
            if seen > 2:  # a sample of two windows has to come to its end
                raise KeyboardInterrupt

        try:
            resumed = hf.profile(folder, calibration, checkpoint=kept, resume=stops > 0, progress=interrupt, **options)
            break
        except Interrupted:
            stops += 1
            assert stops < 20
    assert stops > 0
    for field in ("counts", "total_tokens", *SUMS):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(whole, field))
    with pytest.raises(UsageError, match="a resume file is there already"):
        hf.profile(folder, calibration, checkpoint=kept, **options)
    with pytest.raises(MismatchError, match="options dtype 'auto', where this one has 'bfloat16'"):
        hf.profile(folder, calibration, checkpoint=kept, resume=True, dtype="bfloat16", **options)


def test_interrupting_the_command(folder: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "long.jsonl"
    calibration.write_text(
        json.dumps({"tokens": list(samples()[1])})
        + "\n"
        + "\n".join([json.dumps({"tokens": list(samples()[3])})] * 3000)
    )
    kept = tmp_path / "kept.json"
    words = [
        "hf",
        "profile",
        str(folder),
        str(calibration),
        "-o",
        str(tmp_path / "p.json"),
        "-c",
        "128",
        "--checkpoint",
        str(kept),
    ]
    # the command itself, except for a checkpoint after every sample: the first one says that it is measuring
    script = f"""
import functools, sys
import reap.hf
from reap.cli import main
reap.hf.profile = functools.partial(reap.hf.profile, checkpoint_seconds=0.0)
sys.exit(main({words!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if kept.exists() or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert json.loads(kept.read_text())["units"] > 0
    assert not (tmp_path / "p.json").exists()


def test_the_command(folder: Path, calibration: Path, tmp_path: Path) -> None:
    from reap.cli import main

    output = tmp_path / "p.json"
    assert (
        main(["hf", "profile", str(folder), str(calibration), "-o", str(output), "-c", "128", "--dtype", "float32"])
        == 0
    )
    compare("command", reap.Profile.load(output), truth("nemotronh"))
    assert main(["hf", "profile", str(folder), str(calibration), "-o", str(folder)]) == 2


def test_without_the_extra(tmp_path: Path) -> None:
    """reap imports without torch, transformers and safetensors, and says what is missing."""
    script = (
        "import sys, importlib.util\nfor name in ('torch', 'transformers', 'safetensors'): sys.modules[name] ="
        " None\nfind = importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *rest: None if name in"
        " ('torch', 'transformers', 'safetensors') else find(name, *rest)\nimport reap, reap.hf\nfor use in (lambda:"
        " reap.hf.SaliencyTracker, lambda: reap.hf.find_moe_layers, lambda: reap.hf.prune_model,\n            lambda:"
        " reap.hf.profile('x', 'y')):\n    try:\n        use()\n    except reap.MissingExtraError as error:\n       "
        " print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
    ).stdout
    assert said.splitlines() == [
        "reap.hf.SaliencyTracker needs torch: pip install 'reap-moe[hf]'",
        "reap.hf.find_moe_layers needs torch: pip install 'reap-moe[hf]'",
        "reap.hf.prune_model needs torch: pip install 'reap-moe[hf]'",
        "reap.hf.profile needs torch and transformers and safetensors: pip install 'reap-moe[hf]'",
    ]


def test_nf4(tmp_path: Path) -> None:
    """The experts and the other matrices in four bits, the routers as they are: the numbers of the model with the
    rounded weights."""
    try:
        import bitsandbytes
    except ImportError:
        absent("bitsandbytes is not installed: pip install bitsandbytes")
    import copy

    import torch

    from helpers import checkpoint_models

    checkpoint = checkpoint_models.save(built("nemotronh"), tmp_path / "hf")
    profile = hf.profile(checkpoint, lines(), ctx_size=128, dtype="float32", load_in_4bit=True)
    assert profile.engine["options"]["weights"] == ["float32", "nf4"]
    rounded = copy.deepcopy(built("nemotronh"))
    changed = 0
    for name, tensor in rounded.model.layers.named_parameters():
        matrix = tensor.dim() == 2 and name.endswith("_proj.weight")
        if matrix or name.endswith(("experts.up_proj", "experts.down_proj")):
            packed, state = bitsandbytes.functional.quantize_4bit(
                tensor.data, compress_statistics=True, quant_type="nf4"
            )
            tensor.data = bitsandbytes.functional.dequantize_4bit(packed, state)
            changed += 1
    assert changed > 8
    expected = hf.profile(rounded, lines(), ctx_size=128)
    np.testing.assert_array_equal(profile.counts, expected.counts)
    for field in SUMS:
        np.testing.assert_allclose(getattr(profile, field), getattr(expected, field), rtol=1e-5)
    whole = hf.profile(checkpoint, lines(), ctx_size=128)
    assert not torch.equal(torch.tensor(whole.norm_sum), torch.tensor(profile.norm_sum))


@pytest.mark.parametrize("name", ["gemma4", "step35", "granite_swa", "granite_hybrid", "jamba", "deepseek_ocr"])
def test_further_families(name: str) -> None:
    """Against the oracle that the engine's profiles of these are held against."""
    from helpers import torch_models, torch_more_models, torch_more_oracle

    model = torch_more_models.build(name)
    sums = torch_more_oracle.measure(model, torch_models.samples())
    profile = hf.profile(model, lines(), ctx_size=128)
    assert profile.layers.tolist() == sorted(sums)
    for row, layer in enumerate(sorted(sums)):
        np.testing.assert_array_equal(profile.counts[row], sums[layer].counts)
        for field in SUMS:
            np.testing.assert_allclose(
                getattr(profile, field)[row], getattr(sums[layer], field), rtol=1e-5, err_msg=field
            )


def test_llama4_is_refused() -> None:
    """Its gate multiplies what the experts are given."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 64, "head_dim": 32, "vocab_size": 320}
    config = Llama4TextConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4
    )
    with pytest.raises(UnsupportedModelError, match=r"its experts are called with \(\[192, 64\]\), where"):
        hf.profile(Llama4ForCausalLM(config), [{"tokens": list(samples()[1])}], ctx_size=128)


# ---- both halves


@pytest.mark.parametrize(
    "name", ["qwen3moe", "nemotronh", "nemotronh_latent", "deepseek_v3", "mixtral", "gpt_oss", "olmoe", "glm4_moe"]
)
def test_both_halves_agree(name: str, tmp_path: Path) -> None:
    """The same checkpoint as it is, and converted to GGUF."""
    from helpers import torch_models

    checkpoint = torch_models.save(built(name), tmp_path / "hf")
    gguf = hf.convert_checkpoint(checkpoint, tmp_path / "m.gguf", outtype="f32", pre=torch_models.PRE)
    given = [{**line, "domain": "ab"[number % 2]} for number, line in enumerate(lines())]
    ours = hf.profile(checkpoint, given, ctx_size=128)
    theirs = reap.profile(
        gguf, given, ctx_size=128, ubatch_size=64, type_k="f32", type_v="f32", flash_attn="off", threads=1
    )
    for a, b in ((ours, theirs), *((ours.domain(domain), theirs.domain(domain)) for domain in theirs.domains)):
        np.testing.assert_array_equal(a.layers, b.layers)
        np.testing.assert_array_equal(a.counts, b.counts)
        np.testing.assert_array_equal(a.total_tokens, b.total_tokens)
        for field in SUMS:
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=1e-5, err_msg=field)
    for key in ("n_experts", "n_experts_used", "n_groups", "n_groups_used"):
        assert ours.model[key] == theirs.model[key], key
    assert reap.compare(ours, theirs).overlap == 1
    text = {"text": torch_models.TRAINING_TEXT[0]}
    assert (
        hf.profile(checkpoint, [text]).counts.tolist()
        == reap.profile(gguf, [text], type_k="f32", type_v="f32", flash_attn="off").counts.tolist()
    )


# ---- models larger than memory


def test_streaming_is_the_same(family: str, calibration: Path, tmp_path: Path) -> None:
    """One layer in memory at a time gives what the whole model gives."""
    from helpers import checkpoint_models

    checkpoint = checkpoint_models.save(built(family), tmp_path / "hf")
    compare(f"{family}, streamed", hf.profile(checkpoint, calibration, ctx_size=128, stream=True), truth(family))


def test_streaming_holds_one_layer(folder: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between loads no decoder layer has weights; rounds and interruptions leave whole units, and no thread."""
    import threading

    from reap.hf.memory import streaming

    monkeypatch.setattr(streaming, "ROUND_TOKENS", 60)  # several rounds
    loaded: list[list[int]] = []
    load = streaming.LayerStore.load

    def counting_load(self: Any, layer: int | None) -> None:
        load(self, layer)
        if layer is not None:
            held = [
                number
                for number, part in enumerate(self.layers)
                if any(p.device.type != "meta" for p in part.parameters())
            ]
            loaded.append(held)

    monkeypatch.setattr(streaming.LayerStore, "load", counting_load)
    before = threading.active_count()
    profile = hf.profile(folder, calibration, ctx_size=128, stream=True)
    compare("rounds", profile, truth("nemotronh"))
    assert loaded == [[0], [1], [2], [3]] * (len(loaded) // 4)
    assert len(loaded) > 4

    seen = 0

    def interrupt(_step: reap.Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == 6:  # in the second round
            raise KeyboardInterrupt

    kept = calibration.with_name("streamed.json")
    options: dict[str, Any] = {"ctx_size": 128, "stream": True, "checkpoint": kept, "checkpoint_seconds": 0.0}
    with pytest.raises(Interrupted, match="stopped after"):
        hf.profile(folder, calibration, progress=interrupt, **options)
    assert 0 < json.loads(kept.read_text())["units"] < len(samples())
    assert threading.active_count() == before
    resumed = hf.profile(folder, calibration, resume=True, **options)
    for field in ("counts", *SUMS):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(profile, field))


@pytest.mark.parametrize("stream", [False, True])
def test_a_sample_that_fails_is_named_and_the_others_are_counted(stream: bool, tmp_path: Path) -> None:
    """One rule for both sessions: a token whose embedding is not a number spoils its sample and no other."""
    import copy

    from helpers import checkpoint_models

    model = copy.deepcopy(built("nemotronh"))
    bad = next(token for token in range(200) if not any(token in tokens for tokens in samples()))
    model.get_input_embeddings().weight.data[bad] = float("nan")
    checkpoint = checkpoint_models.save(model, tmp_path / "hf")
    given = [*lines()[:2], {"tokens": [1, bad, 2]}, *lines()[2:]]
    profile = hf.profile(checkpoint, given, ctx_size=128, stream=stream)
    assert len(profile.calibration["failed_samples"]) == 1
    assert profile.calibration["failed_samples"][0].startswith("sample 3: ")
    compare("without it", profile, truth("nemotronh"))


def test_a_model_that_breaks_is_no_sample_s_fault(
    folder: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap.hf.memory import streaming

    loads: list[int | None] = []
    load = streaming.LayerStore.load

    def break_down(self: Any, layer: int | None) -> None:
        loads.append(layer)
        if layer is not None:
            raise EngineError("the disk is gone")
        load(self, layer)

    monkeypatch.setattr(streaming.LayerStore, "load", break_down)
    with pytest.raises(EngineError, match="the disk is gone"):
        hf.profile(folder, calibration, ctx_size=128, stream=True)
    assert loads == [None, 0]


def test_streaming_says_what_is_missing(folder: Path, calibration: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and "gate.weight" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(EngineError, match=r"has no weights for model\.layers\.1\.mixer\.gate\.weight"):
        hf.profile(tmp_path, calibration, ctx_size=128, stream=True)
    with pytest.raises(UsageError, match="three ways to load a model"):
        hf.profile(folder, calibration, stream=True, device_map="auto")


def test_a_run_ends_when_it_is_enough() -> None:
    rng = np.random.default_rng(0)
    lines = [{"tokens": rng.integers(1, 300, 20).tolist()} for _ in range(200)]
    from helpers import torch_models

    model = torch_models.build("qwen3moe")
    profile = hf.profile(model, lines, ctx_size=64, until=0.6, keep=0.5, metric="msan")
    assert profile.calibration["until"]["reached"]
    assert 32 <= profile.calibration["samples"] < 100
    assert profile.total_tokens.max() == 20 * profile.calibration["samples"]
    assert profile.stability(0.5, "msan").overlap > 0.5
    with pytest.raises(UsageError, match="until needs keep"):
        hf.profile("/nowhere", lines, until=0.6)
