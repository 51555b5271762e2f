from pathlib import Path

import numpy as np
import pytest
from conftest import WordHashEncoder

from retriever.index import NO_ROW, BM25Index, FaissFlatIndex


def unit_vectors(num: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def flat_index(path: Path, vectors: np.ndarray) -> FaissFlatIndex:
    FaissFlatIndex.write(path, vectors)
    return FaissFlatIndex.load(path, WordHashEncoder(), num_passages=len(vectors))


def bm25_index(folder: Path, contents: list[str]) -> BM25Index:
    BM25Index.write(folder, contents, k1=1.2, b=0.3)
    return BM25Index.load(folder, num_passages=len(contents))


@pytest.mark.parametrize("num_queries", [1, 2, 50])
def test_flat_search_is_exact_in_any_batch(tmp_path: Path, num_queries: int) -> None:
    passages, queries = unit_vectors(300, 64, seed=0), unit_vectors(50, 64, seed=1)
    index = flat_index(tmp_path / "flat.index", passages)
    expected = np.argsort(-(queries.astype(np.float64) @ passages.T.astype(np.float64)), axis=1)[:, :5]
    parts = [queries[start : start + num_queries] for start in range(0, 50, num_queries)]
    answers = [index.search([""] * len(part), 5, query_vectors=part) for part in parts]
    assert np.concatenate([ids for ids, _ in answers]).tolist() == expected.tolist()
    _, whole = index.search([""] * 50, 5, query_vectors=queries)
    assert np.array_equal(np.concatenate([scores for _, scores in answers]), whole)


def test_equal_passages_are_ordered_by_row(tmp_path: Path) -> None:
    vectors = unit_vectors(6, 64, seed=0)
    vectors[4] = vectors[2] = vectors[5]
    ids, scores = flat_index(tmp_path / "flat.index", vectors).search([""], 3, query_vectors=vectors[5:])
    assert ids.tolist() == [[2, 4, 5]]
    assert len(set(scores[0].tolist())) == 1


def test_a_corpus_smaller_than_topk_fills_up_with_no_row(tmp_path: Path) -> None:
    ids, scores = flat_index(tmp_path / "flat.index", unit_vectors(2, 64, seed=0)).search(["a"], 4)
    assert sorted(ids[0, :2].tolist()) == [0, 1]
    assert ids[0, 2:].tolist() == [NO_ROW, NO_ROW]
    assert np.isneginf(scores[0, 2:]).all()


def test_bm25_counts_the_title_twice_and_keeps_one_letter_words(tmp_path: Path) -> None:
    contents = ['"Paris"\nthe city of light', '"Light"\nthe city of Paris', '"C"\nwords elsewhere']
    index = bm25_index(tmp_path / "bm25", contents)
    ids, scores = index.search(["paris", "Light", "c"], 2)
    assert ids[:, 0].tolist() == [0, 1, 2]
    assert scores[0, 0] > scores[0, 1] > 0


def test_bm25_returns_matches_only_and_orders_ties_by_row(tmp_path: Path) -> None:
    index = bm25_index(tmp_path / "bm25", [f'"T{row}"\nsame words' for row in range(20)])
    ids, scores = index.search(["same words", "unknown", "t7 nothing"], 3)
    assert ids.tolist() == [[0, 1, 2], [NO_ROW] * 3, [7, NO_ROW, NO_ROW]]
    assert np.isneginf(scores[1]).all()
