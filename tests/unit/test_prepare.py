import json

import pytest

from dgpo.__main__ import main
from dgpo.config.load import load_config
from dgpo.config.schema import Config, PrepareConfig
from dgpo.data.benchmarks import BENCHMARKS, Benchmark
from dgpo.data.prepare import prepare, split_questions
from dgpo.data.questions import Question
from dgpo.data.rows import read_rows, row_gold_passages, row_id
from dgpo.errors import ConfigError, DataError
from dgpo.metrics.exact_match import normalize_answer
from dgpo.runs.artifacts import read_manifest
from retriever.corpus import Corpus
from tests.unit.test_natural_questions import simplified
from tests.unit.test_questions import HOTPOT, MUSIQUE, TWO_WIKI, write

SMALL = {  # set -> number of test and training lines
    "nq": (2, 3),
    "triviaqa": (1, None),
    "popqa": (1, None),
    "hotpotqa": (1, 2),
    "2wikimultihopqa": (1, None),
    "musique": (1, None),
    "bamboogle": (1, None),
}
SAMPLES = {"hotpotqa": HOTPOT, "2wikimultihopqa": TWO_WIKI, "musique": MUSIQUE}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """FlashRAG's layout in small, with sizes to match."""
    for name, (num_test, num_train) in SMALL.items():
        split = BENCHMARKS[name].test_split
        monkeypatch.setitem(BENCHMARKS, name, Benchmark(split, num_test, num_train))
        (tmp_path / "flashrag" / name).mkdir(parents=True)
        for file, count in ((split, num_test), ("train", num_train or 0)):
            lines = [
                {"id": f"{file}_{number}", "question": f"{name} {file} question {number}", "golden_answers": ["x"]}
                for number in range(count)
            ]
            if name in SAMPLES and lines:
                lines[0] = {**SAMPLES[name], "id": f"{file}_0"}
                lines[0]["question"] += f" ({file})"
            write(tmp_path / "flashrag" / name / f"{file}.jsonl", lines)
    return tmp_path


def run(folder, **settings):
    config = Config(prepare=PrepareConfig(out=str(folder / "out"), benchmarks=str(folder / "flashrag"), **settings))
    return prepare(config)


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "flashrag")


def test_the_published_sizes_add_up_to_the_papers():
    assert sum(each.num_test for each in BENCHMARKS.values()) == 51_713
    assert sum(each.num_train or 0 for each in BENCHMARKS.values()) == 79_168 + 90_447
    assert [name for name, each in BENCHMARKS.items() if each.test_split == "dev"] == [
        "hotpotqa",
        "2wikimultihopqa",
        "musique",
    ]


def test_the_papers_sets_become_rows_with_unique_ids(folder):
    out = run(folder)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{name}_test.parquet" for name in SMALL), "train.parquet", "manifest.json"]
    )
    train = read_rows(out / "train.parquet")
    assert [row["data_source"] for row in train] == ["nq"] * 3 + ["hotpotqa"] * 2
    everything = train + [row for name in SMALL for row in read_rows(out / f"{name}_test.parquet")]
    ids = [row_id(row) for row in everything]
    assert len(set(ids)) == len(ids) == 13
    assert not any(row_gold_passages(row) for row in train)
    counts = read_manifest(out, stage="prepare")["counts"]
    assert counts["musique_test"] == {"questions": 1, "with_gold_passages": 1, "with_hops": 1}
    assert counts["nq_train"] == {"questions": 3}


def test_nqs_long_answers_become_gold_passages(folder):
    path = write(folder / "annotations.jsonl", [simplified("nq test question 1", (6, 16))])
    out = run(folder, nq_annotations=str(path))
    first, second = read_rows(out / "nq_test.parquet")
    assert row_gold_passages(first) == []
    assert row_gold_passages(second) == [
        {"id": "nq-test_1-gold-0", "contents": '"E-mail history"\nEmail was sent in 1971 (ARPANET).'}
    ]
    assert read_manifest(out, stage="prepare")["counts"]["nq_annotations"]["with_long_answer"] == 1


def test_another_size_than_published_is_an_error_unless_allowed(folder):
    write(folder / "flashrag" / "popqa" / "test.jsonl", [{"question": f"{n}?", "answer": "x"} for n in range(4)])
    with pytest.raises(
        DataError, match=r"popqa/test.jsonl has 4 questions, the published popqa has 1: download it again"
    ):
        run(folder)
    assert left(folder) == []
    run(folder, allow_other_sizes=True)


def test_missing_files_and_unknown_sets_are_named(folder):
    (folder / "flashrag" / "bamboogle" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"bamboogle/test.jsonl does not exist: .*download.what=\[benchmarks\]"):
        run(folder)
    with pytest.raises(ConfigError, match=r"prepare.test_sets: unknown set 'hotpot': did you mean hotpotqa\? expected"):
        run(folder, test_sets=["hotpot"])
    with pytest.raises(ConfigError, match=r"prepare.train_sets: unknown set 'popqa': .*expected some of nq, hotpotqa$"):
        run(folder, train_sets=["popqa"])
    with pytest.raises(ConfigError, match="a set is named twice"):
        run(folder, test_sets=["nq", "nq"])
    with pytest.raises(ConfigError, match="nothing to prepare"):
        run(folder, test_sets=[], train_sets=[])
    assert left(folder) == []


def test_a_bad_line_leaves_nothing_and_a_few_may_be_allowed(folder):
    write(
        folder / "flashrag" / "nq" / "train.jsonl",
        [{"question": "a?", "answer": "x"}, "{", {"question": "b?", "answer": "x"}],
    )
    with pytest.raises(DataError, match=r"nq/train.jsonl, line 2: not valid JSON"):
        run(folder)
    assert left(folder) == []
    manifest = read_manifest(run(folder, max_bad_lines=1), stage="prepare")
    assert manifest["counts"]["unusable_lines"] == 1
    assert "line 2" in manifest["inputs"]["unusable_lines"][0]


def test_a_folder_that_is_there_is_replaced_only_when_told(folder):
    out = run(folder, test_sets=["nq"])
    with pytest.raises(ConfigError, match=r"prepare.overwrite=true"):
        run(folder)
    (folder / "flashrag" / "popqa" / "test.jsonl").unlink()
    with pytest.raises(DataError):
        run(folder, overwrite=True)
    assert (out / "nq_test.parquet").is_file()
    run(folder, test_sets=["bamboogle"], overwrite=True)
    assert not (out / "nq_test.parquet").exists()
    assert left(folder) == ["out"]


def test_a_disk_that_fills_up_leaves_what_was_there(folder, monkeypatch, capsys):
    def full(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dgpo.data.prepare.write_rows", full)
    overrides = [f"prepare.out={folder / 'out'}", f"prepare.benchmarks={folder / 'flashrag'}"]
    assert main(["prepare", *overrides]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert left(folder) == []


def test_training_questions_of_the_test_sets_can_be_dropped(folder):
    write(
        folder / "flashrag" / "nq" / "train.jsonl",
        [{"question": text, "answer": "x"} for text in ("NQ test question 0?", "another?", "popqa test question 0")],
    )
    out = run(folder, drop_overlap=True)
    assert read_rows(out / "train.parquet")[0]["question"] == "another?"
    dropped = read_manifest(out, stage="prepare")["counts"]["dropped_overlap"]
    # HotpotQA's sample question stands in both of its files, up to its last word.
    assert (dropped["nq"], dropped["popqa"], dropped["hotpotqa"], dropped["bamboogle"]) == (1, 1, 1, 0)
    assert dropped["all"] == 3
    with pytest.raises(ConfigError, match=r"prepare both, or unset it"):
        run(folder, overwrite=True, drop_overlap=True, test_sets=[])


def test_own_questions_and_documents_become_sets_and_a_corpus(tmp_path):
    source = write(
        tmp_path / "mine.jsonl",
        [{"question": f"question {n}?", "answers": [str(n)]} for n in range(20)]
        + [{"question": "fixed?", "answer": "x", "split": "test"}],
    )
    documents = write(tmp_path / "docs.jsonl", [{"title": "T", "text": "one two three four five"}])
    config = Config(prepare=PrepareConfig(out=str(tmp_path / "out"), source=str(source), documents=str(documents)))
    config.prepare.name, config.prepare.test_share, config.prepare.passage_words = "mine", 0.25, 3
    out = prepare(config)
    train, test = read_rows(out / "train.parquet"), read_rows(out / "mine_test.parquet")
    assert (len(train), len(test)) == (15, 6)
    assert test[-1]["question"] == "fixed?"
    assert {row["data_source"] for row in train + test} == {"mine"}
    assert [row["contents"] for row in Corpus(out / "corpus.jsonl")] == ['"T"\none two three', '"T"\nfour five']
    counts = read_manifest(out, stage="prepare")["counts"]
    assert counts["corpus"] == {"documents": 1, "cut_documents": 1, "passages": 2, "words": 5}


def test_documents_alone_make_a_corpus(tmp_path):
    documents = write(tmp_path / "docs.jsonl", [{"text": "one"}])
    out = prepare(Config(prepare=PrepareConfig(out=str(tmp_path / "out"), documents=str(documents))))
    assert sorted(path.name for path in out.iterdir()) == ["corpus.jsonl", "manifest.json"]
    assert json.loads((out / "corpus.jsonl").read_text()) == {"id": "0", "contents": '""\none'}


def test_own_settings_that_cannot_work_are_refused(tmp_path):
    source = str(write(tmp_path / "mine.jsonl", [{"question": "a?", "answer": "x"}]))
    for changes, message in (
        ({"name": "My Set"}, "prepare.name='My Set'"),
        ({"test_share": 1.5}, "prepare.test_share=1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(Config(prepare=PrepareConfig(out=str(tmp_path / "out"), source=source, **changes)))
    empty = str(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match=r"empty.jsonl holds no questions"):
        prepare(Config(prepare=PrepareConfig(out=str(tmp_path / "out"), source=empty)))


def test_the_split_depends_on_the_seed_and_keeps_equal_questions_together():
    questions = [Question(str(n), f"Question {n % 50}{'?' * (n % 2)}", ("x",)) for n in range(100)]
    train, test = split_questions(questions, test_share=0.2, seed=1)
    assert (len(train), len(test)) == (80, 20)
    assert split_questions(questions, test_share=0.2, seed=1) == (train, test)
    assert split_questions(questions, test_share=0.2, seed=2) != (train, test)
    assert not {normalize_answer(each.text) for each in train} & {normalize_answer(each.text) for each in test}
    assert split_questions(questions, test_share=0.0, seed=1) == (questions, [])
    assert split_questions(questions, test_share=1.0, seed=1) == ([], questions)


def test_a_data_source_per_line_makes_sets_of_their_own(tmp_path):
    lines = [
        {"question": f"q{i}", "answers": ["a"], "split": "test" if i < 4 else "train", **source}
        for i, source in enumerate([{"data_source": "law"}, {"data_source": "law"}, {"data_source": "tax"}, {}, {}, {}])
    ]
    lines[4]["data_source"] = "tax"
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = prepare(load_config([f"prepare.source={source}", "prepare.name=rest", f"prepare.out={tmp_path / 'out'}"]))
    sizes = {path.name: len(read_rows(path)) for path in out.glob("*_test.parquet")}
    assert sizes == {"law_test.parquet": 2, "tax_test.parquet": 1, "rest_test.parquet": 1}
    assert [row["data_source"] for row in read_rows(out / "train.parquet")] == ["tax", "rest"]


def test_a_data_source_that_cannot_name_a_file_is_refused(tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text('{"question": "q", "answers": ["a"], "data_source": "../x"}\n')
    with pytest.raises(DataError, match=r"`data_source` is '\.\./x', expected small letters"):
        prepare(load_config([f"prepare.source={source}", f"prepare.out={tmp_path / 'out'}"]))
