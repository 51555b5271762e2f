"""What BM25 takes for a word, in any script and form."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest

from retriever.bm25 import BM25Index, split_words
from retriever.errors import RetrieverError
from retriever.scan import NO_ROW


def index(folder: Path, *contents: str) -> BM25Index:
    BM25Index.write(folder / "bm25", contents)
    return BM25Index.load(folder / "bm25", num_passages=len(contents))


@pytest.mark.parametrize("stored", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD", "NFKC", "NFKD"])
def test_a_word_is_found_in_whatever_form_it_is_written(tmp_path: Path, stored: str, asked: str) -> None:
    texts = ["café crème", "São Paulo", "Ångström", "\ufb01ne \uff12\uff10", "हिन्दी भाषा", "Việt Nam"]
    found = index(tmp_path, *(unicodedata.normalize(stored, text) for text in texts))
    rows, _ = found.search([unicodedata.normalize(asked, text.split()[0]) for text in texts], 1)
    assert rows[:, 0].tolist() == list(range(len(texts)))


def test_marks_belong_to_their_letters() -> None:
    assert split_words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert split_words("It's 3.5 naïve_word \u2764\ufe0f x") == ["it", "s", "3", "5", "naïve_word", "x"]
    assert split_words("A.I. of the U.S.") == ["a", "i", "of", "the", "u", "s"]


def test_a_corpus_without_spaces_is_told_and_the_dense_encoder_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        index(tmp_path, "中国的首都是北京", "東京は日本の首都です", "Paris is the capital of France")
    assert "put no spaces between words" in caplog.text
    assert "--encoder intfloat/multilingual-e5-base --preset e5" in caplog.text


def test_a_name_in_such_a_script_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        index(tmp_path, "Beijing (北京) is the capital of the People's Republic of China, and its second largest city")
    assert not caplog.records


def test_a_corpus_without_a_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="no passage has a word"):
        BM25Index.write(tmp_path / "bm25", ["", "...", "!?"])


def test_a_passage_without_a_word_is_never_found(tmp_path: Path) -> None:
    rows, _ = index(tmp_path, "...", "a word").search(["word", "..."], 2)
    assert rows.tolist() == [[1, NO_ROW], [NO_ROW, NO_ROW]]
