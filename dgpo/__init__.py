"""Distillation-Guided Policy Optimization: compact language models that search like agents."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Agent", "Answer", "__version__"]


def __getattr__(name: str) -> Any:
    """`from dgpo import Agent`, without what it needs being imported by `import dgpo`."""
    if name in ("Agent", "Answer"):
        import importlib

        return getattr(importlib.import_module("dgpo.ask.agent"), name)
    raise AttributeError(f"module 'dgpo' has no attribute {name!r}")
