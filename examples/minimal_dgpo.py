"""DGPO (arXiv 2508.20324) in one file of plain torch, on the tiny world: no veRL, no Ray, no vLLM, no server.

    python examples/minimal_dgpo.py [--world runs/quickstart-.../world] [--steps 20] [--seed 1]

Phase 1, the cold start: the teacher plays episodes, and the student learns the correct ones by knowledge distillation.
Phase 2, DGPO: the student plays; PPO with exact match as the reward; and on the episodes that it got wrong, on those
only, a KL term pulls it back to the frozen teacher. The framework does the same on any number of GPUs: the agent and
the mathematics are the ones imported here. Settings are those of `world=tiny` (configs/world/tiny.yaml).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jsonl_search import JsonlSearch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo.agent.episode import EpisodeLimits, Generation, run_episode
from dgpo.agent.protocol import STOP_STRINGS, encode_prompt
from dgpo.agent.trajectory import Trajectory
from dgpo.algorithms.advantages import generalised_advantages
from dgpo.algorithms.distillation import DISTILLATION_LOSSES, LossSettings
from dgpo.algorithms.divergences import reverse_kl
from dgpo.algorithms.reduce import divide, masked_mean
from dgpo.algorithms.selective_kl import compute_gate, subtract_teacher_kl
from dgpo.config.load import load_config
from dgpo.data.rows import read_rows
from dgpo.metrics.exact_match import exact_match
from dgpo.tinyworld.build import WorldSettings, build_world
from dgpo.tinyworld.teacher import train_teacher

CONFIG = load_config(["world=tiny", "hardware=cpu"])
EPISODE, DISTILL, TRAIN, NUM_TEST = CONFIG.episode, CONFIG.distill, CONFIG.train, 200


class TorchPolicy:
    """A model as an episode policy: turns that wait at the same time are sampled as one batch."""

    def __init__(self, model: Any, tokenizer: Any, temperature: float) -> None:
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.waiting: list[tuple[list[int], int, asyncio.Future[Generation]]] = []

    async def generate(self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], **_: Any) -> Generation:
        loop = asyncio.get_running_loop()
        if not self.waiting:
            loop.call_soon(self._answer, stop)  # after all other episodes that go on now
        self.waiting.append((token_ids, max_tokens, loop.create_future()))
        return await self.waiting[-1][2]

    def _answer(self, stop: Sequence[str]) -> None:
        prompts, budgets, futures = zip(*self.waiting, strict=True)
        self.waiting = []
        try:
            for future, turn in zip(futures, self._sample(prompts, budgets, stop), strict=True):
                future.set_result(turn)
        except Exception as error:  # nobody else waits for a callback
            futures[0].set_exception(error)

    def _sample(
        self, prompts: Sequence[list[int]], budgets: Sequence[int], stop: Sequence[str]
    ) -> Iterator[Generation]:
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        output = self.model.generate(
            torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
            max_new_tokens=max(budgets),
            stop_strings=list(stop),
            tokenizer=self.tokenizer,
            **({"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature else {}),
        )
        for row, budget in zip(output[:, longest:].tolist(), budgets, strict=True):
            turn = list(takewhile(lambda token: token != pad, row))
            yield Generation(turn[:budget], [], "stop" if len(turn) < budget else "length")


async def play(policy: TorchPolicy, rows: list[dict], search: JsonlSearch, stop: Sequence[str]) -> list[Trajectory]:
    """One episode per question, by the loop that all of the framework uses."""
    limits = EpisodeLimits.of(EPISODE)
    episodes = (
        run_episode(
            episode_id=f"{index}/{row['extra_info']['id']}",
            prompt_ids=encode_prompt(policy.tokenizer, row["prompt"]),
            policy=policy,
            search=search,
            tokenizer=policy.tokenizer,
            limits=limits,
            stop=stop,
            corpus=row["extra_info"]["corpus"],
        )
        for index, row in enumerate(rows)
    )
    return list(await asyncio.gather(*episodes))


def is_correct(trajectory: Trajectory, row: dict[str, Any]) -> float:
    return float(exact_match(trajectory.answer or "", row["reward_model"]["ground_truth"]["target"]))


@dataclass
class Batch:
    """Episodes, padded on the right. `mask` is I(y_t): 1 where the policy wrote the token, never on observations.

    ids [B, L]; all else is [B, L - 1], at position t about token t + 1.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], *, pad_token_id: int) -> Batch:
        longest = max(len(t.prompt_ids) + len(t.response_ids) for t in trajectories)
        ids = torch.full((len(trajectories), longest), pad_token_id)
        mask = torch.zeros(len(trajectories), longest)
        for row, t in enumerate(trajectories):
            begin, end = len(t.prompt_ids), len(t.prompt_ids) + len(t.response_ids)
            ids[row, :end] = torch.tensor(t.prompt_ids + t.response_ids)
            mask[row, begin:end] = torch.tensor(t.response_mask, dtype=torch.float32)
        return cls(ids, mask[:, 1:])

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]

    def scores(self, correct: Tensor) -> Tensor:
        """The outcome reward, on each episode's last token."""
        positions = torch.arange(self.mask.shape[1]) * self.mask
        return torch.zeros_like(self.mask).scatter(1, positions.argmax(1, keepdim=True), correct[:, None])


def distil(student: nn.Module, teacher: nn.Module, episodes: list[Trajectory], *, pad_token_id: int, seed: int) -> None:
    """(1 - r) CE + r KL(teacher || student) on the teacher's correct episodes, on policy tokens (equation 1)."""
    settings = LossSettings(kl_ratio=DISTILL.kl_ratio, skew=0.1, jsd_beta=0.5, taid_t=0.0)
    token_loss = DISTILLATION_LOSSES["kd"].token_loss(settings)
    num_steps = DISTILL.epochs * (len(episodes) // DISTILL.batch_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=DISTILL.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, DISTILL.learning_rate, num_steps, pct_start=0.1)
    rng = random.Random(seed)
    for _ in range(DISTILL.epochs):
        shuffled = rng.sample(episodes, len(episodes) // DISTILL.batch_size * DISTILL.batch_size)
        for part in slices(len(shuffled), DISTILL.batch_size):
            batch = Batch.of(shuffled[part], pad_token_id=pad_token_id)
            at = batch.mask.bool()
            with torch.no_grad():
                teacher_logits = teacher(batch.ids).logits[:, :-1][at]
            loss = token_loss(student(batch.ids).logits[:, :-1][at], teacher_logits, batch.ids[:, 1:][at]).mean()
            step(loss, student, optimizer)
            schedule.step()


class Critic(nn.Module):
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(student.model)
        self.head = nn.Linear(student.config.hidden_size, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.backbone(ids).last_hidden_state)[..., 0]


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017), averaged over policy tokens."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - TRAIN.clip_ratio, 1 + TRAIN.clip_ratio)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = old_values + (values - old_values).clamp(-TRAIN.value_clip, TRAIN.value_clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def teacher_loss(logits: Tensor, batch: Batch, gate: Tensor, teacher: nn.Module) -> Tensor:
    """sum(gate * I(y_t) * KL(student || teacher)) / policy tokens: the term's `exact` form, over the vocabulary."""
    at = (batch.mask * gate[:, None]).bool()
    with torch.no_grad():
        teacher_logits = teacher(batch.ids).logits[:, :-1][at]
    return divide(reverse_kl(logits[at], teacher_logits).sum(), batch.mask.sum())


def losses(
    student: nn.Module, critic: nn.Module, teacher: nn.Module, batch: Batch, correct: Tensor, *, form: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(actor's loss, critic's loss) of each mini-batch of one step; what they share is from before the first update.

    Args:
        correct: [B] 1 where the episode's answer is right: the reward, and what closes the gate.
        form: `exact`, the teacher term as a loss; or `reward`, the paper's: beta (log p_student - log p_teacher) taken
            off the reward of each sampled token, r_t = score_t - beta * 1[wrong] * I(y_t) * (..).
    """
    gate = compute_gate(correct, "failed")
    with torch.no_grad():
        old_log_probs = batch.log_probs(student(batch.ids).logits[:, :-1])
        old_values = critic(batch.ids)[:, :-1] * batch.mask
        rewards = batch.scores(correct)
        if form == "reward":
            rewards = subtract_teacher_kl(
                rewards,
                student_log_probs=old_log_probs,
                teacher_log_probs=batch.log_probs(teacher(batch.ids).logits[:, :-1]),
                response_mask=batch.mask,
                gate=gate,
                kl_coef=0.001,
            )
        advantages, returns = generalised_advantages(
            rewards, response_mask=batch.mask, values=old_values, gamma=TRAIN.gamma, lam=TRAIN.gae_lambda
        )
    for part in slices(len(batch.ids), TRAIN.mini_batch_size):
        mini = Batch(batch.ids[part], batch.mask[part])
        logits = student(mini.ids).logits[:, :-1]
        actor = policy_loss(mini.log_probs(logits), old_log_probs[part], advantages[part], mini.mask)
        if form == "exact":
            actor = actor + teacher_loss(logits, mini, gate[part], teacher)
        yield actor, value_loss(critic(mini.ids)[:, :-1], old_values[part], returns[part], mini.mask)


def slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), TRAIN.max_grad_norm)
    optimizer.step()


def run(world: Path, *, steps: int, form: str, seed: int) -> dict[str, float]:
    """Both phases; prints, and returns, exact match on held-out questions before, between and after them."""
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    student = AutoModelForCausalLM.from_pretrained(world / "models" / "student_untrained")
    teacher = AutoModelForCausalLM.from_pretrained(world / "models" / "teacher").eval().requires_grad_(False)
    search = JsonlSearch(str(world / "corpora"))
    questions = {name: read_rows(world / "data" / f"{name}.parquet") for name in ("collect", "train", "test")}
    ems, started = {}, time.perf_counter()

    def sampled(model: nn.Module, rows: list, temperature: float, stop: Sequence[str] = STOP_STRINGS) -> list:
        return asyncio.run(play(TorchPolicy(model, tokenizer, temperature), rows, search, stop))

    def test(name: str) -> None:
        rows = questions["test"][:NUM_TEST]
        ems[name] = sum(map(is_correct, sampled(student, rows, 0.0), rows)) / len(rows)
        print(f"{name:<10} exact match {ems[name]:.3f}   ({time.perf_counter() - started:.0f} s)", flush=True)

    test("untrained")
    # Phase 1. The stop at </answer> is left out, so that the teacher's end of sequence is sampled, and then learned.
    played = sampled(teacher, questions["collect"], CONFIG.collect.temperature, stop=("</search>",))
    kept = [t for t, row in zip(played, questions["collect"], strict=True) if is_correct(t, row)]
    distil(student, teacher, kept, pad_token_id=tokenizer.pad_token_id, seed=seed)
    test("kd")
    # Phase 2.
    critic = Critic(student)
    actor_optimizer = torch.optim.AdamW(student.parameters(), lr=TRAIN.actor_learning_rate, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=TRAIN.critic_learning_rate, weight_decay=0.0)
    warm_up = max(1, TRAIN.actor_warmup_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(actor_optimizer, lambda index: min(1.0, (index + 1) / warm_up))
    order = random.Random(seed).sample(questions["train"], len(questions["train"]))
    for index in range(steps):
        rows = [order[(index * TRAIN.batch_size + i) % len(order)] for i in range(TRAIN.batch_size)]
        episodes = sampled(student, rows, TRAIN.temperature)
        correct = torch.tensor([is_correct(t, row) for t, row in zip(episodes, rows, strict=True)])
        batch = Batch.of(episodes, pad_token_id=tokenizer.pad_token_id)
        for actor_loss, critic_loss in losses(student, critic, teacher, batch, correct, form=form):
            step(critic_loss, critic, critic_optimizer)
            step(actor_loss, student, actor_optimizer)
        schedule.step()
        print(f"step {index + 1:>3}   exact match in training {correct.mean():.3f}", flush=True)
    test("dgpo")
    return ems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, help="a tiny world with its teacher; made if not given (a minute)")
    parser.add_argument("--steps", type=int, default=TRAIN.num_steps, help="of DGPO")
    parser.add_argument("--form", choices=("exact", "reward"), default="exact", help="of the teacher term")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if not options.world:
            build_world(Path(scratch), WorldSettings(seed=options.seed))
            output = Path(scratch, "models/teacher")
            train_teacher(Path(scratch), output, seed=options.seed, hardware=CONFIG.hardware)
        run(options.world or Path(scratch), steps=options.steps, form=options.form, seed=options.seed)
