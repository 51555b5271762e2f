"""The collect stage by its command: scripted demonstrations, transcripts, and a collection that keeps nothing."""

import json

import pytest

from dgpo.__main__ import main
from dgpo.agent.trajectory import read_trajectories
from dgpo.data.rows import write_rows
from tests.unit.fake_model import ChatTokenizer, make_question
from tests.unit.stubs import healthy_server, make_model


@pytest.fixture
def collect(tmp_path, monkeypatch, capsys):
    """Runs the command on these rows; gives (exit code, manifest's counts, episodes, what was printed)."""
    monkeypatch.setattr("dgpo.coldstart.collect.load_tokenizer", lambda *_, **__: ChatTokenizer())

    def run(rows, *overrides):
        file = tmp_path / "collect.parquet"
        if rows:
            write_rows(file, rows)
        student = tmp_path / "student"
        common = [
            "hardware=cpu",
            f"run_dir={tmp_path / 'run'}",
            f"student.path={student if student.exists() else make_model(student)}",
            f"data.collect_file={file}",
            "retriever.backend=tests.unit.scripted:RecordingSearch",
        ]
        code = main(["collect", *common, *overrides])
        folder = tmp_path / "run" / "collect"
        counts = json.loads((folder / "manifest.json").read_text())["counts"] if folder.exists() else {}
        episodes = list(read_trajectories(folder / "episodes.jsonl")) if folder.exists() else []
        return code, counts, episodes, capsys.readouterr()

    return run


def test_the_oracles_misses_are_kept_out_and_counted(collect):
    rows = [make_question(0, "Paris"), make_question(1, "Atlantis"), make_question(2, "France")]
    code, counts, episodes, printed = collect(rows, "collect.from=oracle")
    assert code == 0
    assert (counts["episodes"], counts["kept"], counts["missed"], counts["search_failed"]) == (3, 2, 1, 0)
    assert [(episode.question, episode.golds) for episode in episodes] == [("Q0 ?", ["Paris"]), ("Q2 ?", ["France"])]
    assert {episode.origin for episode in episodes} == {"sampled"}
    assert "next: python -m dgpo distill" in printed.out


def test_several_phrasings_of_a_question_are_several_samples(collect):
    rows = [make_question(0, "Paris")]
    _, counts, episodes, _ = collect(rows, "collect.from=oracle", "collect.samples_per_question=6")
    assert counts["kept"] == 6
    assert len({tuple(episode.response_ids) for episode in episodes}) > 2


def test_a_collection_that_keeps_nothing_says_so_and_ends_with_status_1(collect):
    code, counts, episodes, printed = collect([make_question(0, "Atlantis")], "collect.from=oracle")
    assert (code, counts["kept"], episodes) == (1, 0, [])
    assert "no episode was kept of 1 (1 missed)" in printed.err
    assert "next:" not in printed.out


def test_transcripts_are_collected_from_a_file_of_texts(collect, tmp_path):
    good = {"question": "who", "answers": ["Ada"], "response": "<answer> Ada </answer>"}
    file = tmp_path / "texts.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'answers': ['Bob']})}\n")
    code, counts, episodes, _ = collect([], "collect.from=transcripts", f"data.collect_file={file}")
    assert code == 0
    assert (counts["episodes"], counts["kept"], counts["wrong"]) == (2, 1, 1)
    assert [episode.origin for episode in episodes] == ["text"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["collect.from=oracl"], "collect.source=oracl: expected one of teacher, oracle, transcripts"),
        (["collect.from=transcripts", "data.collect_file=none"], "name a jsonl file of transcripts"),
        (["teacher.url=127.0.0.1:8000"], "expected an address such as http://"),
    ],
)
def test_what_cannot_be_collected_is_refused_at_once(collect, overrides, message):
    code, counts, _, printed = collect([make_question(0, "Paris")], *overrides)
    assert (code, counts) == (2, {})
    assert message in printed.err


def test_a_teacher_that_does_not_answer_is_told_by_its_address_before_anything_starts(collect):
    code, counts, _, printed = collect([make_question(0, "Paris")], "teacher.url=http://127.0.0.1:9")
    assert (code, counts) == (2, {})
    assert "http://127.0.0.1:9/v1/models names no model" in printed.err
    with healthy_server() as url:  # it lists no models
        assert "set teacher.url_model" in collect([], f"teacher.url={url}")[3].err
