import asyncio

import pytest

from dgpo.agent.episode import Generation
from dgpo.engines.bounded_policy import BoundedPolicy
from dgpo.errors import DgpoError

TURN = {"max_tokens": 1, "stop": (), "seed": None, "request_id": "1"}


class EngineDeadError(Exception):
    """vLLM's, by name."""


class Scripted:
    """Raises or waits for what it is given, then answers."""

    def __init__(self, what):
        self.what = what

    async def generate(self, token_ids, **_):
        if isinstance(self.what, Exception):
            raise self.what
        await asyncio.sleep(self.what)
        return Generation(token_ids, [0.0], "stop")


async def test_a_turn_in_time_is_passed_on():
    generation = await BoundedPolicy(Scripted(0.01), turn_timeout_s=5).generate([7], **TURN)
    assert generation.token_ids == [7]


async def test_an_engine_that_hangs_is_given_up():
    with pytest.raises(DgpoError, match=r"turn_timeout_s=0\.1: it hangs.*resume=true"):
        await BoundedPolicy(Scripted(60), turn_timeout_s=0.1).generate([7], **TURN)


async def test_an_engine_that_died_is_told_by_name():
    with pytest.raises(DgpoError, match=r"the engine died \(EngineDeadError\).*resume=true"):
        await BoundedPolicy(Scripted(EngineDeadError()), turn_timeout_s=5).generate([7], **TURN)


@pytest.mark.parametrize("error", [ValueError("a mistake"), TimeoutError("of someone else")])
async def test_other_errors_are_themselves(error):
    with pytest.raises(type(error), match=str(error)):
        await BoundedPolicy(Scripted(error), turn_timeout_s=5).generate([7], **TURN)
