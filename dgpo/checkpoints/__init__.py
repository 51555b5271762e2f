"""Checkpoints as files: whole or absent, kept or deleted, read whatever number of ranks wrote them."""
