"""vLLM worker extension for the CPU that keeps plain weights, so that veRL can load new ones every step.

It samples by one number per sequence, like every CPU engine of the project.

Chosen by configuration: `hardware.engine.worker_extension`.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from dgpo.engines.vllm_patches import keep_plain_linears, sample_by_one_number


class PlainWeightsWorkerExtension(vLLMColocateWorkerExtension):
    """veRL's own extension (weight loading, sleep) over unpacked CPU linears."""

    def __new__(cls, **kwargs: Any) -> PlainWeightsWorkerExtension:
        keep_plain_linears(all_sizes=True)
        sample_by_one_number()
        return super().__new__(cls, **kwargs)
