"""The report's tables of test results: every model with intervals and the paper's numbers, and slices by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dgpo.evaluation.charts import interval_bar
from dgpo.evaluation.paper import SETS, paper_value, protocol_note

SLICE_TITLES = {
    "kind": "question kind",
    "relation": "what is asked for",
    "country_split": "countries",
    "held_out_paraphrase": "held-out wording",
}
YES_NO = {"True": "yes", "False": "no"}


def model_of_interest(results: Mapping[str, Any]) -> str | None:
    """The model that the report is about: the last one that is compared with the baseline."""
    return next(reversed(results["difference_to_baseline"]), None) if results["difference_to_baseline"] else None


def results_section(results: Mapping[str, Any], summary: Mapping[str, Any], *, pair: str | None) -> str:
    """Both sections of the page.

    Args:
        results: `test/results.json`.
        summary: `summary.json`, or empty.
        pair: the paper's pair of teacher and student that was used; None shows none of its numbers.
    """
    return _headline(results, summary, pair) + _slices(results)


def runs_section(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The section with a row for each tested model of several runs.

    Args:
        runs: name of a run -> its `test/results.json`.
    """
    highest = max(0.05, *(m["average"]["em_ci95"][1] for results in runs.values() for m in results["models"].values()))
    rows = []
    for run, results in runs.items():
        for name, model in results["models"].items():
            em, (low, high) = model["average"]["em"], model["average"]["em_ci95"]
            cells = [escape(run), escape(name), f"{model['num_questions']} of {escape(', '.join(model['sets']))}"]
            cells += [f"<b>{em:.3f}</b>", f'<span class="range">{low:.3f} to {high:.3f}</span>']
            rows.append((name == model_of_interest(results), [*cells, interval_bar(em, low, high, highest=highest)]))
    head = ["run", "model", "questions", "exact match", "95% interval", ""]
    return (
        '<section id="runs"><h2>Test results of all runs</h2><p>Each interval is of its own model; '
        f"<code>compare</code> tests two runs on the same questions.</p>{_table(head, rows)}</section>"
    )


def _headline(results: Mapping[str, Any], summary: Mapping[str, Any], pair: str | None) -> str:
    models, baseline = results["models"], results["baseline"]
    sets = list(next(iter(models.values()))["sets"])
    highest = max(0.05, *(model["average"]["em_ci95"][1] for model in models.values()))
    several = sets if len(sets) > 1 else []
    terms = {name: method["teacher_term"] for name, method in summary.get("methods", {}).items()}
    with_paper = pair is not None and set(sets) == set(SETS)
    head = ["model", "exact match", "95% interval", "", *(["paper"] if with_paper else []), *several]
    head += [f"against {baseline}"] if baseline else []
    head += ["F1", "answered", "searches", "hit", *(["teacher term"] if any(terms.values()) else [])]
    rows = []
    for name, model in models.items():
        average = model["average"]
        low, high = average["em_ci95"]
        spread = f" <small>±{average['em_sd']:.3f}</small>" if "em_sd" in average else ""
        cells = [
            escape(name),
            f"<b>{average['em']:.3f}</b>{spread}",
            f'<span class="range">{low:.3f} to {high:.3f}</span>',
        ]
        cells += [interval_bar(average["em"], low, high, highest=highest)]
        cells += [_paper(pair, name, "average")] if with_paper else []
        cells += [_set_cell(model["sets"][each], _paper(pair, name, each)) for each in several]
        if baseline:
            cells.append(_difference(results["difference_to_baseline"].get(name)))
        cells += [f"{average['f1']:.3f}", f"{average['answered']:.1%}", f"{average['num_searches']:.2f}"]
        cells.append(f"{average['hit']:.1%}")
        cells += [escape(terms.get(name) or "none")] if any(terms.values()) else []
        rows.append((name == model_of_interest(results), cells))
    num_questions = next(iter(models.values()))["num_questions"]
    how = "greedy" if results["temperature"] == 0 else f"sampled at temperature {results['temperature']:g}"
    if results.get("samples", 1) > 1:
        how += f", {results['samples']} times each (EM: the mean; after ±, its deviation from sample to sample)"
    if results.get("num_dropped"):
        how += f"; {results['num_dropped']} questions dropped"
    ours = results.get("protocol", "ours") == "ours"
    protocol = "" if ours else f"<p class='bad'>Protocol: {escape(results['protocol'])}.</p>"
    mean = " EM is the unweighted mean over the sets." if several else ""
    note = escape(protocol_note({results["temperature"]}, upstream=not ours))
    paper = f" <span class='paper'>paper</span>: its table for the pair {escape(pair)}. {note}" if pair else ""
    return (
        f'<section id="results"><h2>Held-out questions</h2><p>{num_questions} questions of {escape(", ".join(sets))}, '
        f"all of them in the denominator, {how}.{mean} Intervals: bootstrap over questions; differences are paired. "
        f"<i>hit</i>: a gold answer stood in a retrieved passage.{paper}</p>{protocol}{_table(head, rows)}</section>"
    )


def _paper(pair: str | None, row: str, column: str) -> str:
    value = paper_value(pair, row, column) if pair else None
    return "" if value is None else f'<span class="paper">{value:.3f}</span>'


def _set_cell(values: Mapping[str, Any], paper: str) -> str:
    low, high = values["em_ci95"]
    beside = f" <small>/</small> <small>{paper}</small>" if paper else ""
    return f'{values["em"]:.3f}{beside}<small class="under">[{low:.3f}, {high:.3f}]</small>'


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
