"""Two engines behind one policy, on a CPU: the same turns as one engine writes, and an episode stays where it began."""

import asyncio

import pytest

from dgpo.config.load import load_config
from dgpo.engines.policy_pool import PolicyPool, num_engines
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.errors import DgpoError
from tests.engine.test_vllm_policy import PROMPT, make_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]
HARDWARE = load_config(["world=tiny", "hardware=cpu"]).hardware


def policy_maker(folder):
    def make():
        return VllmPolicy(str(folder), hardware=HARDWARE, max_model_len=128, temperature=1.0, seed=1)

    return make


async def write(policy, count):
    requests = [
        policy.generate(PROMPT, max_tokens=8, stop=(), seed=number, request_id=f"e{number}") for number in range(count)
    ]
    return await asyncio.gather(*requests)


def test_two_engines_write_what_one_writes(tmp_path):
    make_model(tmp_path / "model", seed=0)
    make = policy_maker(tmp_path / "model")

    async def pooled():
        async with PolicyPool(make, hardware=HARDWARE, size=2) as policy:
            return await write(policy, 12)

    async def alone():
        async with make() as policy:
            return await write(policy, 12)

    several, one = asyncio.run(pooled()), asyncio.run(alone())
    assert [each.token_ids for each in several] == [each.token_ids for each in one]


def test_a_second_pool_follows_in_the_same_process_and_names_an_engine_that_does_not_start(tmp_path):
    async def start():
        async with PolicyPool(policy_maker(tmp_path / "none"), hardware=HARDWARE, size=2):
            pass

    with pytest.raises(DgpoError, match="none"):
        asyncio.run(start())


def test_a_node_without_gpus_has_one_engine():
    assert num_engines(load_config(["world=tiny", "hardware=cpu"]).hardware) == 1
    assert num_engines(load_config(["world=tiny", "hardware=cpu", "hardware.num_nodes=2"]).hardware) == 2
