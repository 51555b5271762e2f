"""The range of every number in the configuration: one table, checked whenever a configuration is composed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dgpo.config.schema import Config


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; without an end that is left out."""

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'more than' if self.without_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        if not (self.without_low or self.without_high):
            return f"a number from {self.low:g} to {self.high:.10g}"
        return f"{low} and {'less than' if self.without_high else 'at most'} {self.high:.10g}"


_KEYS = {
    Range(1): """
        teacher.url_concurrency prepare.passage_words contamination.ngram
        episode.max_turns episode.max_turn_tokens episode.max_prompt_tokens episode.max_response_tokens
        episode.min_turn_tokens episode.topk episode.max_passage_tokens episode.max_query_chars
        retriever.max_concurrency retriever.max_queries_per_request
        hardware.num_nodes hardware.gpus_per_node hardware.micro_batch_size hardware.max_tokens_per_gpu
        hardware.fsdp_size hardware.ulysses_size hardware.weight_bucket_mb hardware.num_agent_workers
        hardware.num_storage_units hardware.logical_cpus hardware.logical_gpus hardware.engine.tensor_parallel_size
        hardware.engine.max_num_seqs hardware.engine.max_num_batched_tokens hardware.engine.concurrency
        collect.max_questions collect.samples_per_question
        distill.student_episodes.buffer_size distill.epochs distill.max_steps distill.batch_size
        distill.micro_batch_size distill.lora_rank distill.chunk_tokens distill.evaluate_every
        distill.evaluations_per_epoch distill.patience
        train.num_steps train.batch_size train.mini_batch_size train.samples_per_question
        train.chunk_tokens train.stability.patience train.stability.window train.keep_steps
        train.log_episodes_every train.num_logged_episodes train.generation_concurrency
        test.max_questions test.samples test.upstream_batch_size
    """,
    Range(0): """
        teacher.url_max_retries prepare.passage_overlap prepare.validation_questions prepare.max_bad_lines
        retriever.max_retries retriever.max_outage_s retriever.gpu_memory_gb
        hardware.engine.shutdown_timeout_s collect.temperature
        distill.taid.alpha distill.student_episodes.min_rise distill.student_episodes.temperature distill.weight_decay
        train.actor_warmup_steps train.critic_warmup_steps train.weight_decay train.entropy_coef train.init_kl_coef
        train.teacher_term.coef train.teacher_term.num_monitored train.stability.min_entropy
        train.stability.max_rollbacks train.max_restarts train.save_every train.validate_every train.keep_last
        train.keep_best
        test.temperature ask.temperature
    """,
    Range(0, without_low=True): """
        teacher.url_timeout_s retriever.timeout_s retriever.host_memory_gb
        hardware.host_memory_gb hardware.replay_poll_s hardware.engine.turn_timeout_s
        distill.learning_rate train.temperature train.actor_learning_rate train.critic_learning_rate
        train.max_grad_norm train.value_clip train.reuse_log_probs_within train.stability.max_kl
        train.limits.start_s train.limits.rollout_s train.limits.update_s train.limits.sync_s train.limits.save_s
        train.limits.validate_s
    """,
    Range(1, without_low=True): """
        train.dual_clip train.stability.max_entropy_ratio train.stability.max_kl_ratio
        train.stability.max_grad_norm_ratio
    """,
    Range(0, 1): """
        prepare.test_share retriever.max_failed_share
        distill.kl_ratio distill.skew distill.jsd_beta distill.taid.t_start distill.taid.t_end distill.taid.momentum
        distill.student_episodes.initial_threshold distill.student_episodes.increment distill.warmup_ratio
        distill.min_learning_rate_share
        train.gamma train.gae_lambda train.stability.min_em_share train.stability.min_answered_share
        train.stability.max_repeated_token_share train.stability.max_truncated_turn_share
        train.stability.max_response_fill
    """,
    Range(0, 1, without_high=True): "distill.held_out_share distill.adam_betas train.adam_betas",
    Range(0, 1, without_low=True): """
        contamination.min_share train.clip_ratio train.stability.rollback_learning_rate_scale
    """,
    Range(0, 1, without_low=True, without_high=True): """
        hardware.engine.gpu_memory_utilization hardware.engine.gpu_memory_utilization_alone
    """,
    Range(0, 2**32 - 1): "seed seeds",  # numpy's generators take no other
    Range(0, 65535): "ask.port",
    Range(0.08): "hardware.object_store_gb",  # Ray takes none below 75 MiB
}
RANGES = {key: each for each, keys in _KEYS.items() for key in keys.split()}


def number_problems(config: Config) -> Iterator[str]:
    """What is wrong with each number out of its range, a line each; of lists with each element, and null is none."""
    for key, valid in RANGES.items():
        value = _get(config, key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number not in valid:
                yield f"{key}={value}: expected {valid}"


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
