"""A turn of RL and a turn of evaluation stop on the same token, through vLLM's own rules, whatever the tokenizer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgpo.agent.protocol import STOP_STRINGS, parse_action
from dgpo.config.load import load_config
from dgpo.engines.environment import export_environment
from dgpo.engines.vllm_policy import VllmPolicy

pytestmark = pytest.mark.engine

TAGS = ("<search>", "</search>", "<answer>", "</answer>")
PARTS = ("</", "<", "search", "answer", ">")
KINDS = {
    "tags of one token": [AddedToken(tag, normalized=False, special=False) for tag in TAGS],
    "tags of one special token": [AddedToken(tag, normalized=False, special=True) for tag in TAGS],
    "tags spelt out": [],
    "tags of several special tokens": [AddedToken(part, normalized=False, special=True) for part in PARTS],
    "a token that goes on behind the tag": [AddedToken(">. The", normalized=False, special=False)],
    "a special token that goes on behind the tag": [AddedToken("search>. The", normalized=False, special=True)],
}
TURN = "I look. <search> who </search>. The rest"
MAX_TOKENS = 60
HARDWARE = load_config(["world=tiny", "hardware=cpu"]).hardware
# What veRL's agent loop hands on (`verl/experimental/agent_loop/agent_loop.py`).
VERL_PARAMS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


def make_tokenizer(added: list[AddedToken]) -> PreTrainedTokenizerFast:
    """Speaks ASCII, one character a token, and the added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


class RecordingEngine:
    """In the place of vLLM's: keeps the sampling parameters of a request and answers it with one token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    def generate(self, prompt=None, sampling_params=None, request_id=None, **_):
        self.params = sampling_params
        return self._answer()

    async def _answer(self):
        completion = SimpleNamespace(token_ids=[0], logprobs=[{0: SimpleNamespace(logprob=0.0)}], finish_reason="stop")
        yield SimpleNamespace(outputs=[completion], prompt_logprobs=None, kv_transfer_params=None)


@pytest.fixture(autouse=True, scope="module")
def _environment():
    export_environment(HARDWARE)


def evaluation_params(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Any:
    policy = VllmPolicy("model", hardware=HARDWARE, max_model_len=128, temperature=1.0, seed=1)
    policy._engine = RecordingEngine(tokenizer)
    asyncio.run(policy.generate([1], max_tokens=MAX_TOKENS, stop=STOP_STRINGS, seed=seed, request_id="a"))
    return policy._engine.params


def rl_params(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Any:
    """Through the agent loop's policy and all that veRL's server does with a request."""
    from verl.workers.config import RolloutConfig

    from dgpo.rl.agent_loop import RolloutPolicy
    from dgpo.rl.rollout_server import TetheredServer

    server = object.__new__(TetheredServer)
    server.engine = RecordingEngine(tokenizer)
    server.config = RolloutConfig(name="vllm", max_model_len=128)
    server.model_config = SimpleNamespace(processor=None, lora_rank=0, lora={})
    server.replica_rank, server.global_steps, server._admitting = 0, 0, 0
    server._disaggregation_role = None
    server._submission_paused = False
    server._resume_event = asyncio.Event()
    asyncio.run(
        RolloutPolicy(server, VERL_PARAMS).generate(
            [1], max_tokens=MAX_TOKENS, stop=STOP_STRINGS, seed=seed, request_id="a"
        )
    )
    return server.engine.params


def stopped_turn(tokenizer: PreTrainedTokenizerFast, params: Any) -> str:
    """What is written of `TURN` until vLLM's core or its detokenizer ends it."""
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.request import Request

    ids = tokenizer.encode(TURN, add_special_tokens=False)
    request = Request("a", [1], params, None)
    detokenizer = IncrementalDetokenizer.from_new_request(
        tokenizer, EngineCoreRequest("a", [1], None, params, None, 0.0, None, None, None)
    )
    for count, token in enumerate(ids, start=1):
        request.append_output_token_ids(token)
        if check_stop(request, 128) or detokenizer.update([token], False) is not None:
            return tokenizer.decode(ids[:count], skip_special_tokens=False)
    return "not stopped"


@pytest.mark.parametrize("make_params", [rl_params, evaluation_params])
@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_stops_on_the_token_that_completes_its_tag(kind: str, make_params):
    tokenizer = make_tokenizer(KINDS[kind])
    turn = stopped_turn(tokenizer, make_params(tokenizer, seed=3))
    assert turn.startswith("I look. <search> who </search>")
    assert turn == "I look. <search> who </search>" + (". The" if "goes on" in kind else "")
    assert parse_action(turn).content == "who"


def settings(params: Any) -> dict[str, Any]:
    """Every field; -1 and 0 are both vLLM's words for no top-k."""
    return {name: getattr(params, name) for name in params.__struct_fields__} | {"top_k": max(params.top_k, 0)}


@pytest.mark.parametrize("kind", KINDS)
def test_rl_samples_as_evaluation_does(kind: str):
    from vllm.sampling_params import RequestOutputKind

    tokenizer = make_tokenizer(KINDS[kind])
    ours, theirs = (make_params(tokenizer, seed=3) for make_params in (evaluation_params, rl_params))
    assert settings(ours) == settings(theirs)
    assert ours.output_kind == theirs.output_kind == RequestOutputKind.FINAL_ONLY
    assert (theirs.seed, theirs.logprobs, theirs.max_tokens) == (3, 0, MAX_TOKENS)
