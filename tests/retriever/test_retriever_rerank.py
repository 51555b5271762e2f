from pathlib import Path

import numpy as np
import pytest
from conftest import FACTS, QUESTIONS, write_corpus
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from retriever.build import build_indexes
from retriever.collection import SearchJob, load_collection
from retriever.options import SearchOptions
from retriever.rerank import Reranker

QUERIES = list(QUESTIONS)


def write_cross_encoder(folder: Path, *, num_labels: int = 1) -> Path:
    """A tiny BERT with random weights: its order is arbitrary, and its own."""
    import torch

    torch.manual_seed(0)
    words = sorted({word for text in [*FACTS.values(), *FACTS, *QUERIES] for word in text.lower().split()})
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=num_labels,
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cross_encoder(tmp_path_factory.mktemp("rerank") / "cross"))


def test_each_query_gets_its_own_candidates_in_the_rerankers_order(tmp_path: Path, cross_encoder: str) -> None:
    folders = build_indexes({"facts": write_corpus(tmp_path / "facts.jsonl", FACTS)}, tmp_path, method="bm25")
    plain = load_collection(folders)
    [first_stage] = plain.search([SearchJob("facts", QUERIES, 5)])
    reranked = load_collection(folders, options=SearchOptions(reranker=cross_encoder, num_reranked=5))
    [together] = reranked.search([SearchJob("facts", QUERIES, 3)])
    alone = [reranked.search([SearchJob("facts", [query], 3)])[0][0] for query in QUERIES]
    assert together == alone  # scores included, bit for bit

    corpus, reranker = plain.corpora["facts"].corpus, Reranker(cross_encoder)
    changed = 0
    for query, before, after in zip(QUERIES, first_stage, together, strict=True):
        scores = dict(
            zip(before.rows, reranker.score(query, [corpus[row]["contents"] for row in before.rows]), strict=True)
        )
        expected = sorted(before.rows, key=lambda row: -scores[row])[:3]
        assert list(after.rows) == expected
        np.testing.assert_allclose(after.scores, [scores[row] for row in expected])
        changed += expected != list(before.rows[:3])
    assert changed > 0


def test_a_query_without_candidates_stays_empty(tmp_path: Path, cross_encoder: str) -> None:
    folders = build_indexes({"facts": write_corpus(tmp_path / "facts.jsonl", FACTS)}, tmp_path, method="bm25")
    reranked = load_collection(folders, options=SearchOptions(reranker=cross_encoder))
    [[nothing, something]] = reranked.search([SearchJob("facts", ["zzzz", "rings"], 3)])
    assert nothing.rows == ()
    assert len(something.rows) == 1


def test_a_model_that_is_no_reranker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives 3 values per pair; expected one score"):
        Reranker(str(write_cross_encoder(tmp_path / "three", num_labels=3)))
    with pytest.raises(ValueError, match="is neither a folder"):
        Reranker(str(tmp_path / "absent"))
