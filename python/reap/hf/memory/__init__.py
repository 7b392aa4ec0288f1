"""Checkpoints in memory, as transformers models. Needs the extra `hf`."""
