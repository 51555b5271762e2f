import gzip
import json

import pytest

from dgpo.data.lines import BadLines
from dgpo.data.questions import Question, evidence, question_key, question_rows, read_questions
from dgpo.data.rows import row_gold_passages, row_golds, row_hops, row_id, row_question, validate_rows
from dgpo.errors import DataError

HOTPOT = {
    "id": "dev_0",
    "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
    "golden_answers": ["yes"],
    "metadata": {
        "type": "comparison",
        "level": "hard",
        "supporting_facts": {"title": ["Scott Derrickson", "Ed Wood", "Ed Wood"], "sent_id": [0, 0, 1]},
        "context": {
            "title": ["Ed Wood (film)", "Scott Derrickson", "Ed Wood"],
            "sentences": [
                ["A film."],
                ["Scott is a director.", " He is American."],
                ["Ed was a filmmaker.", " He was American."],
            ],
        },
    },
}
TWO_WIKI = {
    "id": "dev_7",
    "question": "Who is the mother of the director of film Polish-Russian War?",
    "golden_answers": ["Małgorzata Braunek"],
    "metadata": {
        "type": "compositional",
        "supporting_facts": {"title": ["Polish-Russian War", "Xawery Żuławski"], "sent_id": [1, 2]},
        "context": {
            "title": ["Polish-Russian War", "Xawery Żuławski", "Other"],
            "content": [["A 2009 film.", "Directed by Xawery Żuławski."], ["A director.", "Son of Małgorzata."], ["x"]],
        },
    },
}
MUSIQUE = {
    "id": "dev_3",
    "question": "When was the institute that owned The Collegian founded?",
    "golden_answers": ["1960", "in 1960"],
    "metadata": {
        "answerable": True,
        "question_decomposition": [
            {
                "id": 1,
                "question": "The Collegian >> owned by",
                "answer": "Houston Baptist University",
                "support_paragraph": {"title": "The Collegian", "paragraph_text": "The Collegian is a newspaper."},
            },
            {
                "id": 2,
                "question": "When was #1 founded?",
                "answer": "1960",
                "support_paragraph": {"title": "Houston", "paragraph_text": "The university\nwas founded in 1960."},
            },
        ],
    },
}


def write(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path, limit=0):
    bad = BadLines(limit)
    questions = read_questions(path, bad)
    bad.check()
    return questions


def test_evidence_and_hops_of_the_three_multi_hop_sets():
    assert evidence(HOTPOT["metadata"]) == (
        (
            '"Scott Derrickson"\nScott is a director. He is American.',
            '"Ed Wood"\nEd was a filmmaker. He was American.',
        ),
        2,
    )
    assert evidence(TWO_WIKI["metadata"]) == (
        (
            '"Polish-Russian War"\nA 2009 film. Directed by Xawery Żuławski.',
            '"Xawery Żuławski"\nA director. Son of Małgorzata.',
        ),
        2,
    )
    assert evidence(MUSIQUE["metadata"]) == (
        (
            '"The Collegian"\nThe Collegian is a newspaper.',
            '"Houston"\nThe university was founded in 1960.',
        ),
        2,
    )


def test_evidence_may_stand_one_level_deeper():
    assert evidence({"metadata": MUSIQUE["metadata"]}) == evidence(MUSIQUE["metadata"])


def test_evidence_is_whole_or_absent():
    partial = {**HOTPOT["metadata"], "context": {"title": ["Ed Wood"], "sentences": [["Ed."]]}}
    assert evidence(partial) == ((), 2)
    assert evidence({**HOTPOT["metadata"], "context": {"title": [], "sentences": []}}) == ((), 2)
    steps = [*MUSIQUE["metadata"]["question_decomposition"], {"id": 3, "support_paragraph": None}]
    assert evidence({"question_decomposition": steps}) == ((), 3)
    assert evidence({}) == ((), None)


def test_a_question_becomes_a_row_of_the_ecosystems_schema(tmp_path):
    (row,) = question_rows(
        read(write(tmp_path / "a.jsonl", [MUSIQUE])), source="musique", split="test", with_passages=True
    )
    validate_rows([row], "a")
    assert row["data_source"] == "musique"
    assert row["ability"] == "fact-reasoning"
    assert row["reward_model"] == {"style": "rule", "ground_truth": {"target": ["1960", "in 1960"]}}
    assert row["prompt"][0]["content"].endswith("Question: When was the institute that owned The Collegian founded?\n")
    assert (row["extra_info"]["split"], row["extra_info"]["index"]) == ("test", 0)
    assert (row_id(row), row_hops(row)) == ("musique-dev_3", 2)
    assert [each["id"] for each in row_gold_passages(row)] == ["musique-dev_3-gold-0", "musique-dev_3-gold-1"]
    assert (row["id"], row["golden_answers"]) == ("dev_3", ["1960", "in 1960"])


def test_training_rows_leave_the_passages_out_and_keep_the_hops(tmp_path):
    (row,) = question_rows(
        read(write(tmp_path / "a.jsonl", [HOTPOT])), source="hotpotqa", split="train", with_passages=False
    )
    assert (row_gold_passages(row), row_hops(row)) == ([], 2)


def test_a_question_gets_its_question_mark(tmp_path):
    questions = read(write(tmp_path / "a.jsonl", [{"question": " who wrote it ", "answer": "Ada"}]))
    (row,) = question_rows(questions, source="own", split="test", with_passages=True)
    assert (row_question(row), row_golds(row), row_id(row)) == ("who wrote it?", ["Ada"], "own-1")


def test_own_lines_may_be_short_or_full(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [
            {"question": "a?", "answers": ["x", " x ", ""]},
            "",
            {"id": 7, "question": "b?", "golden_answers": ["y"], "split": "test", "hops": 3, "gold_passages": ["p"]},
            {"question": "c?", "answer": "z", "gold_passages": [{"title": "T", "text": "t"}, {"contents": '"U"\nu'}]},
        ],
    )
    assert read(path) == [
        Question("1", "a?", ("x",)),
        Question("7", "b?", ("y",), hops=3, gold_passages=("p",), split="test"),
        Question("4", "c?", ("z",), gold_passages=('"T"\nt', '"U"\nu')),
    ]


def test_compressed_lines_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"question": "a?", "answer": "x"}\n'))
    assert len(read(path)) == 1
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is not a whole gzip file"):
        read(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": ', "not valid JSON in UTF-8"),
        ('["a"]', "['a'], expected a json object"),
        ('{"answer": "x"}', "`question` is None, expected a text"),
        ('{"question": " ", "answer": "x"}', "`question` is ' ', expected a text"),
        ('{"question": "a?", "gold": "x"}', "no `golden_answers` (nor `answers`, `answer`); it has question, gold"),
        ('{"question": "a?", "answers": []}', "`answers` is []: no accepted answer"),
        ('{"question": "a?", "answers": [" "]}', "`answers` is [' ']: no accepted answer"),
        ('{"question": "a?", "answers": [1955]}', "`answers` is [1955], expected a text or a list of texts"),
        ('{"question": "a?", "answer": "x", "split": "dev"}', "`split` is 'dev', expected train or test"),
        ('{"question": "a?", "answer": "x", "hops": true}', "`hops` is True, expected a whole number"),
        ('{"question": "a?", "answer": "x", "metadata": "m"}', "`metadata` is 'm', expected an object"),
        ('{"question": "a?", "answer": "x", "gold_passages": [3]}', "a gold passage is 3, expected a text"),
        ('{"id": "q", "question": "a?", "answer": "x"}', "id 'q' is also on line 1; ids must be unique"),
        ('{"id": ["q"], "question": "a?", "answer": "x"}', "`id` is ['q'], expected a text or a whole number, or none"),
        ('{"id": NaN, "question": "a?", "answer": "x"}', "`id` is nan, expected a text or a whole number, or none"),
        ('{"id": true, "question": "a?", "answer": "x"}', "`id` is True, expected a text or a whole number, or none"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "mine.jsonl", [{"id": "q", "question": "first?", "answer": "x"}, "", line])
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"1 unusable line, prepare.max_bad_lines=0: {path}, line 3: {reason}" in str(caught.value)
    assert len(read(path, limit=1)) == 1


def test_all_bad_lines_are_counted_and_the_first_three_shown(tmp_path):
    path = write(tmp_path / "mine.jsonl", ["?"] * 12)
    with pytest.raises(DataError, match=r"^12 unusable lines.* line 3: .*; and 9 more\. Correct"):
        read(path, limit=11)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        read(tmp_path / "none.jsonl")


def test_questions_are_matched_over_case_spaces_and_question_mark():
    assert question_key(" Who  wrote It ?") == question_key("who wrote it") == "who wrote it"
