"""Our episode loop against the lock-step loop for a step's 512 episodes on simulated H200s (simulated_engine.py).

    python scripts/bench/rollout_at_scale.py [--num-episodes 512] [--num-engines 8] [--model qwen2.5-0.5b] [--gpu h200]

The loops are real: `dgpo.agent.episode.run_episode`, with the limits of configs/config.yaml, and lock_step.py. Engine
and search are simulated, and so are the episodes: 1.5 searches on average (none: 10%, one: 45%, two: 35%, three and
four: 5% each), turns of 100 tokens on average (log-normal, sigma 0.6), of which 1% never close a tag and run out,
prompts of 180 tokens and passages of 150: the averages of dgpo/hardware/throughput.py. What is written depends on the
episode and the turn only, so that both loops play the same ones. Behind a tag that nothing stops at, a policy goes on
to the budget of the turn, unless a scenario says otherwise: the release trains no end-of-sequence token there.

Engines share the episodes out evenly and keep them. `running` is the mean number of sequences per engine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lock_step import run_lock_step
from simulated_engine import SimulatedEngine, SimulatedSearch, Speed, WrittenTurn, query_latency_s, run_simulated

from dgpo.agent.episode import EpisodeLimits, Generation, run_episode
from dgpo.agent.seeds import derive_seed
from dgpo.config.load import load_config
from dgpo.hardware.known_gpus import KNOWN_GPUS
from dgpo.hardware.shapes import known_shape
from dgpo.hardware.throughput import PREFILL_UTILISATION, decode_step_s

BFLOAT16 = 2
PROMPT_TOKENS = 180
PASSAGE_TOKENS = 150
SEARCH_SHARES = (0.1, 0.45, 0.35, 0.05, 0.05)  # shares of the episodes with 0, 1, .. searches
MEAN_TURN_TOKENS, TURN_SIGMA = 100, 0.6
RUNAWAY_SHARE = 0.01  # share of the turns that never end by themselves
SLOW_SEARCH_MS = 2000.0
RELEASE_CONTEXT_TOKENS, RELEASE_OBSERVATION_TOKENS = 4096, 500
CHARS_PER_TOKEN = 4
WORD, END = 0, 1  # token ids; those above name an action


@dataclass(frozen=True)
class Scenario:
    """What differs between runs.

    Attributes:
        latency_ms: bounds of a search's latency.
        slow_share: of searches that take `SLOW_SEARCH_MS`.
        self_ending_share: of turns that end by themselves behind the tag.
        budgets: other values for fields of `EpisodeLimits`.
    """

    name: str
    num_episodes: int
    num_engines: int
    latency_ms: tuple[float, float] = (20.0, 200.0)
    slow_share: float = 0.0
    self_ending_share: float = 0.0
    prefix_caching: bool = True
    budgets: dict[str, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one loop did in one scenario; times are simulated."""

    wall_s: float
    num_generated: int
    num_kept: int
    busy: float
    running: float
    finished_s: list[float] = field(default_factory=list)
    num_overflows: int = 0
    num_cut_turns: int = 0


class Words:
    """A tokenizer: four characters are a token, and an action is one."""

    def __init__(self) -> None:
        self.actions: list[str] = []

    def action(self, text: str) -> int:
        self.actions.append(text)
        return END + len(self.actions)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [WORD] * -(-len(text) // CHARS_PER_TOKEN)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(
            "word" if token == WORD else self.actions[token - END - 1] for token in token_ids if token != END
        )

    def batch_decode(self, batch: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]}


class Episodes:
    """What a policy writes, turn by turn; the same for every instance."""

    def __init__(self, scenario: Scenario, words: Words, *, max_turn_tokens: int) -> None:
        self.scenario, self.words, self.max_turn_tokens = scenario, words, max_turn_tokens
        self._num_turns: dict[str, int] = {}
        self._num_searches: dict[str, int] = {}

    def write(self, episode: str) -> WrittenTurn:
        turn = self._num_turns.get(episode, 0)
        self._num_turns[episode] = turn + 1
        wanted = random.Random(derive_seed("searches", episode)).choices(range(len(SEARCH_SHARES)), SEARCH_SHARES)[0]
        draw = random.Random(derive_seed("turn", episode, turn))
        median_tokens = MEAN_TURN_TOKENS / 2.718281828 ** (TURN_SIGMA**2 / 2)
        num_tokens = max(8, round(draw.lognormvariate(0.0, TURN_SIGMA) * median_tokens))
        runaway, self_ending = draw.random() < RUNAWAY_SHARE, draw.random() < self.scenario.self_ending_share
        if runaway or num_tokens > self.max_turn_tokens:
            return WrittenTurn([WORD] * (self.max_turn_tokens + 1), 0)
        num_searches = self._num_searches.get(episode, 0)
        if num_searches < wanted:
            self._num_searches[episode] = num_searches + 1
            tag = self.words.action(f"<search> {episode} {num_searches} </search>")
        else:
            tag = self.words.action("<answer> it </answer>")
        rambling = 0 if self_ending else self.max_turn_tokens
        return WrittenTurn([WORD] * (num_tokens - 1) + [tag], rambling)


class Engines:
    """Several engines as one policy: an episode stays on one."""

    def __init__(self, engines: list[SimulatedEngine]) -> None:
        self.engines = engines

    async def generate(self, token_ids: list[int], *, request_id: str, **options: Any) -> Generation:
        number = int(request_id.split("/")[0].removeprefix("e"))
        return await self.engines[number % len(self.engines)].generate(token_ids, request_id=request_id, **options)


def play(scenario: Scenario, speed: Speed, *, lock_step: bool) -> Outcome:
    """One step's episodes through one of the loops."""
    limits = EpisodeLimits.of(load_config([]).episode)
    words = Words()
    episodes = Episodes(scenario, words, max_turn_tokens=limits.max_turn_tokens)
    limits = replace(limits, **scenario.budgets)
    contents = '"Title"\n' + "word" * PASSAGE_TOKENS
    search = SimulatedSearch(
        partial(_latency_s, scenario), [{"id": str(number), "contents": contents} for number in range(limits.topk)]
    )
    engines = [
        SimulatedEngine(
            speed,
            write=episodes.write,
            end_token=END,
            filler=WORD,
            prefix_caching=scenario.prefix_caching,
        )
        for _ in range(scenario.num_engines)
    ]
    prompts = {f"e{number}": [WORD] * PROMPT_TOKENS for number in range(scenario.num_episodes)}
    finished_s: list[float] = []

    async def one(name: str, prompt_ids: list[int]) -> Any:
        trajectory = await run_episode(
            episode_id=name,
            prompt_ids=prompt_ids,
            policy=Engines(engines),
            search=search,
            tokenizer=words,
            limits=limits,
        )
        finished_s.append(asyncio.get_running_loop().time())
        return trajectory

    async def ours() -> tuple[int, int, int]:
        trajectories = await asyncio.gather(*(one(name, ids) for name, ids in prompts.items()))
        kept = sum(sum(trajectory.response_mask) for trajectory in trajectories)
        cut = sum(trajectory.counters["num_truncated_turns"] for trajectory in trajectories)
        return kept, sum(trajectory.status == "overflow" for trajectory in trajectories), cut

    async def theirs() -> tuple[int, int, int]:
        played = await run_lock_step(
            prompts,
            policy=Engines(engines),
            search=search.search_batch,
            tokenizer=words,
            limits=limits,
            max_context_tokens=RELEASE_CONTEXT_TOKENS,
            max_observation_tokens=RELEASE_OBSERVATION_TOKENS,
        )
        return sum(episode.num_kept for episode in played), 0, 0

    async def main() -> tuple[int, int, int]:
        async with AsyncExitStack() as stack:
            for engine in engines:
                await stack.enter_async_context(engine)
            return await (theirs() if lock_step else ours())

    (kept, overflows, cut_turns), wall_s = run_simulated(main())
    return Outcome(
        wall_s=wall_s,
        num_generated=sum(engine.num_generated for engine in engines),
        num_kept=kept,
        busy=sum(engine.busy_s for engine in engines) / len(engines) / wall_s,
        running=sum(engine.running_s for engine in engines) / len(engines) / wall_s,
        finished_s=sorted(finished_s),
        num_overflows=overflows,
        num_cut_turns=cut_turns,
    )


def _latency_s(scenario: Scenario, query: str) -> float:
    if derive_seed("slow", query) < scenario.slow_share * 2**31:
        return SLOW_SEARCH_MS / 1000
    return query_latency_s(query, *scenario.latency_ms)


def engine_speed(model: str, gpu: str, *, max_num_seqs: int, max_num_batched_tokens: int) -> Speed:
    """The speed of one GPU that holds the model, as the planning estimate has it."""
    shape, card = known_shape(model), KNOWN_GPUS[gpu]
    if shape is None:
        raise SystemExit(f"--model {model}: not one of the known architectures (dgpo/hardware/known_models.py)")
    return Speed(
        decode_step_s=lambda number, context: decode_step_s(
            shape, card, episodes=number, context=context, value=BFLOAT16, size=1
        ),
        prefill_tokens_per_s=card.flops * PREFILL_UTILISATION / (2 * shape.multiplied),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-episodes", type=int, default=512)
    parser.add_argument("--num-engines", type=int, default=8)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--gpu", default="h200")
    options = parser.parse_args()
    engine = load_config([]).hardware.engine
    speed = engine_speed(
        options.model,
        options.gpu,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
    )
    print(
        f"{options.model} on {options.gpu}: a step of 1, 64, 256 sequences of 1000 tokens takes "
        + ", ".join(f"{speed.decode_step_s(number, 1000) * 1e3:.2f}" for number in (1, 64, 256))
        + f" ms; {speed.prefill_tokens_per_s:.0f} tokens of prompts/s; up to {speed.max_num_seqs} sequences and "
        f"{speed.max_num_batched_tokens} tokens a step"
    )
    base = Scenario("searches of 20-200 ms", options.num_episodes, options.num_engines)
    scenarios = [
        base,
        replace(base, name="searches of 0 ms", latency_ms=(0.0, 0.0)),
        replace(base, name="1% of searches take 2 s", slow_share=0.01),
        replace(base, name="half of the turns end themselves", self_ending_share=0.5),
        replace(base, name="all turns end themselves", self_ending_share=1.0),
        replace(base, name="no prefix cache", prefix_caching=False),
        replace(base, name="one engine", num_engines=1),
    ]
    print(f"{'':34}{'wall s':>16}{'ratio':>7}{'tokens':>18}{'ratio':>7}{'running':>14}{'busy':>12}")
    for scenario in scenarios:
        ours, theirs = (play(scenario, speed, lock_step=lock_step) for lock_step in (False, True))
        print(
            f"{scenario.name:34}{ours.wall_s:8.2f}{theirs.wall_s:8.2f}{ours.wall_s / theirs.wall_s:7.2f}"
            f"{ours.num_generated:9}{theirs.num_generated:9}{ours.num_generated / theirs.num_generated:7.2f}"
            f"{ours.running:7.1f}{theirs.running:7.1f}{ours.busy:6.0%}{theirs.busy:6.0%}"
        )
    print("\nours, by budgets of tokens: wall s; s when 50, 90, 95, 99% were finished; episodes and turns cut; tokens")
    for episode, turn in ((4096, 500), (2560, 500), (2048, 500), (1536, 500), (4096, 300), (4096, 200)):
        budgets = {"max_response_tokens": episode, "max_turn_tokens": turn}
        ours = play(replace(base, budgets=budgets), speed, lock_step=False)
        at = [ours.finished_s[round(share * len(ours.finished_s)) - 1] for share in (0.5, 0.9, 0.95, 0.99)]
        print(
            f"{episode:6} an episode,{turn:4} a turn {ours.wall_s:8.2f}  {' '.join(f'{s:6.2f}' for s in at)}"
            f"{ours.num_overflows / options.num_episodes:8.1%}{ours.num_cut_turns:5}{ours.num_generated:9}"
        )


if __name__ == "__main__":
    main()
