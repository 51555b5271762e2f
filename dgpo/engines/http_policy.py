"""A model behind an OpenAI-compatible `/v1/completions` as an episode policy: any server, hosted or one's own.

Such a server takes and gives text. What it wrote is tokenised once, turn by turn, in the student's tokens, and the
trajectory says so (`origin=text`). A server that takes and gives token ids, as vLLM's does, loses nothing: `ids=True`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from dgpo.agent.episode import Generation
from dgpo.agent.trajectory import Origin
from dgpo.errors import DgpoError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


class HttpPolicy:
    """Use as `async with HttpPolicy(...) as policy`.

    Args:
        url: of the server, with or without its `/v1`.
        model: the name that requests carry.
        tokenizer: of the episodes.
        prompts: the text of each episode's prompt, by request id; None with `ids`, where token ids are sent.
        num_prompt_tokens: of each episode, by request id: what comes after them is the response.
        temperature: 0 decodes greedily.
        ids: whether the server takes token ids as the prompt and returns `token_ids` (vLLM's `return_token_ids`).
        key: bearer token.
        max_retries: of a turn that the server refuses for now, or leaves unanswered.
        timeout_s: of one request.

    Attributes:
        counts: requests, retries, prompt_tokens and completion_tokens, as the server counts them.
        origin: of the trajectories.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        tokenizer: Any,
        num_prompt_tokens: Mapping[str, int],
        temperature: float,
        prompts: Mapping[str, str] | None = None,
        ids: bool = False,
        key: str | None = None,
        max_retries: int = 5,
        timeout_s: float = 300.0,
    ) -> None:
        self.url = f"{url.rstrip('/').removesuffix('/v1')}/v1/completions"
        self.model, self.tokenizer, self.temperature, self.ids = model, tokenizer, temperature, ids
        self.prompts, self.num_prompt_tokens = prompts or {}, num_prompt_tokens
        self.max_retries, self.timeout_s = max_retries, timeout_s
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.counts: Counter[str] = Counter(requests=0, retries=0, prompt_tokens=0, completion_tokens=0)
        self.origin: Origin = "sampled" if ids else "text"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpPolicy:
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)  # the runner bounds the episodes in flight
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self.headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """One turn.

        Raises:
            DgpoError: the server did not answer, after all retries, or refuses the request; resuming goes on.
        """
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "stop": list(stop),
        }
        if self.temperature > 0 and seed is not None:
            settings["seed"] = seed % 2**31
        if self.ids:
            return await self._sampled(token_ids, settings)
        response = self.tokenizer.decode(token_ids[self.num_prompt_tokens[request_id] :], skip_special_tokens=False)
        answer = await self._post({**settings, "prompt": self.prompts[request_id] + response})
        return self._from_text(answer["choices"][0], max_tokens=max_tokens, stop=stop)

    async def _sampled(self, token_ids: list[int], settings: Mapping[str, Any]) -> Generation:
        extra = {"return_token_ids": True, "include_stop_str_in_output": True, "skip_special_tokens": False}
        answer = await self._post({**settings, **extra, "prompt": token_ids, "logprobs": 0})
        choice = answer["choices"][0]
        if choice.get("token_ids") is None:
            raise DgpoError(f"{self.url} returned no `token_ids`: set teacher.url_ids=false for such a server")
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        return Generation(list(choice["token_ids"]), list(log_probs), choice.get("finish_reason") or "abort")

    def _from_text(self, choice: Mapping[str, Any], *, max_tokens: int, stop: Sequence[str]) -> Generation:
        """The turn in our tokens. A server leaves out the string that stopped it, and does not say which it was."""
        text, reason = choice["text"], choice.get("finish_reason") or "abort"
        end: list[int] = []
        if reason == "stop" and not text.endswith(tuple(stop)):
            closing = next((s for s in stop if text.count(s.replace("/", "", 1)) > text.count(s)), None)
            text += closing or ""
            end = [] if closing else [self.tokenizer.eos_token_id]
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), *end]
        if len(ids) > max_tokens:  # our tokenizer may need more than theirs
            ids, reason = ids[:max_tokens], "length"
        return Generation(ids, [], reason)

    async def _post(self, body: Mapping[str, Any]) -> Any:
        assert self._session is not None, "use `async with HttpPolicy(...)`"
        reason, wait = "", FIRST_WAIT_S
        for attempt in range(self.max_retries + 1):
            if attempt:
                self.counts["retries"] += 1
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
            try:
                self.counts["requests"] += 1
                async with self._session.post(self.url, json=body) as response:
                    if response.status == 200:
                        return self._counted(await response.json())
                    reason = f"status {response.status}: {' '.join((await response.text()).split())[:200]}"
                    if response.status not in RETRIED:
                        raise DgpoError(f"{self.url} refuses the teacher's turn ({reason}): see teacher.*")
                    wait = max(wait, float(response.headers.get("Retry-After") or 0))
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
        raise DgpoError(
            f"{self.url} did not answer {self.max_retries + 1} times ({reason}): start it again. Finished episodes are "
            "kept; resume=true continues"
        )

    def _counted(self, answer: Any) -> Any:
        for name in ("prompt_tokens", "completion_tokens"):
            self.counts[name] += (answer.get("usage") or {}).get(name) or 0
        return answer
