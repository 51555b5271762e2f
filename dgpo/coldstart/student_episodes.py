"""DistiLLM's second source of examples: episodes that the student plays itself, with search, while it is trained.

Every rank runs an engine of its own beside the trainer, plays its share of a step's questions, and keeps its share of
the replay buffer: no rank waits idle, and no episode travels. What a step trains on is drawn from (seed, step), so all
ranks agree without talking.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from dgpo.agent.seeds import derive_seed
from dgpo.agent.trajectory import Trajectory
from dgpo.coldstart.examples import TrainingExample
from dgpo.coldstart.replay import AdaptiveSchedule, ReplayBuffer
from dgpo.config.schema import Config
from dgpo.engines.episode_runner import PlannedEpisode, forget_episodes, play_episodes
from dgpo.engines.play import make_policy
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.errors import ConfigError
from dgpo.files import atomic_write_text

Result = TypeVar("Result")


class StudentEpisodes:
    """Chooses what each step trains on, and plays the student's episodes. Use as a context manager: it ends the engine.

    Args:
        config: episode rules, retriever, engine, and `distill.student_episodes`.
        model: the student as it starts: its config and tokenizer; the weights are replaced before every play.
        folder: of the stage; trajectories go to its `student_episodes/`, weights in passing to `student_weights/`.
        rank, num_ranks: of this process.
    """

    def __init__(self, config: Config, *, model: str, tokenizer: Any, folder: Path, rank: int = 0, num_ranks: int = 1):
        settings = config.distill.student_episodes
        self.config, self.model, self.tokenizer, self.folder = config, model, tokenizer, folder
        self.rank, self.num_ranks = rank, num_ranks
        self.schedule = AdaptiveSchedule(
            settings.initial_threshold,
            settings.increment,
            settings.min_rise,
            level_follows_down=settings.level_follows_down,
        )
        self.buffer = ReplayBuffer(ceil(settings.buffer_size / num_ranks))
        self.counts: Counter[str] = Counter()  # steps by source, episodes, failed searches
        self._buffers_full = False
        self._policy: VllmPolicy | None = None
        self._loop = asyncio.new_event_loop()  # the engine lives in one loop, beside the trainer's synchronous one

    def __enter__(self) -> StudentEpisodes:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._policy is not None:
            self._wait(self._policy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        shutil.rmtree(self.folder / "student_weights", ignore_errors=True)

    def choose(
        self,
        teacher_examples: Sequence[TrainingExample],
        *,
        step: int,
        num_steps: int,
        save_weights: Callable[[Path], None],
        on_all_ranks: Callable[[bool], bool],
    ) -> list[TrainingExample]:
        """What this rank trains on in step `step` (1 for the first).

        Args:
            teacher_examples: this rank's share of the step's batch; their questions are what the student plays.
            save_weights: writes the student's present weights into a folder; every rank calls it.
            on_all_ranks: whether something holds on every rank.
        """
        draw = random.Random(derive_seed(self.config.seed, "source", step)).random()
        source = self.schedule.source(draw, step=step, num_steps=num_steps, buffer_full=self._buffers_full)
        self.counts[source] += 1
        if source == "teacher":
            return list(teacher_examples)
        if source == "fresh":
            chosen = self._play_now(teacher_examples, step=step, save_weights=save_weights)
            self.buffer.add(chosen)
            self._buffers_full = on_all_ranks(self.buffer.full)
            return chosen
        rng = random.Random(derive_seed(self.config.seed, "replay", step, self.rank))
        return self.buffer.sample(len(teacher_examples), rng)

    def observe(self, **held_out: float) -> None:
        """After each evaluation, with the held-out values by the names that `student_episodes.watched` chooses from."""
        self.schedule = self.schedule.observe(held_out[self.config.distill.student_episodes.watched])

    def metrics(self, total: Callable[[float], float]) -> dict[str, float]:
        """Counts since the start of the run. `total` sums a number over all ranks."""
        return {
            "sgo/threshold": self.schedule.threshold,
            "sgo/buffer_size": total(len(self.buffer)),
            "sgo/fresh_steps": self.counts["fresh"],
            "sgo/replay_steps": self.counts["replay"],
            "sgo/teacher_steps": self.counts["teacher"],
            "sgo/episodes": total(self.counts["episodes"]),
            "sgo/failed_searches": total(self.counts["failed_searches"]),
        }

    def save_state(self, folder: Path) -> None:
        state = {"schedule": asdict(self.schedule), "counts": self.counts, "full": self._buffers_full}
        atomic_write_text(self._state_file(folder), json.dumps({**state, "buffer": self.buffer.state()}))

    def load_state(self, folder: Path) -> None:
        """Raises ConfigError when the run had another number of ranks: each keeps a buffer of its own."""
        wrote = len(list(folder.glob("student_episodes_*.json")))
        if wrote != self.num_ranks:
            raise ConfigError(
                f"{folder} was written by {wrote} ranks, each with a replay buffer of its own, and cannot go on with "
                f"{self.num_ranks}: go back to as many (hardware.num_nodes x hardware.gpus_per_node)"
            )
        state = json.loads(self._state_file(folder).read_text())
        self.schedule, self.counts = AdaptiveSchedule(**state["schedule"]), Counter(state["counts"])
        self._buffers_full = state["full"]
        self.buffer.load_state(state["buffer"])

    def _state_file(self, folder: Path) -> Path:
        return folder / f"student_episodes_{self.rank}.json"

    def _play_now(
        self, examples: Sequence[TrainingExample], *, step: int, save_weights: Callable[[Path], None]
    ) -> list[TrainingExample]:
        weights = self.folder / "student_weights"
        save_weights(weights)
        trajectories = self._wait(self._play(examples, step=step, weights=weights))
        played = [t for t in trajectories if t.status != "search_failed"]
        self.counts["episodes"] += len(played)
        self.counts["failed_searches"] += len(trajectories) - len(played)
        return [TrainingExample.from_trajectory(trajectory) for trajectory in played]

    async def _play(self, examples: Sequence[TrainingExample], *, step: int, weights: Path) -> list[Trajectory]:
        policy = await self._started_policy()
        await policy.load_weights(weights)
        planned = [
            PlannedEpisode(f"step{step}/{self.rank}/{i}", {"extra_info": {"corpus": e.corpus}}, e.prompt_ids)
            for i, e in enumerate(examples)
        ]
        path = self.folder / "student_episodes" / f"step_{step:06d}_rank_{self.rank}.jsonl"
        forget_episodes(path)  # a run that was killed in this step had weights with other last digits
        return await play_episodes(
            planned,
            policy=policy,
            tokenizer=self.tokenizer,
            config=self.config,
            path=path,
            settings={},
            name=f"student episodes, step {step}",
        )

    async def _started_policy(self) -> VllmPolicy:
        if self._policy is None:
            self._policy = make_policy(
                self.config,
                self.model,
                temperature=self.config.distill.student_episodes.temperature,
                trust_remote_code=self.config.student.trust_remote_code,
                replaceable_weights=True,
            )
            await self._policy.start()
        return self._policy

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
