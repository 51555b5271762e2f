"""Our episode loop against a lock-step loop (lock_step.py): wall time and generated tokens, on one vLLM engine.

    python scripts/bench/rollout.py MODEL QUESTIONS.parquet [..] --indexes FOLDER [--num-episodes 256] [--rounds 6]
        [--latency-ms 20 200] [--temperature 1.0] [--engine enable_prefix_caching=false] [--statistics] [key=value ..]

Every round plays the same questions through both loops, one after the other, and the next round turns the order round.
Engine, checkpoint, temperature, number of turns, budget of a turn, questions and retrieval server are the same. The
engine's prefix cache is emptied before each; a first round, which is not counted, warms both. Overrides such as
`world=tiny hardware=cpu` are those of the commands.

The server's answers are held back until a latency is over that is drawn for each query, uniformly between the two
bounds and always the same for the same query, as if the index were a large one elsewhere. A request's answer comes with
its slowest query: all of them are worked on side by side, which is the best that can be assumed. In ours, searches that
wait at the same time share requests, as they do in the commands, with 64 requests in flight whatever the world says
(the tiny one has 1, for a server nearby); the lock-step loop sends all queries of a turn in one. Both send them through
the project's client.

Ours seeds every turn, as RL does; the lock-step loop does not, as the release does not: seeds cost time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evaluation import served
from lock_step import run_lock_step

from dgpo.agent.episode import EpisodeLimits, Search, run_episode
from dgpo.agent.protocol import STOP_STRINGS
from dgpo.agent.search import SearchClient, read_token
from dgpo.agent.seeds import derive_seed
from dgpo.config.load import load_config
from dgpo.config.schema import Config, RetrieverConfig
from dgpo.data.rows import read_rows
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes
from dgpo.engines.play import load_tokenizer
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.metrics.exact_match import exact_match

REQUESTS_IN_FLIGHT = RetrieverConfig().max_concurrency  # as to any server elsewhere, whatever the world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("words", nargs="+", metavar="QUESTIONS.parquet | key=value")
    parser.add_argument("--num-episodes", type=int, default=256, help="of one round and loop, all in flight at once")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--latency-ms", type=float, nargs=2, default=(20.0, 200.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--indexes", type=Path, help="served for the benchmark; else retriever.url is asked")
    parser.add_argument("--engine", action="append", default=[], metavar="KEY=VALUE", help="vLLM engine argument")
    parser.add_argument("--statistics", action="store_true", help="the engine's own counts; they take time")
    options = parser.parse_intermixed_args()
    config = load_config([word for word in options.words if "=" in word])
    tokenizer = load_tokenizer(options.model, trust_remote_code=False)
    planned = [
        episode
        for number, file in enumerate(word for word in options.words if "=" not in word)
        for episode in plan_episodes(read_rows(file), tokenizer, config=config, labels={"file": str(number)})
    ]
    with tempfile.TemporaryDirectory() as folder, served(options.indexes, Path(folder)) as url:
        config.retriever.url = url or config.retriever.url
        bench = RolloutBench(config, options, planned, tokenizer)
        for name, settings in bench.settings().items():
            print(f"{name}: {json.dumps(settings)}", flush=True)
        asyncio.run(bench.run())


class RolloutBench:
    """Both loops over one engine and one server."""

    def __init__(
        self, config: Config, options: argparse.Namespace, planned: list[PlannedEpisode], tokenizer: Any
    ) -> None:
        self.config, self.options, self.planned, self.tokenizer = config, options, planned, tokenizer
        self.limits = EpisodeLimits.of(config.episode)
        self.policy = BenchPolicy(
            options.model,
            hardware=config.hardware,
            max_model_len=config.episode.max_tokens,
            temperature=options.temperature,
            seed=config.seed,
            arguments={key: json.loads(value) for key, value in (word.split("=", 1) for word in options.engine)},
            statistics=options.statistics,
        )

    def settings(self) -> dict[str, dict[str, Any]]:
        """What both loops share, and what each has for itself."""
        limits = self.limits
        vocabulary = self.tokenizer.get_vocab()
        return {
            "both": {
                "episodes per round": self.options.num_episodes,
                "temperature": self.options.temperature,
                "top_p": 1.0,
                "tokens per turn": limits.max_turn_tokens,
                "turns that may search": limits.max_turns,
                "documents per search": limits.topk,
                "search latency, ms": list(self.options.latency_ms),
                "log-probs of sampled tokens": True,
                "engine": {
                    key: self.policy.engine_arguments().get(key)
                    for key in ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "block_size")
                },
            },
            "ours": {
                "stop strings": list(STOP_STRINGS),
                "of these, one token": [tag for tag in STOP_STRINGS if tag in vocabulary],
                "searches": f"up to {self.config.retriever.max_queries_per_request} share a request; others generate",
                "requests in flight": REQUESTS_IN_FLIGHT,
                "tokens per episode": limits.max_response_tokens,
                "seeded turns": True,
            },
            "lock-step": {
                "stop strings": [],
                "searches": "one request per turn with the queries of all episodes",
                "context tokens": self._max_context_tokens(),
                "tokens per observation": self._max_observation_tokens(),
                "seeded turns": False,
            },
        }

    async def run(self) -> None:
        async with self.policy, DelayedClient(self.config.retriever, self.options.latency_ms) as search:
            loops = {"ours": self.ours, "lock-step": self.lock_step}
            gc.collect()
            gc.freeze()
            await self._continuations()
            rounds: list[dict[str, dict[str, float]]] = []
            for number in range(self.options.rounds + 1):
                order = list(loops) if number % 2 else list(loops)[::-1]
                measured = {name: await self._timed(loops[name], number, search) for name in order}
                if number == 0:
                    continue
                rounds.append(measured)
                print(f"round {number}: {json.dumps(measured)}", flush=True)
        self._report(rounds)

    async def _timed(self, loop: Any, number: int, search: Any) -> dict[str, float]:
        await self.policy.forget()
        first = number * self.options.num_episodes
        chosen = [self.planned[(first + i) % len(self.planned)] for i in range(self.options.num_episodes)]
        started = time.perf_counter()
        results = await loop(number, chosen, search)
        seconds = time.perf_counter() - started
        counts = self.policy.counts.totals() if self.policy.counts is not None else {}
        return {"wall_s": round(seconds, 3), **results, **counts}

    async def ours(self, number: int, chosen: Sequence[PlannedEpisode], search: Search) -> dict[str, float]:
        trajectories = await asyncio.gather(
            *(
                run_episode(
                    episode_id=f"{place}/{each.episode_id}",
                    prompt_ids=each.prompt_ids,
                    policy=self.policy,
                    search=search,
                    tokenizer=self.tokenizer,
                    limits=self.limits,
                    corpus=each.corpus,
                    seed=derive_seed(self.config.seed, number, place, each.episode_id),
                )
                for place, each in enumerate(chosen)
            )
        )
        num_tokens = sum(sum(trajectory.response_mask) for trajectory in trajectories)
        return {
            "sampled_tokens": num_tokens,
            "kept_tokens": num_tokens,
            "turns": sum(len(trajectory.turns) for trajectory in trajectories),
            "searches": sum(trajectory.num_searches for trajectory in trajectories),
            "em": self._exact_match(chosen, [trajectory.answer for trajectory in trajectories]),
        }

    async def lock_step(self, number: int, chosen: Sequence[PlannedEpisode], search: DelayedClient) -> dict[str, float]:
        corpora = {each.corpus for each in chosen}
        if len(corpora) > 1:
            raise ValueError(
                f"questions about {len(corpora)} corpora: expected one, as the lock-step loop asks for one"
            )
        (corpus,) = corpora

        async def search_all(queries: list[str]) -> list[list[dict[str, Any]]]:
            return await search.retrieve(queries, self.limits.topk, corpus)

        episodes = await run_lock_step(
            {f"{place}/{each.episode_id}": each.prompt_ids for place, each in enumerate(chosen)},
            policy=self.policy,
            search=search_all,
            tokenizer=self.tokenizer,
            limits=self.limits,
            max_context_tokens=self._max_context_tokens(),
            max_observation_tokens=self._max_observation_tokens(),
        )
        return {
            "sampled_tokens": sum(episode.num_generated for episode in episodes),
            "kept_tokens": sum(episode.num_kept for episode in episodes),
            "turns": sum(episode.num_turns for episode in episodes),
            "searches": sum(episode.num_searches for episode in episodes),
            "em": self._exact_match(chosen, [episode.answer for episode in episodes]),
        }

    async def _continuations(self) -> None:
        """Prints what the model writes behind a tag when nothing stops it: how far the reference's turns run."""
        stop_at = {token: tag for tag, token in self.tokenizer.get_vocab().items() if tag in STOP_STRINGS}
        after: Counter[str] = Counter()
        lengths = []
        for_all = self.planned[: self.options.num_episodes]
        for generation in await asyncio.gather(
            *(
                self.policy.generate(
                    each.prompt_ids,
                    max_tokens=self.limits.max_turn_tokens,
                    stop=(),
                    seed=None,
                    request_id=f"free/{each.episode_id}",
                )
                for each in for_all
            )
        ):
            ids = generation.token_ids
            lengths.append(len(ids))
            place = next((place for place, token in enumerate(ids) if token in stop_at), None)
            tail = ids[place + 1 :] if place is not None else []
            ended = "EOS" if generation.finish_reason == "stop" else "the full budget"
            after[f"no tag, {ended}" if place is None else f"{len(tail)} tokens to {ended}"] += 1
        shares = {key: round(count / len(for_all), 3) for key, count in after.most_common(8)}
        print(
            f"first turns without stop strings: mean {sum(lengths) / len(lengths):.1f} tokens; behind the tag {shares}"
        )

    def _report(self, rounds: list[dict[str, dict[str, float]]]) -> None:
        def middle(loop: str, name: str) -> float:
            return median(each[loop][name] for each in rounds)

        def ratio(name: str) -> float:
            return median(each["ours"][name] / each["lock-step"][name] for each in rounds)

        for loop in ("ours", "lock-step"):
            values = {name: round(middle(loop, name), 3) for name in rounds[0][loop]}
            print(f"median of {len(rounds)} rounds, {loop}: {json.dumps(values)}")
        print(
            f"median ratio, ours to lock-step: wall time {ratio('wall_s'):.3f}, generated tokens "
            f"{ratio('sampled_tokens'):.3f}"
        )

    def _max_context_tokens(self) -> int:
        """What is left of the engine's longest sequence before a turn, as the release's 4096 of 4596."""
        return self.policy.max_model_len - self.limits.max_turn_tokens

    def _max_observation_tokens(self) -> int:
        """The release allows 500 for three passages."""
        return self.limits.topk * self.limits.max_passage_tokens

    @staticmethod
    def _exact_match(chosen: Sequence[PlannedEpisode], answers: Sequence[str | None]) -> float:
        golds = [each.row["reward_model"]["ground_truth"]["target"] for each in chosen]
        right = [
            answer is not None and exact_match(answer, list(gold)) for answer, gold in zip(answers, golds, strict=True)
        ]
        return round(sum(map(float, right)) / len(right), 3)


class BenchPolicy(VllmPolicy):
    """The project's policy, with other engine arguments, and a switch for the engine's statistics."""

    def __init__(self, *args: Any, arguments: dict[str, Any], statistics: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arguments = arguments
        self.counts = EngineCounts() if statistics else None

    def engine_arguments(self) -> dict[str, Any]:
        return {
            **super().engine_arguments(),
            "disable_log_stats": self.counts is None,
            **self.arguments,
        }

    async def start(self) -> None:
        await super().start()
        if self.counts is not None:
            self._engine.logger_manager.stat_loggers[:] = [self.counts]

    async def forget(self) -> None:
        """Empties the prefix cache and the statistics."""
        await self._engine.reset_prefix_cache()
        if self.counts is not None:
            self.counts.reset()


class EngineCounts:
    """vLLM's own count of what its engine did; in the place of its statistics loggers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.num_steps = self.num_running = self.num_generated = self.num_asked = self.num_hit = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
        if scheduler_stats is not None:
            self.num_steps += 1
            self.num_running += scheduler_stats.num_running_reqs
            self.num_asked += scheduler_stats.prefix_cache_stats.queries
            self.num_hit += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.num_generated += iteration_stats.num_generation_tokens

    def totals(self) -> dict[str, float]:
        return {
            "engine_tokens": self.num_generated,
            "engine_steps": self.num_steps,
            "running_per_step": round(self.num_running / max(self.num_steps, 1), 1),
            "prompt_tokens": self.num_asked,
            "cached_share": round(self.num_hit / max(self.num_asked, 1), 3),
        }


class DelayedClient(SearchClient):
    """The project's client, with answers held back until the latency of a request's slowest query is over.

    Args:
        latency_ms: bounds of the latency.
    """

    def __init__(self, retriever: RetrieverConfig, latency_ms: Sequence[float]) -> None:
        super().__init__(
            retriever.url,
            timeout_s=retriever.timeout_s,
            max_retries=retriever.max_retries,
            max_concurrency=REQUESTS_IN_FLIGHT,
            max_queries_per_request=retriever.max_queries_per_request,
            max_outage_s=retriever.max_outage_s,
            token=read_token(retriever.token_file),
        )
        self.low, self.high = latency_ms

    async def retrieve(
        self, queries: list[str], topk: int, corpus: str | None, *, began: float | None = None
    ) -> list[list[dict[str, Any]]]:
        slowest_s = max(query_latency_s(query, self.low, self.high) for query in queries)
        found, _ = await asyncio.gather(super().retrieve(queries, topk, corpus, began=began), asyncio.sleep(slowest_s))
        return found


def query_latency_s(query: str, low_ms: float, high_ms: float) -> float:
    """Uniform between the bounds, and the same for the same query."""
    return (low_ms + (high_ms - low_ms) * derive_seed("latency", query) / 2**31) / 1000


if __name__ == "__main__":
    main()
