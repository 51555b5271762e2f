import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import FACTS, WordHashEncoder, run_module, write_corpus

from retriever.bm25 import BM25Index
from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.corpus import scan_offsets
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.faiss_file import write_index
from retriever.manifest import (
    MANIFEST_FILE,
    NUM_SAMPLE_BLOCKS,
    OFFSETS_FILE,
    PROBE_FILE,
    SAMPLE_BLOCK_BYTES,
    read_manifest,
    sample_sha256,
    seal_file,
)

STUB = EncoderConfig(spec="models/stub", query_prefix="", passage_prefix="", dtype="float32")
INDEX_FILE = "stub_Flat.index"


@pytest.fixture
def folder(tmp_path: Path, word_hash_encoder: WordHashEncoder) -> Path:
    return build_indexes({"facts": write_corpus(tmp_path / "facts.jsonl", FACTS)}, tmp_path, STUB)["facts"]


def test_the_manifest_states_encoder_counts_and_hash(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.encoder == replace(STUB, pooling="mean")
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


def test_a_build_that_fails_before_it_encoded_leaves_nothing_behind(
    tmp_path: Path, word_hash_encoder: WordHashEncoder
) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(RetrieverError):
        build_indexes({"bad": tmp_path / "bad.jsonl"}, tmp_path / "out", STUB)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_told(folder: Path, tmp_path: Path) -> None:
    corpora = {"facts": write_corpus(tmp_path / "new.jsonl", {"Nice": "A city."})}
    with pytest.raises(RetrieverError, match="exists; choose another folder, or pass --overwrite"):
        build_indexes(corpora, tmp_path, STUB)
    build_indexes(corpora, tmp_path, STUB, overwrite=True)
    assert read_manifest(folder).num_passages == 1
    assert not list(tmp_path.glob(".*building*"))


def test_a_malformed_row_is_named_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.build.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text('{"id": "0", "contents": null}\n')
    with pytest.raises(RetrieverError, match='row 0: "contents" is None'):
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


def replace_index(folder: Path, shape: tuple[int, int]) -> None:
    rows = np.full(shape, shape[1] ** -0.5, dtype=np.float32)
    write_index(folder / INDEX_FILE, "Flat", lambda start, end: rows[start:end], num_rows=shape[0], dimension=shape[1])


def overwrite_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content + path.read_bytes()[len(content) :])


def cut_off(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "is not an index folder .*python -m retriever.build"),
        (lambda folder: edit_manifest(folder, format=99), "cannot be read by this version .*99"),
        (lambda folder: edit_manifest(folder, surprise=1), "cannot be read by this version .*surprise"),
        (lambda folder: edit_manifest(folder, index="../x"), r"cannot be read by this version .*\.\./x"),
        (lambda folder: edit_manifest(folder, dimension=None), "a dense index without encoder or dimension"),
        (lambda folder: (folder / INDEX_FILE).unlink(), f"lacks {INDEX_FILE}"),
        (lambda folder: (folder / PROBE_FILE).unlink(), f"lacks {PROBE_FILE}"),
        (drop_last_row, "corpus.jsonl has .* bytes, the manifest was written for .*cut off or was changed"),
        (rename_a_city, "corpus.jsonl is not the file .*another sha256.*build it again"),
        (lambda folder: cut_off(folder / INDEX_FILE, 20), "is not a FAISS index file"),
        (lambda folder: cut_off(folder / INDEX_FILE, 500), "has 500 bytes, the manifest was written for 3117"),
        (lambda folder: replace_index(folder, (11, 64)), "holds 11 vectors, the corpus has 12 passages"),
        (lambda folder: replace_index(folder, (12, 32)), "32 dimensions, its manifest was written for 64"),
        (lambda folder: replace_index(folder, (12, 64)), "another sha256"),
    ],
)
def test_a_folder_whose_parts_do_not_belong_together_is_refused_before_a_model_is_loaded(
    folder: Path, damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_collection({"facts": folder})
    monkeypatch.setattr("retriever.collection.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    damage(folder)
    with pytest.raises(RetrieverError, match=message) as refusal:
        load_collection({"facts": folder})
    assert "\n" not in str(refusal.value)


def test_an_encoder_of_another_dimension_or_other_vectors_is_refused_before_the_index_is_opened(
    folder: Path, word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.collection.open_dense", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(word_hash_encoder, "encode_passages", lambda texts: np.full((len(texts), 64), 0.125))
    with pytest.raises(RetrieverError, match=r"does not reproduce the stored vector of passage .*another encoder"):
        load_collection({"facts": folder})
    monkeypatch.setattr(word_hash_encoder, "dimension", 32)
    with pytest.raises(RetrieverError, match="vectors of 64 dimensions, the encoder makes 32"):
        load_collection({"facts": folder})


def test_a_large_file_is_sampled_and_read_whole_only_to_verify(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(NUM_SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES * 2))
    before = seal_file(path)
    with open(path, "r+b") as file:
        file.seek(SAMPLE_BLOCK_BYTES + 10)  # between the first two samples
        file.write(b"x")
    assert seal_file(path).sample_sha256 == before.sample_sha256
    assert seal_file(path).sha256 != before.sha256
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert sample_sha256(path) != before.sample_sha256


def test_verify_finds_a_change_that_samples_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.manifest.sample_sha256", lambda path: seals[path.name]["sample_sha256"])
    seals = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    overwrite_bytes(folder / INDEX_FILE, (folder / INDEX_FILE).read_bytes()[:-1] + b"x")
    load_collection({"facts": folder})
    with pytest.raises(RetrieverError, match="another sha256"):
        load_collection({"facts": folder}, verify=True)


@pytest.mark.parametrize("damage", ["absent", "no table", "of another size", "of other rows"])
def test_a_stale_offset_table_is_made_again(folder: Path, damage: str) -> None:
    path = folder / OFFSETS_FILE
    offsets = np.load(path)
    if damage == "absent":
        path.unlink()
    elif damage == "no table":
        path.write_bytes(b"oops")
    else:
        offsets[-1 if damage == "of another size" else 5] -= 1
        np.save(path, offsets)
    served = load_collection({"facts": folder}).corpora["facts"].corpus
    assert [document["id"] for document in served] == [str(row) for row in range(len(FACTS))]
    assert np.load(path).tolist() == scan_offsets(folder / "corpus.jsonl").tolist()


def test_a_bm25_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    facts = write_corpus(tmp_path / "facts.jsonl", FACTS)
    one = write_corpus(tmp_path / "one.jsonl", {"Nice": "A city."})
    folders = build_indexes({"facts": facts, "one": one}, tmp_path, method="bm25")
    shutil.rmtree(folders["facts"] / "bm25")
    shutil.copytree(folders["one"] / "bm25", folders["facts"] / "bm25")
    with pytest.raises(RetrieverError, match="indexes 1 passages, the corpus has 12"):
        BM25Index.load(folders["facts"] / "bm25", num_passages=len(FACTS))
    with pytest.raises(RetrieverError, match=r"bm25/.* the manifest was written for"):
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
