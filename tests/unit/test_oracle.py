"""Scripted demonstrations through the real episode loop: what is searched, quoted and answered, and what is not."""

import asyncio
import random

import pytest

from dgpo.agent.episode import run_episode
from dgpo.coldstart.collect import COLLECT_STOP_STRINGS
from dgpo.coldstart.oracle import EVIDENCE, FIRST_THOUGHTS, OraclePolicy, find_evidence, keywords, next_turn
from dgpo.engines.episode_runner import PlannedEpisode
from tests.unit.scripted import EOS_ID, PROMPT_IDS, ByteTokenizer, RecordingSearch, make_limits

LYON = 'Doc 1(Title: "Lyon") Lyon lies on the Rhône. It is a city (in France), rich in silk. It is old.'


class Tokenizer(ByteTokenizer):
    eos_token_id = EOS_ID


def row(question, *golds, **info):
    message = {"role": "user", "content": question}
    truth = {"ground_truth": {"target": list(golds)}}
    return {"question": question, "prompt": [message], "reward_model": truth, "extra_info": {"index": 0, **info}}


def play(row, search, *, name="e", seed=1):
    tokenizer = Tokenizer()
    policy = OraclePolicy(tokenizer, [PlannedEpisode(name, row, PROMPT_IDS)], seed=seed)
    options = {"search": search, "tokenizer": tokenizer, "limits": make_limits(), "stop": COLLECT_STOP_STRINGS}
    return asyncio.run(run_episode(episode_id=name, prompt_ids=PROMPT_IDS, policy=policy, **options))


def test_it_asks_reads_quotes_and_answers_as_the_passage_writes_it():
    search = RecordingSearch()
    episode = play(row("What is the capital of France?", "PARIS"), search)
    assert [turn.kind for turn in episode.turns] == ["search", "answer"]
    assert search.queries[0][0] in ("What is the capital of France", "capital France")
    assert episode.answer == "Paris"
    text = bytes(i for i in episode.response_ids if i < EOS_ID).decode()
    assert "Doc 2" in text.rpartition("<think>")[2]
    assert "The capital of France is Paris." in text.rpartition("<think>")[2]


def test_the_end_token_follows_the_answer_and_is_trained_and_what_was_found_is_not():
    episode = play(row("What is the capital of France?", "Paris"), RecordingSearch())
    assert episode.response_ids[-1] == EOS_ID
    assert episode.response_mask[-1] == 1
    shown = [i for i, mine in zip(episode.response_ids, episode.response_mask, strict=True) if not mine]
    assert bytes(shown).decode().strip().startswith("<information>")


def test_where_no_passage_holds_a_gold_it_gives_up():
    episode = play(row("Who?", "Ada"), RecordingSearch())
    assert (episode.status, episode.answer) == ("answered", "")


def test_a_search_that_fails_is_not_a_miss():
    assert play(row("Who?", "Ada"), RecordingSearch(failing=True)).status == "search_failed"


def test_a_gold_inside_a_word_is_no_evidence():
    assert find_evidence([LYON], ["ranc"]) is None
    assert find_evidence([LYON], ["france"]).answer == "France"


def test_the_quote_is_the_sentence_or_its_part_around_the_answer():
    assert find_evidence([LYON], ["France"]).quote == "It is a city (in France), rich in silk."
    long = "a " * 60 + "Paris" + " b" * 60
    quote = find_evidence([f'Doc 1(Title: "T") {long}'], ["Paris"]).quote.split()
    assert len(quote) == 24
    assert "Paris" in quote


def test_the_passages_that_the_question_names_come_before_others():
    other = 'Doc 1(Title: "Other") France is here too.\nDoc 2(Title: "Lyon") A city in France.'
    assert find_evidence([other], ["France"]).number == 1
    assert find_evidence([other], ["France"], ["Lyon"]).number == 2


def test_wordings_differ_between_episodes_and_are_the_same_when_repeated():
    first = {next_turn(row("Where is Lyon?", "France"), [], rng=random.Random(seed)) for seed in range(40)}
    assert len(first) == 2 * len(FIRST_THOUGHTS)
    last = {next_turn(row("Where is Lyon?", "France"), [LYON], rng=random.Random(seed)) for seed in range(40)}
    assert len(last) == len(EVIDENCE)
    question = row("What is the capital of France?", "Paris")
    same, again = play(question, RecordingSearch()), play(question, RecordingSearch())
    assert same.response_ids == again.response_ids


def test_it_searches_as_often_as_the_question_has_hops_and_only_for_titles_that_it_has_read():
    gold = [{"id": "0", "contents": '"Lyon"\nx'}, {"id": "1", "contents": '"France"\nx'}]
    question = row("What is the capital of the country of Lyon?", "Paris", hops=2, gold_passages=gold)
    search = RecordingSearch(documents=[{"id": "0", "contents": '"Lyon"\nLyon is a city in France.'}])
    episode = play(question, search)
    assert [turn.kind for turn in episode.turns] == ["search", "search", "answer"]
    assert search.queries[1][0].startswith("France")
    unread = row("Who?", "Paris", hops=2, gold_passages=[{"id": "1", "contents": '"Nowhere"\nx'}])
    assert play(unread, RecordingSearch()).num_searches == 1


@pytest.mark.parametrize(
    ("question", "kept"),
    [("Who wrote Moby Dick?", "wrote Moby Dick"), ("who is it?", "who is it"), ("The 'A' of it, then?", "then")],
)
def test_keywords_are_what_few_questions_share(question, kept):
    assert keywords(question) == kept
