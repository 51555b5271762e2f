"""A stage's memory as a table: bytes of each part in each phase, on one GPU; and what waits in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dgpo.config.methods import has_exact_teacher
from dgpo.config.schema import Config, HardwareConfig
from dgpo.hardware import memory
from dgpo.hardware.known_gpus import GIB, KNOWN_GPUS, Gpu
from dgpo.hardware.memory import ADAM, FLOAT32, Precision
from dgpo.hardware.shapes import ModelShape

# Code and tables of torch, Ray and vLLM in all processes of RL, where they share memory with the models: what a step of
# SmolLM2-135M took beyond the rest of its plan (scripts/bench/real_memory.py ppo, 14.0 GiB of 10.3).
LIBRARIES = 3.7 * GIB
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "sharding buffers",
    "teacher",
    "engine weights",
    "engine KV cache",
    "engine workspace",
    "weight sync",
    "retriever",
    "reserve",
)


@dataclass(frozen=True)
class Models:
    """Shapes of a stage's models; None: it has no such model."""

    student: ModelShape  # the one that is trained, or, where none is, the one that plays
    teacher: ModelShape | None = None  # frozen, beside the student
    critic: bool = False
    initial_policy: bool = False  # a frozen copy of the student


@dataclass
class Budget:
    """Bytes. `phases` holds a GPU's memory by phase and part; its fullest phase must fit into `capacity`."""

    phases: dict[str, dict[str, float]]
    capacity: float | None  # None: no limit is known
    place: str = "GPU"  # what the phases are of
    host: dict[str, float] = field(default_factory=dict)  # by what waits there, on one node
    host_capacity: float | None = None
    kv_tokens: float = 0.0  # room in one replica's KV cache
    kv_tokens_needed: int = 0  # by the longest episode

    @property
    def peak(self) -> tuple[str, float]:
        """The fullest phase, and its bytes."""
        totals = {name: sum(parts.values()) for name, parts in self.phases.items()}
        name = max(totals, key=lambda key: totals[key])
        return name, totals[name]

    @property
    def problem(self) -> str | None:
        """Why this does not fit, or None."""
        phase, peak = self.peak
        if self.capacity is not None and peak > self.capacity:
            return f"{phase} needs {peak / GIB:.1f} GiB per {self.place}, of {self.capacity / GIB:.1f}"
        if self.kv_tokens_needed and self.kv_tokens < self.kv_tokens_needed:
            room = f"has room for {max(0, int(self.kv_tokens))} tokens" if self.kv_tokens > 0 else "gets no room"
            return f"the engine's KV cache {room}, fewer than one episode's {self.kv_tokens_needed}"
        if self.host_capacity is not None and sum(self.host.values()) > self.host_capacity:
            needed = sum(self.host.values())
            return f"{needed / GIB:.0f} GiB of host memory per node, of {self.host_capacity / GIB:.0f}"
        return None


def rl_budget(config: Config, models: Models) -> Budget:
    """Memory of the RL stage: a GPU has a shard of everything, and the phases of a step take turns on it."""
    gpu, engine = _TrainingGpu(config, models), engine_share(config, models.student)
    phases = {"generate": gpu.states() | engine.awake}
    scored = [gpu.score(models.student, "actor")]
    if models.critic:
        scored.append(gpu.score(models.student, "critic"))
    phases["score"] = max(scored, key=lambda parts: sum(parts.values()))
    if models.teacher is not None and not gpu.exact:
        parts = gpu.score(models.teacher, None)
        frozen = sum(parts.pop(name) for name in ("sharding buffers", "activations", "logits"))
        phases["teacher"] = parts | {"teacher": frozen}
    if models.critic:
        phases["update critic"] = gpu.update("critic")
    phases["update actor"] = gpu.update("actor")
    bucket = memory.weight_bucket(config, models.student) + memory.largest_tensor(models.student)
    phases["sync weights"] = gpu.states() | {"engine weights": engine.weights, "weight sync": bucket}
    return _finish(config, phases, engine, _rl_host(config, models, gpu.trained))


class _TrainingGpu:
    """What RL's models take of one GPU while one of them is at work."""

    def __init__(self, config: Config, models: Models) -> None:
        hardware = self.hardware = config.hardware
        self.models = models
        self.shards = hardware.num_shards
        self.value = VALUE_BYTES[hardware.dtype]
        self.precision = Precision(self.value, self.value)
        self.tokens = config.micro_batch_tokens
        self.chunk = min(self.tokens, config.train.chunk_tokens)
        self.trained = {"actor": models.student.parameters} | (
            {"critic": models.student.critic} if models.critic else {}
        )
        self.exact = models.teacher is not None and has_exact_teacher(config)

    def states(self, *, using: str | None = None, training: bool = False) -> dict[str, float]:
        """Sharded weights, optimiser and gradients on the GPU while `using` is at work."""
        parts = {"weights": 0.0, "gradients": 0.0, "optimiser": 0.0}
        offload = self.hardware.offload
        for name, count in self.trained.items():
            if offload == "none" or (offload == "idle" and name == using):
                parts["weights"] += FLOAT32 * count / self.shards
                if offload == "none" or training:
                    parts["optimiser"] += ADAM * count / self.shards
                if training and name == using:
                    parts["gradients"] += FLOAT32 * count / self.shards
        return parts

    def gathered(self, shape: ModelShape) -> float:
        streamed = FLOAT32 * shape.layer / self.shards if self.hardware.offload == "full" else 0.0
        return memory.gathered_weights(shape, self.precision) + streamed

    def score(self, shape: ModelShape, owner: str | None) -> dict[str, float]:
        parts = self.states(using=owner) | {"sharding buffers": self.gathered(shape)}
        parts["activations"] = memory.forward_workspace(shape, self.tokens, self.precision)
        if owner != "critic":
            parts["logits"] = memory.logits(shape, self.chunk)
        return parts

    def update(self, name: str) -> dict[str, float]:
        """The fullest of an update's parts. They follow each other: backward, the logits are gone."""
        shape, precision, tokens = self.models.student, self.precision, self.tokens
        checkpointing = self.hardware.gradient_checkpointing
        saved = memory.saved_activations(shape, tokens, precision, checkpointing=checkpointing)
        workspace = memory.backward_workspace(shape, tokens, precision, checkpointing=checkpointing)
        buffers = self.gathered(shape) + memory.reduced_gradients(shape.layer, precision, shards=self.shards)
        # Tied embeddings are whole while the layers run backward, and an output matrix that they are has its gradient.
        if not shape.tied:
            buffers -= self.value * shape.embedding
        elif name == "actor":
            buffers += self.value * shape.embedding
        layers = {"activations": saved + workspace, "sharding buffers": buffers}
        embedding = {
            # An output matrix of its own is reduced before the layers, any embedding after them.
            "activations": saved if name == "actor" and not shape.tied else 0,
            "sharding buffers": memory.reduced_gradients(shape.embedding, precision, shards=self.shards),
        }
        loss, read = {"activations": saved, "sharding buffers": self.gathered(shape)}, {}
        if name == "actor":
            loss["logits"] = memory.logits(shape, self.chunk, exact=self.exact)
            # The output matrix's gradient is summed in float32, and then takes the weight's type.
            loss["sharding buffers"] += shape.embedding * (FLOAT32 + (self.value if self.value < FLOAT32 else 0))
            if self.exact and (teacher := self.models.teacher) is not None:
                loss["teacher"] = _teacher_states(teacher, precision, tokens)
                read["teacher"] = loss["teacher"] + memory.gathered_weights(teacher, precision)
                read["teacher"] += memory.forward_workspace(teacher, tokens, precision)
        parts = (read, loss, layers, embedding)
        return self.states(using=name, training=True) | max(parts, key=lambda each: sum(each.values()))


def _teacher_states(teacher: ModelShape, precision: Precision, tokens: int) -> float:
    """What the update keeps of a teacher that it read: hidden states, twice while they are picked, its whole output
    matrix, and, where that is the embedding, FSDP2's copy, which belongs to the root and stays."""
    matrices = 2 if teacher.tied else 1
    return precision.value * (2 * tokens * teacher.hidden + teacher.embedding * matrices)


def _rl_host(config: Config, models: Models, trained: Mapping[str, int]) -> dict[str, float]:
    """What one node's host memory holds: frozen models always, trained ones where they are offloaded."""
    hardware = config.hardware
    share = hardware.gpus_per_node / hardware.num_shards  # copies of a model per node
    value = VALUE_BYTES[hardware.dtype]
    host: dict[str, float] = {}
    if models.teacher is not None:
        host["teacher"] = value * models.teacher.parameters * share
    if models.initial_policy:
        host["initial policy"] = value * models.student.parameters * share
    if hardware.offload != "none":
        per_parameter = FLOAT32 + ADAM + (FLOAT32 if hardware.offload == "full" else 0)
        host |= {name: per_parameter * count * share for name, count in trained.items()}
    if hardware.platform == "cpu":  # where models are loaded, gradients and moments will stand, which take more
        return host | {"libraries of all processes": LIBRARIES}
    loading = _loading(config, models) - sum(host.values())
    return host | ({"loading": loading} if loading > 0 else {})


def _loading(config: Config, models: Models) -> float:
    """The most that loading takes, one model after the other, before there is an optimiser.

    With tied embeddings veRL reads a whole model in every process, otherwise in one per run.
    """
    ranks = config.hardware.gpus_per_node
    student = FLOAT32 * models.student.parameters
    offloaded = student if config.hardware.offload != "none" else 0.0
    teacher = VALUE_BYTES[config.hardware.dtype] * models.teacher.parameters if models.teacher else 0
    teacher_copies = ranks if models.teacher and models.teacher.tied else 1
    first = offloaded + teacher * (1 + teacher_copies)
    return max(first, 2 * offloaded + teacher + student * (ranks if models.student.tied else 1))


def distill_budget(config: Config, models: Models) -> Budget:
    """Memory of the cold start: Hugging Face's Trainer in autocast, the teacher whole on every GPU."""
    hardware, settings, shape = config.hardware, config.distill, models.student
    world = hardware.num_gpus
    shards = world if settings.sharding == "full" else 1
    value = VALUE_BYTES[hardware.dtype]
    precision = Precision(value, value if settings.sharding == "full" else FLOAT32)
    per_gpu = -(-settings.batch_size // world)
    tokens = min(settings.micro_batch_size or hardware.micro_batch_size, per_gpu) * config.episode.max_tokens
    checkpointing = hardware.gradient_checkpointing
    frozen = shape.parameters if settings.lora_rank else 0
    count = shape.adapters(settings.lora_rank) if settings.lora_rank else shape.parameters
    saved = memory.saved_activations(shape, tokens, precision, checkpointing=checkpointing)
    workspace = memory.backward_workspace(shape, tokens, precision, checkpointing=checkpointing)
    # The fused loss keeps the output matrix's gradient in float32, and that of the hidden states.
    loss = tokens * shape.hidden * precision.stream
    if not frozen:
        loss += FLOAT32 * shape.embedding
    chunk = 4 * settings.chunk_tokens * shape.vocab * FLOAT32
    parts = {
        "weights": FLOAT32 * count / shards + value * frozen,
        "gradients": FLOAT32 * count / shards,
        "optimiser": ADAM * count / shards,
        "activations": saved + max(workspace, loss),
        "logits": chunk,
    }
    if settings.sharding == "full":
        reduced = memory.reduced_gradients(shape.embedding, precision, shards=shards)
        parts["sharding buffers"] = memory.gathered_weights(shape, precision) + reduced
    else:
        # Autocast's copies of the weights, and, with several GPUs, the buckets that DDP reduces gradients in.
        copies = value * count if value < FLOAT32 else 0.0
        parts["sharding buffers"] = copies + (FLOAT32 * count if world > 1 else 0.0)
    if models.teacher is not None:
        forward = memory.forward_workspace(models.teacher, tokens, Precision(value, value))
        parts["teacher"] = value * models.teacher.parameters + forward + tokens * models.teacher.hidden * value
    phases = {"train": parts}
    engine = None
    if settings.loss == "distillm":
        engine = engine_share(config, shape)
        parts |= engine.awake
    return _finish(config, phases, engine, {})


def play_budget(config: Config, models: Models) -> Budget:
    """Memory where an engine has the GPU to itself: collect, test, arcap, ask."""
    engine = engine_share(config, models.student, alone=True)
    return _finish(config, {"generate": dict(engine.awake)}, engine, {})


@dataclass(frozen=True)
class EngineShare:
    """vLLM's part of a GPU."""

    weights: float
    awake: dict[str, float]
    kv_tokens: float  # room in one replica's KV cache


def engine_share(config: Config, shape: ModelShape, *, alone: bool = False) -> EngineShare:
    """It takes its share of the GPU: weights, workspace, and KV cache in what is left. `alone`: nothing is trained."""
    hardware, engine = config.hardware, config.hardware.engine
    value = VALUE_BYTES[engine.dtype]
    size = engine.tensor_parallel_size
    weights = memory.engine_weights(shape, value=value, tensor_parallel=size)
    workspace = memory.engine_workspace(
        shape,
        value=value,
        batched_tokens=max(engine.max_num_batched_tokens, config.episode.max_tokens),
        num_seqs=engine.max_num_seqs,
        tensor_parallel=size,
    )
    per_token = memory.kv_bytes_per_token(shape, value=value, tensor_parallel=size)
    gpu = find_gpu(hardware)
    if gpu is None:
        cache = float(hardware.env.get("VLLM_CPU_KVCACHE_SPACE", "4")) * GIB
    else:
        share = engine.gpu_memory_utilization_alone if alone else engine.gpu_memory_utilization
        cache = share * gpu.memory - weights - workspace
    awake = {"engine weights": weights, "engine workspace": workspace, "engine KV cache": max(0.0, cache)}
    return EngineShare(weights, awake, cache / per_token)


def find_gpu(hardware: HardwareConfig) -> Gpu | None:
    """The GPU to estimate for."""
    return KNOWN_GPUS[hardware.gpu] if hardware.gpu else None


def is_on_this_node(url: str) -> bool:
    """Whether a retriever's URL, the first of several, is that of the machine itself."""
    return urlsplit(url.split(",")[0]).hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0")


def _finish(
    config: Config,
    phases: dict[str, dict[str, float]],
    engine: EngineShare | None,
    host: dict[str, float],
) -> Budget:
    """Adds what every phase has (reserve, a retriever on the same GPU, an engine that does not sleep), and limits."""
    hardware, gpu = config.hardware, find_gpu(config.hardware)
    processes = 2 if engine and "generate" in phases and len(phases) > 1 else 1
    fixed = processes * memory.PROCESS
    if hardware.num_gpus > 1:
        fixed += memory.COMMUNICATION
    if engine is not None and not hardware.engine.enforce_eager:
        fixed += memory.CUDA_GRAPHS
    for parts in phases.values():
        if engine and not hardware.engine.sleep:
            parts |= engine.awake
        if config.retriever.gpu_memory_gb:
            parts["retriever"] = config.retriever.gpu_memory_gb * GIB
        if gpu is not None:
            torch_bytes = sum(size for name, size in parts.items() if not name.startswith(("engine", "retriever")))
            parts["reserve"] = fixed + memory.ALLOCATOR_SLACK * torch_bytes
    host_capacity = hardware.host_memory_gb * 1e9 if hardware.host_memory_gb else None
    if config.retriever.host_memory_gb and is_on_this_node(config.retriever.url) and engine:
        host["retriever"] = config.retriever.host_memory_gb * 1e9
    capacity = gpu.memory if gpu else None
    if hardware.platform == "cpu" and host_capacity is not None:  # ranks and what waits share one memory
        capacity = (host_capacity - sum(host.values())) / hardware.gpus_per_node
    return Budget(
        phases=phases,
        capacity=capacity,
        place="GPU" if gpu else "rank and its engine",
        host=host,
        host_capacity=host_capacity,
        kv_tokens=engine.kv_tokens if engine else 0.0,
        kv_tokens_needed=config.episode.max_tokens if engine else 0,
    )
