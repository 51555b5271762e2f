"""The parts of the rollout benchmarks that need no engine: the lock-step reference, and the simulated engine."""

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
simulated = importlib.import_module("simulated_engine")
at_scale = importlib.import_module("rollout_at_scale")

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


def test_simulated_time_jumps_to_the_next_timer():
    async def main():
        await asyncio.gather(asyncio.sleep(3600.0), asyncio.sleep(10.0))
        return asyncio.get_running_loop().time()

    assert simulated.run_simulated(main()) == (3600.0, 3600.0)


def test_a_simulation_in_which_nothing_can_happen_is_an_error():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="stuck"):
        simulated.run_simulated(main())


SPEED = simulated.Speed(
    decode_step_s=lambda number, context: 1.0 + number, prefill_tokens_per_s=10.0, max_num_seqs=2,
    max_num_batched_tokens=100,
)  # fmt: skip


def engine_run(*requests, speed=SPEED, **options):
    """(name, prompt length, tokens to write) each, all at once: when each was done, and the engine."""
    lengths = {name: length for name, _, length in requests}
    engine = simulated.SimulatedEngine(
        speed, write=lambda name: simulated.WrittenTurn([7] * lengths[name], 5), end_token=1, filler=0, **options
    )

    async def main():
        async def one(name, num_prompt):
            generation = await engine.generate([7] * num_prompt, max_tokens=50, stop=("x",), seed=None, request_id=name)
            return asyncio.get_running_loop().time(), len(generation.token_ids)

        async with engine:
            return await asyncio.gather(*(one(name, num_prompt) for name, num_prompt, _ in requests))

    return simulated.run_simulated(main())[0], engine


def test_the_engine_reads_prompts_once_and_writes_a_token_of_each_sequence_a_step():
    done, engine = engine_run(("a", 10, 1), ("b", 20, 2))
    # both join: 3 s for two sequences and 3 s for 30 tokens; then b alone: 2 s
    assert done == [(6.0, 1), (8.0, 2)]
    assert (engine.num_generated, engine.num_prefilled, engine.busy_s, engine.running_s) == (3, 30, 8.0, 14.0)


def test_the_engine_lets_no_more_sequences_join_than_fit():
    done, _ = engine_run(("a", 0, 1), ("b", 0, 1), ("c", 0, 1))
    assert [seconds for seconds, _ in done] == [3.0, 3.0, 5.0]


def test_the_engine_reads_no_more_tokens_a_step_than_fit():
    done, _ = engine_run(("a", 60, 1), ("b", 60, 1))
    assert [seconds for seconds, _ in done] == [2.0 + 6.0, 8.0 + 2.0 + 6.0]


@pytest.mark.parametrize(("prefix_caching", "num_read"), [(True, 10 + 3), (False, 10 + 18)])
def test_a_later_turn_reads_only_what_is_new(prefix_caching, num_read):
    engine = simulated.SimulatedEngine(
        SPEED, write=lambda _: simulated.WrittenTurn([7] * 5, 4), end_token=1, filler=0, prefix_caching=prefix_caching
    )

    async def main():
        async with engine:
            free = await engine.generate([7] * 10, max_tokens=50, stop=(), seed=None, request_id="a/0")
            assert free.token_ids == [7] * 5 + [0] * 4 + [1], "nothing stops it at its tag"
            await engine.generate([7] * 18, max_tokens=50, stop=(), seed=None, request_id="a/1")

    simulated.run_simulated(main())
    assert engine.num_prefilled == num_read


def test_a_query_has_its_own_latency_within_the_bounds():
    drawn = [simulated.query_latency_s(f"query {number}", 20.0, 200.0) for number in range(500)]
    assert 0.02 <= min(drawn) < 0.03
    assert 0.19 < max(drawn) <= 0.2
    assert drawn[7] == simulated.query_latency_s("query 7", 20.0, 200.0)


def test_at_scale_both_loops_play_the_same_episodes_and_ours_is_done_first():
    scenario = at_scale.Scenario("test", num_episodes=24, num_engines=2)
    speed = simulated.Speed(
        decode_step_s=lambda *_: 0.01, prefill_tokens_per_s=1e5, max_num_seqs=8, max_num_batched_tokens=8192
    )
    ours, theirs = (at_scale.play(scenario, speed, lock_step=lock_step) for lock_step in (False, True))
    assert ours.num_generated == ours.num_kept
    assert ours.num_kept == pytest.approx(theirs.num_kept, rel=0.08)  # an action's text is six of its tokens
    assert ours.num_generated < 0.6 * theirs.num_generated
    assert ours.wall_s < 0.5 * theirs.wall_s
    assert ours.finished_s[-1] == ours.wall_s


def test_turns_that_end_themselves_cost_the_lock_step_loop_no_tokens():
    scenario = at_scale.Scenario("test", num_episodes=8, num_engines=1, self_ending_share=1.0)
    speed = simulated.Speed(
        decode_step_s=lambda *_: 0.01, prefill_tokens_per_s=1e5, max_num_seqs=8, max_num_batched_tokens=8192
    )
    ours, theirs = (at_scale.play(scenario, speed, lock_step=lock_step) for lock_step in (False, True))
    assert 0 <= theirs.num_generated - ours.num_generated <= 8 * 5  # an end-of-sequence token a turn
