"""vLLM worker extension that loads new weights into the running engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dgpo.engines.fixed_weights import FixedWeights


class ReplaceableWeights(FixedWeights):
    """Mixed into vLLM's worker. Its method is called by name, through `collective_rpc`."""

    all_linears_plain = True

    def load_weights_from(self, folder: str) -> None:
        """Loads the safetensors files of a Hugging Face folder over the present weights."""
        self.get_model().load_weights(_tensors(Path(folder)))  # type: ignore[attr-defined]


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                yield name, tensors.get_tensor(name)
