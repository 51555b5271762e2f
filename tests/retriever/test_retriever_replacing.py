"""`--overwrite` replaces an index folder, and nothing else that lies there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FACTS, WordHashEncoder, run_module, write_corpus

from retriever.build import build_indexes
from retriever.convert import convert_file, convert_folder
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.manifest import RECALL_FILE, read_manifest

STUB = EncoderConfig(spec="models/stub", preset="none", dtype="float32")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "facts.jsonl", FACTS)


def build(corpus: Path, out: Path) -> Path:
    return build_indexes({out.name: corpus}, out.parent, method="bm25", overwrite=True)[out.name]


@pytest.fixture
def index(facts: Path, tmp_path: Path) -> Path:
    return build(facts, tmp_path / "index")


def with_corpus_and_thesis(out: Path, facts: Path) -> Path:
    out.mkdir()
    shutil.copy(facts, out / "c.jsonl")
    (out / "thesis.txt").write_text("years of work")
    return out / "c.jsonl"


def with_a_manifest_of_another_program(out: Path, facts: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({"name": "an app", "files": {}}))
    return facts


def an_index_with_a_note(out: Path, facts: Path) -> Path:
    (build(facts, out) / "note.txt").write_text("mine")
    return facts


def an_index_with_a_link(out: Path, facts: Path) -> Path:
    (build(facts, out) / "link").symlink_to(facts.parent)
    return facts


def an_index_that_holds_the_corpus(out: Path, facts: Path) -> Path:
    return build(facts, out) / "corpus.jsonl"


def an_index_reached_by_a_link_that_holds_the_corpus(out: Path, facts: Path) -> Path:
    corpus = build(facts, out.with_name("real")) / "corpus.jsonl"
    out.symlink_to(out.with_name("real"))
    return corpus


def a_file(out: Path, facts: Path) -> Path:
    out.write_bytes(b"IxFI")
    return facts


def a_dangling_link(out: Path, facts: Path) -> Path:
    out.symlink_to(out.with_name("nowhere"))
    return facts


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (with_corpus_and_thesis, "has no manifest.json of an index"),
        (with_a_manifest_of_another_program, "its manifest.json is not that of an index"),
        (an_index_with_a_note, "holds note.txt, which is no part of the index"),
        (an_index_with_a_link, "holds link, which is no part of the index"),
        (an_index_that_holds_the_corpus, "is made from .*corpus.jsonl, which would go with it"),
        (an_index_reached_by_a_link_that_holds_the_corpus, "is made from .*corpus.jsonl, which would go with it"),
        (a_file, "is not a folder"),
        (a_dangling_link, "is not a folder"),
    ],
)
def test_what_is_not_ours_or_is_read_stays(
    facts: Path, prepare: Callable[[Path, Path], Path], message: str, tmp_path: Path
) -> None:
    corpus = prepare(tmp_path / "out", facts)
    before = tree(tmp_path)
    with pytest.raises(RetrieverError, match=message):
        build(corpus, tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_folder_is_not_converted_onto_itself_or_into_itself(
    facts: Path, tmp_path: Path, word_hash_encoder: WordHashEncoder
) -> None:
    flat = build_indexes({"flat": facts}, tmp_path, STUB)["flat"]
    before = tree(flat)
    for out in (flat, flat / "inner"):
        if out != flat:
            convert_folder(flat, out, index_type="SQfp16")  # a new folder there harms nothing
        with pytest.raises(RetrieverError, match="is not replaced"):
            convert_folder(flat, out, index_type="SQfp16", overwrite=True)
    index = flat / "stub_Flat.index"
    with pytest.raises(RetrieverError, match="is not a folder"):
        convert_file(index, facts, index, STUB, overwrite=True)
    shutil.rmtree(flat / "inner")
    assert tree(flat) == before


def test_an_index_is_replaced_and_an_empty_folder_filled(index: Path, facts: Path, tmp_path: Path) -> None:
    (index / RECALL_FILE).write_text("{}")
    write_corpus(facts, {"Nice": "A city."})
    assert read_manifest(build(facts, index)).num_passages == 1
    (tmp_path / "empty").mkdir()
    assert build_indexes({"empty": facts}, tmp_path, method="bm25")["empty"].is_dir()


def test_an_index_of_an_older_version_is_replaced(index: Path, facts: Path) -> None:
    manifest = json.loads((index / "manifest.json").read_text())
    (index / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    build(facts, index)


def test_what_comes_to_the_place_during_a_build_stays(
    facts: Path, tmp_path: Path, word_hash_encoder: WordHashEncoder
) -> None:
    def somebody_comes(num_done: int, num_all: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with pytest.raises(RetrieverError, match="out exists"):
        build_indexes({"out": facts}, tmp_path, STUB, progress=somebody_comes)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_hidden_folder_of_somebody_else_is_no_work_folder(facts: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.building").mkdir()
    (tmp_path / ".out.building" / "thesis.txt").write_text("years of work")
    with pytest.raises(RetrieverError, match=r"\.out\.building is not an unfinished index of ours"):
        build(facts, tmp_path / "out")
    assert (tmp_path / ".out.building" / "thesis.txt").exists()


def test_the_commands_keep_it_too_and_the_current_folder_has_a_name(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in (facts.parent, Path("/")):
        run = run_module("build", "--corpus", str(facts), "--out", str(out), "--method", "bm25", "--overwrite")
        assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
        assert run.stderr.startswith("retriever.build: ")
    assert facts.exists()


def test_the_server_names_no_file_or_folder_of_a_user_as_the_place_for_an_index(tmp_path: Path) -> None:
    (tmp_path / "e5_Flat.index").write_bytes(b"IxFI")
    (tmp_path / "lucene").mkdir()
    for name in ("e5_Flat.index", "lucene"):
        with pytest.raises(RetrieverError, match=r"is not an index folder .*--out NEW_FOLDER"):
            read_manifest(tmp_path / name)
    with pytest.raises(RetrieverError, match=r"retriever\.convert --index .*e5_Flat.index"):
        read_manifest(tmp_path / "e5_Flat.index")
    with pytest.raises(RetrieverError, match=r"retriever\.build .*--out .*/absent"):
        read_manifest(tmp_path / "absent")
