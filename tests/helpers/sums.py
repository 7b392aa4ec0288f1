"""The names of the sums, for oracles, which never import reap; `test_profile.py` holds reap's own list against it."""

from __future__ import annotations

SUMS = ("gate_sum", "norm_sum", "gated_norm_sum", "gated_norm_sq_sum", "norm_sq_sum", "norm_max")
COUNTS_AND_SUMS = ("counts", *SUMS)
