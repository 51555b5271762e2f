"""The memory estimates of dgpo/hardware against measurements on the CPU: equal, or within 15% of a measured peak.

    python -m pytest tests/unit/test_memory_estimates.py -m "slow or not slow" -rP   # with estimate, measured, ratio

Models of the Llama family, small enough to run, are measured with real tensors: what a forward pass keeps for its
backward pass (`saved_tensors_hooks`), and the most bytes of tensors that live at once in a training micro-batch with
FSDP2 on one rank, log-probs and entropies in chunks, and an AdamW step. The paper's models are counted on torch's meta
device, and their updates on 8 ranks with tensors that have sizes but no values (torch's FakeTensorMode, and its process
group of that kind): a model of any size, the very operations, no memory. KV-cache bytes are vLLM's own.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from dgpo.algorithms.chunked_head import ENTROPY, LOG_PROB, token_terms
from dgpo.config.load import load_config
from dgpo.config.schema import Config, TrainConfig
from dgpo.hardware.budget import Models, rl_budget
from dgpo.hardware.known_models import KNOWN_MODELS
from dgpo.hardware.memory import Precision, kv_bytes_per_token, saved_activations
from dgpo.hardware.shapes import ModelShape, shape_from_config

TOLERANCE = 1.15
VALUE_BYTES = {torch.float32: 4, torch.bfloat16: 2}


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes, or parameters."""

    what: str
    estimate: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.estimate / self.measured


class LiveBytes(TorchDispatchMode):
    """The most bytes of distinct tensor storages that live at once while this is on."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self, *tensors: Any) -> None:
        """Tensors that were there before."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                local = getattr(tensor, "_local_tensor", tensor)
                self._storages.add(local.untyped_storage())

    def now(self) -> int:
        """FSDP resizes storages in place, so sizes are read anew."""
        return sum({storage._cdata: storage.nbytes() for storage in self._storages}.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.watch(result)
        self.peak = max(self.peak, self.now())
        return result


def make_model(
    shape: ModelShape, *, kind: str, dtype: torch.dtype, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model with random weights."""
    settings = AutoConfig.for_model(
        kind,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        num_labels=1,
    )
    return auto.from_config(settings, dtype=dtype, attn_implementation="sdpa").train()


def small_shape(kind: str, *, tied: bool, vocab: int = 8000) -> ModelShape:
    """The proportions of the real ones."""
    return ModelShape(256, 4, 8, 2, 32, 1024, vocab, tied, qkv_bias=kind == "qwen2")


def parameters(names: Iterable[str] = tuple(KNOWN_MODELS)) -> Iterator[Row]:
    """The paper's models, and value models made from them, on the meta device."""
    for name in names:
        settings = KNOWN_MODELS[name]
        shape = shape_from_config(settings)
        assert shape is not None
        for role, auto, estimate in (
            ("", AutoModelForCausalLM, shape.parameters),
            (" as critic", AutoModelForTokenClassification, shape.critic),
        ):
            with torch.device("meta"):
                model = make_model(shape, kind=settings["model_type"], dtype=torch.bfloat16, auto=auto)
            yield Row(f"parameters of {name}{role}", estimate, sum(p.numel() for p in model.parameters()))


def activations(*, tokens: int = 512) -> Iterator[Row]:
    """What a forward pass keeps, logits apart."""
    for kind in ("llama", "qwen2"):
        for dtype in (torch.float32, torch.bfloat16):
            for checkpointing in (False, True):
                shape = small_shape(kind, tied=True, vocab=100)
                model = make_model(shape, kind=kind, dtype=dtype)
                if checkpointing:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                value = VALUE_BYTES[dtype]
                estimate = saved_activations(shape, tokens, Precision(value, value), checkpointing=checkpointing)
                name = f"activations, {kind}, {str(dtype).split('.')[1]}{', checkpointed' * checkpointing}"
                yield Row(name, estimate, saved_bytes(model, tokens))


def saved_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of distinct storages, weights apart, that autograd keeps after a forward pass."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def states() -> Iterator[Row]:
    """Weights, gradients and optimiser of a small model after a real AdamW step."""
    for kind in ("llama", "qwen2"):
        shape = small_shape(kind, tied=False)
        model = make_model(shape, kind=kind, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        yield Row(f"weights, {kind}", 4 * shape.parameters, _bytes(list(model.parameters())))
        yield Row(f"gradients, {kind}", 4 * shape.parameters, _bytes([p.grad for p in model.parameters()]))
        yield Row(f"optimiser, {kind}", 8 * shape.parameters, _bytes(moments))


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class MicroBatch:
    """A training micro-batch to measure."""

    kind: str
    dtype: str
    checkpointing: bool
    vocab: int
    tokens: int = 768

    @property
    def shape(self) -> ModelShape:
        return small_shape(self.kind, tied=True, vocab=self.vocab)

    def config(self) -> Config:
        config = load_config(["hardware=cpu", "train.algorithm=grpo", "train.samples_per_question=2"])
        config.hardware.dtype, config.hardware.max_tokens_per_gpu = self.dtype, self.tokens
        config.hardware.gradient_checkpointing, config.hardware.remove_padding = self.checkpointing, True
        config.hardware.engine.sleep = True
        return config

    def estimate(self) -> float:
        parts = rl_budget(self.config(), Models(self.shape)).phases["update actor"]
        return sum(parts.values())


MICRO_BATCHES = (
    MicroBatch("qwen2", "bfloat16", checkpointing=True, vocab=8000),
    MicroBatch("llama", "bfloat16", checkpointing=True, vocab=500),
    MicroBatch("llama", "bfloat16", checkpointing=False, vocab=8000),
    MicroBatch("qwen2", "float32", checkpointing=True, vocab=8000),
    MicroBatch("qwen2", "float32", checkpointing=False, vocab=500),
)


def training() -> Iterator[Row]:
    """Peak of an update of the actor, on one rank."""
    with process_group():
        for batch in MICRO_BATCHES:
            name = f"update, {batch.kind}, {batch.dtype}{', checkpointed' * batch.checkpointing}, V={batch.vocab}"
            yield Row(name, batch.estimate(), training_peak(batch))


class process_group:
    """torch.distributed with one rank."""

    def __enter__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{self._folder.name}/store", rank=0, world_size=1
        )

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()
        self._folder.cleanup()


def training_peak(batch: MicroBatch) -> int:
    """The most bytes of live tensors: FSDP2 as veRL applies it, log-probs and entropies, backward, AdamW.

    Of the second step, in which the moments exist already, with two micro-batches, of which one finds gradients.
    """
    from torch.distributed.device_mesh import init_device_mesh

    model = make_model(batch.shape, kind=batch.kind, dtype=torch.float32)
    if batch.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dtype = getattr(torch, batch.dtype)
    ids = torch.randint(0, batch.vocab, (1, batch.tokens))
    read_in_chunks(model, ids.roll(-1, 1)[0])
    shard(model, init_device_mesh("cpu", (1,)), dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def micro_batch() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = policy_loss(model(input_ids=ids, use_cache=False).logits)
        loss.backward()

    def step() -> None:
        micro_batch()
        micro_batch()
        optimizer.step()
        optimizer.zero_grad()

    step()
    live = LiveBytes()
    live.watch(list(model.parameters()), [list(state.values()) for state in optimizer.state.values()])
    with live:
        step()
    return live.peak


def shard(model: PreTrainedModel, mesh: Any, dtype: torch.dtype) -> None:
    """FSDP2 as veRL applies it (utils/fsdp_utils.py): layers, untied embeddings and output matrix, and the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=True),
        "reshard_after_forward": True,
    }
    groups = list(model.model.layers)
    if not model.config.tie_word_embeddings:
        groups += [module for name, module in model.named_modules() if name.endswith(("embed_tokens", "lm_head"))]
    for module in [*groups, model]:
        fully_shard(module, **settings)


def read_in_chunks(model: PreTrainedModel, targets: torch.Tensor) -> None:
    """The output layer as `dgpo.platforms.token_engine` has it, of all tokens."""
    head = model.get_output_embeddings()

    def terms(hidden: torch.Tensor) -> torch.Tensor:
        chunk = TrainConfig().chunk_tokens
        return token_terms(hidden[0], head=head.weight, targets=targets, temperature=1.0, chunk_size=chunk)

    head.forward = terms


def policy_loss(terms: torch.Tensor) -> torch.Tensor:
    return -terms[:, LOG_PROB].mean() - 0.001 * terms[:, ENTROPY].mean()


@dataclass(frozen=True)
class ShardedUpdate:
    """An update of a paper's model on 8 GPUs, checkpointed, in bfloat16."""

    name: str
    role: str  # actor | critic
    tokens: int = 4096
    ranks: int = 8

    def estimate(self) -> float:
        config = load_config(["hardware=cpu", "hardware.gradient_checkpointing=true", "hardware.engine.sleep=true"])
        config.hardware.dtype, config.hardware.max_tokens_per_gpu = "bfloat16", self.tokens
        config.hardware.gpus_per_node = self.ranks
        parts = rl_budget(config, Models(_shape(self.name), critic=self.role == "critic")).phases[f"update {self.role}"]
        if self.role == "critic":  # the actor's states beside it were not there
            others = _shape(self.name).parameters / self.ranks
            return sum(parts.values()) - 12 * others
        return sum(parts.values())

    def measure(self, mesh: Any) -> int:
        """The most bytes of live tensors of one rank in two micro-batches; the optimiser's step is left out."""
        from torch._subclasses import FakeTensorMode

        auto = AutoModelForCausalLM if self.role == "actor" else AutoModelForTokenClassification
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = make_model(_shape(self.name), kind="qwen2", dtype=torch.float32, auto=auto)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            ids, positions = torch.zeros(1, self.tokens, dtype=torch.int64), torch.arange(self.tokens)[None]
            if self.role == "actor":
                read_in_chunks(model, ids[0])
            shard(model, mesh, torch.bfloat16)
            moments = [torch.zeros_like(p._local_tensor) for p in model.parameters() for _ in range(2)]
            live = LiveBytes()
            live.watch(list(model.parameters()), moments)
            with live:
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16):
                        # Without a mask, as packed sequences go to flash attention.
                        output = model(input_ids=ids, position_ids=positions, attention_mask={"full_attention": None})
                        loss = policy_loss(output.logits) if self.role == "actor" else output.logits.mean()
                    del output
                    loss.backward()
        return live.peak


def _shape(name: str) -> ModelShape:
    shape = shape_from_config(KNOWN_MODELS[name])
    assert shape is not None
    return shape


SHARDED_UPDATES = (
    ShardedUpdate("qwen2.5-0.5b", "actor"),
    ShardedUpdate("qwen2.5-0.5b", "critic"),
    ShardedUpdate("qwen2.5-3b", "critic"),
    ShardedUpdate("qwen2.5-7b", "critic"),
)


def sharded() -> Iterator[Row]:
    """Peak of an update of the paper's models, on one of 8 ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (8,))
    for update in SHARDED_UPDATES:
        yield Row(f"update {update.role}, {update.name}, 8 ranks", update.estimate(), update.measure(mesh))
    torch.distributed.destroy_process_group()


def kv_cache() -> Iterator[Row]:
    """Bytes per token of the paper's models, by vLLM."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for name, settings in KNOWN_MODELS.items():
        shape = shape_from_config(settings)
        assert shape is not None
        spec = FullAttentionSpec(
            block_size=16, num_kv_heads=shape.kv_heads, head_size=shape.head_dim, dtype=torch.bfloat16
        )
        measured = spec.page_size_bytes * shape.layers / spec.block_size
        yield Row(f"KV cache per token, {name}", kv_bytes_per_token(shape, value=2), measured)


def show(rows: Iterable[Row]) -> list[Row]:
    """The rows, which are printed as they come."""
    shown = []
    for row in rows:
        print(f"{row.what:44} {row.estimate:16,.0f} {row.measured:16,.0f} {row.ratio:6.3f}", flush=True)
        shown.append(row)
    return shown


def test_weights_gradients_and_optimiser_are_those_of_a_real_step():
    assert all(row.estimate == row.measured for row in show(states()))


@pytest.mark.parametrize("tokens", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_saved_activations_are_those_of_a_real_forward_pass(tokens):
    rows = show(activations(tokens=tokens))
    assert len(rows) == 8
    assert all(row.estimate == row.measured for row in rows), rows


@pytest.mark.parametrize(
    "names", [("qwen2.5-0.5b", "llama-3.1-8b"), pytest.param(tuple(KNOWN_MODELS), marks=pytest.mark.slow)]
)
def test_parameters_are_those_of_the_real_models(names):
    rows = show(parameters(names))
    assert len(rows) == 2 * len(names)
    assert all(row.estimate == row.measured for row in rows), rows


@pytest.mark.slow
def test_a_token_takes_as_much_of_the_kv_cache_as_vllm_says():
    assert all(row.estimate == row.measured for row in show(kv_cache()))


@pytest.mark.slow
@pytest.mark.parametrize("measure", [training, sharded])
def test_the_peak_of_an_update_is_estimated_within_15_percent(measure):
    assert all(1 / TOLERANCE < row.ratio < TOLERANCE for row in show(measure()))
