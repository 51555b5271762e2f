"""vLLM's packed CPU linear layers against torch's plain ones.

What `MIN_PACKED_ELEMENTS` of dgpo/engines/vllm_patches.py rests on.

    python scripts/bench/linears.py [--dtype float32]

Per layer and number of tokens: medians in ms, both forms in turn, on one thread. 65 to 84 tokens come once each, as the
batches of episodes do.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}

import torch
from vllm import _custom_ops as ops

LAYERS = ((64, 320), (896, 1152), (896, 9728), (4864, 896))  # inputs and outputs: the tiny world, Qwen2.5-0.5B
PRIMITIVES = 32  # vLLM's own cache per layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    dtype = getattr(torch, parser.parse_args().dtype)
    torch.set_num_threads(1)
    print(f"{'layer':>12} {'tokens':>10} {'packed':>8} {'plain':>8} {'packed / plain':>15}")
    for inputs, outputs in LAYERS:
        weight = torch.randn(outputs, inputs, dtype=dtype)
        handler = ops.create_onednn_mm(weight.t(), PRIMITIVES)

        def packed(x: torch.Tensor, handler: object = handler) -> torch.Tensor:
            return ops.onednn_mm(handler, x, None)

        def plain(x: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

        for name, counts in [("1", [1] * 20), ("8", [8] * 20), ("64", [64] * 20), ("65 to 84", range(65, 85))]:
            times = [_in_turn(torch.randn(count, inputs, dtype=dtype), packed, plain) for count in counts]
            both = [1e3 * median(column) for column in zip(*times, strict=True)]
            print(f"{f'{inputs} x {outputs}':>12} {name:>10} {both[0]:8.3f} {both[1]:8.3f} {both[0] / both[1]:15.2f}")


def _in_turn(x: torch.Tensor, *forms: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    seconds = []
    for form in forms:
        started = time.perf_counter()
        form(x)
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
