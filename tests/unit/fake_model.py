"""A checkpoint whose every turn a test decides, and a search that finds what a test puts there, for whole stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgpo.agent.episode import Generation
from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.data.rows import write_rows
from tests.unit.scripted import EOS_ID, ByteTokenizer
from tests.unit.stubs import make_model


class ChatTokenizer(ByteTokenizer):
    eos_token_id = EOS_ID

    def apply_chat_template(self, messages, **_):
        return list(messages[-1]["content"].encode())


class FakeModel:
    """Writes `reply(the episode so far, seed)` in every turn, obeying stop strings and budgets as an engine does."""

    def __init__(self, reply: Callable[[str, int | None], str]) -> None:
        self.reply = reply
        self.num_turns = 0

    async def __aenter__(self) -> FakeModel:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def generate(self, token_ids, *, max_tokens, stop, seed, request_id) -> Generation:
        self.num_turns += 1
        text = self.reply(bytes(i for i in token_ids if i < EOS_ID).decode(errors="replace"), seed)
        ends = [text.index(tag) + len(tag) for tag in stop if tag in text]
        ids = list(text[: min(ends, default=len(text))].encode())
        return Generation(
            ids[:max_tokens], [-1.0] * len(ids[:max_tokens]), "length" if len(ids) > max_tokens else "stop"
        )


class ShelfSearch:
    """Finds `shelf[query]`, nothing for other queries."""

    def __init__(self, shelf: Mapping[str, list[str]]) -> None:
        self.shelf = shelf

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        found = self.shelf.get(query, ["nothing\n about it"])[:topk]
        return [{"id": str(i), "contents": contents} for i, contents in enumerate(found)]


def make_question(index: int, *golds: str, source: str = "own", **info: Any) -> dict[str, Any]:
    """A row that asks `Q<index>`."""
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"Q{index} ?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(golds)}},
        "extra_info": {"split": "test", "index": index, **info},
    }


def fake_config(tmp_path: Path, sets: Mapping[str, list[dict[str, Any]]], shelf: Mapping[str, list[str]]) -> Config:
    """A configuration that passes the checks of `test`: one model, the sets, and a search without a server."""
    config = load_config(["hardware=cpu"])
    for name, rows in sets.items():
        write_rows(tmp_path / f"{name}.parquet", rows)
        config.data.test_files[name] = str(tmp_path / f"{name}.parquet")
    config.run_dir = str(tmp_path / "run")
    config.test.models = {"mine": make_model(tmp_path / "model")}
    config.retriever.backend = "tests.unit.fake_model:ShelfSearch"
    config.retriever.backend_options = {"shelf": dict(shelf)}
    return config


def use_model(monkeypatch, model: FakeModel) -> None:
    """Every checkpoint is this one, and its tokenizer splits into bytes."""
    monkeypatch.setattr("dgpo.engines.play.make_policy", lambda *_, **__: model)
    monkeypatch.setattr("dgpo.evaluation.stage.load_tokenizer", lambda *_, **__: ChatTokenizer())
