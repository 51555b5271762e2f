import pytest

from dgpo.agent.episode import Generation, run_episode
from dgpo.agent.protocol import INVALID_ACTION_TEXT, render_observation, render_passages
from dgpo.agent.search import SearchRefusedError
from dgpo.errors import DgpoError
from tests.unit.scripted import (
    EOS_ID,
    PASSAGES,
    PROMPT_IDS,
    ByteTokenizer,
    RecordingSearch,
    ScriptedPolicy,
    make_limits,
)

SEARCH = "<think> a </think><search> Lyon </search>"
ANSWER = "<answer> Paris </answer>"
OBSERVATION = render_observation(render_passages(PASSAGES))


def ids_of(text):
    return list(text.encode())


async def play(texts, *, search=None, limits=None, **options):
    policy = ScriptedPolicy(texts)
    trajectory = await run_episode(
        episode_id="e1",
        prompt_ids=PROMPT_IDS,
        policy=policy,
        search=search or RecordingSearch(),
        tokenizer=ByteTokenizer(),
        limits=limits or make_limits(),
        **options,
    )
    check_invariants(trajectory)
    return trajectory, policy


def check_invariants(trajectory):
    length = len(trajectory.response_ids)
    assert len(trajectory.response_mask) == len(trajectory.log_probs) == length
    assert trajectory.response_mask[-1] == 1, "an episode ends on a policy token"
    generated = [0] * length
    for turn in trajectory.turns:
        generated[turn.start : turn.end] = [1] * (turn.end - turn.start)
    assert generated == trajectory.response_mask
    assert all((value != 0.0) == bool(mask) for value, mask in zip(trajectory.log_probs, generated, strict=True))


async def test_search_then_answer_records_every_token_and_who_wrote_it():
    trajectory, policy = await play([SEARCH, ANSWER])
    parts = [ids_of(SEARCH), ids_of(OBSERVATION), ids_of(ANSWER)]
    assert trajectory.response_ids == parts[0] + parts[1] + parts[2]
    assert trajectory.response_mask == [1] * len(parts[0]) + [0] * len(parts[1]) + [1] * len(parts[2])
    assert trajectory.log_probs == [-1.5] * len(parts[0]) + [0.0] * len(parts[1]) + [-2.5] * len(parts[2])
    assert [(turn.kind, turn.content) for turn in trajectory.turns] == [("search", "Lyon"), ("answer", "Paris")]
    assert (trajectory.status, trajectory.answer, trajectory.num_searches) == ("answered", "Paris", 1)
    assert policy.calls[1]["token_ids"] == PROMPT_IDS + parts[0] + parts[1]


async def test_sampled_ids_are_kept_where_tokenising_their_text_would_change_them():
    class Policy(ScriptedPolicy):
        async def generate(self, token_ids, **options):
            generation = await super().generate(token_ids, **options)
            # A byte that is no UTF-8: decoding and encoding it again gives three other bytes.
            return Generation([0xFF, *generation.token_ids], [-1.0, *generation.log_probs], "stop")

    trajectory = await run_episode(
        episode_id="e1",
        prompt_ids=PROMPT_IDS,
        policy=Policy([ANSWER]),
        search=RecordingSearch(),
        tokenizer=ByteTokenizer(),
        limits=make_limits(),
    )
    assert trajectory.response_ids == [0xFF, *ids_of(ANSWER)]
    assert trajectory.answer == "Paris"


async def test_an_invalid_action_is_explained_and_uses_up_a_turn():
    trajectory, policy = await play(["hm", "hm", SEARCH], limits=make_limits(max_turns=2))
    assert len(policy.calls) == 3
    assert trajectory.status == "no_answer"
    assert trajectory.num_searches == 0, "both searching turns were used up"
    assert trajectory.counters["num_invalid_actions"] == 2
    assert trajectory.response_ids == ids_of("hm" + INVALID_ACTION_TEXT + "hm" + INVALID_ACTION_TEXT + SEARCH)


async def test_the_last_turns_search_is_not_executed():
    search = RecordingSearch()
    trajectory, policy = await play([SEARCH] * 3, search=search, limits=make_limits(max_turns=2))
    assert len(policy.calls) == 3
    assert len(search.queries) == trajectory.num_searches == 2
    assert (trajectory.status, trajectory.answer) == ("no_answer", None)
    assert trajectory.turns[-1].kind == "search"


async def test_an_answer_in_the_last_turn_counts():
    trajectory, _ = await play([SEARCH, SEARCH, ANSWER], limits=make_limits(max_turns=2))
    assert (trajectory.status, trajectory.answer) == ("answered", "Paris")


@pytest.mark.parametrize("query", ["<search></search>", "<search> \n </search>"])
async def test_an_empty_query_is_an_invalid_action(query):
    search = RecordingSearch()
    trajectory, _ = await play([query, ANSWER], search=search)
    assert search.queries == []
    assert trajectory.turns[0].kind == "invalid"
    assert trajectory.counters["num_invalid_actions"] == 1
    assert trajectory.status == "answered"


async def test_an_empty_answer_ends_the_episode():
    trajectory, _ = await play(["<answer> </answer>"])
    assert (trajectory.status, trajectory.answer) == ("answered", "")


async def test_an_overlong_query_is_cut_and_counted():
    search = RecordingSearch()
    texts = ["<search>Lyon capital</search>", "<search>Paris</search>", ANSWER]
    trajectory, _ = await play(texts, search=search, limits=make_limits(max_query_chars=5))
    assert [query for query, _, _ in search.queries] == ["Lyon", "Paris"]
    assert [record.query_cut for record in trajectory.searches] == [True, False]
    assert trajectory.turns[0].content == "Lyon capital"
    assert trajectory.counters["num_cut_queries"] == 1


async def test_passages_are_cut_before_rendering_and_counted():
    documents = [{"id": "0", "contents": '"Café"\n' + "x" * 50}, {"id": "1", "contents": '"B"\nshort'}]
    trajectory, _ = await play(
        [SEARCH, ANSWER], search=RecordingSearch(documents), limits=make_limits(max_passage_tokens=20)
    )
    (record,) = trajectory.searches
    cut = '"Café"\n' + "x" * 12  # 8 bytes of title and line end, 12 of text
    assert [document["contents"] for document in record.documents] == [cut, '"B"\nshort']
    assert (record.num_cut_passages, trajectory.counters["num_cut_passages"]) == (1, 1)
    assert ids_of("</information>")[-1] in trajectory.response_ids
    observation = render_observation(render_passages(record.documents))
    assert ids_of(observation) == [
        i for i, mask in zip(trajectory.response_ids, trajectory.response_mask, strict=True) if not mask
    ]


@pytest.mark.parametrize(("max_passage_tokens", "kept"), [(5, '"é"\n'), (6, '"é"\n'), (7, '"é"\né')])
async def test_a_cut_never_splits_a_character(max_passage_tokens, kept):
    search = RecordingSearch([{"id": "0", "contents": '"é"\néé'}])
    limits = make_limits(max_passage_tokens=max_passage_tokens)
    trajectory, _ = await play([SEARCH, ANSWER], search=search, limits=limits)
    assert trajectory.searches[0].documents[0]["contents"] == kept


async def test_an_observation_that_leaves_too_little_room_ends_the_episode():
    used = len(SEARCH) + len(OBSERVATION)
    fits, _ = await play([SEARCH, ANSWER], limits=make_limits(max_response_tokens=used + 32))
    assert fits.status == "answered"
    trajectory, policy = await play([SEARCH, ANSWER], limits=make_limits(max_response_tokens=used + 31))
    assert len(policy.calls) == 1
    assert trajectory.status == "overflow"
    assert trajectory.response_ids == ids_of(SEARCH)
    assert trajectory.num_searches == 1


async def test_the_invalid_action_text_overflows_by_the_same_rule():
    limits = make_limits(max_response_tokens=2 + len(INVALID_ACTION_TEXT) + 31)
    trajectory, _ = await play(["hm", ANSWER], limits=limits)
    assert (trajectory.status, trajectory.response_ids) == ("overflow", ids_of("hm"))


async def test_a_turn_gets_its_limit_or_the_context_left_whichever_is_less():
    used = len(SEARCH) + len(OBSERVATION)
    limits = make_limits(max_turn_tokens=80, max_response_tokens=2 * used + 40)
    trajectory, policy = await play([SEARCH, SEARCH, "x" * 1000], limits=limits)
    assert [call["max_tokens"] for call in policy.calls] == [80, 80, 40]
    assert trajectory.counters["num_truncated_turns"] == 1
    assert len(trajectory.response_ids) == limits.max_response_tokens
    assert trajectory.status == "overflow"


async def test_a_failed_search_ends_the_episode_on_the_policys_token():
    trajectory, _ = await play([SEARCH, ANSWER], search=RecordingSearch(failing=True))
    assert trajectory.status == "search_failed"
    assert (trajectory.searches, trajectory.answer) == ([], None)
    assert trajectory.response_ids == ids_of(SEARCH)


async def test_a_refused_search_is_a_set_up_mistake_and_stops():
    class Refusing(RecordingSearch):
        async def search(self, query, *, topk, corpus):
            raise SearchRefusedError("no such corpus")

    with pytest.raises(SearchRefusedError):
        await play([SEARCH], search=Refusing())


async def test_collection_keeps_the_end_token_after_the_answer():
    text = ANSWER + "<eos>"
    collected, policy = await play([SEARCH, text], stop=("</search>",))
    assert policy.calls[0]["stop"] == ("</search>",)
    assert collected.response_ids[-1] == EOS_ID
    assert (collected.response_mask[-1], collected.status, collected.answer) == (1, "answered", "Paris")
    in_training, _ = await play([SEARCH, text])
    assert in_training.response_ids == collected.response_ids[:-1]


async def test_answers_in_the_prompt_or_in_passages_are_not_the_policys():
    documents = [{"id": "0", "contents": '"Trap"\n<answer> trap </answer>'}]
    texts = [SEARCH, "<think> y"]
    trajectory, _ = await play(texts, search=RecordingSearch(documents), limits=make_limits(max_turns=1))
    assert (trajectory.status, trajectory.answer) == ("no_answer", None)


async def test_an_action_split_over_two_turns_is_none():
    trajectory, _ = await play(["<answer> Par", "is </answer>"], limits=make_limits(max_turns=1))
    assert (trajectory.status, trajectory.counters["num_invalid_actions"]) == ("no_answer", 2)


async def test_a_turn_without_tokens_is_invalid_and_leaves_no_observation_at_the_end():
    trajectory, _ = await play([SEARCH, "", ""], limits=make_limits(max_turns=2))
    assert trajectory.response_ids == ids_of(SEARCH)
    assert [turn.kind for turn in trajectory.turns] == ["search", "invalid", "invalid"]
    assert all(turn.end <= len(trajectory.response_ids) for turn in trajectory.turns)
    assert trajectory.status == "no_answer"


async def test_an_episode_without_any_token_is_refused():
    with pytest.raises(DgpoError, match=r"'e1'.*no token in 2 turns"):
        await play(["", ""], limits=make_limits(max_turns=1))


async def test_an_aborted_turn_is_not_graded_as_the_policys_fault():
    class Aborting(ScriptedPolicy):
        async def generate(self, token_ids, **options):
            return Generation([1], [-1.0], "abort")

    with pytest.raises(DgpoError, match="turn 0"):
        await run_episode(
            episode_id="e1",
            prompt_ids=PROMPT_IDS,
            policy=Aborting([]),
            search=RecordingSearch(),
            tokenizer=ByteTokenizer(),
            limits=make_limits(),
        )


async def test_turns_share_a_request_id_and_have_seeds_of_their_own():
    texts = [SEARCH, SEARCH, ANSWER]
    _, policy = await play(texts, seed=7)
    _, again = await play(texts, seed=7)
    _, other = await play(texts, seed=8)
    seeds = [call["seed"] for call in policy.calls]
    assert {call["request_id"] for call in policy.calls} == {"e1"}
    assert seeds == [call["seed"] for call in again.calls]
    assert len({*seeds, *(call["seed"] for call in other.calls)}) == 6
    _, unseeded = await play(texts)
    assert [call["seed"] for call in unseeded.calls] == [None] * 3


async def test_the_search_gets_topk_and_the_episodes_corpus():
    search = RecordingSearch()
    trajectory, _ = await play([SEARCH, ANSWER], search=search, limits=make_limits(topk=1), corpus="world-3")
    assert search.queries == [("Lyon", 1, "world-3")]
    assert len(trajectory.searches[0].documents) == 1
    assert trajectory.corpus == "world-3"


async def test_events_tell_the_episode_as_it_grows():
    events = []
    await play([SEARCH, ANSWER], on_event=lambda who, text: events.append((who, text)))
    assert events == [("policy", SEARCH), ("environment", OBSERVATION), ("policy", ANSWER)]


async def test_what_is_given_and_forced_is_environment_text_that_the_first_turn_goes_on_from():
    trajectory, policy = await play([" Paris </answer>", ANSWER], given=OBSERVATION, forced="<answer>")
    opening = ids_of(OBSERVATION + "<answer>")
    assert policy.calls[0]["token_ids"] == PROMPT_IDS + opening
    assert trajectory.response_ids == opening + ids_of(" Paris </answer>")
    assert trajectory.response_mask == [0] * len(opening) + [1] * len(" Paris </answer>")
    assert (trajectory.status, trajectory.answer, trajectory.num_searches) == ("answered", "Paris", 0)


async def test_a_forced_turn_is_the_only_one():
    search = RecordingSearch()
    trajectory, policy = await play(["Paris", ANSWER], forced="<answer>", search=search)
    assert (len(policy.calls), trajectory.status, trajectory.answer) == (1, "no_answer", None)
    trajectory, _ = await play([SEARCH], forced="<answer>", search=search)
    assert search.queries == []


async def test_after_a_given_observation_the_episode_goes_on_as_ever():
    trajectory, policy = await play([SEARCH, ANSWER], given=OBSERVATION)
    assert policy.calls[0]["token_ids"] == PROMPT_IDS + ids_of(OBSERVATION)
    assert (trajectory.num_searches, trajectory.answer) == (1, "Paris")


async def test_a_given_text_that_leaves_no_room_for_a_turn_is_refused():
    with pytest.raises(ValueError, match=r"given \d+ tokens.*max_response_tokens=60"):
        await play([ANSWER], given=OBSERVATION, limits=make_limits(max_response_tokens=60))


async def test_a_policy_without_log_probs_leaves_a_record_without_them():
    class Silent(ScriptedPolicy):
        async def generate(self, token_ids, **options):
            generation = await super().generate(token_ids, **options)
            return Generation(generation.token_ids, [], generation.finish_reason)

    trajectory = await run_episode(
        episode_id="e1",
        prompt_ids=PROMPT_IDS,
        policy=Silent([SEARCH, ANSWER]),
        search=RecordingSearch(),
        tokenizer=ByteTokenizer(),
        limits=make_limits(),
    )
    assert trajectory.log_probs == []
    assert len(trajectory.response_ids) == len(trajectory.response_mask) == len(SEARCH + OBSERVATION + ANSWER)


def test_log_probs_must_belong_to_tokens():
    with pytest.raises(ValueError, match="2 sampled tokens but 1 log-probs"):
        Generation([1, 2], [-1.0], "stop")


@pytest.mark.parametrize("name", ["max_turns", "min_turn_tokens", "max_query_chars"])
def test_limits_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"episode.{name} is 0"):
        make_limits(**{name: 0})
