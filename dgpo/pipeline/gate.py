"""What the table `gate` adds to `reproduce`: the check of the cold start, and the seeds together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.errors import DgpoError
from dgpo.evaluation.charts import dot_chart
from dgpo.evaluation.gate import ARMS, CONTRASTS, MIN_START_EM, RELATION, ROWS, TUNED
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.pipeline.over_seeds import ALPHA, Values, primary_contrasts, render_contrasts

LABELS = {"kd": "cold start", **{row: arm.label for row, arm in ARMS.items()}}


def check_cold_start(run_dir: Path) -> None:
    """Raises `DgpoError` where the cold start that was tested in this folder is too weak for the experiment."""
    em = json.loads((run_dir / "test" / "results.json").read_text())["models"]["start"]["average"]["em"]
    if em < MIN_START_EM:
        raise DgpoError(
            f"the cold start's exact match at temperature 1 is {em:.3f}, expected at least {MIN_START_EM:g}: make it "
            "longer for all arms, distill.epochs=.., in another run_dir; no arm of RL was run"
        )


def write_gate(folder: Path, seeds: Sequence[int]) -> Path:
    """Writes `table_gate_seeds.md`, `.json` and `.svg` from the tests of every seed, and prints the table."""
    overall: dict[str, dict[int, float]] = {row: {} for row in ROWS["gate"]}
    relation: dict[str, dict[int, float]] = {row: {} for row in ROWS["gate"]}
    share: dict[str, dict[int, float]] = {row: {} for row in ROWS["gate"]}
    for row in ROWS["gate"]:
        for seed in seeds:
            results = json.loads((_run(folder, seed, row) / "test" / "results.json").read_text())["models"][row]
            overall[row][seed] = results["average"]["em"]
            relation[row][seed] = results["slices"]["relation"][RELATION]["em"]
            if row in TUNED:
                steps = [record["teacher/gate_token_fraction"] for record in _metrics(folder, seed, row)]
                share[row][seed] = statistics.mean(steps)
    contrasts = primary_contrasts(relation, CONTRASTS)
    text = render_arms(overall, relation, share)
    if contrasts:
        text += f"{render_contrasts(contrasts, LABELS, f'exact match on `{RELATION}`')}\n{answer(contrasts)}\n"
    record = {"seeds": list(seeds), "biased_relation": RELATION, "all": overall, "relation": relation, "share": share}
    measures = {"all questions": overall, f"relation {RELATION}": relation}
    points = {LABELS[row]: {name: list(each[row].values()) for name, each in measures.items()} for row in ROWS["gate"]}
    atomic_write_text(folder / "table_gate_seeds.svg", dot_chart(points, x_label="exact match, a point per seed"))
    atomic_write_text(folder / "table_gate_seeds.json", json.dumps({**record, "contrasts": contrasts}, indent=1) + "\n")
    path = folder / "table_gate_seeds.md"
    atomic_write_text(path, text)
    print(text)
    return path


def render_arms(overall: Values, relation: Values, share: Values) -> str:
    """A line per arm. Whether it passes its teacher is by the means; how many seeds agree stands beside it."""
    head = f"| arm | seeds | EM | EM, `{RELATION}` | tokens under the gate | passes its teacher | on `{RELATION}` |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row, by_seed in overall.items():
        teacher = ARMS[row].teacher if row in ARMS else None
        passes = [_passes(each[row], each[teacher]) if teacher else "-" for each in (overall, relation)]
        means = [f"{statistics.mean(each[row].values()):.3f}" for each in (overall, relation)]
        tokens = f"{statistics.mean(share[row].values()):.1%}" if share.get(row) else "-"
        lines.append(f"| {' | '.join([LABELS[row], str(len(by_seed)), *means, tokens, *passes])} |")
    return "\n".join(lines) + "\n"


def _passes(arm: Mapping[int, float], teacher: Mapping[int, float]) -> str:
    differences = [arm[seed] - teacher[seed] for seed in arm]
    mean, above = statistics.mean(differences), sum(each > 0 for each in differences)
    return f"{'yes' if mean > 0 else 'no'}, {mean:+.3f} ({above} of {len(differences)})"


def answer(contrasts: Sequence[Mapping[str, Any]]) -> str:
    """The experiment's outcome as a sentence for each contrast."""
    sentences = []
    for each in contrasts:
        is_better = "better" if each["mean"] > 0 else "worse"
        verdict = f"does {is_better} than" if each["p_holm"] < ALPHA else "is not shown to differ from"
        sentences.append(f"On `{RELATION}`, {LABELS[each['row']]}, {verdict} {LABELS[each['other']]}.")
    return " ".join(sentences)


def _run(folder: Path, seed: int, row: str) -> Path:
    return folder / f"seed_{seed}" / "tiny" / row


def _metrics(folder: Path, seed: int, row: str) -> list[dict[str, Any]]:
    return read_jsonl(_run(folder, seed, row) / "train" / "metrics.jsonl")
