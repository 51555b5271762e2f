"""Shards of an index behind a front server answer like the whole index."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import QUESTIONS, HeldCollection, get, metrics, post, served_here, serving

from retriever.collection import load_collection
from retriever.errors import IndexFolderError
from retriever.limits import ServerLimits
from retriever.manifest import check_files, read_manifest
from retriever.sharded import ShardedService, merge, mismatch
from retriever.split import split_folder


@pytest.fixture(scope="module")
def shards(indexes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split_folder(indexes["facts"], tmp_path_factory.mktemp("shards"), 3)


@pytest.fixture(scope="module")
def front(shards: list[Path]) -> Iterator[str]:
    """A front server of three shards, all with a token."""
    with ExitStack() as stack:
        urls = [
            stack.enter_context(served_here(load_collection({"facts": folder}), limits=ServerLimits(), token="s3cret"))
            for folder in shards
        ]
        service = ShardedService(urls, limits=ServerLimits(max_topk=20), shard_token="s3cret")
        url = stack.enter_context(serving(service))
        wait_until_ready(url)
        yield url


@pytest.fixture(scope="module")
def whole(indexes: dict[str, Path]) -> Iterator[str]:
    with served_here(load_collection({"facts": indexes["facts"]}), limits=ServerLimits()) as url:
        yield url


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while get(url + "/ready").status != 200:
        assert time.monotonic() < deadline, get(url + "/ready").json
        time.sleep(0.05)


def test_a_split_keeps_every_passage_once_and_in_order(indexes: dict[str, Path], shards: list[Path]) -> None:
    parts = [(folder / "corpus.jsonl").read_bytes() for folder in shards]
    assert b"".join(parts) == (indexes["facts"] / "corpus.jsonl").read_bytes()
    assert [read_manifest(folder).num_passages for folder in shards] == [4, 4, 4]
    for folder in shards:
        check_files(folder, read_manifest(folder), verify=True)


@pytest.mark.parametrize("topk", [1, 3, 7, 12, 20])
@pytest.mark.parametrize("return_scores", [True, False])
def test_the_merged_answer_is_the_whole_indexs(front: str, whole: str, topk: int, return_scores: bool) -> None:
    body = {"queries": list(QUESTIONS), "topk": topk, "return_scores": return_scores}
    expected = post(whole + "/retrieve", body).json["result"]
    for path in ("/retrieve", "/corpora/facts/retrieve"):
        result = post(front + path, body).json["result"]
        if return_scores:
            documents = [[hit["document"] for hit in hits] for hits in result]
            assert documents == [[hit["document"] for hit in hits] for hits in expected]
            scores = [hit["score"] for hits in result for hit in hits]
            assert scores == pytest.approx([hit["score"] for hits in expected for hit in hits], abs=1e-6)
        else:
            assert result == expected


def test_the_front_tells_what_all_shards_hold(front: str) -> None:
    info = get(front + "/info").json
    assert info["default"] == "facts"
    assert info["corpora"]["facts"]["count"] == 12
    assert len(info["corpora"]["facts"]["corpus_sha256"].split(",")) == 3
    seen = metrics(front)
    assert (seen["retriever_ready"], seen['retriever_passages{corpus="facts"}']) == (1, 12)


def test_the_front_checks_requests_itself(front: str) -> None:
    assert post(front + "/retrieve", {"queries": []}).json == {"result": []}
    assert post(front + "/retrieve", {"query": "a", "topk": 21}).status == 422
    assert post(front + "/corpora/nowhere/retrieve", {"query": "a"}).status == 404


def test_a_shard_that_is_gone_makes_the_front_unready_and_is_named(shards: list[Path]) -> None:
    with served_here(load_collection({"facts": shards[0]}), limits=ServerLimits()) as first, ExitStack() as stack:
        second = stack.enter_context(served_here(load_collection({"facts": shards[1]}), limits=ServerLimits()))
        with serving(ShardedService([first, second], limits=ServerLimits(retry_after_s=4))) as url:
            wait_until_ready(url)
            stack.close()
            reply = post(url + "/retrieve", {"query": "rings"})
            assert (reply.status, reply.headers["retry-after"]) == (503, "4")
            assert second in reply.json["detail"]
            assert get(url + "/ready").json["loaded"] == 1


def test_a_client_that_leaves_takes_its_queries_off_the_shards(shards: list[Path]) -> None:
    held = HeldCollection(load_collection({"facts": shards[0]}))
    with (
        served_here(held, limits=ServerLimits()) as shard,
        serving(ShardedService([shard], limits=ServerLimits(max_waiting_queries=1))) as url,
        ThreadPoolExecutor(1) as pool,
    ):
        wait_until_ready(url)
        waiting = pool.submit(post, url + "/retrieve", {"query": "rings"})
        assert held.started.wait(10)
        assert post(url + "/retrieve", {"query": "full"}).status == 503
        held.release.set()
        assert waiting.result().status == 200


def test_equal_scores_keep_the_order_of_the_shards() -> None:
    def hits(*pairs: tuple[str, float]) -> list[list[dict[str, object]]]:
        return [[{"document": name, "score": score} for name, score in pairs]]

    merged = merge([hits(("a", 0.5), ("b", 0.1)), hits(("c", 0.5), ("d", 0.4))], 3)
    assert [hit["document"] for hit in merged[0]] == ["a", "c", "d"]


def test_servers_that_are_no_shards_of_one_index_are_told_apart() -> None:
    def info(encoder: object, *names: str) -> dict[str, object]:
        return {"corpora": {name: {"encoder": encoder} for name in names}}

    urls = ["http://a", "http://b"]
    assert mismatch(urls, [info({"spec": "e5"}, "wiki"), info({"spec": "e5"}, "wiki")]) is None
    for other, message in (
        (info({"spec": "bge"}, "wiki"), "another encoder"),
        (info({"spec": "e5"}, "news"), "serves"),
        (info(None, "wiki"), "BM25"),
    ):
        assert message in str(mismatch(urls, [info({"spec": "e5"}, "wiki"), other]))


def test_what_cannot_be_split_is_refused(indexes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(IndexFolderError, match="is a BM25 index; expected Flat or SQfp16"):
        split_folder(indexes["words"], tmp_path, 2)
    with pytest.raises(IndexFolderError, match="expected 2 to 12"):
        split_folder(indexes["facts"], tmp_path, 13)
