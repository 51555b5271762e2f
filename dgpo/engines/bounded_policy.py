"""A policy that never waits for an engine that is gone: a turn has a bound, and a dead engine is told by name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dgpo.agent.episode import Generation, Policy
from dgpo.errors import DgpoError

# Errors of vLLM and Ray, alone or as the cause of another one, by name: neither has to be imported.
ENGINE_ERRORS = ("EngineDeadError", "ActorDiedError", "ActorUnavailableError", "RayActorError")


class BoundedPolicy:
    """Passes turns on to `policy`.

    Args:
        turn_timeout_s: of one turn, the wait for a place in the engine included.
    """

    def __init__(self, policy: Policy, *, turn_timeout_s: float) -> None:
        self.policy, self.turn_timeout_s = policy, turn_timeout_s

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """As the policy's own.

        Raises:
            DgpoError: the engine died, or wrote no whole turn in time.
        """
        try:
            async with asyncio.timeout(self.turn_timeout_s) as bound:
                return await self.policy.generate(
                    token_ids, max_tokens=max_tokens, stop=stop, seed=seed, request_id=request_id
                )
        except TimeoutError:
            if not bound.expired():
                raise
            raise DgpoError(
                f"the engine wrote no turn within hardware.engine.turn_timeout_s={self.turn_timeout_s:g}: it hangs, or "
                "the limit is too low. Finished episodes are kept; resume=true continues"
            ) from None
        except Exception as error:
            if not any(name in type(error).__name__ for name in ENGINE_ERRORS):
                raise
            raise DgpoError(
                f"the engine died ({type(error).__name__}): killed, out of memory, or crashed; its output is above. "
                "Finished episodes are kept; resume=true continues"
            ) from error
