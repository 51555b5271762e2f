"""What GPUs can do, from their makers' data sheets. One direction of a link; arithmetic is dense bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One GPU, and how it reaches others."""

    name: str
    memory: float  # bytes that a process can allocate on an empty card: less than the name says
    bandwidth: float  # bytes/s of its memory
    flops: float  # per second
    link: float  # bytes/s to the other GPUs of its node
    host_link: float  # bytes/s to host memory
    network: float  # bytes/s to GPUs of other nodes, one adapter per GPU in nodes that are made for it


# NVIDIA data sheets: H200, H100 SXM5, A100 80GB SXM4, L40S, RTX 4090 and 3090. Networks: 400 Gbit/s per GPU in HGX
# H100 and H200 nodes, 200 in A100 ones. Memory: `torch.cuda.mem_get_info()` on an empty card.
KNOWN_GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 139.8 * GIB, 4.8e12, 989e12, 450e9, 55e9, 50e9),
        Gpu("h100", 79.1 * GIB, 3.35e12, 989e12, 450e9, 55e9, 50e9),
        Gpu("a100", 79.1 * GIB, 2.04e12, 312e12, 300e9, 25e9, 25e9),
        Gpu("l40s", 44.4 * GIB, 0.864e12, 362e12, 25e9, 25e9, 12e9),
        Gpu("rtx4090", 23.5 * GIB, 1.008e12, 165e12, 25e9, 25e9, 1e9),
        Gpu("rtx3090", 23.6 * GIB, 0.936e12, 71e12, 25e9, 25e9, 1e9),
    )
}
