"""Bytes on one GPU, by part: the formulas of docs/hardware.md, each with its source there. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from dgpo.config.schema import Config
from dgpo.hardware.known_gpus import GIB
from dgpo.hardware.shapes import ModelShape

FLOAT32 = 4
ADAM = 2 * FLOAT32  # two moments
# PROCESS: a CUDA context and cuBLAS workspaces. COMMUNICATION: NCCL's channels and buffers, where GPUs talk. Then the
# share of torch's own tensors that its allocator holds without using. Assumed: not measured by this project.
PROCESS = 0.75 * GIB
COMMUNICATION = 1.0 * GIB
ALLOCATOR_SLACK = 0.05
CUDA_GRAPHS = 0.7 * GIB  # vLLM's; they stay when it sleeps
# Float32 tensors of [chunk, vocabulary] at the peak of `dgpo.algorithms.chunked_head`: log-probs and probabilities, and
# with the teacher in the loss both models' and their difference's product.
CHUNK_COPIES = {False: 2, True: 5}
UNSHARDED_LAYERS = 3  # the one that computes, the next one on its way, and the buffer it comes in


@dataclass(frozen=True)
class Precision:
    """Bytes per value. `stream`: of the residual stream, which autocast leaves in float32."""

    value: int
    stream: int


def kv_bytes_per_token(shape: ModelShape, *, value: int, tensor_parallel: int = 1) -> float:
    """Keys and values of one token on one GPU; a GPU holds at least one head."""
    heads = max(1.0, shape.kv_heads / tensor_parallel)
    return 2.0 * shape.layers * heads * shape.head_dim * value


def layer_activations(shape: ModelShape, precision: Precision) -> int:
    """Bytes per token that one decoder layer keeps for its backward pass.

    Two norms keep their input in float32, its normalised form and one float32 each; the projections their inputs;
    attention (flash, or sdpa) queries, keys, values and a log-sum; the MLP its gate, its activation, up and product.
    """
    norms = 2 * (FLOAT32 * shape.hidden + precision.stream * shape.hidden + FLOAT32)
    projections = precision.value * (2 * shape.hidden + shape.query_size)
    attention = precision.value * (shape.query_size + 2 * shape.kv_size) + FLOAT32 * shape.heads
    mlp = precision.value * 4 * shape.intermediate
    return norms + projections + attention + mlp


def saved_activations(shape: ModelShape, tokens: int, precision: Precision, *, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps, logits apart: of every layer all, or its input; and of the final norm."""
    of_layer = precision.stream * shape.hidden if checkpointing else layer_activations(shape, precision)
    final = FLOAT32 * shape.hidden + (precision.stream + precision.value) * shape.hidden + FLOAT32
    rotary = 0 if checkpointing else 2 * shape.head_dim * precision.stream
    return tokens * (shape.layers * of_layer + final + rotary + 8)  # 8: the token's id


def backward_workspace(shape: ModelShape, tokens: int, precision: Precision, *, checkpointing: bool) -> int:
    """Bytes on top while a layer runs backward: what it recomputes, one gradient of the MLP's width, one weight's."""
    recomputed = tokens * layer_activations(shape, precision) if checkpointing else 0
    return recomputed + precision.value * (tokens * shape.intermediate + shape.hidden * shape.intermediate)


def forward_workspace(shape: ModelShape, tokens: int, precision: Precision) -> int:
    """Bytes of a forward pass that keeps nothing: three tensors of the MLP's width, and the stream in and out."""
    return tokens * (3 * precision.value * shape.intermediate + 3 * precision.stream * shape.hidden)


def logits(shape: ModelShape, tokens: int, *, exact: bool = False) -> int:
    """Bytes of float32 tensors of [tokens, vocabulary], for the tokens of one chunk."""
    return CHUNK_COPIES[exact] * tokens * shape.vocab * FLOAT32


def gathered_weights(shape: ModelShape, precision: Precision) -> int:
    """Bytes of the whole weights that FSDP2 holds at once in a forward pass.

    A layer is a group. Tied embeddings belong to the root, which is whole all along; others are groups of their own,
    of which one is whole at a time.
    """
    return precision.value * (UNSHARDED_LAYERS * shape.layer + shape.embedding)


def reduced_gradients(size: int, precision: Precision, *, shards: int) -> float:
    """Bytes for the gradients of a group of `size` parameters: copied to float32, then that one reduced to a shard.

    The group's whole weights are gone before, its gradients after the copy.
    """
    return size * max(precision.value + FLOAT32, FLOAT32 + FLOAT32 / shards)


def engine_weights(shape: ModelShape, *, value: int, tensor_parallel: int) -> float:
    """vLLM's copy of the model on one of its GPUs."""
    return value * shape.parameters / tensor_parallel


def engine_workspace(
    shape: ModelShape, *, value: int, batched_tokens: int, num_seqs: int, tensor_parallel: int
) -> float:
    """vLLM's activations of its largest batch, and the float32 logits of one token per episode, twice (sampling)."""
    activations = batched_tokens * value * (3 * shape.intermediate / tensor_parallel + 4 * shape.hidden)
    return activations + 2 * FLOAT32 * num_seqs * shape.vocab


def weight_bucket(config: Config, shape: ModelShape | None) -> float:
    """Bytes of the buffer of a weight sync. A GPU hands a larger weight over by itself; a CPU's must fit."""
    configured = config.hardware.weight_bucket_mb * 2**20
    if shape is None or config.hardware.platform != "cpu":
        return configured
    return max(configured, 2**20 * -(-largest_tensor(shape) // 2**20))


def largest_tensor(shape: ModelShape) -> int:
    """Bytes of the largest weight, which a weight sync gathers in float32."""
    return FLOAT32 * max(shape.embedding, shape.hidden * shape.intermediate)
