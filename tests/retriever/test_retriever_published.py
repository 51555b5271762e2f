"""Index files of others: told by their header, taken as they are, linked through links, watched while served."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from conftest import FACTS, QUESTIONS, WordHashEncoder, get, post, served_here, write_corpus

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.convert import convert_file, convert_folder
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.faiss_file import file_type
from retriever.manifest import read_manifest, seal_files
from retriever.options import SearchOptions, ServerLimits

STUB = EncoderConfig(spec="models/stub", preset="none", dtype="float32")
NUM = 600


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    facts = FACTS | {f"Place {row}": f"Number {row} lies {row * row} miles from the sea" for row in range(NUM - 12)}
    return write_corpus(tmp_path / "wiki.jsonl", facts)


def publish(path: Path, index_type: str, corpus: Path, encoder: WordHashEncoder) -> Path:
    """What somebody else made with FAISS."""
    texts = [json.loads(line)["contents"] for line in corpus.read_text().splitlines()]
    vectors = encoder.encode_queries(texts)
    index = faiss.index_factory(encoder.dimension, index_type, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize(
    "index_type",
    ["Flat", "SQfp16", "SQ8", "HNSW64", "HNSW16_SQ8", "IVF16,Flat", "IVF16,SQ8", "IVF4,PQ8x4"],
)
def test_a_published_file_is_taken_as_it_is_and_found_in(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder, index_type: str
) -> None:
    published = publish(tmp_path / "e5_any.index", index_type, corpus, word_hash_encoder)
    assert file_type(published) == index_type
    convert_file(published, corpus, tmp_path / "out", STUB)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.index_type == index_type
    assert (tmp_path / "out" / manifest.index).samefile(published)
    params = {"H": "efSearch=64", "I": "nprobe=16"}.get(index_type[0], "")
    params = "nprobe=4" if "IVF4" in index_type else params
    collection = load_collection({"wiki": tmp_path / "out"}, options=SearchOptions(search_params=params))
    [hits] = collection.search([SearchJob("wiki", list(QUESTIONS), 10)])
    titles = list(FACTS)
    found = [titles.index(title) in hit.rows for title, hit in zip(QUESTIONS.values(), hits, strict=True)]
    [exact] = load_collection({"wiki": flat(tmp_path, corpus)}).search([SearchJob("wiki", list(QUESTIONS), 10)])
    possible = [titles.index(title) in hit.rows for title, hit in zip(QUESTIONS.values(), exact, strict=True)]
    assert sum(found) >= sum(possible) - 1


def flat(tmp_path: Path, corpus: Path) -> Path:
    return build_indexes({"flat": corpus}, tmp_path, STUB)["flat"]


@pytest.mark.parametrize("index_type", ["PQ8", "IDMap,Flat", "PCA32,IVF16,SQ8"])
def test_a_kind_that_cannot_be_served_so_is_refused_in_words(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder, index_type: str
) -> None:
    vectors = np.random.default_rng(0).normal(size=(NUM, 64)).astype(np.float32)
    index: Any = faiss.index_factory(64, index_type, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(NUM)) if "IDMap" in index_type else index.add(vectors)
    faiss.write_index(index, str(tmp_path / "x.index"))
    with pytest.raises(RetrieverError, match=r"FAISS file of the kind|inner products"):
        convert_file(tmp_path / "x.index", corpus, tmp_path / "out", STUB)


def test_lists_with_numbers_of_their_own_are_refused(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    vectors = np.random.default_rng(0).normal(size=(NUM, 64)).astype(np.float32)
    index: Any = faiss.index_factory(64, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(NUM) + 10**6)
    faiss.write_index(index, str(tmp_path / "x.index"))
    with pytest.raises(RetrieverError, match="has row numbers of its own"):
        convert_file(tmp_path / "x.index", corpus, tmp_path / "out", STUB)


def test_a_number_that_is_not_finite_is_found_within_a_graph(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    published = publish(tmp_path / "x.index", "HNSW8", corpus, word_hash_encoder)
    index: Any = faiss.read_index(str(published))
    rows = faiss.rev_swig_ptr(faiss.downcast_index(index.storage).codes.data(), NUM * 256).view(np.float32)
    rows.reshape(NUM, 64)[7, 3] = np.nan
    faiss.write_index(index, str(published))
    with pytest.raises(RetrieverError, match=f"1 of {NUM} vectors .* the first is row 7"):
        convert_file(published, corpus, tmp_path / "out", STUB)


def test_a_graph_of_others_is_searched_as_it_was_made_unless_told(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    published = publish(tmp_path / "x.index", "HNSW8", corpus, word_hash_encoder)
    for said in ("", "efSearch=64"):
        convert_file(published, corpus, tmp_path / "out", STUB, search_params=said, overwrite=True)
        assert read_manifest(tmp_path / "out").search_params == said


def test_a_graph_is_not_turned_into_rows(tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder) -> None:
    published = publish(tmp_path / "x.index", "HNSW8", corpus, word_hash_encoder)
    with pytest.raises(RetrieverError, match=r"is a HNSW8 index, which does not hold the vectors .*leave out --to"):
        convert_file(published, corpus, tmp_path / "out", STUB, index_type="Flat")


def test_a_folder_whose_file_is_of_another_kind_is_refused(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    folder = flat(tmp_path, corpus)
    publish(folder / "stub_Flat.index", "HNSW8", corpus, word_hash_encoder)
    path = folder / "manifest.json"
    files = {name: vars(seal) for name, seal in seal_files(folder).items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    with pytest.raises(RetrieverError, match="is a HNSW8 index, its manifest says Flat"):
        load_collection({"x": folder})


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative, as in a hub's cache"])
def test_an_index_behind_a_link_is_linked_itself(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder, relative: bool
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    blob = publish(tmp_path / "blobs" / "0123", "Flat", corpus, word_hash_encoder)
    link = tmp_path / "snapshots" / "e5_Flat.index"
    link.symlink_to(Path("../blobs/0123") if relative else blob)
    convert_file(link, corpus, tmp_path / "out", STUB)
    file = tmp_path / "out" / "stub_Flat.index"
    assert not file.is_symlink()
    assert file.samefile(blob)
    assert read_manifest(tmp_path / "out").files["stub_Flat.index"].bytes == blob.stat().st_size
    load_collection({"x": tmp_path / "out"})


def test_a_folder_of_links_is_converted_and_served(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    folder, snapshot = flat(tmp_path, corpus), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    load_collection({"x": snapshot})
    convert_folder(snapshot, tmp_path / "half", index_type="SQfp16")
    assert not any(path.is_symlink() for path in (tmp_path / "half").iterdir())
    load_collection({"x": tmp_path / "half"})


@pytest.mark.parametrize("index_type", [None, "HNSW16"])
def test_the_first_vectors_of_a_published_file_need_no_unit_length(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder, index_type: str | None, monkeypatch: Any
) -> None:
    """And one of another encoder is told, however long its vectors are."""
    texts = [json.loads(line)["contents"] for line in corpus.read_text().splitlines()]
    right = word_hash_encoder.encode_queries(texts)
    wrong = right + 0.2 * np.random.default_rng(0).normal(size=right.shape).astype(np.float32)
    shifted = np.roll(right, 1, axis=0)
    for name, vectors in {"right": right, "wrong": wrong, "shifted": shifted}.items():
        index = faiss.IndexFlatIP(64)
        index.add(7 * vectors)
        faiss.write_index(index, str(tmp_path / f"{name}.index"))
        convert_file(tmp_path / f"{name}.index", corpus, tmp_path / name, STUB, index_type=index_type)
        if name == "right":
            load_collection({"x": tmp_path / name})
        else:
            with pytest.raises(RetrieverError, match="does not reproduce the stored vector"):
                load_collection({"x": tmp_path / name})


def test_the_order_of_vectors_that_are_all_alike_is_told(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model whose vectors all point one way: each cosine is above the bound, whoever is compared."""
    encode = word_hash_encoder.encode_queries

    def narrow(texts: list[str]) -> np.ndarray:
        vectors = encode(texts) + 12 / 8
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr(word_hash_encoder, "encode_queries", narrow)
    texts = [json.loads(line)["contents"] for line in corpus.read_text().splitlines()]
    vectors = narrow(texts)
    assert (vectors @ vectors.T).min() > 0.98
    for name, rows in {"right": vectors, "shifted": np.roll(vectors, 1, axis=0)}.items():
        index = faiss.IndexFlatIP(64)
        index.add(rows)
        faiss.write_index(index, str(tmp_path / f"{name}.index"))
        convert_file(tmp_path / f"{name}.index", corpus, tmp_path / name, STUB)
    load_collection({"x": tmp_path / "right"})
    with pytest.raises(RetrieverError, match=r"different orders|does not reproduce"):
        load_collection({"x": tmp_path / "shifted"})


def test_a_file_that_is_rewritten_while_it_is_served_is_told(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    published = publish(tmp_path / "e5_Flat.index", "Flat", corpus, word_hash_encoder)
    convert_file(published, corpus, tmp_path / "out", STUB)
    words = build_indexes({"words": corpus}, tmp_path, method="bm25")["words"]
    collection = load_collection({"wiki": tmp_path / "out", "words": words})
    with served_here(collection, limits=ServerLimits(cache_mb=0)) as url:
        assert post(url + "/retrieve", {"query": "rings"}).status == 200
        with open(published, "r+b") as file:  # the same inode as the one that is served
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
        os.utime(published, ns=(1, 1))
        reply = post(url + "/retrieve", {"query": "rings"})
        assert reply.status == 503
        assert "stub_Flat.index was rewritten while it is served" in reply.json["detail"]
        ready = get(url + "/ready")
        assert (ready.status, ready.json["status"]) == (503, "rewritten")
        assert post(url + "/corpora/words/retrieve", {"query": "rings"}).status == 200


def test_a_folder_that_is_replaced_goes_on_being_served_as_it_was(
    tmp_path: Path, corpus: Path, word_hash_encoder: WordHashEncoder
) -> None:
    collection = load_collection({"flat": flat(tmp_path, corpus)})
    job = SearchJob("flat", ["Who hunts the white whale?"], 1)
    before = collection.search([job])
    write_corpus(corpus, {"Nice": "A city."})
    build_indexes({"flat": corpus}, tmp_path, STUB, overwrite=True)
    assert collection.search([job]) == before
