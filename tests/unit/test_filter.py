"""Only correct episodes are kept, up to their answer; what is dropped is counted under its reason."""

import pytest

from dgpo.agent.trajectory import Trajectory, Turn
from dgpo.coldstart.examples import TrainingExample
from dgpo.coldstart.filter import end_at_answer, keep_correct, tail_counts


def make_trajectory(name, answer, status="answered"):
    return Trajectory(name, [1], [2], [1], [-0.1], [], [], answer, status, {}, None)


def test_correct_answers_are_kept_and_the_rest_is_counted_by_reason():
    trajectories = [
        make_trajectory("a", "The Paris"),
        make_trajectory("b", "Lyon"),
        make_trajectory("c", None, "no_answer"),
        make_trajectory("d", None, "overflow"),
        make_trajectory("e", None, "search_failed"),
        make_trajectory("f", "paris."),
    ]
    kept, counts = keep_correct(trajectories, {name: ["Paris"] for name in "abcdef"})
    assert [trajectory.episode_id for trajectory in kept] == ["a", "f"]
    assert counts == {"kept": 2, "wrong": 1, "no_answer": 1, "overflow": 1, "search_failed": 1}


class WordTokenizer:
    """A token is a word; `<eos>` is a special one, which decoding may leave out."""

    words = ("<eos>", "<answer>", "Paris", "</answer>", "more", "</ans", "wer>", "<search>")
    eos_token_id = 0

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(self.words[i] for i in token_ids if i or not skip_special_tokens)


def answered(*turn):
    """An episode whose last turn has these tokens, after two tokens of the environment."""
    ids = [7, 7, *turn]
    counters = {"num_invalid_actions": 0}
    turns = [Turn(2, len(ids), "answer", "Paris")]
    mask, log_probs = [0, 0] + [1] * len(turn), [0.0, 0.0] + [-0.5] * len(turn)
    return Trajectory("a", [1], ids, mask, log_probs, turns, [], "Paris", "answered", counters, None)


@pytest.mark.parametrize(
    ("turn", "kept", "dropped", "appended"),
    [
        ([1, 2, 3, 0], [1, 2, 3, 0], 0, 0),  # the teacher ended right there: as sampled
        ([1, 2, 5, 6, 0], [1, 2, 5, 6, 0], 0, 0),  # the tag in two tokens
        ([1, 2, 3, 4, 4, 0], [1, 2, 3, 0], 3, 1),  # went on, then ended: that end token belongs to another text
        ([1, 2, 3, 4], [1, 2, 3, 0], 1, 1),
        ([1, 2, 3], [1, 2, 3, 0], 0, 1),  # stopped by a budget
        ([4, 1, 2, 3, 1, 4, 3], [4, 1, 2, 3, 0], 3, 1),  # the first answer counts
    ],
)
def test_an_episode_ends_at_its_answer(turn, kept, dropped, appended):
    episode = end_at_answer(answered(*turn), WordTokenizer())
    assert episode.response_ids == [7, 7, *kept]
    assert episode.response_mask == [0, 0] + [1] * len(kept)
    assert episode.log_probs == [0.0, 0.0] + [-0.5] * (len(kept) - appended) + [None] * appended
    assert episode.turns[-1].end == len(episode.response_ids)
    assert episode.counters == {
        "num_invalid_actions": 0,
        "num_dropped_tail_tokens": dropped,
        "num_appended_end_tokens": appended,
    }


def test_what_is_dropped_and_appended_is_counted():
    episodes = [end_at_answer(answered(*turn), WordTokenizer()) for turn in ([1, 2, 3, 0], [1, 2, 3, 4, 4], [1, 2, 3])]
    assert tail_counts(episodes) == {"episodes_with_tail": 1, "dropped_tail_tokens": 2, "appended_end_tokens": 2}


def test_an_absent_log_prob_survives_the_file():
    episode = end_at_answer(answered(1, 2, 3), WordTokenizer())
    assert Trajectory.from_json(episode.to_json()) == episode
    assert TrainingExample.from_trajectory(episode).end_was_appended
    assert not TrainingExample.from_trajectory(end_at_answer(answered(1, 2, 3, 0), WordTokenizer())).end_was_appended
