"""Other people's episodes: what is learnt from one, and every reason for which one is left out, counted."""

import gzip
import json
import os
from pathlib import Path

import pytest

from dgpo.agent.protocol import INVALID_ACTION_TEXT
from dgpo.coldstart.transcripts import REASONS, read_transcripts
from dgpo.config.schema import EpisodeConfig
from dgpo.data.lines import BadLines
from dgpo.errors import DataError
from tests.unit.fake_model import ChatTokenizer
from tests.unit.scripted import EOS_ID

FOUND = '\n\n<information>Doc 1(Title: "Lyon") Lyon is in France.\nDoc 2(Title: Paris) A city.</information>\n\n'
SEARCH = "<think>I look</think>\n<search> Lyon </search>"
ANSWER = "<think>Doc 1</think>\n<answer> France </answer>"
GOOD = SEARCH + FOUND + ANSWER


def read(tmp_path, *responses, limits=None, **more):
    path = tmp_path / "transcripts.jsonl"
    lines = [{"question": "where is Lyon", "answers": ["France"], "response": text, **more} for text in responses]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_transcripts(path, ChatTokenizer(), limits=limits or EpisodeConfig(), bad=BadLines())


def text_of(trajectory, *, mine):
    pairs = zip(trajectory.response_ids, trajectory.response_mask, strict=True)
    return bytes(token for token, mask in pairs if mask == mine and token != EOS_ID).decode()


def test_an_episode_is_tokenised_turn_by_turn_behind_our_prompt_with_its_observations_masked(tmp_path):
    [episode], _ = read(tmp_path, GOOD)
    assert bytes(episode.prompt_ids).startswith(b"Answer the given question.")
    assert bytes(episode.prompt_ids).endswith(b"Question: where is Lyon?\n")
    assert text_of(episode, mine=1) == SEARCH + ANSWER
    assert text_of(episode, mine=0) == FOUND
    assert episode.response_ids[-1] == EOS_ID
    assert (episode.origin, episode.answer, episode.golds) == ("text", "France", ["France"])
    assert [(turn.kind, turn.content) for turn in episode.turns] == [("search", "Lyon"), ("answer", "France")]
    [search] = episode.searches
    assert [document["contents"] for document in search.documents] == ['"Lyon"\nLyon is in France.', "Paris\nA city."]


def test_the_environments_word_on_invalid_actions_is_masked_too(tmp_path):
    [episode], _ = read(tmp_path, "hm" + INVALID_ACTION_TEXT + GOOD)
    assert text_of(episode, mine=0) == INVALID_ACTION_TEXT + FOUND
    assert [turn.kind for turn in episode.turns] == ["invalid", "search", "answer"]
    assert episode.counters["num_invalid_actions"] == 1


def test_what_stands_after_the_answer_is_left_out(tmp_path):
    [episode], _ = read(tmp_path, GOOD + "\nand so on <search> x")
    assert text_of(episode, mine=1) == SEARCH + ANSWER


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (GOOD, "kept"),
        (GOOD.replace("> France <", "> Spain <"), "wrong"),
        (SEARCH + FOUND + "<think>I do not know</think>", "unanswered"),
        (SEARCH, "unanswered"),
        ("", "unanswered"),
        (SEARCH + FOUND + "<think>Doc 1</think>\n<answer> Fra", "truncated"),
        (SEARCH + FOUND + "<think>Doc 1", "truncated"),
        (SEARCH + FOUND.replace("</information>", "") + ANSWER, "unclosed"),
        (SEARCH + FOUND.replace("<information>", "") + ANSWER, "unclosed"),
        (FOUND + GOOD.replace("<search> Lyon </search>", ""), "unasked"),
        (SEARCH + INVALID_ACTION_TEXT + ANSWER, "unasked"),
    ],
)
def test_each_reason_is_counted(tmp_path, response, reason):
    kept, counts = read(tmp_path, response)
    assert len(kept) == (reason == "kept")
    assert counts == {name: int(name == reason) for name in REASONS}


def test_one_that_was_cut_by_its_length_or_does_not_fit_is_left_out(tmp_path):
    assert read(tmp_path, GOOD, stop_reason="length")[1]["truncated"] == 1
    assert read(tmp_path, GOOD, limits=EpisodeConfig(max_response_tokens=50))[1]["too_long"] == 1


def test_a_line_without_a_response_is_named(tmp_path):
    with pytest.raises(DataError, match=r"transcripts.jsonl, line 1: `response` is None"):
        read(tmp_path, None)


REAL = Path(os.environ.get("DGPO_REALDATA", "/nonexistent")) / "search_r1_episodes.jsonl.gz"


@pytest.mark.skipif(not REAL.exists(), reason="DGPO_REALDATA names no folder with Search-R1's episodes")
def test_search_r1s_own_episodes_are_scored_as_they_were_recorded():
    with gzip.open(REAL) as file:
        lines = [json.loads(line) for line in file]
    limits = EpisodeConfig(max_prompt_tokens=10**6, max_response_tokens=10**6)
    kept, counts = read_transcripts(REAL, ChatTokenizer(), limits=limits, bad=BadLines())
    right = sum(line["metric_score"]["em"] == 1.0 for line in lines)
    assert counts["kept"] + counts["wrong"] > 0.85 * len(lines)
    assert right - 10 < len(kept) <= right
