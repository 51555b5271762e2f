import json

import pytest

from dgpo.config.schema import Config, ContaminationConfig
from dgpo.data.contamination import Overlap, check_rows, contamination, find_overlaps, markdown, table
from dgpo.data.questions import Question, question_rows
from dgpo.data.rows import write_rows
from dgpo.errors import ConfigError


def rows(*questions, source="own", split="test"):
    """(text, gold, ..) each."""
    made = [Question(str(number), text, tuple(golds)) for number, (text, *golds) in enumerate(questions)]
    return question_rows(made, source=source, split=split, with_passages=True)


def overlaps(train, test, **settings):
    return list(find_overlaps(train, test, **settings))


def test_equal_texts_are_exact_over_case_articles_and_punctuation():
    assert overlaps(["Who wrote it?", "who is the CEO"], ["who wrote  it", "Who is a C.E.O.?", "why?"]) == [
        Overlap(0, 0, True, 1.0),
        Overlap(1, 1, True, 1.0),
    ]


def test_near_duplicates_share_enough_word_sequences():
    test = ["one two three four five six"]  # sequences of 3: 123 234 345 456
    assert overlaps(["zero one two three four"], test, ngram=3, min_share=0.5) == [Overlap(0, 0, False, 0.5)]
    assert overlaps(["zero one two three four"], test, ngram=3, min_share=0.51) == []
    assert overlaps(["one two three x three four five"], test, ngram=3) == [Overlap(0, 0, False, 0.5)]


def test_a_training_question_that_contains_the_test_question_is_a_near_duplicate():
    short = "who won the eurovision song contest for ireland in nineteen ninety"
    assert [each.share for each in overlaps([f"please tell me {short} six"], [short])] == [1.0]


def test_short_questions_match_exactly_or_not_at_all():
    assert overlaps(["who wrote the first book"], ["who wrote the first"], ngram=8) == []
    assert overlaps(["who wrote the first"], ["who wrote the first"], ngram=8) == [Overlap(0, 0, True, 1.0)]


def test_every_pair_is_found():
    found = overlaps(["When!", "how?", "when how"], ["when?", "when", "how"])
    assert {(each.test, each.train) for each in found} == {(0, 0), (1, 0), (2, 1)}


def test_the_report_counts_each_kind_of_fault():
    train = rows(
        ("Who wrote it?", "Ada"), ("who wrote it", "Ada L"), ("Who wrote it", "Bob"), source="t", split="train"
    )
    test = rows(("who wrote it?", "Ada"), ("Is Paris older than Rome?", "Rome"), ("why?", "yes"), ("Whyever?", "why"))
    report = check_rows(train, {"own": test}, ContaminationConfig())
    assert table(report) == [
        ("train", "3", "2", "2", "-", "-", "0"),
        ("own", "4", "0", "0", "1", "0", "1"),
    ]
    assert report["train"]["duplicate_ids"] == [["t-0", "t-1", "t-2"]]
    assert report["tests"]["own"]["answer_in_question_ids"] == ["own-1"]
    assert [(pair["test_id"], pair["train_id"]) for pair in report["tests"]["own"]["overlaps"]] == [
        ("own-0", "t-0"),
        ("own-0", "t-1"),
        ("own-0", "t-2"),
    ]


def test_repeats_that_share_an_answer_do_not_conflict():
    train = rows(("a?", "x", "y"), ("a", "Y."), ("a", "z"))
    assert check_rows(train, {}, ContaminationConfig())["train"]["conflicting_duplicates"] == 1


def test_the_command_writes_table_json_and_markdown(tmp_path, capsys):
    write_rows(tmp_path / "train.parquet", rows(("Who wrote it?", "Ada"), source="t", split="train"))
    write_rows(tmp_path / "own.parquet", rows(("who wrote it?", "Ada")))
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.train_file = str(tmp_path / "train.parquet")
    config.data.test_files = {"own": str(tmp_path / "own.parquet")}
    contamination(config)
    folder = tmp_path / "run" / "contamination"
    report = json.loads((folder / "contamination.json").read_text())
    assert report["tests"]["own"]["exact_in_train"] == 1
    text = (folder / "contamination.md").read_text()
    assert text == markdown(report)
    assert "| own | 1 | 0 | 0 | 1 | 0 | 0 |" in text
    assert "- who wrote it? (own-0) / Who wrote it? (t-0), exact" in text
    assert "in train, exact" in capsys.readouterr().out


def test_nothing_to_check_and_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to check: name data.train_file"):
        contamination(Config(run_dir=str(tmp_path)))
    for settings in (
        ContaminationConfig(ngram=0),
        ContaminationConfig(min_share=0.0),
        ContaminationConfig(min_share=2),
    ):
        with pytest.raises(ConfigError, match=r"contamination\.(ngram=0|min_share=[02].*): expected"):
            contamination(Config(run_dir=str(tmp_path), contamination=settings))
