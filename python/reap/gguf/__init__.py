"""Reading and writing GGUF files, and which parts of one belong to experts."""

from __future__ import annotations
