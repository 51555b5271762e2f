import json
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import FACTS, QUESTIONS, ROOT, WordHashEncoder, run_module, write_corpus

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.convert import convert_file, convert_folder
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.manifest import RECALL_FILE, read_manifest
from retriever.options import SearchOptions
from retriever.recall import measure_recall, recall_at, title_queries

STUB = EncoderConfig(spec="models/stub", preset="none", dtype="float32")


@pytest.fixture
def flat(tmp_path: Path, word_hash_encoder: WordHashEncoder) -> Path:
    facts = FACTS | {f"Place {row}": f"Number {row} lies {row * row} miles from the sea" for row in range(300)}
    corpus = write_corpus(tmp_path / "facts.jsonl", facts)
    return build_indexes({"flat": corpus}, tmp_path / "indexes", STUB)["flat"]


@pytest.mark.parametrize("index_type", ["SQfp16", "SQ8", "IVF1,SQ8", "Flat"])
def test_a_folder_is_converted_and_answers_alike(flat: Path, index_type: str) -> None:
    out = flat.with_name(index_type)
    convert_folder(flat, out, index_type=index_type)
    manifest = read_manifest(out)
    assert (manifest.index_type, manifest.encoder) == (index_type, read_manifest(flat).encoder)
    assert (out / "corpus.jsonl").samefile(flat / "corpus.jsonl")
    collection = load_collection({"flat": flat, "other": out}, options=SearchOptions())
    flat_hits, hits = collection.search([SearchJob(name, list(QUESTIONS), 3) for name in ("flat", "other")])
    for expected, seen in zip(flat_hits, hits, strict=True):
        np.testing.assert_allclose(seen.scores, expected.scores, atol=0.02)
    assert {path.name for path in flat.parent.iterdir()} == {"flat", index_type}


def test_a_published_flat_file_is_taken_over_without_copying_it(flat: Path, tmp_path: Path) -> None:
    published, out = tmp_path / "e5_Flat.index", tmp_path / "wiki"
    index = faiss.IndexFlatIP(64)
    index.add(np.array(faiss.read_index(str(flat / "stub_Flat.index")).reconstruct_n(0, 312)))
    faiss.write_index(index, str(published))
    convert_file(published, tmp_path / "facts.jsonl", out, STUB)
    assert (out / "stub_Flat.index").samefile(published)
    [hits] = load_collection({"wiki": out}).search([SearchJob("wiki", ["Number 7 lies"], 1)])
    [same] = load_collection({"flat": flat}).search([SearchJob("flat", ["Number 7 lies"], 1)])
    assert hits == same


def test_what_does_not_belong_together_is_not_converted(flat: Path, tmp_path: Path) -> None:
    index = flat / "stub_Flat.index"
    short = write_corpus(tmp_path / "short.jsonl", FACTS)
    with pytest.raises(RetrieverError, match=r"holds 312 vectors, .* has 12 passages: they do not belong together"):
        convert_file(index, short, tmp_path / "out", STUB)
    with pytest.raises(RetrieverError, match=r"is a Flat index, not SQfp16 as --from-type says"):
        convert_file(index, short, tmp_path / "out", STUB, from_type="SQfp16")
    convert_folder(flat, flat.with_name("sq8"), index_type="SQ8")
    with pytest.raises(RetrieverError, match="is a SQ8 index, which does not hold the vectors"):
        convert_folder(flat.with_name("sq8"), tmp_path / "out", index_type="Flat")
    with pytest.raises(RetrieverError, match="sq8 exists"):
        convert_folder(flat, flat.with_name("sq8"), index_type="SQfp16")
    with pytest.raises(ValueError, match="'Plat' is refused by FAISS"):
        convert_folder(flat, tmp_path / "out", index_type="Plat")
    assert not (tmp_path / "out").exists()
    run = run_module("convert", "--index", str(index), "--out", str(tmp_path / "out"))
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "needs --corpus and an encoder" in run.stderr


PEAK_OF_CONVERT = """
import resource, sys
from pathlib import Path
from retriever.faiss_file import row_reader, write_index
import faiss
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_index(Path(sys.argv[2]), sys.argv[3], row_reader(Path(sys.argv[1]), "Flat"), num_rows=300_000, dimension=256)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


@pytest.mark.parametrize(("index_type", "max_mb"), [("SQfp16", 150), ("SQ8", 300)])
def test_a_conversion_stays_out_of_memory(tmp_path: Path, index_type: str, max_mb: float) -> None:
    """307 MB in, 154 or 77 MB out; quantisation trains on 100,000 rows (102 MB, and FAISS's copy of them)."""
    source, target = tmp_path / "flat.index", tmp_path / "out.index"
    index = faiss.IndexFlatIP(256)
    index.add(np.random.default_rng(0).normal(size=(300_000, 256)).astype(np.float32))
    faiss.write_index(index, str(source))
    command = [sys.executable, "-c", PEAK_OF_CONVERT, str(source), str(target), index_type]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < max_mb
    assert faiss.read_index(str(target)).ntotal == 300_000


def test_recall_counts_the_share_of_the_exact_best_and_equal_ones_alike() -> None:
    expected = np.array([[0.9, 0.8, 0.8], [0.5, 0.4, 0.3]], dtype=np.float32)
    found = np.array([[0.8, 0.9, 0.8], [0.5, 0.2, -np.inf]], dtype=np.float32)
    assert recall_at(found, expected, 1) == 0.5
    assert recall_at(found, expected, 2) == 0.75
    assert recall_at(found, expected, 3) == round(4 / 6, 4)


def test_the_recall_report_is_a_table_and_a_file_beside_the_index(flat: Path) -> None:
    approximate = flat.with_name("ivf")
    convert_folder(flat, approximate, index_type="IVF16,Flat")
    params = ["nprobe=1", "nprobe=16"]
    report = measure_recall(approximate, flat, num_queries=40, cutoffs=[1, 3], search_params=params)
    few, all_lists = report["measurements"]
    assert all_lists["recall"] == {"1": 1.0, "3": 1.0}
    assert few["recall"]["3"] < 1
    assert few["ms_per_query_alone"] > 0
    assert json.loads((approximate / RECALL_FILE).read_text()) == json.loads(json.dumps(report))
    load_collection({"ivf": approximate})  # the report does not disturb the seals


@pytest.mark.parametrize(
    ("index_type", "said", "recorded"),
    [
        ("SQ8", "", ""),
        ("HNSW8", "", "efSearch=128"),
        ("HNSW8", "efSearch=40", "efSearch=40"),
        ("PCA16,HNSW8", "", "efSearch=128"),
        ("HNSW8_SQ8,Refine(SQfp16)", "", "efSearch=128"),
        ("IVF4_HNSW8,Flat", "", ""),
    ],
)
def test_a_graph_that_is_told_nothing_is_not_searched_with_faiss_own_value(
    flat: Path, tmp_path: Path, index_type: str, said: str, recorded: str
) -> None:
    corpus, index = tmp_path / "facts.jsonl", flat / "stub_Flat.index"
    convert_folder(flat, tmp_path / "folder", index_type=index_type, search_params=said)
    convert_file(index, corpus, tmp_path / "file", STUB, index_type=index_type, search_params=said)
    built = {"index_type": index_type, "search_params": said}
    build_indexes({"built": corpus}, tmp_path, STUB, **built)
    for name in ("folder", "file", "built"):
        assert read_manifest(tmp_path / name).search_params == recorded
    load_collection({name: tmp_path / name for name in ("folder", "file", "built")})


def test_recall_wants_the_same_corpus_and_an_exact_reference(flat: Path, tmp_path: Path) -> None:
    other = build_indexes({"other": write_corpus(tmp_path / "o.jsonl", FACTS)}, tmp_path, STUB)["other"]
    with pytest.raises(RetrieverError, match="index different corpora"):
        measure_recall(other, flat)
    convert_folder(flat, flat.with_name("half"), index_type="SQfp16")
    with pytest.raises(RetrieverError, match="reference must be Flat"):
        measure_recall(flat, flat.with_name("half"))


def test_without_queries_titles_are_asked(flat: Path) -> None:
    corpus = load_collection({"flat": flat}).corpora["flat"].corpus
    assert title_queries(corpus, 3) == ["Lyon", "Place 143", "Place 299"]


def test_the_commands_convert_and_report(tmp_path: Path, indexes: dict[str, Path]) -> None:
    out = tmp_path / "half"
    run = run_module("convert", "--index", str(indexes["facts"]), "--to", "SQfp16", "--out", str(out))
    assert run.returncode == 0, run.stderr
    run = run_module("recall", "--index", str(out), "--exact", str(indexes["facts"]), "--k", "1", "3")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].startswith("SQfp16, 12 passages")
    assert run.stdout.splitlines()[2].split()[:3] == ["-", "1.0000", "1.0000"]
