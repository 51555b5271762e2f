"""`report.html`: what a run achieved, on one self-contained page. Reads only what the stages left in the run folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dgpo.artifacts import atomic_write_text
from dgpo.evaluation.charts import interval_bar, line_chart, stage_bars
from dgpo.evaluation.report_style import STYLE
from dgpo.evaluation.summary import read_results

# How many questions of each kind are shown, where there are as many: (right before, right after) -> (count, label).
SHOWN = {
    (False, True): (5, "wrong before, right after"),
    (True, True): (3, "right before and after"),
    (False, False): (2, "wrong before and after"),
    (True, False): (2, "right before, wrong after"),
}
SLICE_TITLES = {"kind": "question kind", "country_split": "countries", "held_out_paraphrase": "held-out wording"}
YES_NO = {"True": "yes", "False": "no"}
_VALIDATION_EM = re.compile(r"val-aux/(.+)/em/mean@\d+")
_TAGGED = re.compile(r"<(think|search|answer|information)>.*?</\1>", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """One model's episode on one question."""

    model: str
    correct: bool
    answer: str | None
    status: str
    segments: list[list[str]]


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder that has been tested. Returns its path.

    Raises:
        FileNotFoundError: the run has not been tested.
    """
    folder = Path(folder)
    results = read_results(folder)
    summary = json.loads((folder / "summary.json").read_text())
    sections = [
        _headline(results, summary),
        _slices(results),
        _curves(folder),
        _stages(folder, summary),
        _episodes(folder, results),
        _configuration(folder, summary),
    ]
    title = f"DGPO: {folder.name}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{_opening(folder, results, summary)}{''.join(sections)}</main></body></html>\n"
    )
    path = folder / "report.html"
    atomic_write_text(path, page)
    return path


def _opening(folder: Path, results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    after, before = _after(results), results["baseline"]
    sentence = ""
    if after and before:
        difference, low, high = results["difference_to_baseline"][after]["average"]
        sentence = (
            f"<p><b>{escape(after)}</b> answers <b>{summary['methods'][after]['em']:.1%}</b> of the questions exactly, "
            f"{escape(before)} {summary['methods'][before]['em']:.1%}: a difference of <b>{100 * difference:+.1f} "
            f"points</b> [{100 * low:+.1f}, {100 * high:+.1f}] on the same questions.</p>"
        )
    what = (
        "<p>A small model learns to search: it copies a teacher that can, then improves by reinforcement learning.</p>"
    )
    return f"<header><h1>{escape(folder.name)}</h1>{what}{sentence}</header>"


def _after(results: Mapping[str, Any]) -> str | None:
    """The model that the report is about: the last one that is compared with the baseline."""
    return next(reversed(results["difference_to_baseline"]), None) if results["difference_to_baseline"] else None


def _headline(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    models, baseline = results["models"], results["baseline"]
    sets = list(next(iter(models.values()))["sets"])
    highest = max(0.05, *(model["average"]["em_ci95"][1] for model in models.values()))
    several = sets if len(sets) > 1 else []
    head = ["model", "exact match", "95% interval", "", *several]
    head += [f"against {baseline}"] if baseline else []
    with_terms = any(method["teacher_term"] for method in summary["methods"].values())
    head += ["F1", "answered", "searches", "hit", *(["teacher term"] if with_terms else [])]
    rows = []
    for name, model in models.items():
        average = model["average"]
        low, high = average["em_ci95"]
        cells = [escape(name), f"<b>{average['em']:.3f}</b>", f'<span class="range">{low:.3f} to {high:.3f}</span>']
        cells += [interval_bar(average["em"], low, high, highest=highest)]
        cells += [f"{model['sets'][each]['em']:.3f}" for each in several]
        if baseline:
            cells.append(_difference(results["difference_to_baseline"].get(name)))
        cells += [f"{average['f1']:.3f}", f"{average['answered']:.1%}", f"{average['num_searches']:.2f}"]
        cells.append(f"{average['hit']:.1%}")
        cells += [escape(summary["methods"][name]["teacher_term"] or "none")] if with_terms else []
        rows.append((name == _after(results), cells))
    num_questions = next(iter(models.values()))["num_questions"]
    how = "greedy" if results["temperature"] == 0 else f"sampled at temperature {results['temperature']:g}"
    mean = " EM is the unweighted mean over the sets." if several else ""
    return (
        f"<section><h2>Held-out questions</h2><p>{num_questions} questions of {escape(', '.join(sets))}, all of them "
        f"in the denominator, {how}.{mean} Intervals: bootstrap over questions; differences are paired. "
        f"<i>hit</i>: a gold answer stood in a retrieved passage.</p>{_table(head, rows)}</section>"
    )


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    value, low, high = difference["average"]
    tone = "good" if low > 0 else "bad" if high < 0 else ""
    return f'<span class="{tone}">{value:+.3f}</span> <small>[{low:+.3f}, {high:+.3f}]</small>'


def _slices(results: Mapping[str, Any]) -> str:
    models = results["models"]
    first = next(iter(models.values()))["slices"]
    if not first:
        return ""
    head = ["slice", "questions", *models]
    rows = []
    for field, groups in first.items():
        for value, group in groups.items():
            cells = [
                f"{escape(SLICE_TITLES.get(field, field))}: {escape(YES_NO.get(value, value))}",
                str(group["num_questions"]),
            ]
            for model in models.values():
                part = model["slices"][field][value]
                low, high = part["em_ci95"]
                cells.append(f"{part['em']:.3f} <small>[{low:.2f}, {high:.2f}]</small>")
            rows.append((False, cells))
    return f"<section><h2>Slices</h2><p>Exact match by property of the question.</p>{_table(head, rows)}</section>"


def _table(head: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{"best" if best else ""}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for best, cells in rows
    )
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def _curves(folder: Path) -> str:
    training = _read_lines(folder / "train" / "metrics.jsonl")
    distillation = next(
        (lines for path in ("distill/model", "distill") if (lines := _read_lines(folder / path / "metrics.jsonl"))), []
    )
    validation = sorted({key for record in training for key in record if _VALIDATION_EM.fullmatch(key)})
    charts = [
        line_chart(
            {"training episodes (sampled)": _series(training, "episode/em")},
            dotted={f"validation: {_VALIDATION_EM.fullmatch(key)[1]}": _series(training, key) for key in validation},
            x_label="RL step",
            y_label="Exact match during RL",
        ),
        line_chart({"distillation loss": _series(distillation, "loss")}, x_label="step", y_label="Cold start"),
        line_chart(
            {
                "hit": _series(training, "episode/hit"),
                "gated (failed)": _series(training, "teacher/gate_fraction"),
                "answered": _series(training, "episode/answered"),
            },
            x_label="RL step",
            y_label="Share of episodes",
        ),
        line_chart(
            {
                "teacher term": _series(training, "actor/teacher_loss"),
                "KL on failed": _series(training, "teacher/kl_failed"),
                "KL on correct": _series(training, "teacher/kl_correct"),
            },
            x_label="RL step",
            y_label="Distance to the teacher (nats per token)",
        ),
    ]
    drawn = "".join(charts)
    return f'<section><h2>Learning curves</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if key in record]


def _stages(folder: Path, summary: Mapping[str, Any]) -> str:
    seconds = {name: value for name, value in summary["wall_s"].items() if name != "total"}
    if not seconds:
        return ""
    total = summary["wall_s"].get("total")
    memory = folder / "memory.txt"
    notes = [f"{total:.0f} s in all."] if total else []
    notes += [memory.read_text().strip() + "."] if memory.exists() else []
    return f"<section><h2>Time</h2><p>{escape(' '.join(notes))}</p>{stage_bars(seconds)}</section>"


def _episodes(folder: Path, results: Mapping[str, Any]) -> str:
    before, after = results["baseline"], _after(results)
    if not (before and after):
        return ""
    sides = {name: _sides(folder, name) for name in (before, after)}
    shared = [key for key in sides[after] if key in sides[before]]
    outcome = {key: (sides[before][key][0].correct, sides[after][key][0].correct) for key in shared}
    blocks = []
    for kind, (count, label) in SHOWN.items():
        keys = [key for key in shared if outcome[key] == kind]
        for key in keys[:count]:
            pair = "".join(_side(sides[name][key][0]) for name in (before, after))
            transcript = sides[after][key][1]
            blocks.append(
                f'<div class="episode"><h3>{escape(transcript["question"])}</h3><small>gold: '
                f"{escape(' | '.join(transcript['golds']))} &middot; {label} ({len(keys)} of {len(shared)})</small>"
                f'<div class="pair">{pair}</div></div>'
            )
    key = "".join(f'<span class="{name}">{name}</span>' for name in ("think", "search", "information", "answer"))
    return (
        f"<section><h2>Episodes: {escape(before)} beside {escape(after)}</h2><p>The first questions of each outcome, "
        f"chosen by their order in the file; each label says how common its outcome is. <i>information</i> is what the "
        f'retriever returned.</p><div class="key">{key}</div>{"".join(blocks)}</section>'
    )


def _sides(folder: Path, model: str) -> dict[str, tuple[Side, dict[str, Any]]]:
    path = folder / "test" / model
    scores = {score["episode_id"]: score for score in _read_lines(path / "scores.jsonl")}
    found = {}
    for transcript in _read_lines(path / "transcripts.jsonl"):
        score = scores[transcript["episode_id"]]
        side = Side(model, score["em"] == 1.0, score["answer"], score["status"], transcript["segments"])
        found[transcript["episode_id"]] = (side, transcript)
    return found


def _side(side: Side) -> str:
    tone, verdict = ("good", "right") if side.correct else ("bad", "wrong")
    if side.status != "answered":
        verdict = side.status.replace("_", " ")
    text = "".join(_coloured(speaker, text) for speaker, text in side.segments)
    return (
        f'<div><h4><span>{escape(side.model)}</span><span class="{tone}">{verdict}</span></h4>'
        f'<div class="text">{text}</div></div>'
    )


def _coloured(speaker: str, text: str) -> str:
    """Text with its tagged parts wrapped in coloured spans; environment text without tags is a notice."""
    text = text.strip("\n") if speaker == "environment" else text
    parts, end = [], 0
    for match in _TAGGED.finditer(text):
        parts.append(_plain(speaker, text[end : match.start()]))
        parts.append(f'<span class="{match[1]}">{escape(match[0])}</span>')
        end = match.end()
    return "".join([*parts, _plain(speaker, text[end:])])


def _plain(speaker: str, text: str) -> str:
    if not text.strip():
        return ""
    return f'<span class="notice">{escape(text)}</span>' if speaker == "environment" else escape(text)


def _configuration(folder: Path, summary: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    path = folder / "train" / "config.yaml"
    text = path.read_text() if path.exists() else ""
    details = f"<details><summary>Configuration of the RL stage</summary><pre>{escape(text)}</pre></details>"
    return (
        f"<section><h2>How this was made</h2><p>Seed {summary['seed']}. {escape(versions)}.</p>"
        f"{details if text else ''}</section>"
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
