"""The typed configuration of every command. Each default lives here; `configs/` states only differences.

One tree serves all commands: a stage reads the sections that it needs, so that one `world=` or `hardware=` choice
means the same thing to collection, distillation, training and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    path: str | None = None  # a Hugging Face folder or hub name
    trust_remote_code: bool = False  # run code that the model's repository brings; only for models that you trust


@dataclass
class TeacherConfig(ModelConfig):
    init: str | None = None  # the model that `experiment=teacher_ppo` makes the teacher from
    # An OpenAI-compatible server (`/v1/completions`) that plays `collect`, for distill.loss=seqkd. Its episodes are
    # written in the tokens of student.path; teacher.path, where it is set, gives the prompt's chat template
    url: str | None = None
    url_model: str | None = None  # the name that requests carry; None: the first that the server lists
    url_ids: bool = False  # the server takes and returns token ids of teacher.path's tokenizer, as vLLM's can
    url_key_file: str | None = None  # holds the bearer token
    url_concurrency: int = 16  # episodes in flight
    url_max_retries: int = 5  # how often a turn is asked for again
    url_timeout_s: float = 300.0  # how long a request may take


@dataclass
class DataConfig:
    collect_file: str | None = None  # parquet: questions on which the teacher demonstrates
    train_file: str | None = None  # parquet: questions for RL
    validation_file: str | None = None  # parquet: scored during RL every `train.validate_every` steps
    test_files: dict[str, str] = field(default_factory=dict)  # name of the set -> parquet


@dataclass
class HubFilesConfig:
    """Files of a data set on the Hugging Face hub; `repo` may be a mirror of yours."""

    repo: str = ""  # the data set's name on the hub
    revision: str = "main"  # branch, tag or commit; download.json records the commit
    files: list[str] = field(default_factory=list)  # what is fetched of it
    joined: str | None = None  # the files, one after the other, are one file of this name


@dataclass
class DownloadConfig:
    what: list[str] = field(
        default_factory=lambda: ["corpus", "index", "train"]
    )  # and benchmarks, nq_annotations, models
    folder: str = "data"  # each goes to a folder of its name below
    endpoint: str | None = None  # a mirror's address; None: HF_ENDPOINT, else the hub
    # Fetched by `models` into the hub's cache (HF_HOME), besides student and teacher: the retriever's encoder
    models: list[str] = field(default_factory=lambda: ["intfloat/e5-base-v2"])
    verify: bool = False  # read again what is there already, and compare its checksums
    pinned: bool = True  # the test sets are refused where they are not the bytes that the published sizes are of
    corpus: HubFilesConfig = field(
        default_factory=lambda: HubFilesConfig("PeterJinGo/wiki-18-corpus", files=["wiki-18.jsonl.gz"])
    )
    index: HubFilesConfig = field(
        default_factory=lambda: HubFilesConfig(
            "PeterJinGo/wiki-18-e5-index", files=["part_aa", "part_ab"], joined="e5_Flat.index"
        )
    )
    train: HubFilesConfig = field(
        default_factory=lambda: HubFilesConfig("PeterJinGo/nq_hotpotqa_train", files=["train.parquet"])
    )
    benchmarks: HubFilesConfig = field(
        default_factory=lambda: HubFilesConfig(
            "RUC-NLPIR/FlashRAG_datasets",
            files=[
                "nq/train.jsonl",
                "nq/test.jsonl",
                "triviaqa/test.jsonl",
                "popqa/test.jsonl",
                "hotpotqa/train.jsonl",
                "hotpotqa/dev.jsonl",
                "2wikimultihopqa/dev.jsonl",
                "musique/dev.jsonl",
                "bamboogle/test.jsonl",
            ],
        )
    )
    # NQ's dev set with long answers, simplified (prepare.nq_annotations reads it)
    nq_annotations: str = "https://storage.googleapis.com/natural_questions/v1.0-simplified/nq-dev-all.jsonl.gz"


@dataclass
class PrepareConfig:
    """Question files and corpora (docs/data.md): the paper's sets, or, with `source` or `documents`, your own."""

    out: str = "data/prepared"  # the folder to write
    overwrite: bool = False  # replace what an earlier `prepare` wrote there
    benchmarks: str = "data/benchmarks"  # what download.what=[benchmarks] wrote: <set>/<split>.jsonl
    # which of the paper's sets become test files
    test_sets: list[str] = field(
        default_factory=lambda: ["nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"]
    )
    # whose training questions make train.parquet
    train_sets: list[str] = field(default_factory=lambda: ["nq", "hotpotqa"])
    allow_other_sizes: bool = False  # accept sets whose sizes are not the published ones
    nq_annotations: str | None = None  # NQ's own jsonl, jsonl.gz, or a folder of them: the long answers
    source: str | None = None  # jsonl of your questions and answers
    name: str = "own"  # the data_source that those questions get
    test_share: float = 0.1  # share of them that is tested on, drawn by seed, where a line names no split
    documents: str | None = None  # a folder of .txt and .md files, or a jsonl: becomes corpus.jsonl
    passage_words: int = 100  # longer documents are cut
    passage_overlap: int = 0  # words that a passage repeats of the one before
    # Training questions drawn by seed and taken out (at most a tenth): what `train` validates on
    validation_questions: int = 1000
    max_bad_lines: int = 0  # more stop the command; up to here they are named, left out and counted
    drop_overlap: bool = False  # training questions that also stand in a test set


@dataclass
class ContaminationConfig:
    ngram: int = 8  # words of one n-gram
    min_share: float = 0.5  # a training question with this share of a test question's n-grams is a near duplicate


@dataclass
class EpisodeConfig:
    """Rules of one episode; lengths in tokens of the policy's tokenizer."""

    max_turns: int = 4  # turns that may search; one last turn without search follows
    max_turn_tokens: int = 500  # what the policy may write in one turn
    max_prompt_tokens: int = 2048  # a longer one is refused before anything starts
    max_response_tokens: int = 4096  # all turns and all observations of the episode
    min_turn_tokens: int = 32  # an observation that leaves less than this for the next turn is not appended
    topk: int = 3  # passages that a search returns
    max_passage_tokens: int = 160  # each passage is cut to this
    max_query_chars: int = 1000  # E5 reads 256 tokens; longer queries are cut and counted

    @property
    def max_tokens(self) -> int:
        """The length of the longest episode, prompt and response."""
        return self.max_prompt_tokens + self.max_response_tokens


@dataclass
class RetrieverConfig:
    url: str = "http://127.0.0.1:8000"  # or several that serve the same, separated by commas
    token_file: str | None = None  # holds the servers' bearer token
    timeout_s: float = 30.0  # how long one request may take
    max_retries: int = 4  # further attempts at a search that a server refuses or leaves unanswered
    max_outage_s: float = 300.0  # how long searches wait for servers that are gone to come back
    max_concurrency: int = 64  # requests in flight, of each process that plays episodes
    max_queries_per_request: int = 64  # searches that wait at the same time share requests
    max_failed_share: float = 0.05  # a step with a larger share of failed episodes stops the run, resumable
    # What a server on our own machine holds, for dry runs: 65 for a flat index of Wikipedia. None: not counted.
    host_memory_gb: float | None = None
    gpu_memory_gb: float = 0.0  # what that server takes of each of our GPUs, for dry runs
    backend: str | None = None  # "package.module:Class", a search of your own instead of the server (docs/extending.md)
    backend_options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of that class


@dataclass
class EngineConfig:
    """vLLM, as used by rollouts, collection and evaluation."""

    dtype: str = "bfloat16"  # type of weights and activations
    enforce_eager: bool = False  # no CUDA graphs: a shorter start, slower steps
    tensor_parallel_size: int = 1  # GPUs of one node that hold one replica
    gpu_memory_utilization: float = 0.5  # share of a GPU for weights and KV cache, beside models that are trained
    gpu_memory_utilization_alone: float = 0.9  # that share where nothing is trained: collect, test, arcap, ask
    max_num_seqs: int = 256  # episodes that decode at once
    max_num_batched_tokens: int = 8192  # tokens of one step of the engine
    chunked_prefill: bool = True  # long prompts are computed in parts, beside the episodes that decode
    concurrency: int = 512  # episodes in flight per engine
    turn_timeout_s: float = 3600.0  # outside RL: a turn that takes longer means that the engine hangs
    worker_extension: str | None = None  # vLLM's setting: a class that its workers inherit from
    sleep: bool = True  # gives its GPU memory back while models are trained
    # The model runs in the process of vLLM's scheduler, which begins as a copy of the one that starts it and so imports
    # nothing again; one GPU per replica
    in_process: bool = False
    shutdown_timeout_s: float = 20.0  # after SIGTERM, before SIGKILL: GPU workers free memory and communicators


@dataclass
class HardwareConfig:
    """Everything that differs between a laptop and a cluster."""

    platform: str = "cuda"  # cuda | cpu
    gpu: str | None = "h200"  # a name in dgpo/hardware/known_gpus.py; None: no GPU to estimate for
    num_nodes: int = 1  # machines of the run
    gpus_per_node: int = 8  # GPUs of each machine
    host_memory_gb: float | None = 2000.0  # main memory of a node; None: unknown
    dtype: str = "bfloat16"  # type of parameters in the forward pass; the optimiser always keeps float32
    attention: str = "flash_attention_2"  # transformers' name: flash_attention_2 | sdpa | eager
    remove_padding: bool = True  # sequence packing
    # activations are computed again in the backward pass: less memory, a third more work
    gradient_checkpointing: bool = True
    micro_batch_size: int = 8  # sequences per GPU and forward, in distill, and in RL without max_tokens_per_gpu
    max_tokens_per_gpu: int | None = 16384  # RL: tokens per GPU and forward, packed from whole episodes
    fsdp_size: int | None = None  # GPUs over which RL's weights and optimiser are sharded; None: all
    # Where RL's weights and optimiser live: none (on the GPU) | idle (in host memory while their model waits) | full
    # (always in host memory, a layer at a time on the GPU; the CPU makes the optimiser step)
    offload: str = "none"
    ulysses_size: int = 1  # GPUs that share one sequence in RL
    weight_bucket_mb: int = 2048  # buffer through which new weights reach the engine
    num_agent_workers: int = 8  # Ray processes per node that run episode loops
    num_storage_units: int = 8  # Ray processes that hold the episodes of a step, over all nodes
    logical_cpus: int | None = None  # CPUs announced to Ray; None: Ray counts them
    logical_gpus: int | None = None  # GPUs announced to Ray; None: Ray counts them
    object_store_gb: float | None = None  # Ray's shared memory on a node; None: 30% of its memory
    replay_poll_s: float = 0.05  # how often the trainer looks for finished episodes
    # Exported before any engine is imported. vLLM would take its V2 model runner for Llama and V1 for Qwen2, whose
    # samplers and speed differ; V1 serves all models, on both platforms (V2 needs Triton), and is what the tests run.
    env: dict[str, str] = field(default_factory=lambda: {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    verl: dict[str, Any] = field(default_factory=dict)  # raw veRL keys ("a.b.c": value), laid over everything else
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes; the number of ranks, where there are no GPUs."""
        return self.num_nodes * self.gpus_per_node

    @property
    def num_shards(self) -> int:
        """GPUs that hold one copy of a model that RL trains."""
        return min(self.fsdp_size or self.num_gpus, self.num_gpus)


@dataclass
class CollectConfig:
    """Phase 1a: episodes of the teacher, or demonstrations from elsewhere."""

    # teacher | oracle (scripted, from golds and what the retriever returns) | transcripts (data.collect_file is then a
    # jsonl of other people's episodes as text). Also `collect.from` on the command line
    source: str = "teacher"
    max_questions: int | None = None  # the first so many; None: all
    samples_per_question: int = 1  # episodes of each question
    temperature: float = 1.0  # the teacher's, in sampling


@dataclass
class TaidConfig:
    """TAID's target: the teacher's share of its logits rises from `t_start` to `t_end` (paper's values)."""

    t_start: float = 0.4  # where the interpolation between student (0) and teacher (1) begins
    t_end: float = 1.0  # where it ends
    alpha: float = 5e-4  # size of the adaptive increments
    momentum: float = 0.99  # weight of the past in the average of the loss's relative change


@dataclass
class StudentEpisodesConfig:
    """DistiLLM's use of student-generated episodes (dgpo/coldstart/replay.py; defaults of the authors' release)."""

    initial_threshold: float = 0.0  # share of steps that train on the student's own episodes
    increment: float = 0.1  # added to the threshold whenever the held-out loss rises
    min_rise: float = 0.1  # nats; a smaller rise does not count
    watched: str = "cross_entropy"  # the held-out loss that is meant: cross_entropy | loss (the one that is trained)
    # Whether the level that a rise is measured from follows the held-out loss down; else it moves with the threshold
    # only, from the loss before training, which a student that starts untrained never reaches again.
    level_follows_down: bool = True
    buffer_size: int = 1000  # episodes kept for training more than once
    temperature: float = 1.0  # the student's, in sampling


@dataclass
class DistillConfig:
    """Phase 1b: the student learns the teacher's correct episodes (paper: 5 epochs, batch 64, lr 1e-4, r = 1)."""

    init: str | None = None  # what the student starts from; None: what `stages` says, else student.path
    episodes: str | None = None  # folder of a finished collection; None: the run's own
    # kd | seqkd | distillm | taid | forward_kl | reverse_kl | jsd | skew_kl | skew_reverse_kl
    loss: str = "kd"
    # What is learned of each episode: agent (all) | rag (its last retrieval and turn) | closed_book (its last turn);
    # the latter two under prompts of their own (dgpo/agent/modes.py)
    demonstrations: str = "agent"
    kl_ratio: float = 1.0  # r in L = (1 - r) CE + r D(teacher, student)
    skew: float = 0.1  # lambda of the skew KLs and of distillm
    jsd_beta: float = 0.5  # the teacher's share in jsd
    taid: TaidConfig = field(default_factory=TaidConfig)
    student_episodes: StudentEpisodesConfig = field(default_factory=StudentEpisodesConfig)  # for loss=distillm
    epochs: int = 5  # passes over the kept episodes
    max_steps: int | None = None  # instead of epochs
    batch_size: int = 64  # episodes per step, over all GPUs
    micro_batch_size: int | None = None  # episodes per GPU and forward; None: hardware.micro_batch_size
    learning_rate: float = 1e-4  # at its highest
    warmup_ratio: float = 0.1  # share of all steps
    min_learning_rate_share: float = 0.05  # what its cosine ends at, as a share of the learning rate
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # AdamW's
    weight_decay: float = 0.0  # AdamW's; biases and norms have none
    chunk_tokens: int = 128  # policy tokens whose full-vocabulary logits exist at once
    # Rank of LoRA adapters, which are trained in place of all weights and merged at the end; None: no adapters. They
    # want about ten times the learning rate.
    lora_rank: int | None = None
    sharding: str = "none"  # how the student lies on the GPUs: none (a copy each, DDP) | full (in shards, FSDP2)
    held_out_share: float = 0.02  # share of the questions that the loss is watched on
    evaluate_every: int | None = None  # steps between held-out losses, each with a checkpoint
    evaluations_per_epoch: int = 1  # where evaluate_every is None
    # Evaluations without a better held-out loss that end the training; None: never. The best model is kept. Not for
    # distillm, which answers a rising loss by itself.
    patience: int | None = 3


@dataclass
class TeacherTermConfig:
    # reward (the paper: sampled k1 inside the reward, before GAE) | token (sampled, on each token's own advantage) |
    # exact (full-vocabulary reverse KL, as a loss)
    form: str = "reward"
    gate: str = "failed"  # failed | all | none | random: the episodes to which the term applies
    coef: float | None = None  # None: the default of the form
    num_monitored: int = 8  # correct, and failed, episodes per step that the teacher scores for monitoring only


@dataclass
class StabilityConfig:
    """The collapse detector (docs/stability.md): a rule that is broken for `patience` steps in a row raises an alarm.

    The thresholds leave room for what healthy runs do; a run of your own may allow tighter ones.
    """

    action: str = "warn"  # warn | stop | rollback
    measure_init_kl: bool = False  # KL to the initial policy without a penalty; init_kl_coef > 0 measures it anyway
    patience: int = 3  # steps in a row that break a rule before it alarms
    window: int = 5  # steps in an early value, and in the moving averages of exact match and answer rate
    min_entropy: float = 0.01  # nats per policy token
    max_entropy_ratio: float = 3.0  # entropy over its early value
    min_em_share: float = 0.5  # moving average of exact match over its best
    min_answered_share: float = 0.7  # moving average of the answer rate over its best
    max_repeated_token_share: float = 0.5  # share of a step's policy tokens
    max_truncated_turn_share: float = 0.5  # share of a step's turns
    max_response_fill: float = 0.9  # mean length over episode.max_response_tokens
    max_kl: float = 2.0  # nats per policy token, to the initial policy; to the teacher also
    max_kl_ratio: float = 4.0  # KL over its early value
    max_grad_norm_ratio: float = 10.0  # gradient norm over its median so far
    max_rollbacks: int = 2  # a run that needs more stops
    rollback_learning_rate_scale: float = 0.5  # multiplies the actor's learning rate at every rollback


@dataclass
class PhaseLimitsConfig:
    """The longest that each part of RL may take; then something hangs and the run stops (docs/faults.md)."""

    start_s: float = 3600.0  # models, engines, loading a checkpoint
    rollout_s: float = 7200.0  # the episodes of a step; more than retriever.max_outage_s
    update_s: float = 7200.0  # scoring and both updates of a step
    sync_s: float = 900.0  # new weights into the engines
    save_s: float = 3600.0  # writing a checkpoint
    validate_s: float = 14400.0  # playing data.validation_file


@dataclass
class TrainConfig:
    """Phase 2: PPO with the gated teacher (paper: 1000 steps of 512 questions, mini-batch 256)."""

    init: str | None = None  # the checkpoint to start from; None: what `stages` says, else student.path
    algorithm: str = "ppo"  # ppo (GAE, critic) | grpo (group-relative, no critic) | gkd (the teacher term alone)
    num_steps: int = 1000  # steps of RL; no learning rate depends on their number
    batch_size: int = 512  # questions of a step
    mini_batch_size: int = 256  # episodes of an update: a step makes batch_size * samples_per_question / this of them
    samples_per_question: int = 1  # episodes of each question of a step: GRPO's group
    temperature: float = 1.0  # the policy's, in sampling and in every log-prob
    actor_learning_rate: float = 1e-6  # after the warm-up
    actor_warmup_steps: int = 285  # linear from 0, then constant; the same however many steps are asked for
    critic_learning_rate: float = 1e-5  # after the warm-up
    critic_warmup_steps: int = 15  # linear from 0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW's, of actor and critic
    weight_decay: float = 0.0  # AdamW's, of actor and critic
    max_grad_norm: float = 1.0  # gradients are scaled down to it
    clip_ratio: float = 0.2  # PPO's epsilon
    dual_clip: float | None = 3.0  # cap of the ratio where the advantage is negative (arXiv 1912.09729); None: no cap
    value_clip: float = 0.5  # how far a value may move from the old one in an update
    entropy_coef: float = 0.001  # coefficient of the entropy bonus
    gamma: float = 1.0  # discount of rewards
    gae_lambda: float = 1.0  # GAE's lambda
    init_kl_coef: float = 0.0  # coefficient of the KL penalty to the frozen initial policy (Search-R1: 0.001)
    # reward (Search-R1's PPO: sampled k1, in each token's reward) | loss (its GRPO: the low-variance k3, as a loss)
    init_kl_form: str = "reward"
    reward: str | None = None  # "package.module:function" instead of exact match (docs/extending.md)
    teacher_term: TeacherTermConfig = field(default_factory=TeacherTermConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    limits: PhaseLimitsConfig = field(default_factory=PhaseLimitsConfig)
    max_restarts: int = 2  # after a process of the run died or hung; each goes on from the last checkpoint
    save_every: int = 50  # the last step is saved in any case; 0: it alone
    keep_last: int = 2  # checkpoints that are kept
    keep_best: int = 1  # checkpoints besides, by exact match on data.validation_file; validated steps are saved then
    # Steps whose checkpoints are kept besides, each as train/models/step_N. A later stage, as in the inverted order,
    # starts from the last of them instead of the last step.
    keep_steps: list[int] = field(default_factory=list)
    validate_every: int = 200  # steps between validations
    log_episodes_every: int | None = 20  # steps between samples for train/episodes (docs/report.md); None: never
    num_logged_episodes: int = 8  # in a sample
    # The rollout's own log-probs as the old ones, in steps where a sample of episodes differs from the trainer's by at
    # most this much (nats) on every token; in others, and with None, the trainer computes all (docs/performance.md)
    reuse_log_probs_within: float | None = None
    # A seed of its own for every turn. None: on CPUs only, where it makes a run repeatable; on GPUs the numbers of an
    # engine depend on what else is in a batch, and each seed costs a kernel per token (docs/hardware.md)
    request_seeds: bool | None = None
    chunk_tokens: int = 256  # policy tokens whose full-vocabulary logits exist at once
    generation_concurrency: int | None = None  # episodes in flight; 1 makes a CPU run repeatable to the last bit
    loggers: list[str] = field(default_factory=lambda: ["console"])  # veRL's names; metrics.jsonl is always written
    timeline: bool = False  # train/timeline.jsonl: when each part of every step and episode was (docs/performance.md)


@dataclass
class TestConfig:
    """Evaluation of checkpoints on held-out questions (docs/evaluation.md); `arcap` reads it too."""

    __test__ = False  # not a pytest class

    models: dict[str, str] = field(default_factory=dict)  # name in the table -> checkpoint
    modes: dict[str, str] = field(default_factory=dict)  # name in the table -> agent (else) | rag | closed_book
    sets: list[str] | None = None  # some of data.test_files; None: all of them
    max_questions: int | None = None  # per set
    temperature: float | None = None  # None: 0 (greedy); 1 with several samples or compat=upstream
    samples: int = 1  # episodes of each question
    baseline: str | None = None  # the model against which paired differences are shown
    compat: str = "none"  # none | upstream: the protocol of the authors' release, faults included
    upstream_batch_size: int = 256  # for compat=upstream; the last batch is dropped when it is not full
    loggers: list[str] = field(default_factory=lambda: ["console"])  # console | tensorboard | wandb


@dataclass
class AskConfig:
    """`ask`: a checkpoint answers a question, and shows how."""

    model: str | None = None  # a checkpoint; None with world=tiny: the latest quickstart's
    temperature: float = 0.0  # 0: greedy
    mode: str = "agent"  # agent | rag | closed_book, as in test.modes
    prompt: str | None = None  # a template with {question}; None: Search-R1's, which the checkpoints were trained on
    corpus: str | None = None  # the retrieval server's named corpus; None: its default
    web: bool = False  # a page on this machine instead of the terminal
    port: int = 8765  # where that page is


@dataclass
class ExportConfig:
    """`export`: the run's model as a Hugging Face folder with a card (docs/checkpoints.md)."""

    out: str | None = None  # the folder to write
    stage: str | None = None  # distill | train; None: the last that left a model
    dtype: str | None = None  # type of the weights: float32 | bfloat16 | float16; None: as they were trained
    push: str | None = None  # user/name of a repository on the hub
    endpoint: str | None = None  # the hub's address; None: HF_ENDPOINT, or huggingface.co
    private: bool = False  # a new repository


@dataclass
class ReportConfig:
    """`report.html` of a run."""

    runs: list[str] = field(default_factory=list)  # run folders whose curves and test results stand beside this run's


@dataclass
class DryRunConfig:
    """`dry_run=true`: check everything, print placement, memory and time, start nothing. Is true when it is on."""

    enabled: bool = False  # check everything and print the plan; `dry_run=true` sets it
    assume: str | None = None  # a `hardware` group to plan for, on a machine that does not have it

    def __bool__(self) -> bool:
        return self.enabled or self.assume is not None


@dataclass
class Config:
    run_dir: str = "runs/default"  # every stage writes to a folder of its own below
    # What the experiment consists of, in order. A stage whose `init` is not set starts from what the stage before it
    # wrote in this run_dir.
    stages: list[str] = field(default_factory=lambda: ["collect", "distill", "train"])
    # `reproduce`'s: main | ablation | contrasts | pairs | arcap | figures | teacher_time | gate | gate_tuning | tuning
    table: str = "main"
    seeds: list[int] = field(default_factory=list)  # `reproduce` makes the whole table with each of them, and contrasts
    # For `reproduce`, by row: overrides of that row alone, such as rows.dgpo=["train.actor_learning_rate=1e-3"]
    rows: dict[str, list[str]] = field(default_factory=dict)
    seed: int = 1  # decides the order of questions, sampling and initial weights
    resume: bool = False  # go on where the stage stopped, with the same settings
    dry_run: DryRunConfig = field(default_factory=DryRunConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    ask: AskConfig = field(default_factory=AskConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens per GPU and forward pass where batches are packed by tokens; else room for any micro-batch."""
        return self.hardware.max_tokens_per_gpu or self.hardware.micro_batch_size * self.episode.max_tokens
