"""What an evaluation says of a pruned model, as a page shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reap.files.strict_json import Node


@dataclass(frozen=True)
class Judged:
    """A pruned model on text that had no part in its choice."""

    perplexity: float
    """Its own."""
    stderr: float
    """Of that."""
    rise: float
    """Over the whole model's, a share."""
    rise_error: float
    """Standard error of that, token by token."""
    tokens: int
    """Scored."""

    @classmethod
    def of(cls, root: Node) -> Judged:
        """From what `reap evaluate -o` wrote. FormatError where it was compared with no reference, or is damaged."""
        if "perplexity_ratio" not in root or root["perplexity_ratio"].value is None:
            root.fail("was compared with no other model: evaluate with --reference")
        values = {name: _number(root, name) for name in ("perplexity", "stderr", "ratio_stderr")}
        ratio = root["perplexity_ratio"].number()
        tokens = root["tokens"].integer()
        return cls(values["perplexity"], values["stderr"], ratio - 1, values["ratio_stderr"], tokens)


def _number(node: Node, key: str) -> float:
    return math.nan if key not in node or node[key].value is None else node[key].number()
