"""vLLM as an episode policy, on a tiny random model: ids verbatim, log-probs of the model, seeds, stop strings."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dgpo.config.load import load_config
from dgpo.engines.vllm_policy import VllmPolicy

pytestmark = pytest.mark.engine

PROMPT = [5, 17, 42, 60, 7]


def make_model(folder, *, seed):
    """A random Qwen2 of 40 thousand parameters that speaks printable ASCII, one character a token."""
    vocabulary = {symbol: index for index, symbol in enumerate(["<eos>", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).to(torch.float32).save_pretrained(folder)


class CountingPolicy(VllmPolicy):
    """Keeps vLLM's count of prompt tokens that its prefix cache held, by request."""

    hits: ClassVar[list[int]] = []

    def engine_arguments(self):
        return {**super().engine_arguments(), "disable_log_stats": False, "block_size": 32}  # on CPUs vLLM takes 128

    async def start(self):
        await super().start()
        self._engine.logger_manager.stat_loggers[:] = [self]

    def record(self, scheduler_stats, *_, **__):
        if scheduler_stats is not None and scheduler_stats.prefix_cache_stats.queries:
            self.hits.append(scheduler_stats.prefix_cache_stats.hits)


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """One engine for all tests: what it generated for a set of requests, and the model's folder."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, seed=0)
    other = tmp_path_factory.mktemp("other_weights")
    make_model(other, seed=1)
    hardware = load_config(["world=tiny", "hardware=cpu"]).hardware
    before = children()
    told = {}

    async def main():
        async with CountingPolicy(
            str(folder), hardware=hardware, max_model_len=128, temperature=1.0, seed=1, replaceable_weights=True
        ) as policy:

            async def ask(name, seed, stop=(), max_tokens=12):
                return await policy.generate(
                    PROMPT, max_tokens=max_tokens, stop=stop, seed=seed, request_id=f"{name}-{seed}"
                )

            cancelled = asyncio.create_task(ask("cancelled", 9, max_tokens=120))
            while not policy._engine.output_processor.has_unfinished_requests():
                await asyncio.sleep(0)
            cancelled.cancel()
            results = await asyncio.gather(ask("a", 1), ask("b", 1), ask("c", 2), cancelled, return_exceptions=True)
            stop = chr(32 + results[0].token_ids[10])
            results.append(await ask("stopped", 1, (stop,)))
            unfinished = policy._engine.output_processor.get_num_unfinished_requests()
            policy.on_text = lambda request, text: told.setdefault(request, []).append(text)
            results.append(await ask("told", 1))
            results.append(await ask("told-stopped", 1, (stop,)))
            two_tokens = "".join(chr(32 + token) for token in results[0].token_ids[4:6])
            results.append(await ask("stopped-by-text", 1, (two_tokens,)))
            for turn in (100, 110):
                await policy.generate(
                    (PROMPT * 22)[:turn], max_tokens=4, stop=(), seed=1, request_id=f"turn of {turn} tokens"
                )
            await policy.load_weights(other)
            return [*results, await ask("replaced", 1)], unfinished

    results, unfinished = asyncio.run(main())
    return (folder, other), results, unfinished, children() - before, told


def children():
    """Command lines by process id; multiprocessing's own tracker lives as long as this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended, and that nobody has waited for
            found.add((process.pid, " ".join(process.cmdline())))
    return {(pid, command) for pid, command in found if "resource_tracker" not in command}


def test_log_probs_are_those_of_the_model_on_the_ids_that_were_sampled(generations):
    (folder, other_folder), (first, _, other, *_, replaced), *_ = generations
    for path, generation in ((folder, first), (folder, other), (other_folder, replaced)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert len(generation.token_ids) == len(generation.log_probs) > 0
        ids = torch.tensor([PROMPT + generation.token_ids])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]
        expected = log_probs.gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert torch.tensor(generation.log_probs) == pytest.approx(expected, abs=1e-3)


def test_new_weights_take_the_place_of_the_old_ones_and_of_their_prefix_cache(generations):
    """The log-probs are checked above; the same request, with the same seed and prompt, now goes another way."""
    _, (first, *_, replaced), *_ = generations
    assert replaced.token_ids != first.token_ids


def test_a_later_turn_finds_whole_blocks_of_the_one_before_in_the_prefix_cache(generations):
    assert CountingPolicy.hits[-2:] == [96, 0], "96 of 100 tokens are three blocks; new weights empty the cache"


async def test_weights_are_loaded_only_into_an_engine_made_for_it():
    hardware = load_config(["world=tiny", "hardware=cpu"]).hardware
    policy = VllmPolicy("model", hardware=hardware, max_model_len=128, temperature=1.0, seed=1)
    with pytest.raises(RuntimeError, match="replaceable_weights=True"):
        await policy.load_weights("other")


def test_a_request_is_repeatable_by_its_own_seed(generations):
    _, (first, again, other, *_), *_ = generations
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


def test_a_stop_string_ends_the_turn_and_is_kept(generations):
    _, (first, _, _, _, stopped, *_), *_ = generations
    last = first.token_ids.index(first.token_ids[10])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == first.token_ids[: last + 1]


def test_a_stop_string_of_several_tokens_ends_the_turn_on_the_last_of_them(generations):
    _, (first, *_, stopped, _), *_ = generations
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == first.token_ids[: len(stopped.token_ids)]
    assert stopped.token_ids[-2:] == first.token_ids[4:6]
    assert len(stopped.token_ids) <= 6


def test_the_token_limit_is_reported(generations):
    _, (first, *_), *_ = generations
    assert (first.finish_reason, len(first.token_ids)) == ("length", 12)


def test_text_is_told_while_it_is_written_and_the_turn_stays_the_same(generations):
    _, (first, _, _, _, stopped, told, told_stopped, *_), *_, pieces = generations
    assert (told.token_ids, told.finish_reason) == (first.token_ids, first.finish_reason)
    assert told.log_probs == pytest.approx(first.log_probs, abs=1e-3)
    assert (told_stopped.token_ids, told_stopped.finish_reason) == (stopped.token_ids, "stop")
    assert len(pieces["told-1"]) > 1
    for name, generation in (("told-1", told), ("told-stopped-1", told_stopped)):
        assert "".join(pieces[name]) == "".join(chr(32 + token) for token in generation.token_ids)


def test_cancelling_aborts_the_request(generations):
    _, results, unfinished, *_ = generations
    assert isinstance(results[3], asyncio.CancelledError)
    assert unfinished == 0


def test_stopping_leaves_no_engine_behind(generations):
    assert not generations[3]


START = """
import asyncio, signal, sys
from dgpo.config.load import load_config
from dgpo.engines.vllm_policy import VllmPolicy

async def main():
    hardware = load_config(["world=tiny", "hardware=cpu", "hardware.engine.dtype=bfloat16"]).hardware
    async with VllmPolicy(sys.argv[1], hardware=hardware, max_model_len=128, temperature=1.0, seed=1) as policy:
        turn = await policy.generate([5, 17, 42, 60, 7], max_tokens=12, stop=(), seed=1, request_id="first")
        print("ready:", len(turn.token_ids), "tokens", flush=True)
        signal.pause()

if __name__ == "__main__":
    asyncio.run(main())
"""


@contextlib.contextmanager
def started_engine(model: Path, folder: Path, **environment: str):
    """A process of its own and its engine, which has written a turn in bfloat16."""
    script = folder / "start.py"
    script.write_text(START)
    with (
        (folder / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(script), str(model)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        ) as parent,
    ):
        try:
            said = next((line for line in parent.stdout if "ready" in line), "nothing")
            assert said == "ready: 12 tokens\n", (folder / "stderr.txt").read_text()[-2000:]
            (engine,) = [p for p in psutil.Process(parent.pid).children(recursive=True) if "EngineCore" in p.name()]
            yield parent, engine
        finally:
            parent.kill()


def test_an_engine_dies_with_its_parent_even_when_that_is_killed(generations, tmp_path):
    with started_engine(generations[0][0], tmp_path) as (parent, engine):
        parent.kill()
        engine.wait(timeout=10)


def test_an_engine_that_crashes_says_so_and_runs_where_onednn_leaves_the_tiles_alone(generations, tmp_path):
    """On a CPU with AMX the first turn was an illegal instruction: nobody had asked the kernel for the tiles."""
    with started_engine(generations[0][0], tmp_path, ONEDNN_MAX_CPU_ISA="AVX512_CORE_FP16") as (_, engine):
        engine.send_signal(signal.SIGILL)
        engine.wait(timeout=10)
        assert "Fatal Python error: Illegal instruction" in (tmp_path / "stderr.txt").read_text()
