"""How busy evaluation keeps vLLM: its generated tokens a second against vLLM's offline `generate` on the same turns.

    python scripts/bench/evaluation.py MODEL QUESTIONS.parquet [..] --indexes FOLDER [--num-questions N] [key=value ..]

First the episodes are played exactly as `python -m dgpo test` plays them, searches included, with its engine settings
and a retrieval server that has answered nothing yet. Then vLLM's offline engine, with the same settings in a process of
its own, gets all turns of those episodes at once: the recorded ids up to the turn as the prompt, and as many tokens to
write as the episode wrote there. Starting engines and server is not timed, and each engine has written a few tokens
before. Overrides such as `world=tiny hardware=cpu` are those of the command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dgpo.agent.trajectory import Trajectory, read_trajectories
from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows
from dgpo.engines.environment import export_environment
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes, play_episodes
from dgpo.engines.play import load_tokenizer, make_policy
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.pipeline.processes import Stages, index_folders, retrieval_server
from dgpo.runs.stopping import stopped_by_sigterm

WARM_UP_PROMPT, WARM_UP_TOKENS, WARM_UP_REQUESTS = list(range(5, 45)), 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("words", nargs="+", metavar="QUESTIONS.parquet | key=value")
    parser.add_argument("--num-questions", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=1, help="of both, in turn")
    parser.add_argument("--indexes", type=Path, help="served anew for every repetition; else retriever.url is asked")
    parser.add_argument("--offline", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    config = load_config([word for word in options.words if "=" in word])
    if options.offline:
        print(json.dumps(offline_generate(config, options.model, list(read_trajectories(options.offline)))))
        return
    tokenizer = load_tokenizer(options.model, trust_remote_code=False)
    planned = [
        episode
        for number, file in enumerate(word for word in options.words if "=" not in word)
        for episode in plan_episodes(read_rows(file), tokenizer, config=config, labels={"file": str(number)})
    ][: options.num_questions]
    print(json.dumps(settings(config, options.model), default=str), flush=True)
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            recorded = Path(folder) / "trajectories.jsonl"
            with served(options.indexes, Path(folder)) as url:
                config.retriever.url = url or config.retriever.url
                ours = asyncio.run(episodes(config, options.model, planned, tokenizer, recorded))
            command = [sys.executable, __file__, options.model, *options.words, f"--offline={recorded}"]
            offline = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        result = {"ours": ours, "offline": offline, "ratio": ours["tokens_per_s"] / offline["tokens_per_s"]}
        print(json.dumps({name: rounded(value) for name, value in result.items()}), flush=True)


def settings(config: Config, model: str) -> dict[str, dict[str, object]]:
    """What both sides share, and what each has for itself."""
    return {
        "both": {**greedy_policy(config, model).engine_arguments(), "environment": dict(config.hardware.env)},
        "ours": {
            "episodes in flight": config.hardware.engine.concurrency,
            "requests to the retrieval server": config.retriever.max_concurrency,
            "searches per request": config.retriever.max_queries_per_request,
            "engine forked from this process": config.hardware.engine.in_process,
        },
        "offline": {"turns": "all at once", "tokens per turn": "as recorded", "processes": "as vLLM starts them"},
    }


@contextlib.contextmanager
def served(indexes: Path | None, folder: Path) -> Iterator[str | None]:
    """The address of a new server over the folder's first index; None without a folder."""
    if indexes is None:
        yield None
        return
    name = next((path.name for path in index_folders(indexes)), None)
    if name is None:
        sys.exit(f"{indexes} holds no index folder; make one: python -m retriever.build")
    with retrieval_server(Stages(folder), indexes, default=name) as url:
        yield url


def greedy_policy(config: Config, model: str) -> VllmPolicy:
    return make_policy(config, model, temperature=0.0, trust_remote_code=False, log_probs=False)


async def episodes(
    config: Config, model: str, planned: list[PlannedEpisode], tokenizer: object, recorded: Path
) -> dict[str, float]:
    """Plays every planned episode, writes them to `recorded`, and returns the speed."""
    policy = greedy_policy(config, model)
    async with policy:
        warm_up = [
            policy.generate(
                WARM_UP_PROMPT, max_tokens=WARM_UP_TOKENS, stop=(), seed=None, request_id=f"warm-up {number}"
            )
            for number in range(WARM_UP_REQUESTS)
        ]
        await asyncio.gather(*warm_up)
        started = time.perf_counter()
        trajectories = await play_episodes(
            planned,
            policy=policy,
            tokenizer=tokenizer,
            config=config,
            path=recorded,
            settings={},
            name="episodes",
        )
        seconds = time.perf_counter() - started
    num_tokens = sum(sum(trajectory.response_mask) for trajectory in trajectories)
    num_searches = sum(trajectory.num_searches for trajectory in trajectories)
    speed = {"seconds": seconds, "tokens": num_tokens, "tokens_per_s": num_tokens / seconds}
    return {**speed, "episodes": len(trajectories), "searches": num_searches}


def offline_generate(config: Config, model: str, trajectories: list[Trajectory]) -> dict[str, float]:
    """The same turns through `vllm.LLM.generate`, all at once."""
    export_environment(config.hardware)
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**greedy_policy(config, model).engine_arguments())
    prompts, sampling = [], []
    for trajectory in trajectories:
        for turn in trajectory.turns:
            if turn.end > turn.start:
                ids = trajectory.prompt_ids + trajectory.response_ids[: turn.start]
                prompts.append(TokensPrompt(prompt_token_ids=ids))
                sampling.append(SamplingParams(temperature=0.0, max_tokens=turn.end - turn.start, ignore_eos=True))
    warm_up = [TokensPrompt(prompt_token_ids=WARM_UP_PROMPT)] * WARM_UP_REQUESTS
    llm.generate(warm_up, SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True), use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"seconds": seconds, "tokens": num_tokens, "tokens_per_s": num_tokens / seconds, "turns": len(prompts)}


def rounded(value: float | dict[str, float]) -> float | dict[str, float]:
    return {name: round(each, 1) for name, each in value.items()} if isinstance(value, dict) else round(value, 3)


if __name__ == "__main__":
    with stopped_by_sigterm():
        main()
