"""The search episode as a veRL agent loop: the project's one episode loop over veRL's rollout servers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from dgpo.episode import EpisodeLimits, Generation, run_episode
from dgpo.protocol import encode_prompt
from dgpo.rl.scoring import episode_scores
from dgpo.search import SearchClient
from dgpo.seeds import derive_seed
from dgpo.trajectory import Trajectory

AGENT_NAME = "search_agent"


class RolloutPolicy:
    """veRL's rollout servers as an episode `Policy`: token ids in, sampled token ids and log-probs out."""

    def __init__(self, server: Any, sampling_params: Mapping[str, Any]) -> None:
        self.server = server
        self.sampling_params = sampling_params
        self.generate_s = 0.0
        self.extra_fields: dict[str, Any] = {}

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        params = dict(
            self.sampling_params,
            max_tokens=max_tokens,
            stop=list(stop),
            include_stop_str_in_output=True,
            detokenize=True,
            seed=seed,
        )
        clock = asyncio.get_running_loop().time
        started = clock()
        output = await self.server.generate(request_id=request_id, prompt_ids=token_ids, sampling_params=params)
        self.generate_s += clock() - started
        # The weight version that generated: the first turn's minimum, the last turn's maximum.
        self.extra_fields = {
            **output.extra_fields,
            **{k: v for k, v in self.extra_fields.items() if k.startswith("min_")},
        }
        # veRL's server says "completed" of a stop and of an exhausted budget alike.
        aborted = output.stop_reason in ("abort", "aborted")
        reason = "abort" if aborted else "length" if len(output.token_ids) >= max_tokens else "stop"
        return Generation(list(output.token_ids), list(output.log_probs or ()), reason)


class WorkerResources:
    """What the episodes of one Ray worker share: a search client with its connections, and the concurrency bound."""

    _instance: WorkerResources | None = None

    def __init__(self, retriever: Mapping[str, Any], concurrency: int | None) -> None:
        self.search = SearchClient(
            retriever["url"],
            timeout_s=retriever["timeout_s"],
            max_retries=retriever["max_retries"],
            max_concurrency=retriever["max_concurrency"],
        )
        self.slots = asyncio.Semaphore(concurrency or 1_000_000)

    @classmethod
    def get(cls, retriever: Mapping[str, Any], concurrency: int | None) -> WorkerResources:
        if cls._instance is None:
            cls._instance = cls(retriever, concurrency)
        return cls._instance


class SearchAgentLoop(AgentLoopBase):
    """One episode per call. Built by veRL from `agent_loop.yaml`, which `dgpo.rl.verl_config` writes.

    Args:
        episode: the fields of `EpisodeConfig`.
        retriever: the fields of `RetrieverConfig`.
        seed: the run's seed; a turn samples with a seed derived from (seed, step, episode, session, turn).
        concurrency: episodes in flight in this worker, or None for no bound.
    """

    def __init__(
        self,
        *args: Any,
        episode: Mapping[str, Any],
        retriever: Mapping[str, Any],
        seed: int,
        concurrency: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = EpisodeLimits(**{k: v for k, v in episode.items() if k != "max_prompt_tokens"})
        self.max_prompt_tokens = episode["max_prompt_tokens"]
        self.resources = WorkerResources.get(retriever, concurrency)
        self.seed = seed

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Plays the episode of one data row and scores it.

        Returns:
            The episode in veRL's form. An episode whose search failed carries an all-zero `response_mask`: it takes
            part in no statistic and no gradient, and is counted by the trainer.
        """
        info = row["extra_info"]
        prompt_ids = encode_prompt(self.tokenizer, list(row["raw_prompt"]))
        if len(prompt_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"question {info.get('id')!r} has a prompt of {len(prompt_ids)} tokens, more than "
                f"episode.max_prompt_tokens={self.max_prompt_tokens}: raise the limit or drop the question"
            )
        policy = RolloutPolicy(self.server_manager, sampling_params)
        async with self.resources.slots:
            trajectory = await run_episode(
                episode_id=str(row["uid"]),
                prompt_ids=prompt_ids,
                policy=policy,
                search=self.resources.search,
                tokenizer=self.tokenizer,
                limits=self.limits,
                corpus=info.get("corpus"),
                seed=derive_seed(self.seed, row["global_steps"], info.get("id", info.get("index")), row["session_id"]),
            )
        return self._output(trajectory, policy, row["reward_model"]["ground_truth"]["target"])

    def _output(self, trajectory: Trajectory, policy: RolloutPolicy, golds: Sequence[str]) -> AgentLoopOutput:
        scores = episode_scores(trajectory, list(golds))
        trained = trajectory.status != "search_failed"
        return AgentLoopOutput(
            prompt_ids=trajectory.prompt_ids,
            response_ids=trajectory.response_ids,
            response_mask=trajectory.response_mask if trained else [0] * len(trajectory.response_mask),
            response_logprobs=trajectory.log_probs,
            reward_score=scores["em"],
            num_turns=2 * len(trajectory.turns),
            metrics=AgentLoopMetrics(
                generate_sequences=policy.generate_s,
                tool_calls=sum(record.latency_s for record in trajectory.searches),
            ),
            extra_fields={
                **policy.extra_fields,
                "reward_extra_info": scores,
                "turn_scores": [],
                "tool_rewards": [],
            },
        )
