"""llm-compressor's utilities for REAP, with that project's names, signatures and semantics (0.14): its users change an
import and nothing else.

    from reap.hf.llmcompressor import REAPSaliencyTracker, get_moe_attrs, prune_moe_layer, update_model_config

What differs from reap's own: an expert that no token was routed to has a mean of 0 (`reap.hf.SaliencyTracker`: NaN),
and nothing is checked before it is done (`reap.hf.prune_moe_layer` refuses what the router could not be served with).
"""

from reap.hf.dependencies import require_extra

require_extra("reap.hf.llmcompressor", "torch")

from reap.hf.memory.llmcompressor import (  # noqa: E402  (it imports torch)
    MoeModelAttrs,
    REAPSaliencyTracker,
    get_moe_attrs,
    prune_moe_layer,
    update_model_config,
)

__all__ = ["MoeModelAttrs", "REAPSaliencyTracker", "get_moe_attrs", "prune_moe_layer", "update_model_config"]
