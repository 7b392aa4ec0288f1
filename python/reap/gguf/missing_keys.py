"""Keys of the header without which the engine runs a model in another way than it was trained, or not at all.

Read in llama.cpp's src/models/*.cpp: where expert_gating_func may be missing, and what is taken then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reap.gguf.expert_tensors import ExpertLayout, read_count
from reap.gguf.reader import GGUFModel

# a softmax where the key is missing, which is right for DeepSeek-V2 and wrong for what came later
_SOFTMAX_WHERE_MISSING = frozenset({"deepseek2", "deepseek2-ocr"})
# nothing where the key is missing, and the graph cannot be built
_NOTHING_WHERE_MISSING = frozenset({"dots1", "hy_v4", "minimax-m2", "smallthinker"})
# recognised by these numbers there (src/models/deepseek2.cpp), and then given a sigmoid
_GLM_LITE_LAYERS, _GLM_LITE_VOCABULARY = (47, 48), 154_880
_SIGMOID = 2  # src/llama-hparams.h, LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID


def find_missing_keys(model: GGUFModel, layout: ExpertLayout, *, n_layers: int, vocab_size: int) -> dict[str, str]:
    """Key that the header lacks, or whose promise the file does not keep -> a sentence: what the engine does then, and
    what to give."""
    return _promised_layers(model, layout.architecture) | _gating(model, layout, n_layers, vocab_size)


def _promised_layers(model: GGUFModel, architecture: str) -> dict[str, str]:
    key = f"{architecture}.nextn_predict_layers"
    n_promised = read_count(model, key)
    if not n_promised or any(".nextn." in name for name in model.tensors):
        return {}
    layers = f"{n_promised} prediction layer{'s' * (n_promised > 1)}"
    return {
        key: (
            f"the header promises {layers}, but the file has none: what runs it may refuse it;"
            " reap prune --drop-prediction-layers (drop_prediction_layers=True) writes it without the promise"
        )
    }


def _gating(model: GGUFModel, layout: ExpertLayout, n_layers: int, vocab_size: int) -> dict[str, str]:
    architecture = layout.architecture
    key = f"{architecture}.expert_gating_func"
    if not layout.layers or read_count(model, key):
        return {}
    way_round = f"--override-kv {key}=int:{_SIGMOID} (override_kv) makes it a sigmoid"
    if architecture in _NOTHING_WHERE_MISSING:
        return {key: f"the header has no {key}, without which llama.cpp cannot run {architecture}; {way_round}"}
    biases = [tensor.name for tensor in layout.routers if ".exp_probs_b" in tensor.name]
    n_trunk = n_layers - read_count(model, f"{architecture}.nextn_predict_layers")
    is_recognised = n_trunk in _GLM_LITE_LAYERS and vocab_size == _GLM_LITE_VOCABULARY
    if architecture not in _SOFTMAX_WHERE_MISSING or not biases or is_recognised:
        return {}
    return {
        key: (
            f"the header has no {key}, so llama.cpp routes by a softmax, but only routers that use a sigmoid have a"
            f" selection bias as this one does ({biases[0]}); {way_round}"
        )
    }


def sentences(missing: Mapping[str, str], given: Iterable[tuple[str, str, str]]) -> list[str]:
    """Those about keys that are not among what is `given` as override_kv."""
    keys = {key for key, _, _ in given}
    return [sentence for key, sentence in missing.items() if key not in keys]
