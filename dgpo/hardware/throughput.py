"""How long a stage takes, from bytes and operations: an estimate to plan with, no measurement (docs/hardware.md)."""

from __future__ import annotations

from dataclasses import dataclass

from dgpo.config.schema import Config
from dgpo.hardware.budget import VALUE_BYTES, Models, engine_share, find_gpu
from dgpo.hardware.known_gpus import Gpu
from dgpo.hardware.memory import FLOAT32, kv_bytes_per_token
from dgpo.hardware.shapes import ModelShape

# Assumed shares of the data sheet, and times that no data sheet names.
TRAIN_UTILISATION = 0.35  # share of the arithmetic
PREFILL_UTILISATION = 0.4
DECODE_UTILISATION = 0.6
BANDWIDTH_UTILISATION = 0.7
LINK_UTILISATION = 0.7
DECODE_OVERHEAD_S = 0.006  # vLLM's own work per decoding step
STEP_OVERHEAD_S = 3.0  # Ray, transfer of the batch, waking and putting the engine to sleep
SEARCH_S = 0.3
CPU_ADAM_BYTES = 30e9  # per second, of the optimiser step in host memory

# An episode, in the authors' setting.
GENERATED_TOKENS = 250
READ_TOKENS = 1500  # prompt and passages
SEARCHES = 1.5
LONGEST_EPISODE = 4.0  # what the longest of a batch writes and searches, times the average
TEACHER_EXACT_MATCH = 0.36  # share of the teacher's episodes that are kept (paper, table 2)
FAILED_SHARE = 0.65  # share of the student's episodes that a teacher with gate=failed scores
TRAINING_QUESTIONS = 169_615  # NQ and HotpotQA
TEST_QUESTIONS = 51_713


@dataclass(frozen=True)
class Episode:
    """Tokens of an average episode."""

    generated: float
    read: float

    @property
    def tokens(self) -> float:
        return self.generated + self.read


@dataclass(frozen=True)
class Throughput:
    """How long a stage takes, and why."""

    seconds: dict[str, float]  # by part, of one step (RL) or of the whole stage
    steps: int  # 1 where `seconds` is the whole stage
    episodes: int  # per step
    tokens_per_s: float  # generated, on all GPUs, while generating; 0 without generation

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_hours(self) -> float:
        return self.step_s * self.steps / 3600

    @property
    def episodes_per_hour(self) -> float:
        return self.episodes / self.step_s * 3600


def average_episode(config: Config) -> Episode:
    """The authors', within this configuration's limits."""
    limits = config.episode
    generated = min(GENERATED_TOKENS, limits.max_response_tokens / 3)
    read = min(READ_TOKENS, limits.max_prompt_tokens + limits.max_response_tokens / 2)
    return Episode(generated, read)


def decode_step_s(shape: ModelShape, gpu: Gpu, *, episodes: float, context: float, value: int, size: int) -> float:
    """One token of each of `episodes`: weights and caches are read once, or the arithmetic takes longer; plus vLLM."""
    read = value * shape.multiplied / size + episodes * context * kv_bytes_per_token(
        shape, value=value, tensor_parallel=size
    )
    operations = 2 * shape.multiplied * episodes / size
    return (
        max(read / (gpu.bandwidth * BANDWIDTH_UTILISATION), operations / (gpu.flops * DECODE_UTILISATION))
        + DECODE_OVERHEAD_S
    )


def generation_s(config: Config, gpu: Gpu, shape: ModelShape, *, episodes: int, alone: bool) -> float:
    """Episodes dealt out to the replicas, as many at once as the engine and its KV cache hold; the longest ends it."""
    hardware, engine = config.hardware, config.hardware.engine
    replicas = max(1, hardware.num_gpus // engine.tensor_parallel_size)
    average, own = average_episode(config), max(1.0, episodes / replicas)
    room = max(1.0, engine_share(config, shape, alone=alone).kv_tokens / average.tokens)
    at_once = min(own, engine.max_num_seqs, room)
    decode = decode_step_s(
        shape,
        gpu,
        episodes=at_once,
        context=average.tokens,
        value=VALUE_BYTES[engine.dtype],
        size=engine.tensor_parallel_size,
    )
    prefill = own * average.read * 2 * shape.multiplied / engine.tensor_parallel_size
    busy = own * average.generated / at_once * decode + prefill / (gpu.flops * PREFILL_UTILISATION)
    longest = LONGEST_EPISODE * (average.generated * decode + SEARCHES * SEARCH_S)
    return max(busy, longest)


def operations_per_token(shape: ModelShape, context: float) -> float:
    """Operations of a forward pass: two per parameter, and attention over half of the context on average."""
    return 2 * shape.multiplied + 2 * shape.layers * shape.query_size * context


def pass_s(config: Config, gpu: Gpu, shape: ModelShape, *, tokens: float, training: bool) -> float:
    """A pass over `tokens` (of all GPUs): arithmetic, or moving the weights, whichever takes longer, per micro-batch.

    Training is a forward pass and a backward pass of twice its arithmetic; checkpointing makes the forward pass again.
    """
    hardware = config.hardware
    per_gpu = tokens / hardware.num_gpus
    passes = (4 if hardware.gradient_checkpointing else 3) if training else 1
    utilisation = TRAIN_UTILISATION if training else PREFILL_UTILISATION
    compute = passes * per_gpu * operations_per_token(shape, average_episode(config).tokens)
    moved = max(1.0, per_gpu / config.micro_batch_tokens) * gather_s(config, gpu, shape, training=training)
    return max(compute / (gpu.flops * utilisation), moved)


def gather_s(config: Config, gpu: Gpu, shape: ModelShape, *, training: bool) -> float:
    """FSDP's traffic of one micro-batch: weights gathered (twice in training), gradients reduced in float32."""
    hardware = config.hardware
    shards = hardware.num_shards
    value = VALUE_BYTES[hardware.dtype]
    weights, gradients = value * shape.parameters * (2 if training else 1), FLOAT32 * shape.parameters * training
    link = (gpu.link if shards <= hardware.gpus_per_node else gpu.network) * LINK_UTILISATION
    seconds = (weights + gradients) * (shards - 1) / shards / link
    if training and hardware.num_gpus > shards:  # gradients of the shards, between copies of the model
        across = gpu.network if hardware.num_nodes > 1 else gpu.link
        seconds += 2 * FLOAT32 * shape.parameters / shards / (across * LINK_UTILISATION)
    return seconds


def offload_s(config: Config, gpu: Gpu, shape: ModelShape, *, training: bool) -> float:
    """Weights and optimiser to the GPU and back, once per pass over the batch, where they wait in host memory."""
    hardware = config.hardware
    if hardware.offload == "none":
        return 0.0
    own = shape.parameters / hardware.num_shards
    moved = 2 * FLOAT32 * own * (3 if training else 1) / gpu.host_link
    if hardware.offload == "full" and training:
        train = config.train
        mini_batches = train.batch_size * train.samples_per_question / train.mini_batch_size
        moved += mini_batches * 7 * FLOAT32 * own / CPU_ADAM_BYTES
    return moved


def rl_throughput(config: Config, models: Models) -> Throughput | None:
    """One step of RL, by part; None without a GPU to estimate for."""
    gpu = find_gpu(config.hardware)
    if gpu is None:
        return None
    student, train = models.student, config.train
    episodes = train.batch_size * train.samples_per_question
    average = average_episode(config)
    tokens = episodes * average.tokens
    generate = generation_s(config, gpu, student, episodes=episodes, alone=False)

    def forward(shape: ModelShape, share: float = 1.0) -> float:
        return pass_s(config, gpu, shape, tokens=tokens * share, training=False)

    def update() -> float:
        return pass_s(config, gpu, student, tokens=tokens, training=True) + offload_s(
            config, gpu, student, training=True
        )

    seconds = {"generate": generate, "score": forward(student) + offload_s(config, gpu, student, training=False)}
    if models.initial_policy:
        seconds["score"] += forward(student)
    if models.critic:
        seconds["score"] += forward(student) + offload_s(config, gpu, student, training=False)
    if models.teacher is not None:
        share = FAILED_SHARE if train.teacher_term.gate == "failed" else 1.0
        seconds["teacher"] = forward(models.teacher, share)
    if models.critic:
        seconds["update critic"] = update()
    seconds["update actor"] = update()
    moved = FLOAT32 * student.parameters
    seconds["sync weights"] = moved / (gpu.link * LINK_UTILISATION) + moved / gpu.bandwidth
    seconds["other"] = STEP_OVERHEAD_S
    return Throughput(seconds, train.num_steps, episodes, episodes * average.generated / generate)


def collect_throughput(config: Config, models: Models, *, questions: int | None = None) -> Throughput | None:
    """All episodes of the collection."""
    count = (questions or config.collect.max_questions or TRAINING_QUESTIONS) * config.collect.samples_per_question
    return _played(config, models.student, count)


def play_throughput(config: Config, models: Models, *, questions: int | None = None) -> Throughput | None:
    """All episodes of one checkpoint on the test sets."""
    return _played(config, models.student, (questions or TEST_QUESTIONS) * config.test.samples)


def _played(config: Config, shape: ModelShape, episodes: int) -> Throughput | None:
    gpu = find_gpu(config.hardware)
    if gpu is None:
        return None
    seconds = generation_s(config, gpu, shape, episodes=episodes, alone=True)
    return Throughput({"generate": seconds}, 1, episodes, episodes * average_episode(config).generated / seconds)


def distill_throughput(config: Config, models: Models, *, episodes: int | None = None) -> Throughput | None:
    """All steps of the cold start; the teacher runs on every token of it."""
    gpu = find_gpu(config.hardware)
    if gpu is None:
        return None
    hardware, settings = config.hardware, config.distill
    world = hardware.num_gpus
    collected = config.collect.max_questions or TRAINING_QUESTIONS
    kept = episodes or int(collected * config.collect.samples_per_question * TEACHER_EXACT_MATCH)
    played = settings.max_steps * settings.batch_size if settings.max_steps else kept * settings.epochs
    tokens = played * average_episode(config).tokens / world
    context = average_episode(config).tokens
    passes = 4 if hardware.gradient_checkpointing else 3
    seconds = {"student": passes * tokens * operations_per_token(models.student, context)}
    if models.teacher is not None:
        seconds["teacher"] = tokens * operations_per_token(models.teacher, context)
    rates = {"student": gpu.flops * TRAIN_UTILISATION, "teacher": gpu.flops * PREFILL_UTILISATION}
    return Throughput({name: flops / rates[name] for name, flops in seconds.items()}, 1, played, 0.0)
