"""The search episode as a veRL agent loop: the project's one episode loop over veRL's rollout servers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from dgpo.agent.episode import EpisodeLimits, Generation, run_episode
from dgpo.agent.plugins import load_reward, make_search
from dgpo.agent.protocol import encode_prompt
from dgpo.agent.scoring import episode_reward, episode_scores
from dgpo.agent.seeds import derive_seed
from dgpo.agent.trajectory import Trajectory
from dgpo.config.schema import EpisodeConfig, RetrieverConfig
from dgpo.rl.timeline import TimedSearch

logger = logging.getLogger(__name__)


class RolloutPolicy:
    """veRL's rollout servers as an episode `Policy`: token ids in, sampled token ids and log-probs out."""

    def __init__(self, server: Any, sampling_params: Mapping[str, Any]) -> None:
        self.server = server
        self.sampling_params = sampling_params
        self.spans: list[tuple[str, float, float]] = []  # generations, and searches by `TimedSearch`
        self.extra_fields: dict[str, Any] = {}

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        # `TetheredServer` makes the rest of the turn's sampling parameters, with the engine's tokenizer.
        params = {**self.sampling_params, "max_tokens": max_tokens, "stop": list(stop), "seed": seed}
        started = time.time()
        output = await self.server.generate(request_id=request_id, prompt_ids=token_ids, sampling_params=params)
        self.spans.append(("generate", started, time.time()))
        # The weight version that generated: the first turn's minimum, the last turn's maximum.
        self.extra_fields = {
            **output.extra_fields,
            **{k: v for k, v in self.extra_fields.items() if k.startswith("min_")},
        }
        # veRL's server says "completed" of a stop and of an exhausted budget alike.
        aborted = output.stop_reason in ("abort", "aborted")
        reason = "abort" if aborted else "length" if len(output.token_ids) >= max_tokens else "stop"
        return Generation(list(output.token_ids), list(output.log_probs or ()), reason)


class WorkerContext:
    """What the episodes of one Ray worker share: settings, the search with its connections, the reward, the bound.

    Args:
        settings: JSON, from `dgpo.rl.verl_config`: the fields of `EpisodeConfig` and `RetrieverConfig` as `episode`
            and `retriever`; `reward`, the name of a reward function, or null for exact match; `seed`, the run's: a turn
            samples with a seed derived from (seed, step, row of the batch, session, turn), or, without `request_seeds`,
            with whatever the engine draws; `concurrency`, the episodes in flight in this worker, or null for no bound.
    """

    def __init__(self, settings: str) -> None:
        values = json.loads(settings)
        episode = EpisodeConfig(**values["episode"])
        self.max_prompt_tokens, self.limits = episode.max_prompt_tokens, EpisodeLimits.of(episode)
        self.search = make_search(RetrieverConfig(**values["retriever"]))
        self.reward = load_reward(values["reward"]) if values["reward"] else None
        self.seed: int | None = values["seed"] if values["request_seeds"] else None
        self.slots = asyncio.Semaphore(values["concurrency"] or 1_000_000)


worker_context = cache(WorkerContext)


class SearchAgentLoop(AgentLoopBase):
    """One episode per call. Built by veRL from `agent_loop.yaml`, which `dgpo.rl.verl_config` writes.

    Args:
        server_manager: veRL's rollout servers.
        tokenizer: the policy's.
        settings: of `WorkerContext`.
    """

    def __init__(self, *, server_manager: Any, tokenizer: Any, settings: str, **_: Any) -> None:
        # Not veRL's: it makes a builder of chats, which would tokenise sampled text, and warns of models new to it.
        self.server_manager = server_manager
        self.tokenizer = tokenizer
        self.shared = worker_context(settings)

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Plays the episode of one data row and scores it.

        Returns:
            The episode in veRL's form. One that failed (its search, or an error) carries an all-zero `response_mask`:
            it takes part in no statistic and no gradient, and is counted by the trainer. veRL itself would only log an
            error and go on with padding in the episode's place.
        """
        try:
            return await self._play(sampling_params, row)
        except Exception as error:  # a reward function or a search backend may raise anything
            logger.exception("episode %s failed", row["uid"])
            return self._failed_output(f"raised {type(error).__name__}: {error}", step=row["global_steps"])

    async def _play(self, sampling_params: dict[str, Any], row: Mapping[str, Any]) -> AgentLoopOutput:
        info = row["extra_info"]
        prompt_ids = encode_prompt(self.tokenizer, list(row["raw_prompt"]))
        shared = self.shared
        if len(prompt_ids) > shared.max_prompt_tokens:
            raise ValueError(
                f"question {info.get('id')!r} has a prompt of {len(prompt_ids)} tokens, more than "
                f"episode.max_prompt_tokens={shared.max_prompt_tokens}: raise the limit or drop the question"
            )
        policy = RolloutPolicy(self.server_manager, sampling_params)
        async with shared.slots:
            trajectory = await run_episode(
                episode_id=str(row["uid"]),
                prompt_ids=prompt_ids,
                policy=policy,
                search=TimedSearch(shared.search, policy.spans),
                tokenizer=self.tokenizer,
                limits=shared.limits,
                corpus=info.get("corpus"),
                seed=None if shared.seed is None else _episode_seed(shared.seed, row),
            )
        golds = list(row["reward_model"]["ground_truth"]["target"])
        started = time.time()
        scores = episode_scores(trajectory, golds)
        rewards = episode_reward(shared.reward, trajectory, golds, scores)
        policy.spans.append(("score", started, time.time()))
        return self._output(trajectory, policy, scores, *rewards)

    def _output(
        self,
        trajectory: Trajectory,
        policy: RolloutPolicy,
        scores: dict[str, float],
        reward: float,
        reward_parts: dict[str, float],
    ) -> AgentLoopOutput:
        trained = trajectory.status != "search_failed"
        return AgentLoopOutput(
            prompt_ids=trajectory.prompt_ids,
            response_ids=trajectory.response_ids,
            response_mask=trajectory.response_mask if trained else [0] * len(trajectory.response_mask),
            response_logprobs=trajectory.log_probs,
            reward_score=reward if trained else 0.0,
            num_turns=2 * len(trajectory.turns),
            metrics=AgentLoopMetrics(
                generate_sequences=sum(end - start for name, start, end in policy.spans if name == "generate"),
                tool_calls=sum(record.latency_s for record in trajectory.searches),
            ),
            extra_fields={
                **policy.extra_fields,
                "spans": policy.spans,
                "reward_extra_info": {**scores, **reward_parts, "error": 0.0},
                "failure": None if trained else "lost a search: the retriever is down or overloaded",
                "turn_scores": [],
                "tool_rewards": [],
            },
        )

    def _failed_output(self, failure: str, *, step: int) -> AgentLoopOutput:
        """Stands in for an episode that could not be played or scored: one token, masked out."""
        token = self.tokenizer.eos_token_id
        return AgentLoopOutput(
            prompt_ids=[token],
            response_ids=[token],
            response_mask=[0],
            response_logprobs=[0.0],
            reward_score=0.0,
            num_turns=0,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "min_global_steps": step - 1,  # veRL's weight version; those of step - 1 play the episodes of a step
                "max_global_steps": step - 1,
                "spans": [],
                "reward_extra_info": {"em": 0.0, "error": 1.0},
                "failure": failure,
                "turn_scores": [],
                "tool_rewards": [],
            },
        )


def _episode_seed(seed: int, row: Mapping[str, Any]) -> int:
    """By the row's place in its batch, and not by what its file calls it: ids may be absent, or equal."""
    return derive_seed(seed, row["global_steps"], row["uid"], row["session_id"])
