"""The parts of the rollout benchmark that need no engine: the lock-step reference, and the latency of a search."""

import asyncio
import importlib
import sys
from pathlib import Path

import pytest

from dgpo.agent.protocol import INVALID_ACTION_TEXT, render_observation, render_passages
from tests.unit.scripted import PASSAGES, PROMPT_IDS, ByteTokenizer, ScriptedPolicy, make_limits

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))
lock_step = importlib.import_module("lock_step")
rollout = importlib.import_module("rollout")

SEARCH = "<search> Lyon </search>"
ANSWER = "<answer> Paris </answer>"
OBSERVATION = render_observation(render_passages(PASSAGES))


class BatchTokenizer(ByteTokenizer):
    def batch_decode(self, batch, *, skip_special_tokens):
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def __call__(self, texts, *, add_special_tokens):
        return {"input_ids": [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]}


def play_lock_step(scripts, *, max_context_tokens=4096, max_observation_tokens=4096, **limits):
    """Each name's texts, one a turn. Returns the episodes, the policies' calls and the batches of queries."""
    policies = {name: ScriptedPolicy(texts) for name, texts in scripts.items()}
    batches = []

    class Policies:
        async def generate(self, token_ids, *, request_id, **options):
            return await policies[request_id.split("/")[0]].generate(token_ids, request_id=request_id, **options)

    async def search(queries):
        batches.append(queries)
        return [PASSAGES for _ in queries]

    episodes = asyncio.run(
        lock_step.run_lock_step(
            {name: list(PROMPT_IDS) for name in scripts},
            policy=Policies(),
            search=search,
            tokenizer=BatchTokenizer(),
            limits=make_limits(**limits),
            max_context_tokens=max_context_tokens,
            max_observation_tokens=max_observation_tokens,
        )
    )
    return episodes, {name: policy.calls for name, policy in policies.items()}, batches


def test_lock_step_sends_one_batch_of_searches_per_turn_and_none_after_the_last():
    _, _, batches = play_lock_step({"a": [SEARCH] * 3, "b": [SEARCH, ANSWER]}, max_turns=2)
    assert batches == [["Lyon", "Lyon"], ["Lyon"]]


def test_lock_step_runs_past_the_tag_and_cuts_the_text_afterwards():
    (episode,), calls, _ = play_lock_step({"a": [SEARCH + " and more", ANSWER + "<eos>"]})
    assert calls["a"][0]["stop"] == ()
    assert calls["a"][1]["token_ids"] == PROMPT_IDS + list((SEARCH + OBSERVATION).encode())
    assert episode.num_generated == len(SEARCH + " and more" + ANSWER) + 1
    assert episode.num_kept == len(SEARCH + ANSWER)
    assert (episode.answer, episode.num_turns, episode.num_searches) == ("Paris", 2, 1)


def test_lock_step_explains_an_invalid_action():
    _, calls, batches = play_lock_step({"a": ["what?", "<search>  </search>", ANSWER]})
    assert calls["a"][1]["token_ids"][len(PROMPT_IDS) :] == list(("what?" + INVALID_ACTION_TEXT).encode())
    assert calls["a"][2]["token_ids"][-len(INVALID_ACTION_TEXT) :] == list(INVALID_ACTION_TEXT.encode())
    assert batches == []


def test_lock_step_cuts_observations_on_the_right_and_contexts_on_the_left():
    _, calls, _ = play_lock_step({"a": [SEARCH, ANSWER]}, max_observation_tokens=10, max_context_tokens=20)
    assert calls["a"][1]["token_ids"] == list((SEARCH + OBSERVATION[:10]).encode())[-20:]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a</search>b</search>", "a</search>"),
        ("a</answer>b</search>c", "a</answer>b</search>"),  # the release looks for a search first
        ("a</answer>b", "a</answer>"),
        ("ab", "ab"),
    ],
)
def test_a_turn_is_cut_where_the_release_cuts_it(text, kept):
    assert lock_step.cut_turn(text) == kept


def test_a_query_has_its_own_latency_within_the_bounds():
    drawn = [rollout.query_latency_s(f"query {number}", 20.0, 200.0) for number in range(500)]
    assert 0.02 <= min(drawn) < 0.03
    assert 0.19 < max(drawn) <= 0.2
    assert drawn[7] == rollout.query_latency_s("query 7", 20.0, 200.0)
