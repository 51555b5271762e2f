import gzip
import json

import pytest

from dgpo.data.lines import BadLines
from dgpo.data.natural_questions import join_long_answers, long_answer
from dgpo.data.questions import Question
from dgpo.errors import ConfigError, DataError

# Tokens 0-13. The paragraph with the answer is 6-13 (end exclusive).
TEXT = "Email - wikipedia <H1> Email </H1> <P> Email was sent in 1971 ( ARPANET ) . </P>"
URL = "https://en.wikipedia.org//w/index.php?title=E-mail_history&amp;oldid=814071202"


def annotation(start, end):
    return {
        "annotation_id": 1,
        "long_answer": {"start_token": start, "candidate_index": 0 if start >= 0 else -1, "end_token": end},
        "short_answers": [],
        "yes_no_answer": "NONE",
    }


def simplified(question, *spans, text=TEXT):
    return {
        "example_id": 5,
        "question_text": question,
        "document_url": URL,
        "document_text": text,
        "long_answer_candidates": [],
        "annotations": [annotation(*span) for span in spans],
    }


def original(question, *spans):
    tokens = [
        {"token": token, "html_token": token.startswith("<"), "start_byte": 0, "end_byte": 1}
        for token in TEXT.split(" ")
    ]
    record = simplified(question, *spans)
    del record["document_text"]
    return {**record, "document_tokens": tokens, "document_title": "Email", "document_html": "<html>"}


def join(tmp_path, records, questions):
    path = tmp_path / "nq.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return join_long_answers(questions, path, BadLines())


def test_a_simplified_line_gives_the_text_without_markup_under_the_urls_title():
    assert long_answer(simplified("q", (6, 16))) == '"E-mail history"\nEmail was sent in 1971 (ARPANET).'


def test_an_original_line_gives_the_same_text_under_the_pages_title():
    assert long_answer(original("q", (6, 16))) == '"Email"\nEmail was sent in 1971 (ARPANET).'


def test_table_markup_and_quotes_are_cleaned():
    text = "<Table> <Th_colspan=\"2\"> `` Song '' </Th> <Td> it 's 3 % , is n't it ? </Td> </Table>"
    assert long_answer(simplified("q", (0, 20), text=text)).endswith("\n\" Song \" it's 3%, isn't it?")


def test_the_span_of_most_annotators_counts_and_the_first_of_equals():
    assert long_answer(original("q", (-1, -1), (3, 6), (6, 16), (6, 16))).endswith("(ARPANET).")
    assert long_answer(original("q", (3, 6), (6, 16))) == '"Email"\nEmail'
    assert long_answer(original("q", (-1, -1), (-1, -1), (6, 16))).endswith("(ARPANET).")
    assert long_answer(original("q", (-1, -1))) is None
    assert long_answer(original("q")) is None


def test_questions_are_joined_by_their_text_and_counted(tmp_path):
    questions = [
        Question("test_0", "When was the first Email sent?", ("1971",)),
        Question("test_1", "who sent it", ("Ray Tomlinson",)),
        Question("test_2", "why", ("x",)),
        Question("test_3", "never asked there", ("x",)),
    ]
    records = [
        simplified("when was the  first email sent", (6, 16)),
        simplified("who sent it", (6, 16)),
        simplified("why", (-1, -1)),
        simplified("not in nq-open", (0, 3)),
    ]
    joined, counts = join(tmp_path, records, questions)
    assert [question.id for question in joined] == [question.id for question in questions]
    assert [len(question.gold_passages) for question in joined] == [1, 1, 0, 0]
    assert counts == {
        "with_long_answer": 2,
        "without_long_answer": 1,
        "not_annotated": 1,
        "answer_in_long_answer": 1,
    }


def test_a_folder_of_compressed_files_is_read_through(tmp_path):
    for number, name in enumerate(("nq-dev-00.jsonl.gz", "nq-dev-01.jsonl.gz")):
        line = json.dumps(original(f"question {number}", (6, 16))) + "\n"
        (tmp_path / name).write_bytes(gzip.compress(line.encode()))
    questions = [Question("0", "question 0", ("x",)), Question("1", "question 1", ("x",))]
    joined, _ = join_long_answers(questions, tmp_path, BadLines())
    assert all(question.gold_passages for question in joined)


def test_lines_that_are_not_of_natural_questions_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"nq.jsonl, line 1: not a line of Natural Questions \(KeyError\('annotations'\)\)"
    ):
        join(tmp_path, [{"question_text": "why"}], [Question("0", "why", ("x",))])
    with pytest.raises(ConfigError, match=r"prepare.nq_annotations=.*none: no .jsonl or .jsonl.gz there"):
        join_long_answers([], tmp_path / "none", BadLines())
