"""The names of regular expressions that split text before byte-pair encoding (`tokenizer.ggml.pre`), as the pinned
llama.cpp knows them. A file with another name does not load."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

# read from src/llama-vocab.cpp of the pinned tree; tests/project/test_pin.py compares
PRE_TOKENIZERS = frozenset(
    [
        "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell",
        "cohere2moe", "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3",
        "default", "exaone", "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gemma4",
        "gigachat", "glm4", "glm5", "gpt-2", "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-311m",
        "granite-embed-multi-97m", "grok-2", "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de",
        "jina-es", "jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2",
        "kimi-k2", "kormo", "laguna", "lfm2", "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez",
        "mellum", "mellum2", "midm-2.0", "minerva-7b", "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo",
        "phi-2", "pixtral", "poro-chat", "qwen2", "qwen35", "refact", "roberta-bpe", "sarvam-moe", "seed-coder",
        "smaug-bpe", "smollm", "solar-open", "spark2_5", "stablelm2", "starcoder", "superbpe", "talkie", "tekken",
        "tiny_aya", "trillion", "ufakzeka", "viking", "whitespace", "youtu",
    ]
)  # fmt: skip
_VOCABULARY = Path("src") / "llama-vocab.cpp"


def read_pre_tokenizers(tree: Path) -> frozenset[str]:
    """The names that a llama.cpp source tree knows; none where it has no such file."""
    try:
        source = (tree / _VOCABULARY).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(re.findall(r'tokenizer_pre\s*==\s*"([^"]+)"', source))


def like(name: str, known: frozenset[str]) -> str:
    """A few of the known names, those that look like `name` first."""
    found = get_close_matches(name, known, n=3, cutoff=0.6)
    return ", ".join(found or ["qwen2", "llama-bpe", "gpt-4o", "deepseek-v3"])
