"""Which architectures with experts the pinned llama.cpp and the installed transformers have, read in their sources;
knows nothing of reap."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from helpers.llama_tools import source_directory as source_directory

_EXPERT_CLASSES = re.compile(r"class \w*Experts?\b|class \w*(MoE|Moe|SparseMlp)")
_EXPERT_KEYS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_moe")


def with_experts(source: Path) -> frozenset[str]:
    """Architectures whose code in llama.cpp's tree loads tensors of experts, as files name them."""
    names = dict(re.findall(r'\{ (LLM_ARCH_\w+),\s*"([^"]+)"', (source / "src/llama-arch.cpp").read_text()))
    bases = dict(
        re.findall(r"struct llama_model_(\w+) : public llama_model_(\w+)", (source / "src/models/models.h").read_text())
    )
    loading = re.compile(r"FFN_(DOWN|UP)_EXPS|gate_up_exps\(")
    classes = {
        path.stem.replace("-", "_"): bool(loading.search(path.read_text()))
        for path in (source / "src/models").glob("*.cpp")
    }

    def loads_experts(name: str | None) -> bool:
        return name is not None and (classes.get(name, False) or loads_experts(bases.get(name)))

    found: set[str] = set()
    for cases, name in re.findall(
        r"((?:case LLM_ARCH_\w+:\s*)+)return new llama_model_(\w+)\(", (source / "src/llama-model.cpp").read_text()
    ):
        if loads_experts(name):
            found.update(names[case] for case in re.findall(r"LLM_ARCH_\w+", cases))
    return frozenset(found)


def families_with_experts() -> list[str]:
    """Folders of transformers' models whose code has experts and whose configuration counts them, sorted."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return []
    models = Path(spec.submodule_search_locations[0]) / "models"
    return [folder.name for folder in sorted(models.iterdir()) if folder.is_dir() and _has_experts(folder)]


def _has_experts(folder: Path) -> bool:
    code, keys = (
        "".join(path.read_text(encoding="utf-8") for path in folder.glob(f"{kind}_*.py"))
        for kind in ("modeling", "configuration")
    )
    return bool(_EXPERT_CLASSES.search(code) and _EXPERT_KEYS.search(keys))


def converted_classes(converter: Path) -> frozenset[str]:
    """Classes that llama.cpp's converter registers."""
    found: set[str] = set()
    for path in (converter / "conversion").glob("*.py"):
        for names in re.findall(r"@ModelBase\.register\(([^)]*)\)", path.read_text(encoding="utf-8")):
            found.update(name.rpartition(".")[2] for name in re.findall(r'"([^"]+)"', names))
    return frozenset(found)
