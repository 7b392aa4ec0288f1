"""Checkpoints on disk: read, pruned and converted. Never imports torch."""
