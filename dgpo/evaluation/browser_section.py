"""The episode browser in the page: which episodes of a run it shows, and its controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dgpo.evaluation.browser import ModelEpisodes, embed_json, write_browser_data
from dgpo.evaluation.results_section import model_of_interest
from dgpo.evaluation.token_pieces import TokenPieces, find_tokenizer
from dgpo.files import read_jsonl
from dgpo.runs.settings import SETTINGS

TRAINING_EPISODES = "train/episodes"  # step_N.jsonl and the tokenizer, written by dgpo.rl.episode_log
IN_TRAINING = "in training"
NOT_SCORED = (
    "Not recorded: the teacher did not score this episode token by token. It scores those that its gate lets in, and a "
    "few others; in its `exact` form, which scores whole vocabularies inside the update, a few of either outcome."
)
PERMUTED = (
    "<p>The sets <i>training, step N</i> are of <i>permuted worlds</i>: all names are real, all facts are shuffled, in "
    "golds and passages alike, so that an answer must be read and cannot be remembered.</p>"
)
_FILTERS = ("model", "set", "property", "outcome", "against", "searches")


def browser_section(folder: Path, results: Mapping[str, Any] | None) -> str:
    """The section of the page, and its files beside the page where there are many episodes; empty without episodes."""
    models = _tested(folder, results) if results else []
    training, steps = _in_training(folder)
    models += training
    if not models:
        return ""
    names = [model.name for model in models]
    focus = (model_of_interest(results) if results else None) or names[-1]
    beside = "teacher" if "teacher" in names and focus != "teacher" else results["baseline"] if results else None
    data = write_browser_data(
        models,
        folder,
        focus=focus,
        shown=list(dict.fromkeys([*([beside] if beside else []), focus, *(m.name for m in training)])),
        kl_notes=dict.fromkeys(steps, NOT_SCORED),
    )
    selects = "".join(f'<select id="filter-{name}" aria-label="{name}"></select>' for name in _FILTERS)
    key = "".join(
        f'<span class="{name}">&lt;{name}&gt;</span>' for name in ("think", "search", "information", "answer")
    )
    return (
        '<section id="episodes"><h2>Episodes</h2><p>Every recorded episode; filters apply to the model chosen first. '
        "<i>information</i> is what the retriever returned. Keys: <kbd>/</kbd> text, <kbd>j</kbd> <kbd>k</kbd> next "
        "and previous, <kbd>t</kbd> token mask, <kbd>d</kbd> reverse KL to the teacher.</p>"
        f"{PERMUTED if training and _is_permuted(folder) else ''}"
        f'<div class="key">{key}</div><p>In the list a mark for each model that played the question, in the order '
        f'{escape(", ".join(names))}: <b class="good">✓</b> exact match, <b class="bad">✗</b> failed.</p>'
        f'<div class="filters">{selects}<input id="filter-text" type="search" '
        'placeholder="text in question, gold, answer, query or id" aria-label="text"><button id="filter-clear" '
        'type="button" class="chip">clear filters</button><span id="episode-count" role="status"></span></div>'
        '<div class="browser"><div id="episode-list" role="listbox" tabindex="0" '
        'aria-label="questions"></div><div id="episode-detail"></div></div>'
        f'<script type="application/json" id="episode-data">{embed_json(data)}</script></section>'
    )


def _is_permuted(folder: Path) -> bool:
    """Whether RL searched in permuted worlds (`dgpo.tinyworld.world`), by what it recorded of its retriever."""
    path = folder / "train" / SETTINGS
    searched = json.loads(path.read_text()).get("retriever") or {} if path.exists() else {}
    return any(name.startswith("permuted") for name in searched.get("corpora", searched))


def _tested(folder: Path, results: Mapping[str, Any]) -> list[ModelEpisodes]:
    models = []
    for name, model in results["models"].items():
        place = folder / "test" / name
        recorded = place / "trajectories.jsonl"
        tokenizer = find_tokenizer(model["checkpoint"])
        transcripts = read_jsonl(place / "transcripts.jsonl", growing=True)
        models.append(
            ModelEpisodes(
                name,
                scores=read_jsonl(place / "scores.jsonl", growing=True),
                files=[recorded] if recorded.exists() else [],
                pieces=TokenPieces(tokenizer) if tokenizer else None,
                transcripts={line["episode_id"]: line["segments"] for line in transcripts},
            )
        )
    return models


def _in_training(folder: Path) -> tuple[list[ModelEpisodes], list[str]]:
    """The logged sample of RL's own episodes as a model of its own, and the names of its sets."""
    place = folder / TRAINING_EPISODES
    files = sorted(place.glob("step_*.jsonl"), key=lambda path: int(path.stem.partition("_")[2]))
    if not files:
        return [], []
    scores = [
        {**record, "set": f"training, step {record['step']}"}
        for path in files
        for record in read_jsonl(path, growing=True)
    ]
    tokenizer = find_tokenizer(place)
    model = ModelEpisodes(IN_TRAINING, scores, files, TokenPieces(tokenizer) if tokenizer else None)
    return [model], list(dict.fromkeys(score["set"] for score in scores))
