"""One number that is not finite ends no search but its own: found at build, convert and load, and in query vectors."""

import asyncio
import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import FACTS, WordHashEncoder, metrics, post, served_here, write_corpus

from dgpo.agent.search import SearchClient, SearchFailedError
from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.convert import convert_file, convert_folder
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.manifest import MANIFEST_FILE, read_manifest, seal_file
from retriever.options import SearchOptions, ServerLimits
from retriever.scan import TorchScan

STUB = EncoderConfig(spec="models/stub", preset="none", dtype="float32")
INDEX_FILE = "stub_Flat.index"
BROKEN_QUERY = "rings nan"


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "facts.jsonl", FACTS)


@pytest.fixture
def folder(facts: Path, word_hash_encoder: WordHashEncoder) -> Path:
    return build_indexes({"facts": facts}, facts.parent / "indexes", STUB)["facts"]


def rows_with(value: float, num: int = 12) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(num, 64)).astype(np.float32)
    rows[7, 3] = value
    return rows


def write_flat(path: Path, rows: np.ndarray) -> Path:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index_type", ["Flat", "SQfp16", "HNSW8"])
def test_convert_names_count_and_row(
    tmp_path: Path, facts: Path, word_hash_encoder: WordHashEncoder, value: float, index_type: str
) -> None:
    published = write_flat(tmp_path / "e5_Flat.index", rows_with(value))
    with pytest.raises(RetrieverError, match=r"1 of 12 vectors of .* are not finite .* the first is row 7"):
        convert_file(published, facts, tmp_path / "out", STUB, index_type=index_type)
    assert not (tmp_path / "out").exists()


def test_what_16_bits_cannot_hold_is_named(tmp_path: Path, facts: Path, word_hash_encoder: WordHashEncoder) -> None:
    published = write_flat(tmp_path / "e5_Flat.index", rows_with(70_000))
    with pytest.raises(RetrieverError, match=r"1 of 12 vectors of out are not finite \(NaN, or beyond 6.55e\+04\)"):
        convert_file(published, facts, tmp_path / "out", STUB, index_type="SQfp16")


def test_a_build_names_the_passage_and_keeps_no_such_part(
    facts: Path, word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(texts: list[str]) -> np.ndarray:
        vectors = word_hash_encoder.encode_queries(texts)
        vectors[[text.startswith('"Saturn"') for text in texts]] = np.nan
        return vectors

    monkeypatch.setattr(word_hash_encoder, "encode_passages", encode)
    with pytest.raises(RetrieverError, match=r"1 of 2 passages of part 3 .* row 7 \(id '7'\) of corpus facts"):
        build_indexes({"facts": facts}, facts.parent / "out", STUB, passages_per_part=2)
    assert not (facts.parent / "out" / "facts").exists()


def replace_row(folder: Path, *, is_finite: bool | None) -> None:
    """A folder whose index has a NaN and whose seals agree; `is_finite` None = as older versions wrote manifests."""
    write_flat(folder / INDEX_FILE, rows_with(np.nan))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][INDEX_FILE] = vars(seal_file(folder / INDEX_FILE))
    manifest["is_finite"] = is_finite
    if is_finite is None:
        del manifest["is_finite"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_a_folder_that_nobody_looked_at_is_looked_at_on_loading(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_manifest(folder).is_finite
    monkeypatch.setattr("retriever.collection._check_encoder", lambda *_: None)
    replace_row(folder, is_finite=None)
    with pytest.raises(RetrieverError, match=r"1 of 12 vectors of .*stub_Flat.index are not finite .* row 7"):
        load_collection({"facts": folder}, options=SearchOptions(engine=engine))


def test_the_16_bit_copy_refuses_what_changed_since(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.collection._check_encoder", lambda *_: None)
    replace_row(folder, is_finite=True)
    with pytest.raises(RetrieverError, match=r"1 of 12 vectors are not finite in bfloat16, the first is row 7"):
        load_collection({"facts": folder}, options=SearchOptions(engine="torch", scan_dtype="bfloat16"))


def test_one_row_does_not_make_the_mean_of_all_useless() -> None:
    """With a NaN in the mean, every row of the copy would be called not finite."""
    with pytest.raises(RetrieverError, match="1 of 500 vectors"):
        TorchScan(rows_with(np.inf, num=500), dtype="float16")


def test_a_converted_folder_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_folder(folder, folder.with_name("half"), index_type="SQfp16")
    monkeypatch.setattr("retriever.collection.refuse_non_finite", lambda *_: pytest.fail("looked at again"))
    load_collection({"facts": folder, "half": folder.with_name("half")})
    shutil.rmtree(folder)


@pytest.fixture
def failing_on_a_query(word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = word_hash_encoder.encode_queries

    def encode_queries(texts: list[str]) -> np.ndarray:
        vectors = encode(texts)
        vectors[[text == BROKEN_QUERY for text in texts]] = np.nan
        return vectors

    monkeypatch.setattr(word_hash_encoder, "encode_queries", encode_queries)


@pytest.mark.parametrize("options", [{"engine": "faiss"}, {"engine": "torch"}], ids=["faiss", "torch"])
def test_a_query_without_a_finite_vector_leaves_its_neighbours_their_answers(
    folder: Path, options: dict, failing_on_a_query: None
) -> None:
    collection = load_collection({"facts": folder}, options=SearchOptions(**options))
    [alone] = collection.search([SearchJob("facts", ["planet with rings", "city in Japan"], 3)])
    mixed = [SearchJob("facts", ["planet with rings", BROKEN_QUERY], 3), SearchJob("facts", ["city in Japan"], 3)]
    [planets, broken], [city] = collection.search(mixed)
    assert [planets, city] == alone
    assert broken.rows == ()


def test_the_server_names_such_a_query_and_answers_its_neighbours_without_it(
    folder: Path, failing_on_a_query: None
) -> None:
    """An empty list would say that there is nothing to find; that is what a blank query gets."""
    with served_here(load_collection({"facts": folder}), limits=ServerLimits()) as url:
        mixed = ["planet with rings", "", BROKEN_QUERY, "city in Japan", BROKEN_QUERY]
        reply = post(url + "/retrieve", {"queries": mixed, "topk": 1})
        assert (reply.status, reply.json["detail"]) == (
            500,
            "the encoder gives queries[2], and 1 more no finite vector (NaN or infinite): send the others without it",
        )
        alone = post(url + "/retrieve", {"query": BROKEN_QUERY})
        assert (alone.status, alone.json["detail"].partition(" no finite")[0]) == (500, "the encoder gives queries[0]")
        assert metrics(url)["retriever_unsearchable_queries_total"] == 2
        rest = post(url + "/retrieve", {"queries": [query for query in mixed if query != BROKEN_QUERY], "topk": 1})
        assert [len(found) for found in rest.json["result"]] == [1, 0, 1]


async def test_our_client_loses_that_search_and_no_other(folder: Path, failing_on_a_query: None) -> None:
    queries = ["planet with rings", BROKEN_QUERY, "city in Japan"]
    with served_here(load_collection({"facts": folder}), limits=ServerLimits()) as url:
        async with SearchClient(
            url, timeout_s=30, max_retries=0, max_concurrency=1, max_queries_per_request=8, backoff_s=0.01
        ) as client:
            searches = [client.search(query, topk=1, corpus=None) for query in queries]
            first, broken, last = await asyncio.gather(*searches, return_exceptions=True)
    assert isinstance(broken, SearchFailedError)
    assert [len(first), len(last)] == [1, 1]
