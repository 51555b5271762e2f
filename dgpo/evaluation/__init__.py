"""Evaluation of checkpoints on held-out questions, and what a run's results look like."""
