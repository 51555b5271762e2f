"""What a run needs of its machines: placement, memory, time. Pure arithmetic (docs/hardware.md), without torch."""
