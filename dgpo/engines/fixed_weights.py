"""vLLM worker extension of engines whose weights stay as they are."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import torch

from dgpo.engines.cpu_sampling import sample_by_one_number
from dgpo.engines.die_with_parent import DieWithParent
from dgpo.engines.plain_linears import keep_plain_linears


class FixedWeights(DieWithParent):
    """As `DieWithParent`; on a CPU it also samples by one number, and packs large linear layers only."""

    all_linears_plain: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if kwargs["vllm_config"].device_config.device_type == "cpu":
            sample_by_one_number()
            keep_plain_linears(all_sizes=cls.all_linears_plain)
            if num_threads := os.environ.get("OMP_NUM_THREADS"):
                # A forked process has the number of the one that it comes from, which may have read no variable.
                torch.set_num_threads(int(num_threads))
        return super().__new__(cls, *args, **kwargs)
