import pytest

from dgpo.metrics.hits import answer_in_passages

PASSAGES = [
    {"id": "0", "contents": '"Lyon"\nLyon, in the U.S.A., is no city.'},
    {"id": "1", "contents": '"Capital"\nx'},
]


@pytest.mark.parametrize(
    ("golds", "normalised", "raw"),
    [
        (["usa"], True, False),  # punctuation and case
        (["cap"], False, False),
        (["capital"], True, False),
        (["Capital"], True, True),
        (["Cap"], False, True),  # inside a word
        (["nothing", "lyon in U.S.A."], True, False),  # articles
        (["the"], False, True),  # normalises to nothing
        ([], False, False),
    ],
)
def test_hits(golds, normalised, raw):
    assert answer_in_passages(golds, PASSAGES) is normalised
    assert answer_in_passages(golds, PASSAGES, raw=True) is raw


def test_an_answer_must_stand_in_one_passage():
    passages = [{"id": "0", "contents": "New"}, {"id": "1", "contents": "York"}]
    assert not answer_in_passages(["New York"], passages)
