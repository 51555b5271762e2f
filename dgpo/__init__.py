"""Distillation-Guided Policy Optimization: compact language models that search like agents."""

__version__ = "0.1.0"
