"""vLLM worker extension for the CPU that keeps plain weights, so that veRL can load new ones every step.

Chosen by configuration: `hardware.engine.worker_extension`.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from dgpo.engines.vllm_patches import ask_for_matrix_tiles, keep_plain_linears


class PlainWeightsWorkerExtension(vLLMColocateWorkerExtension):
    """veRL's own extension (weight loading, sleep) over unpacked CPU linears."""

    def __new__(cls, **kwargs: Any) -> PlainWeightsWorkerExtension:
        ask_for_matrix_tiles()
        keep_plain_linears()
        return super().__new__(cls, **kwargs)
