"""What reap relies on in llama.cpp's source, checked by name: nodes of the graph, tensors of the loader, keys of the
header.

    python vendor/llama.cpp/source_facts.py TREE

prints a sentence for each thing that a tree names otherwise than reap does, and fails where there is one.
tests/project/test_pin.py runs it on the pinned tree,
bump.py on the next one. Needs reap's Python half; the native module may
be absent.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Nodes that look like a form of the gate or of the experts' output, and are none: sums of gates.
NOT_A_FORM = {"ffn_moe_weights_sum", "ffn_moe_weights_sum_clamped"}
#: Where the table of tensors is.
TABLE = "reap/gguf/expert_tensors.py"
#: Tensors that it cuts, keeps on purpose or refuses; the loader must know them by these names.
EXPERT_TENSORS = {
    *(f"ffn_{part}_exps" for part in ("gate", "up", "down", "gate_up")),
    *(f"ffn_{part}_shexp" for part in ("gate", "up", "down", "gate_inp")),
    *(f"ffn_{part}_chexps" for part in ("gate", "up", "down")),
    *("ffn_gate_inp", "exp_probs_b", "exp_probs_b_vl", "ffn_norm_exps", "ffn_gate_tid2eid"),
}
#: Keys of the header that reap reads or patches.
KEYS = {
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_gating_func",
    "expert_weights_norm",
}


@dataclass(frozen=True)
class Facts:
    """Names in a tree. nodes: of the graph. tensors: of a block, as the loader asks for them -> the suffixes that it
    asks for. keys: of the header, after the architecture. architectures, pre_tokenizers: as files name them."""

    nodes: frozenset[str]
    tensors: dict[str, frozenset[str]]
    keys: frozenset[str]
    architectures: frozenset[str]
    pre_tokenizers: frozenset[str]


def read_facts(tree: Path) -> Facts:
    """Read with regular expressions, which the pinned tree and those before it follow; nothing found at all is an
    error."""
    from reap.hf.disk.pre_tokenizers import read_pre_tokenizers

    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((tree / "src").rglob("*.cpp")))
    names = (tree / "src" / "llama-arch.cpp").read_text(encoding="utf-8")
    of_constant = dict(re.findall(r'\{\s*(LLM_TENSOR_\w+),\s*"blk\.%d\.([\w.]+)"\s*\}', names))
    suffixes: dict[str, set[str]] = {name: set() for name in of_constant.values()}
    for constant, suffix in re.findall(r'\b(LLM_TENSOR_\w+),\s*"(\w+)"', source):
        if constant in of_constant:
            suffixes[of_constant[constant]].add(suffix)
    facts = Facts(
        nodes=frozenset(re.findall(r'\bcb\([^;"]*"([\w.]+)"', source)),
        tensors={name: frozenset(found) for name, found in suffixes.items()},
        keys=frozenset(re.findall(r'"%s\.(\w+)"', names)),
        architectures=frozenset(re.findall(r'\{\s*LLM_ARCH_\w+,\s*"([\w.-]+)"\s*\}', names)),
        pre_tokenizers=read_pre_tokenizers(tree),
    )
    for what in ("nodes", "tensors", "keys", "architectures", "pre_tokenizers"):
        if not getattr(facts, what):
            raise ValueError(
                f"{tree}: no {what} found in src/: llama.cpp writes them in another way now, and this script must"
                " follow"
            )
    return facts


def looked_for() -> dict[str, str]:
    """Node names in reap's own sources -> the file that has them."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "csrc").glob("*.*")):
        for name in re.findall(r'"(ffn_moe_\w+|h_nextn|result_norm)"', path.read_text(encoding="utf-8")):
            if name != "ffn_moe_":
                found.setdefault(name, f"csrc/{path.name}")
    return found


def problems(facts: Facts) -> list[str]:
    """A sentence for each name that is not what reap takes it for."""
    return [*_node_problems(facts), *_tensor_problems(facts), *_key_problems(facts), *_pre_tokenizer_problems(facts)]


def _node_problems(facts: Facts) -> list[str]:
    ours = looked_for()
    gone = [f"{home} looks for the node {name!r}, which llama.cpp's graph no longer has" for name, home in ours.items()
            if name not in facts.nodes]  # fmt: skip
    forms = {name for name in facts.nodes if re.match(r"ffn_moe_(topk|weights|down)", name)}
    new = sorted(forms - ours.keys() - NOT_A_FORM)
    return [
        *gone,
        *(
            f"llama.cpp's graph has a node {name!r}: ids, a gate or an output that csrc/node_names.cpp does not know"
            for name in new
        ),
    ]


def _pre_tokenizer_problems(facts: Facts) -> list[str]:
    from reap.hf.disk.pre_tokenizers import PRE_TOKENIZERS

    home = "reap/hf/disk/pre_tokenizers.py"
    gone, new = sorted(PRE_TOKENIZERS - facts.pre_tokenizers), sorted(facts.pre_tokenizers - PRE_TOKENIZERS)
    return [f"{home} names {name!r}, which llama.cpp's vocabulary no longer knows" for name in gone] + [
        f"llama.cpp's vocabulary knows the pre-tokenizer {name!r}, which {home} does not" for name in new
    ]


def _tensor_problems(facts: Facts) -> list[str]:
    from reap.gguf.expert_tensors import find_rule

    found = [f"{TABLE} knows blk.N.{name}, which llama.cpp's loader no longer asks for"
             for name in sorted(EXPERT_TENSORS - facts.tensors.keys())]  # fmt: skip
    for name, suffixes in sorted(facts.tensors.items()):
        if not re.search(r"exp|gate_inp|tid2eid|moe|router", name):
            continue
        for full in sorted(f"{name}.{suffix}" for suffix in suffixes) or [name]:
            if find_rule(full) is None:
                found.append(f"llama.cpp's loader asks for blk.N.{full}, which {TABLE} does not know")
    return found


def _key_problems(facts: Facts) -> list[str]:
    return [
        f"reap reads the key <architecture>.{key}, which llama.cpp no longer has" for key in sorted(KEYS - facts.keys)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    found = problems(read_facts(parser.parse_args().tree))
    for sentence in found:
        print(sentence)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
