"""Step 4: vLLM as the episode policy: tokens and log-probs against Hugging Face, stop strings, sleep, speed."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import torch
from smoke.checks import Checks
from smoke.models import random_ids, save_model
from transformers import AutoModelForCausalLM

from dgpo.agent.episode import Generation
from dgpo.config.load import load_config
from dgpo.engines.vllm_policy import VllmPolicy

PROMPT, TURN, CONTEXT = 64, 32, 512
TOLERANCE = 0.02  # nats, of log-probs in bfloat16

READABLE = re.compile(r"[^\ufffd\s]{2,4}")


class SleepingPolicy(VllmPolicy):
    """An engine that gives its memory back, as in RL."""

    def engine_arguments(self) -> dict[str, Any]:
        return {**super().engine_arguments(), "enable_sleep_mode": self.hardware.engine.sleep}


def run(checks: Checks, *, device: str, folder: Path) -> None:
    model = save_model("qwen2.5-0.5b", folder / "model", seed=0, device=device)
    asyncio.run(_run(checks, device, model))


def settings(device: str) -> list[str]:
    group = "cpu" if device == "cpu" else "h200x8"
    return [f"hardware={group}", "hardware.engine.gpu_memory_utilization_alone=0.3"]


async def _run(checks: Checks, device: str, model: Path) -> None:
    hardware = load_config(settings(device)).hardware
    started = time.perf_counter()
    async with SleepingPolicy(str(model), hardware=hardware, max_model_len=CONTEXT, temperature=0, seed=1) as policy:
        checks.number("start, s", time.perf_counter() - started)
        await _greedy(checks, policy, model, device)
        await _speed(checks, policy, device)
        if device == "cuda":
            await _sleep(checks, policy)


async def _turn(policy: VllmPolicy, name: str, ids: list[int], *, stop: tuple[str, ...] = ()) -> Generation:
    return await policy.generate(ids, max_tokens=TURN, stop=stop, seed=None, request_id=name)


async def _greedy(checks: Checks, policy: VllmPolicy, model: Path, device: str) -> None:
    """The log-probs of a turn are the model's; a stop string ends it where it appears."""
    prompts = random_ids(4, PROMPT, vocab=500, seed=1, device="cpu").tolist()
    turns = [await _turn(policy, f"greedy-{index}", ids) for index, ids in enumerate(prompts)]
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=kind).to(device)
    differences = []
    for ids, turn in zip(prompts, turns, strict=True):
        whole = torch.tensor([ids + turn.token_ids], device=device)
        with torch.no_grad():
            log_probs = reference(whole).logits[0, PROMPT - 1 : -1].float().log_softmax(-1)
        own = log_probs.gather(-1, whole[0, PROMPT:, None])[:, 0].cpu()
        differences += (own - torch.tensor(turn.log_probs)).abs().tolist()
    checks.below("log-probs against Hugging Face's, mean difference", sum(differences) / len(differences), TOLERANCE)
    checks.number("log-probs, largest difference", max(differences))
    decode = policy._engine.get_tokenizer().decode
    halves = [decode(turn.token_ids)[: TURN // 2] for turn in turns]
    # A random model also writes halves of characters, which are no text to stop at.
    found = [(prompt, READABLE.search(half)) for prompt, half in zip(prompts, halves, strict=True)]
    prompt, text = next((prompt, match.group()) for prompt, match in found if match)
    stopped = await _turn(policy, "stop", prompt, stop=(text,))
    right = len(stopped.token_ids) < TURN and stopped.finish_reason == "stop"
    checks.true("a stop string ends the turn", right, f"{len(stopped.token_ids)} of {TURN} tokens")


async def _speed(checks: Checks, policy: VllmPolicy, device: str) -> None:
    """Tokens per second of many episodes at temperature 1, with and without seeds, with one output or one per token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    count, tokens = (64, 256) if device == "cuda" else (8, 16)
    prompts = random_ids(count, PROMPT, vocab=500, seed=2, device="cpu").tolist()

    async def play(name: str, index: int, **settings: Any) -> None:
        sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, **settings)
        prompt = {"type": "token", "prompt_token_ids": prompts[index]}
        async for _ in policy._engine.generate(prompt, sampling, f"{name}-{index}"):
            pass

    ways: dict[str, dict[str, Any]] = {
        "warm": {"output_kind": RequestOutputKind.FINAL_ONLY},
        "one output": {"output_kind": RequestOutputKind.FINAL_ONLY},
        "one output, seeds": {"output_kind": RequestOutputKind.FINAL_ONLY, "seed": 1},
        "an output per token": {"output_kind": RequestOutputKind.CUMULATIVE},
    }
    for way, sampling in ways.items():
        started = time.perf_counter()
        await asyncio.gather(*(play(way, index, **sampling) for index in range(count)))
        if way != "warm":
            checks.number(f"tokens per s, {count} episodes, {way}", count * tokens / (time.perf_counter() - started))


async def _sleep(checks: Checks, policy: VllmPolicy) -> None:
    """Asleep the engine gives its memory back; awake it writes as before."""
    ids = random_ids(PROMPT, vocab=500, seed=3, device="cpu").tolist()
    before = await _turn(policy, "before", ids)
    free = torch.cuda.mem_get_info()[0]
    await policy._engine.sleep(level=1)
    checks.number("GiB that sleep frees", (torch.cuda.mem_get_info()[0] - free) / 2**30)
    checks.true("sleep frees memory", torch.cuda.mem_get_info()[0] - free > 2**33)
    await policy._engine.wake_up()
    await policy._engine.reset_prefix_cache()
    after = await _turn(policy, "after", ids)
    checks.true("after it the engine writes the same", after.token_ids == before.token_ids)
