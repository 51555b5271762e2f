"""The episode browser's data: who played which question with what result, and the tokens of every episode.

The page's block `episode-data` (read by `page/browser.js`) is one JSON object. A row is a question:

    sets, models, statuses   names; other fields hold their numbers
    questions, golds, ids, set   per row
    properties   name of a slice -> its value per row, null where the question has none
    scores   per model {em, status, searches, hit, answers, queries}, each a list per row, null where it did not play
    vocabulary, pieces       per model the number of its tokenizer; per tokenizer {token id: text, or bytes}
    chunk_size, chunks       "model-number" -> {row: episode}; empty where the chunks are files in `folder`
    folder                   null, or the folder beside the page with a file "model-number.js" per chunk
    kl_notes                 per set, why an episode has no reverse KL to the teacher per token
    focus, shown             the model that is filtered by at the start; those whose episodes are open

An episode is {ids, runs} with the lengths of its runs by policy and environment in turns, and {student, teacher}
log-probs (nats) where RL recorded them; or {segments: [[by the policy, text]]} where no tokenizer was found.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgpo.evaluation.scores import SLICE_FIELDS, Score
from dgpo.evaluation.token_pieces import TokenPieces

CHUNK_SIZE = 200  # questions
# Recorded episodes of more bytes than this are paged into files: about a fifth of it would be added to the page.
MAX_INLINE_BYTES = 40_000_000
CHUNK_FOLDER = "report_episodes"
NOT_RECORDED = (
    "Not recorded: the teacher plays no part in an evaluation. During RL it scores tokens of a logged sample of "
    "episodes, the sets named `training`."
)
_EPISODE_ID = re.compile(rb'\{"episode_id": ("(?:[^"\\]|\\.)*")')


@dataclass
class ModelEpisodes:
    """One model's episodes: their scores, and where their tokens are.

    Attributes:
        scores: as `dgpo.evaluation.scores` makes them.
        files: jsonl files whose lines begin with `episode_id` and hold `response_ids` and `response_mask`.
        pieces: of the checkpoint's tokenizer, None where it was not found.
        transcripts: episode id -> segments [writer, text], used without a tokenizer.
    """

    name: str
    scores: Sequence[Score]
    files: Sequence[Path]
    pieces: TokenPieces | None
    transcripts: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


def write_browser_data(
    models: Sequence[ModelEpisodes],
    page_folder: Path,
    *,
    focus: str,
    shown: Sequence[str],
    kl_notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The block `episode-data`; writes the chunk files into `page_folder` where the episodes are too many for a page.

    Args:
        focus: name of the model that filters apply to at first.
        shown: names of the models whose episodes are open at first.
        kl_notes: for sets of training episodes, why an episode may lack its teacher's log-probs.
    """
    rows = _rows(models)
    statuses = sorted({score["status"] for model in models for score in model.scores})
    sets = list(dict.fromkeys(score["set"] for score in rows.values()))
    names = [model.name for model in models]
    recorded = sum(path.stat().st_size for model in models for path in model.files)
    chunks = _Chunks(page_folder, inline=recorded <= MAX_INLINE_BYTES)
    tokenizers = {model.pieces.fingerprint: model.pieces for model in models if model.pieces}
    used: dict[str, set[int]] = {fingerprint: set() for fingerprint in tokenizers}
    columns = []
    for number, model in enumerate(models):
        ids = used[model.pieces.fingerprint] if model.pieces else None
        queries = _add_episodes(model, number, list(rows), chunks, ids)
        columns.append({**_columns(model, rows, statuses), "queries": queries})
    chunks.finish()
    return {
        "sets": sets,
        "models": names,
        "statuses": statuses,
        "questions": [score["question"] for score in rows.values()],
        "golds": [score["golds"] for score in rows.values()],
        "ids": list(rows),
        "set": [sets.index(score["set"]) for score in rows.values()],
        "properties": {
            name: values
            for name in SLICE_FIELDS
            if any(values := [str(score[name]) if name in score else None for score in rows.values()])
        },
        "scores": columns,
        "vocabulary": [list(tokenizers).index(model.pieces.fingerprint) if model.pieces else None for model in models],
        "pieces": [tokenizer.pieces(sorted(used[fingerprint])) for fingerprint, tokenizer in tokenizers.items()],
        "chunk_size": CHUNK_SIZE,
        "chunks": chunks.inline,
        "folder": chunks.folder.name if chunks.folder else None,
        "kl_notes": [(kl_notes or {}).get(name, NOT_RECORDED) for name in sets],
        "focus": names.index(focus),
        "shown": [names.index(name) for name in shown],
    }


def embed_json(data: Any) -> str:
    """JSON that can stand inside a `<script>` element: no text in it can end the element or open another."""
    return _dumps(data).replace("<", "\\u003c")


def _dumps(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _rows(models: Sequence[ModelEpisodes]) -> dict[str, Score]:
    """Episode id -> what is known of the question, in order of appearance."""
    rows: dict[str, Score] = {}
    for model in models:
        for score in model.scores:
            rows.setdefault(score["episode_id"], score)
    return rows


def _columns(model: ModelEpisodes, rows: Mapping[str, Score], statuses: Sequence[str]) -> dict[str, list[Any]]:
    by_id = {score["episode_id"]: score for score in model.scores}
    mine = [by_id.get(name) for name in rows]
    return {
        "em": [score and int(score["em"] == 1) for score in mine],
        "status": [score and statuses.index(score["status"]) for score in mine],
        "searches": [score and int(score["num_searches"]) for score in mine],
        "hit": [score and int(score["hit"] > 0) for score in mine],
        "answers": [score and score["answer"] for score in mine],
    }


def _add_episodes(
    model: ModelEpisodes, number: int, ids: Sequence[str], chunks: _Chunks, used: set[int] | None
) -> list[str | None]:
    """Writes the model's episodes chunk by chunk; adds their token ids to `used`. Returns its queries per row."""
    queries: list[str | None] = [None] * len(ids)
    with _Recorded(model.files) as recorded:
        for start in range(0, len(ids), CHUNK_SIZE):
            episodes = {}
            for row in range(start, min(start + CHUNK_SIZE, len(ids))):
                record = recorded.read(ids[row])
                if record is not None:
                    queries[row] = "\n".join(search["query"] for search in record.get("searches", ()))
                if record is not None and used is not None:
                    used.update(record["response_ids"])
                    episodes[row] = _tokens(record)
                elif ids[row] in model.transcripts:
                    segments = model.transcripts[ids[row]]
                    episodes[row] = {"segments": [[speaker == "policy", text] for speaker, text in segments]}
            chunks.add(f"{number}-{start // CHUNK_SIZE}", episodes)
    return queries


def _tokens(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recorded episode that the page shows."""
    runs, speaker = [0], 1
    for generated in record["response_mask"]:
        if generated != speaker:
            runs.append(0)
            speaker = generated
        runs[-1] += 1
    episode = {"ids": record["response_ids"], "runs": runs}
    if record.get("teacher_log_probs") is not None:
        episode |= {name: [round(value, 4) for value in record[f"{name}_log_probs"]] for name in ("student", "teacher")}
    return episode


class _Recorded:
    """Lines of jsonl files by episode id, read when they are asked for: a large evaluation does not fit in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in files]
        self._places = {}
        for file in self._files:
            start = 0
            for line in file:
                match = _EPISODE_ID.match(line)
                name = json.loads(match[1]) if match else json.loads(line)["episode_id"]
                self._places[name] = (file, start)
                start += len(line)

    def __enter__(self) -> _Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def read(self, episode_id: str) -> dict[str, Any] | None:
        if episode_id not in self._places:
            return None
        file, start = self._places[episode_id]
        file.seek(start)
        return json.loads(file.readline())


class _Chunks:
    """Where the episodes go: into the page, or into files of a folder beside it that replaces an older report's."""

    def __init__(self, page_folder: Path, *, inline: bool) -> None:
        self.inline: dict[str, Any] = {}
        self.folder = None if inline else page_folder / CHUNK_FOLDER
        self._target = page_folder / CHUNK_FOLDER
        self._new = page_folder / f".{CHUNK_FOLDER}.new"
        shutil.rmtree(self._new, ignore_errors=True)
        if self.folder:
            self._new.mkdir(parents=True)

    def add(self, name: str, episodes: Mapping[int, Any]) -> None:
        if not self.folder:
            self.inline[name] = episodes
            return
        (self._new / f"{name}.js").write_text(f'receiveEpisodes("{name}",{_dumps(episodes)});\n', encoding="utf-8")

    def finish(self) -> None:
        shutil.rmtree(self._target, ignore_errors=True)
        if self.folder:
            self._new.rename(self._target)
