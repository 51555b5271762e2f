import mmap
import os
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import WordHashEncoder

from retriever.bm25 import BM25Index
from retriever.errors import RetrieverError
from retriever.faiss_file import make_index, map_rows, row_reader, write_index
from retriever.index import DenseIndex
from retriever.scan import BLAS_THRESHOLD, NO_ROW, FaissScan, TorchScan, advise, best_of, open_scan

DIMENSION = 64


def unit_vectors(num: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def one_sided_vectors(num: int, seed: int) -> np.ndarray:
    """Unit vectors with cosines above .9, as if E5's .7-.9 were worse: 16-bit scores of them are full of ties."""
    common = 4 * unit_vectors(1, DIMENSION, seed=99)
    vectors = common + unit_vectors(num, DIMENSION, seed)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(path: Path, vectors: np.ndarray, index_type: str = "Flat", search_params: str = "") -> Path:
    write_index(
        path,
        index_type,
        lambda start, end: vectors[start:end],
        num_rows=len(vectors),
        dimension=vectors.shape[1],
        search_params=search_params,
    )
    return path


def open_index(path: Path, index_type: str = "Flat", **settings) -> DenseIndex:
    scan, rows = open_scan(path, index_type, **({"engine": "faiss"} | settings))
    return DenseIndex(scan, WordHashEncoder(), num_rows=faiss.read_index(str(path)).ntotal, rows=rows)


def exact_rows(queries: np.ndarray, passages: np.ndarray, topk: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ passages.T.astype(np.float64)), axis=1)[:, :topk]


def recall(index: DenseIndex, queries: np.ndarray, expected: np.ndarray) -> float:
    found, _ = index.search([""] * len(queries), expected.shape[1], query_vectors=queries)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


ENGINES = [
    pytest.param({"engine": "faiss"}, id="faiss"),
    pytest.param({"engine": "torch", "scan_dtype": "float32"}, id="torch float32"),
    pytest.param({"engine": "torch", "scan_dtype": "bfloat16"}, id="torch bfloat16"),
    pytest.param({"engine": "torch", "scan_dtype": "float16"}, id="torch float16"),
]


@pytest.mark.parametrize("settings", ENGINES)
@pytest.mark.parametrize("num_queries", [1, 2, 50])
def test_exact_search_is_exact_in_any_batch(tmp_path: Path, num_queries: int, settings: dict) -> None:
    passages, queries = one_sided_vectors(3000, seed=0), one_sided_vectors(50, seed=1)
    index = open_index(write(tmp_path / "flat.index", passages), **settings)
    parts = [queries[start : start + num_queries] for start in range(0, 50, num_queries)]
    answers = [index.search([""] * len(part), 5, query_vectors=part) for part in parts]
    assert np.concatenate([ids for ids, _ in answers]).tolist() == exact_rows(queries, passages, 5).tolist()
    _, whole = index.search([""] * 50, 5, query_vectors=queries)
    assert np.array_equal(np.concatenate([scores for _, scores in answers]), whole)


@pytest.mark.parametrize("settings", ENGINES)
def test_equal_passages_are_ordered_by_row(tmp_path: Path, settings: dict) -> None:
    vectors = unit_vectors(6, DIMENSION, seed=0)
    vectors[4] = vectors[2] = vectors[5]
    index = open_index(write(tmp_path / "flat.index", vectors), **settings)
    ids, scores = index.search([""], 3, query_vectors=vectors[5:])
    assert ids.tolist() == [[2, 4, 5]]
    assert len(set(scores[0].tolist())) == 1


@pytest.mark.parametrize("settings", ENGINES)
def test_a_corpus_smaller_than_topk_fills_up_with_no_row(tmp_path: Path, settings: dict) -> None:
    index = open_index(write(tmp_path / "flat.index", unit_vectors(2, DIMENSION, seed=0)), **settings)
    ids, scores = index.search(["a"], 4)
    assert sorted(ids[0, :2].tolist()) == [0, 1]
    assert ids[0, 2:].tolist() == [NO_ROW, NO_ROW]
    assert np.isneginf(scores[0, 2:]).all()


def test_without_its_mean_taken_off_a_16_bit_scan_loses_rows() -> None:
    """Why rows are centred: the candidates of one-sided vectors, before any rescoring."""
    passages, queries = one_sided_vectors(20_000, seed=0), one_sided_vectors(100, seed=1)
    expected = exact_rows(queries, passages, 16)
    plain = torch.from_numpy(queries).bfloat16() @ torch.from_numpy(passages).bfloat16().T
    centred, _ = TorchScan(passages, dtype="bfloat16").candidates(queries, 16)

    def share(found: np.ndarray) -> float:
        return float(np.mean([len(set(a) & set(b)) / 16 for a, b in zip(found, expected, strict=True)]))

    assert share(centred) > share(plain.topk(16).indices.numpy()) + 0.2


def test_torch_scores_are_those_of_the_uncentred_rows() -> None:
    passages, queries = one_sided_vectors(300, seed=0), one_sided_vectors(7, seed=1)
    rows, scores = TorchScan(passages, dtype="float16").candidates(queries, 300)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ passages.T, rows, 1), atol=2e-3)


@pytest.mark.parametrize("width", [5, 33, 64, 1000, 1024])
@pytest.mark.parametrize("num", [1, 3, 16])
def test_the_best_of_groups_are_the_best_of_all(width: int, num: int) -> None:
    scores = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    best, columns = best_of(scores, min(num, width))
    expected = scores.topk(min(num, width))
    assert torch.equal(best, expected.values)
    assert torch.equal(columns, expected.indices)


def test_blocks_of_rows_give_the_answers_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    passages, queries = unit_vectors(500, DIMENSION, seed=0), unit_vectors(4, DIMENSION, seed=1)
    whole = TorchScan(passages, dtype="float32").candidates(queries, 16)
    monkeypatch.setattr("retriever.scan.MAX_SCORES", {"cpu": 400})
    monkeypatch.setattr("retriever.scan.COPY_ROWS", 33)
    parts = TorchScan(passages, dtype="float32").candidates(queries, 16)
    assert np.array_equal(parts[0], whole[0])
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-6)


def test_faiss_multiplies_by_blas_from_the_second_query_on(tmp_path: Path) -> None:
    FaissScan(write(tmp_path / "flat.index", unit_vectors(4, DIMENSION, seed=0)), "Flat")
    assert faiss.cvar.distance_compute_blas_threshold == BLAS_THRESHOLD
    assert 768 < BLAS_THRESHOLD <= 2 * 768


@pytest.mark.parametrize("index_type", ["Flat", "SQfp16", "SQ8"])
def test_rows_written_straight_to_the_file_make_the_file_that_faiss_writes(
    tmp_path: Path, index_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.faiss_file.BLOCK_BYTES", 4 * DIMENSION * 7)
    vectors = unit_vectors(100, DIMENSION, seed=0)
    path = write(tmp_path / "ours.index", vectors, index_type)
    index = make_index(index_type, DIMENSION)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "theirs.index"))
    assert path.read_bytes() == (tmp_path / "theirs.index").read_bytes()


@pytest.mark.parametrize(("index_type", "atol"), [("Flat", 0), ("SQfp16", 2e-4)])
def test_rows_of_a_file_are_read_mapped_and_unmapped(tmp_path: Path, index_type: str, atol: float) -> None:
    vectors = unit_vectors(100, DIMENSION, seed=0)
    path = write(tmp_path / "x.index", vectors, index_type)
    rows = map_rows(path, index_type)
    np.testing.assert_allclose(rows, vectors, atol=atol)
    read = row_reader(path, index_type)(30, 50)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, rows[30:50].astype(np.float32))
    advise(rows, mmap.MADV_DONTNEED)
    np.testing.assert_array_equal(read, rows[30:50].astype(np.float32))
    scan = FaissScan(path, index_type)
    np.testing.assert_array_equal(scan.rows(), rows)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RetrieverError, match=f"expected a {index_type} index of 100 rows of 64 dimensions.*cut off"):
        map_rows(path, index_type)


def test_an_index_of_distances_is_refused(tmp_path: Path) -> None:
    index = faiss.IndexFlatL2(DIMENSION)
    index.add(unit_vectors(3, DIMENSION, seed=0))
    faiss.write_index(index, str(tmp_path / "l2.index"))
    with pytest.raises(RetrieverError, match=r"has metric 1.*inner products"):
        map_rows(tmp_path / "l2.index", "Flat")


@pytest.mark.parametrize(
    ("index_type", "search_params", "least"),
    [
        ("SQfp16", "", 1.0),
        ("SQ8", "", 0.95),
        ("HNSW32", "efSearch=64", 0.95),
        ("HNSW32_SQ8", "efSearch=64", 0.9),
        ("HNSW32_SQ8,Refine(SQfp16)", "efSearch=64", 0.99),
        ("IVF16,Flat", "nprobe=16", 1.0),
        ("IVF16,SQ8", "nprobe=16", 0.95),
        pytest.param("IVF16,PQ16x4,RFlat", "nprobe=16,k_factor_rf=8", 0.5, marks=pytest.mark.slow),
        ("PCA48,IVF16,SQ8", "nprobe=16", 0.3),
    ],
)
def test_any_factory_string_is_built_mapped_and_searched(
    tmp_path: Path, index_type: str, search_params: str, least: float
) -> None:
    passages, queries = unit_vectors(2000, DIMENSION, seed=0), unit_vectors(50, DIMENSION, seed=1)
    path = write(tmp_path / "x.index", passages, index_type)
    index = open_index(path, index_type, search_params=search_params)
    assert recall(index, queries, exact_rows(queries, passages, 3)) >= least


def test_search_parameters_reach_the_index(tmp_path: Path) -> None:
    passages, queries = unit_vectors(2000, DIMENSION, seed=0), unit_vectors(50, DIMENSION, seed=1)
    expected = exact_rows(queries, passages, 3)
    path = write(tmp_path / "x.index", passages, "IVF64,Flat")
    few, all_lists = (open_index(path, "IVF64,Flat", search_params=f"nprobe={num}") for num in (1, 64))
    assert recall(few, queries, expected) < 0.5
    assert recall(all_lists, queries, expected) == 1


def test_what_an_index_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index type 'Plat' is refused by FAISS .*HNSW32_SQ8"):
        make_index("Plat", DIMENSION)
    with pytest.raises(ValueError, match="'nprobe=3' do not fit a IndexFlat"):
        make_index("Flat", DIMENSION, "nprobe=3")
    path = write(tmp_path / "sq8.index", unit_vectors(9, DIMENSION, seed=0), "SQ8")
    with pytest.raises(RetrieverError, match=r"SQ8 index, which the torch engine cannot scan.*--to SQfp16"):
        open_index(path, "SQ8", engine="torch")
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(RetrieverError, match="needs a FAISS with CUDA"):
            open_index(path, "SQ8", engine="faiss-gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{"engine": "auto"}, {"engine": "torch", "scan_dtype": "bfloat16"}], ids=str)
def test_a_gpu_finds_what_the_cpu_finds(tmp_path: Path, settings: dict) -> None:
    passages, queries = one_sided_vectors(50_000, seed=0), one_sided_vectors(64, seed=1)
    index = open_index(write(tmp_path / "flat.index", passages), **settings, device="cuda")
    assert recall(index, queries, exact_rows(queries, passages, 3)) == 1


def resident_file_pages(rows: np.ndarray) -> int:
    """Bytes of mapped files in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def test_a_scan_lets_go_of_the_rows_it_copied(tmp_path: Path) -> None:
    rows = map_rows(write(tmp_path / "flat.index", np.ones((60_000, 256), dtype=np.float32)), "Flat")  # 61 MB
    before = resident_file_pages(rows)
    TorchScan(rows, dtype="bfloat16")
    assert resident_file_pages(rows) - before < 20e6
    assert isinstance(rows.base, mmap.mmap)


def bm25_index(folder: Path, contents: list[str]) -> BM25Index:
    BM25Index.write(folder, contents, k1=1.2, b=0.3)
    return BM25Index.load(folder, num_passages=len(contents))


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
