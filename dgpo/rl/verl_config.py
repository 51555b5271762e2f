"""Our configuration in veRL's words: the one place that knows veRL's keys."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from dgpo.config.methods import algorithm_of
from dgpo.config.schema import Config, TrainConfig
from dgpo.config.stages import initial_model
from dgpo.hardware.memory import weight_bucket
from dgpo.hardware.shapes import ModelShape, find_shape
from dgpo.platforms import CHUNK
from dgpo.rl.settings import teacher_settings

AGENT_NAME = "search_agent"
NO_DUAL_CLIP = 1e9  # veRL always caps the ratio; its own clamp, exp(20), is below this


def to_verl(config: Config, folder: Path, checkpoint: Path | None = None) -> DictConfig:
    """Composes veRL's `ppo_trainer` with our settings laid over it.

    Args:
        config: a checked configuration.
        folder: the stage's folder; the agent loop's settings are written there for veRL's workers.
        checkpoint: to go on from; None begins with the initial model.
    """
    with initialize_config_module("verl.trainer.config", version_base=None):
        verl = compose("ppo_trainer")
    values = {
        **_data(config),
        **_model(config),
        **_rollout(config, _write_agent_loop(config, folder)),
        **_actor(config),
        **_critic(config),
        **_algorithm(config),
        **_trainer(config, folder, checkpoint),
        **config.hardware.verl,
    }
    with open_dict(verl):
        for key, value in values.items():
            OmegaConf.update(verl, key, value, force_add=True)
        verl.actor_rollout_ref.teacher = asdict(teacher_settings(config))  # our worker reads it, veRL does not
    return verl


def _write_agent_loop(config: Config, folder: Path) -> str:
    settings = {
        "episode": asdict(config.episode),
        "retriever": asdict(config.retriever),
        "reward": config.train.reward,
        "seed": config.seed,
        "request_seeds": has_request_seeds(config),
        "concurrency": config.train.generation_concurrency,
    }
    # As one text: veRL makes the agent loop from this entry for every episode, and Hydra copies each node of it.
    entry = {
        "name": AGENT_NAME,
        "_target_": "dgpo.rl.agent_loop.SearchAgentLoop",
        "settings": json.dumps(settings),
    }
    path = folder / "agent_loop.yaml"
    path.write_text(yaml.safe_dump([entry], sort_keys=False))
    return str(path.resolve())


def has_request_seeds(config: Config) -> bool:
    """Whether every turn draws from a seed of its own: `train.request_seeds`, or, where it is null, on CPUs only."""
    asked = config.train.request_seeds
    return config.hardware.platform == "cpu" if asked is None else asked


def _data(config: Config) -> dict[str, Any]:
    return {
        "data.train_files": config.data.train_file,
        "data.val_files": config.data.validation_file or config.data.train_file,
        "data.train_batch_size": config.train.batch_size,
        "data.max_prompt_length": config.episode.max_prompt_tokens,
        "data.max_response_length": config.episode.max_response_tokens,
        "data.dataloader_num_workers": 0,
        "data.seed": config.seed,
        "data.validation_shuffle": False,  # would draw from a generator that training draws from
        "data.trust_remote_code": config.student.trust_remote_code,
    }


def _model(config: Config) -> dict[str, Any]:
    hardware = config.hardware
    shared = {
        "path": initial_model(config, "train")[1],
        "trust_remote_code": config.student.trust_remote_code,
        "use_remove_padding": hardware.remove_padding,
        "enable_gradient_checkpointing": hardware.gradient_checkpointing,
        "override_config.attn_implementation": hardware.attention,
        f"fused_kernel_options.{CHUNK}": config.train.chunk_tokens,
    }
    return {
        f"{prefix}.{key}": value
        for prefix in ("actor_rollout_ref.model", "critic.model")
        for key, value in shared.items()
    }


def _rollout(config: Config, agent_loop_path: str) -> dict[str, Any]:
    hardware, engine = config.hardware, config.hardware.engine
    rollout = {
        "name": "vllm",
        "dtype": engine.dtype,
        "temperature": config.train.temperature,
        "n": config.train.samples_per_question,
        "seed": config.seed,
        "enforce_eager": engine.enforce_eager,
        "tensor_model_parallel_size": engine.tensor_parallel_size,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": max(engine.max_num_batched_tokens, config.episode.max_tokens),
        "enable_chunked_prefill": engine.chunked_prefill,
        "max_model_len": config.episode.max_tokens,
        "log_prob_micro_batch_size_per_gpu": hardware.micro_batch_size,
        "log_prob_use_dynamic_bsz": hardware.max_tokens_per_gpu is not None,
        "log_prob_max_token_len_per_gpu": config.micro_batch_tokens,
        "skip_tokenizer_init": False,  # stop strings are found in detokenised text
        "agent.num_workers": hardware.num_agent_workers * hardware.num_nodes,
        "agent.default_agent_loop": AGENT_NAME,
        "agent.agent_loop_config_path": agent_loop_path,
        "free_cache_engine": engine.sleep,
        "enable_sleep_mode": engine.sleep,
        "checkpoint_engine.update_weights_bucket_megabytes": int(weight_bucket(config, _shape(config)) / 2**20),
    }
    if engine.in_process:
        rollout["engine_kwargs.vllm.distributed_executor_backend"] = "uni"
    if engine.worker_extension:
        rollout["engine_kwargs.vllm.worker_extension_cls"] = engine.worker_extension
    return {f"actor_rollout_ref.rollout.{key}": value for key, value in rollout.items()}


def _shape(config: Config) -> ModelShape | None:
    return find_shape(config, initial_model(config, "train")[1])


def _mixed_precision(dtype: str) -> dict[str, str]:
    """Forward and backward in `dtype`, gradients reduced in float32; parameters and optimiser stay float32."""
    return {"param_dtype": _short(dtype), "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def _engine(config: Config, prefix: str, *, frozen: bool = False) -> dict[str, Any]:
    """What veRL's FSDP engines of actor, critic and frozen models have in common, below `prefix`."""
    hardware = config.hardware
    values = {
        "seed": config.seed,
        "mixed_precision": _mixed_precision(hardware.dtype),
        "fsdp_size": hardware.fsdp_size or -1,
        "ulysses_sequence_parallel_size": hardware.ulysses_size,
    }
    if frozen:
        # veRL keeps frozen models in host memory, and never updates them: no need for more digits than are read.
        values["model_dtype"] = _short(hardware.dtype)
    else:
        values |= {
            "param_offload": hardware.offload == "idle",
            "optimizer_offload": hardware.offload == "idle",
            "offload_policy": hardware.offload == "full",
        }
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def _actor(config: Config) -> dict[str, Any]:
    train, hardware = config.train, config.hardware
    actor = {
        "strategy": "fsdp2",
        "ppo_mini_batch_size": train.batch_size,  # in questions; the worker makes the updates, of so many episodes
        "ppo_micro_batch_size_per_gpu": hardware.micro_batch_size,
        "use_dynamic_bsz": hardware.max_tokens_per_gpu is not None,
        "ppo_max_token_len_per_gpu": config.micro_batch_tokens,
        "use_kl_loss": _has_kl_loss(config),
        "kl_loss_coef": train.init_kl_coef,
        "kl_loss_type": "low_var_kl",
        "clip_ratio": train.clip_ratio,
        "clip_ratio_low": train.clip_ratio,
        "clip_ratio_high": train.clip_ratio,
        "clip_ratio_c": train.dual_clip or NO_DUAL_CLIP,
        "entropy_coeff": train.entropy_coef if algorithm_of(config).task_reward else 0.0,
        "grad_clip": train.max_grad_norm,
        **_optimizer(train, train.actor_learning_rate, train.actor_warmup_steps),
        "data_loader_seed": config.seed,
        "checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        "checkpoint.load_contents": ["model", "optimizer", "extra"],
        **_engine(config, "fsdp_config"),
    }
    ref = {
        "log_prob_micro_batch_size_per_gpu": hardware.micro_batch_size,
        # By tokens: the number of episodes that the teacher scores divides by nothing in particular.
        "log_prob_use_dynamic_bsz": True,
        "log_prob_max_token_len_per_gpu": config.micro_batch_tokens,
        **_engine(config, "fsdp_config", frozen=True),
    }
    return {f"actor_rollout_ref.actor.{k}": v for k, v in actor.items()} | {
        f"actor_rollout_ref.ref.{k}": v for k, v in ref.items()
    }


def _optimizer(train: TrainConfig, learning_rate: float, warmup_steps: int) -> dict[str, Any]:
    return {
        "optim.lr": learning_rate,
        "optim.lr_warmup_steps": warmup_steps,
        "optim.betas": list(train.adam_betas),
        "optim.weight_decay": train.weight_decay,
        # No temporaries of the model's size, and on a CPU a third of the time; the cold start's optimiser is so too.
        "optim.override_optimizer_config": {"fused": True},
    }


def _has_kl_loss(config: Config) -> bool:
    return config.train.init_kl_coef > 0 and config.train.init_kl_form == "loss"


def _critic(config: Config) -> dict[str, Any]:
    train, hardware = config.train, config.hardware
    critic = {
        "enable": algorithm_of(config).critic,
        "strategy": "fsdp2",
        "ppo_mini_batch_size": train.mini_batch_size // train.samples_per_question,  # in questions
        "ppo_micro_batch_size_per_gpu": hardware.micro_batch_size,
        "use_dynamic_bsz": hardware.max_tokens_per_gpu is not None,
        "ppo_max_token_len_per_gpu": config.micro_batch_tokens,
        "ppo_infer_max_token_len_per_gpu": config.micro_batch_tokens,  # veRL trains the critic by this one too
        "cliprange_value": train.value_clip,
        "grad_clip": train.max_grad_norm,
        **_optimizer(train, train.critic_learning_rate, train.critic_warmup_steps),
        "data_loader_seed": config.seed,
        **_engine(config, "fsdp"),
    }
    return {f"critic.{key}": value for key, value in critic.items()}


def _algorithm(config: Config) -> dict[str, Any]:
    train = config.train
    return {
        # veRL's words for "with" and "without a critic": advantages are `dgpo.algorithms.advantages`' alone.
        "algorithm.adv_estimator": "gae" if algorithm_of(config).critic else "grpo",
        "algorithm.gamma": train.gamma,
        "algorithm.lam": train.gae_lambda,
        "algorithm.use_kl_in_reward": train.init_kl_coef > 0 and train.init_kl_form == "reward",
        "algorithm.kl_ctrl.kl_coef": train.init_kl_coef,
        "reward.num_workers": 0,  # the agent loop scores its episodes itself
    }


def _trainer(config: Config, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    train, hardware = config.train, config.hardware
    return {
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "sync",
        "trainer.device": hardware.platform,
        "trainer.n_gpus_per_node": hardware.gpus_per_node,
        "trainer.nnodes": hardware.num_nodes,
        "trainer.logger": list(train.loggers),
        "trainer.project_name": "dgpo",
        "trainer.experiment_name": Path(config.run_dir).name,
        "trainer.total_training_steps": train.num_steps,
        "trainer.total_epochs": 1_000_000,  # num_steps ends the run; the data is repeated as often as that takes
        "trainer.save_freq": train.save_every if train.save_every > 0 else train.num_steps,  # the last one always
        "trainer.test_freq": train.validate_every if config.data.validation_file else -1,
        "trainer.val_before_train": False,
        "trainer.default_local_dir": str((folder / "checkpoints").resolve()),
        # dgpo.runs.run_state deletes what need not be kept.
        "trainer.max_actor_ckpt_to_keep": None,
        "trainer.max_critic_ckpt_to_keep": None,
        "trainer.resume_mode": "resume_path" if checkpoint else "disable",
        "trainer.resume_from_path": str(checkpoint.resolve()) if checkpoint else None,
        "transfer_queue.enable": True,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": hardware.num_storage_units,
    }
