"""Hardware that veRL does not ship: each folder is a plugin loaded through `VERL_USE_EXTERNAL_MODULES`."""

CHUNK = "chunk_tokens"  # `train.chunk_tokens`, in veRL's `fused_kernel_options`, of whose own kernels none is used
