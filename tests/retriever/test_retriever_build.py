import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import FACTS, WordHashEncoder, run_module, write_corpus

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.encoders import EncoderConfig
from retriever.errors import CorpusError, IndexFolderError
from retriever.index import FaissFlatIndex
from retriever.manifest import MANIFEST_FILE, read_manifest

STUB = EncoderConfig(spec="models/stub", query_prefix="", passage_prefix="", dtype="float32")
INDEX_FILE = "stub_Flat.index"


@pytest.fixture
def folder(tmp_path: Path, word_hash_encoder: WordHashEncoder) -> Path:
    return build_indexes({"facts": write_corpus(tmp_path / "facts.jsonl", FACTS)}, tmp_path, STUB)["facts"]


def test_the_manifest_states_encoder_counts_and_hash(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.encoder == STUB
    assert (manifest.method, manifest.index, manifest.num_passages) == ("dense", INDEX_FILE, len(FACTS))
    assert manifest.dimension == WordHashEncoder.dimension
    assert len(manifest.corpus_sha256) == 64
    assert "faiss-cpu" in manifest.versions


def test_a_text_in_several_corpora_is_encoded_once(tmp_path: Path, word_hash_encoder: WordHashEncoder) -> None:
    facts = write_corpus(tmp_path / "facts.jsonl", FACTS)
    more = write_corpus(tmp_path / "more.jsonl", {"Nice": "Nice is a city in France.", **FACTS})
    folders = build_indexes({"a": facts, "b": more}, tmp_path, STUB)
    assert len(word_hash_encoder.passages) == len(FACTS) + 1
    collection = load_collection(folders)
    [in_a], [in_b] = collection.search([SearchJob(name, ["Saturn rings"], 1) for name in "ab"])
    row = in_a.rows[0]
    assert in_b.rows == (row + 1,)
    assert in_a.scores == in_b.scores
    assert len({id(served.index.encoder) for served in collection.corpora.values()}) == 1


def test_a_build_that_fails_leaves_nothing_behind(
    tmp_path: Path, word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)

    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("retriever.manifest.Manifest.write", disk_full)
    with pytest.raises(OSError, match="no space"):
        build_indexes({"facts": corpus}, tmp_path / "out", STUB)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_told(folder: Path, tmp_path: Path) -> None:
    corpora = {"facts": write_corpus(tmp_path / "new.jsonl", {"Nice": "A city."})}
    with pytest.raises(IndexFolderError, match="exists; choose another folder, or pass --overwrite"):
        build_indexes(corpora, tmp_path, STUB)
    build_indexes(corpora, tmp_path, STUB, overwrite=True)
    assert read_manifest(folder).num_passages == 1
    assert not list(tmp_path.glob(".*building*"))


def test_a_malformed_row_is_named_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.build.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text('{"id": "0", "contents": null}\n')
    with pytest.raises(CorpusError, match='row 0: "contents" is None'):
        build_indexes({"bad": tmp_path / "bad.jsonl"}, tmp_path)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_last_row(folder: Path) -> None:
    lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:-1]))


def rename_a_city(folder: Path) -> None:
    path = folder / "corpus.jsonl"
    path.write_text(path.read_text().replace("Osaka", "Kyoto"))


def truncate_index(folder: Path) -> None:
    path = folder / INDEX_FILE
    path.write_bytes(path.read_bytes()[:500])


def write_vectors(folder: Path, shape: tuple[int, int]) -> None:
    FaissFlatIndex.write(folder / INDEX_FILE, np.full(shape, shape[1] ** -0.5, dtype=np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "is not an index folder .*python -m retriever.build"),
        (lambda folder: edit_manifest(folder, format=99), "cannot be read by this version .*99"),
        (lambda folder: edit_manifest(folder, surprise=1), "cannot be read by this version .*surprise"),
        (lambda folder: (folder / INDEX_FILE).unlink(), f"lacks {INDEX_FILE}"),
        (drop_last_row, "offset table was made for"),
        (lambda folder: edit_manifest(folder, num_passages=11), "has 12 passages, the index was built from 11"),
        (rename_a_city, "the corpus changed; build it again"),
        (truncate_index, "cannot be read as a FAISS index"),
        (lambda folder: write_vectors(folder, (11, 64)), "holds 11 vectors, the corpus has 12 passages"),
        (lambda folder: write_vectors(folder, (12, 32)), "vectors of 32 dimensions, the encoder makes 64"),
        (lambda folder: write_vectors(folder, (12, 64)), "does not reproduce the stored vector of passage 0"),
    ],
)
def test_a_folder_whose_parts_do_not_belong_together_is_refused(folder: Path, damage, message: str) -> None:
    load_collection({"facts": folder})
    damage(folder)
    with pytest.raises(IndexFolderError, match=message) as refusal:
        load_collection({"facts": folder})
    assert "\n" not in str(refusal.value)


def test_a_bm25_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    facts = write_corpus(tmp_path / "facts.jsonl", FACTS)
    one = write_corpus(tmp_path / "one.jsonl", {"Nice": "A city."})
    folders = build_indexes({"facts": facts, "one": one}, tmp_path, method="bm25")
    shutil.rmtree(folders["facts"] / "bm25")
    shutil.copytree(folders["one"] / "bm25", folders["facts"] / "bm25")
    with pytest.raises(IndexFolderError, match="indexes 1 passages, the corpus has 12"):
        load_collection(folders)


def test_the_command_builds_a_folder_and_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    arguments = ("--corpus", str(corpus), "--out", str(tmp_path / "words"), "--method", "bm25")
    assert run_module("build", *arguments).returncode == 0
    assert read_manifest(tmp_path / "words").method == "bm25"
    again = run_module("build", *arguments)
    assert again.returncode == 1
    assert again.stderr.startswith("retriever.build: ")
    assert again.stderr.count("\n") == 1
