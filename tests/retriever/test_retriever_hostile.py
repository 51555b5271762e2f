"""Index folders and corpora of strangers: no code runs, no name leads out of the folder, no size is believed."""

import gzip
import json
import pickle
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import FACTS, WordHashEncoder, write_corpus

from retriever.bm25 import BM25Index
from retriever.build import build_indexes
from retriever.collection import load_collection
from retriever.convert import convert_file
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.faiss_file import open_index, read_header
from retriever.manifest import MANIFEST_FILE, OFFSETS_FILE, PROBE_FILE, read_manifest, seal_files
from retriever.sources import import_corpus

STUB = EncoderConfig(spec="models/stub", preset="none", dtype="float32")
INDEX_FILE = "stub_Flat.index"


class Bomb:
    """A pickle that fails the test when somebody loads it."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled",)


def planted(path: Path, *, as_array: bool) -> None:
    """A pickle, plain or inside an array of objects."""
    with open(path, "wb") as file:
        if as_array:
            np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
        else:
            pickle.dump(Bomb(), file)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "facts.jsonl", FACTS)


@pytest.fixture
def dense(facts: Path, word_hash_encoder: WordHashEncoder) -> Path:
    return build_indexes({"dense": facts}, facts.parent / "indexes", STUB)["dense"]


@pytest.fixture
def words(facts: Path) -> Path:
    return build_indexes({"words": facts}, facts.parent / "indexes", method="bm25")["words"]


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal_again(folder: Path) -> None:
    """As a stranger would, so that the seals tell nothing."""
    edit_manifest(folder, files={name: vars(seal) for name, seal in seal_files(folder).items()})


@pytest.mark.parametrize("as_array", [False, True], ids=["pickle", "array of objects"])
@pytest.mark.parametrize("name", [PROBE_FILE, OFFSETS_FILE, INDEX_FILE])
def test_no_pickle_of_a_dense_folder_is_loaded(dense: Path, name: str, as_array: bool) -> None:
    planted(dense / name, as_array=as_array)
    seal_again(dense)
    if name == OFFSETS_FILE:  # a cache, made again
        assert len(load_collection({"x": dense}).corpora["x"].corpus) == len(FACTS)
    else:
        with pytest.raises(RetrieverError, match=name):
            load_collection({"x": dense})


@pytest.mark.parametrize("name", ["data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"])
def test_no_pickle_of_a_bm25_folder_is_loaded(words: Path, name: str) -> None:
    planted(words / "bm25" / name, as_array=True)
    with pytest.raises(RetrieverError, match="cannot be read as a BM25 index"):
        BM25Index.load(words / "bm25", num_passages=len(FACTS))


def test_a_model_folder_without_safetensors_is_refused_wherever_its_pickles_lie(tmp_path: Path) -> None:
    from retriever.encoder_config import refuse_pickles

    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "model.safetensors").touch()
    planted(tmp_path / "2_Dense" / "pytorch_model.bin", as_array=False)
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model.bin is a pickle"):
        refuse_pickles(str(tmp_path))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "bm25/../../secret"])
def test_a_manifest_names_nothing_outside_its_folder(words: Path, name: str) -> None:
    files = json.loads((words / MANIFEST_FILE).read_text())["files"]
    for changes in ({"index": name}, {"files": files | {name: next(iter(files.values()))}}):
        edit_manifest(words, **({"index": "bm25", "files": files} | changes))
        with pytest.raises(RetrieverError, match="outside its folder"):
            read_manifest(words)


@pytest.mark.parametrize("index", ["other.index", "", ".", "corpus.json"])
def test_an_index_that_is_not_sealed_is_refused(dense: Path, index: str) -> None:
    (dense / "other.index").write_bytes(b"IxFI")
    edit_manifest(dense, index=index)
    with pytest.raises(RetrieverError, match="its index, is not among its files"):
        read_manifest(dense)


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b"[]", b'"text"', b"\xff", b'{"format": 2}', b" " * (1 << 25)],
    ids=["deep", "list", "text", "not UTF-8", "bare", "large"],
)
def test_a_manifest_of_any_content_is_refused_in_words(dense: Path, content: bytes) -> None:
    (dense / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(RetrieverError, match="cannot be read by this version"):
        read_manifest(dense)


def absurd_array(path: Path, num: int) -> None:
    """A header that promises `num` numbers, and one number."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (num,)})
        file.write(b"\0" * 4)


def test_an_array_is_no_larger_than_its_file(dense: Path, words: Path) -> None:
    absurd_array(dense / PROBE_FILE, 10**14)
    seal_again(dense)
    with pytest.raises(RetrieverError, match=f"{PROBE_FILE} cannot be read"):
        load_collection({"x": dense})
    absurd_array(words / "bm25" / "data.csc.index.npy", 10**14)
    with pytest.raises(RetrieverError, match="cannot be read as a BM25 index"):
        BM25Index.load(words / "bm25", num_passages=len(FACTS))


def test_probes_of_another_shape_are_refused(dense: Path) -> None:
    np.save(dense / PROBE_FILE, np.zeros((1, 3), dtype=np.float32))
    seal_again(dense)
    with pytest.raises(RetrieverError, match=r"holds float32 \(1, 3\); expected float32 \(rows, 64\)"):
        load_collection({"x": dense})


@pytest.mark.parametrize(("field", "value"), [(4, 1 << 30), (8, 1 << 40), (8, (1 << 62) + 1)])
def test_a_faiss_header_is_compared_with_the_size_of_its_file(
    facts: Path, dense: Path, tmp_path: Path, field: int, value: int
) -> None:
    content = bytearray((dense / INDEX_FILE).read_bytes())
    content[field : field + (4 if field == 4 else 8)] = value.to_bytes(4 if field == 4 else 8, "little")
    path = tmp_path / "absurd.index"
    path.write_bytes(content)
    with pytest.raises(RetrieverError, match=r"has 3117 bytes, its header promises"):
        read_header(path)
    with pytest.raises(RetrieverError, match=r"has 3117 bytes, its header promises"):
        convert_file(path, facts, tmp_path / "out", STUB)


@pytest.mark.parametrize("index_type", ["HNSW8", "SQ8", "IVF4,Flat"])
def test_no_size_within_a_faiss_file_is_believed(tmp_path: Path, index_type: str) -> None:
    """One of the 64-bit numbers after the header is made absurd at a time: read or refused, never allocated."""
    vectors = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    index = faiss.index_factory(16, index_type, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    path = tmp_path / "x.index"
    faiss.write_index(index, str(path))
    content, refused = path.read_bytes(), 0
    for offset in range(33, 600):
        path.write_bytes(content[:offset] + (1 << 38).to_bytes(8, "little") + content[offset + 8 :])
        try:
            open_index(path, is_ivf="IVF" in index_type)
        except RetrieverError:
            refused += 1
    assert refused > 0


def test_postings_that_lie_outside_their_arrays_are_refused(words: Path) -> None:
    path = words / "bm25" / "indptr.csc.index.npy"
    starts = np.load(path)
    for damaged in (starts[:-1], starts[::-1], starts + 1):
        np.save(path, damaged)
        with pytest.raises(RetrieverError, match="cannot be read as a BM25 index"):
            BM25Index.load(words / "bm25", num_passages=len(FACTS))


def test_an_offset_table_that_goes_back_is_made_again(words: Path) -> None:
    path = words / OFFSETS_FILE
    offsets = np.load(path)
    offsets[3] = offsets[1]
    np.save(path, offsets)
    corpus = load_collection({"x": words}).corpora["x"].corpus
    assert [row["id"] for row in corpus] == [str(row) for row in range(len(FACTS))]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_of_any_length_is_not_read(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.sources.MAX_ROW_BYTES", 1000)
    content = b'{"id": "0", "contents": "x"}\n' + b" " * 5000
    source = tmp_path / f"c{suffix}"
    source.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(RetrieverError, match="row 1 has more than 1000 bytes"):
        import_corpus(source, tmp_path / "out.jsonl")


def test_a_gzip_file_damaged_inside_is_named(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": str(row), "contents": str(np.sin(row))}) + "\n" for row in range(3000))
    content = bytearray(gzip.compress(lines.encode()))
    for place in range(2000, 2100):
        content[place] ^= 0xFF
    (tmp_path / "c.jsonl.gz").write_bytes(content)
    with pytest.raises(RetrieverError, match=r"not a whole gzip file|is not valid JSON"):
        import_corpus(tmp_path / "c.jsonl.gz", tmp_path / "out.jsonl")
