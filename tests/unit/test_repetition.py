from dgpo.metrics.repetition import num_repeated_tokens


def test_a_loop_counts_from_its_second_round_on():
    # 1 2 1 2 1 2: the 2-grams that end at tokens 2..6 are 12 21 12 21 12; the last three were seen before.
    assert num_repeated_tokens([1, 2, 1, 2, 1, 2], [1] * 6, n=2) == 3


def test_text_without_a_repeated_ngram_has_none():
    assert num_repeated_tokens([1, 2, 3, 1, 2, 4], [1] * 6, n=3) == 0


def test_a_later_turn_that_says_the_same_repeats_it():
    ids = [1, 2, 3, 9, 9, 1, 2, 3]
    mask = [1, 1, 1, 0, 0, 1, 1, 1]
    assert num_repeated_tokens(ids, mask, n=3) == 1


def test_an_ngram_does_not_reach_across_an_observation():
    ids = [1, 2, 9, 1, 2, 9, 1, 2]
    mask = [1, 1, 0, 1, 1, 0, 1, 1]
    assert num_repeated_tokens(ids, mask, n=3) == 0


def test_what_the_environment_wrote_is_not_the_policys():
    ids = [7, 8, 7, 8, 7, 8, 1, 2]
    mask = [0, 0, 0, 0, 0, 0, 1, 1]
    assert num_repeated_tokens(ids, mask, n=2) == 0


def test_copying_a_passage_once_repeats_nothing():
    assert num_repeated_tokens([5, 6, 7, 5, 6, 7], [0, 0, 0, 1, 1, 1], n=3) == 0


def test_an_empty_response_repeats_nothing():
    assert num_repeated_tokens([], []) == 0
