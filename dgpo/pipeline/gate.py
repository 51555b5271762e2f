"""What the tables `gate` and `gate_tuning` add to `reproduce`: the check of the cold start, and the seeds together."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.errors import DgpoError
from dgpo.evaluation.charts import dot_chart
from dgpo.evaluation.gate import (
    ARMS,
    CONTRASTS,
    FACTORS,
    MIN_START_EM,
    RELATION,
    ROWS,
    TEST_SEEDS,
    TUNED,
    best_factors,
    coefficient,
)
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


def write_tuning(folder: Path, seeds: Sequence[int], overrides: Sequence[str]) -> Path:
    """Writes and prints every coefficient's validation score, and the command of `table=gate` with the best ones."""
    values = {
        row: {seed: _metrics(folder, seed, row)[-1]["validation/em"] for seed in seeds}
        for row in ROWS["gate_tuning"][1:]
    }
    best = best_factors(values)
    text = f"{_render_tuning(values, best)}\nNext:\n\n    {gate_command(overrides, best)}\n"
    return _write(folder / "table_gate_tuning_seeds", {"seeds": list(seeds), "values": values, "best": best}, text)


def gate_command(overrides: Sequence[str], best: Mapping[str, str]) -> str:
    """The line that makes the table with the chosen coefficients and whatever else the tuning was given."""
    kept = [each for each in overrides if not each.startswith(("table=", "seeds=", "seed=", "rows."))]
    rows = [f'rows.{arm}=["{coefficient(arm, factor)}"]' for arm, factor in best.items()]
    seeds = f"seeds=[{','.join(map(str, TEST_SEEDS))}]"
    return shlex.join(["python", "-m", "dgpo", "reproduce", "table=gate", *kept, seeds, *rows])


def _render_tuning(values: Values, best: Mapping[str, str]) -> str:
    lines = ["| arm | 1/3 of the default | default | 3 times | best |", "|---|---|---|---|---|"]
    for arm in TUNED:
        tried = [values[f"{arm}_{factor}"].values() for factor in FACTORS]
        cells = [f"{statistics.mean(each):.3f} ({', '.join(f'{em:.3f}' for em in each)})" for each in tried]
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} | `{coefficient(arm, best[arm])}` |")
    return "Exact match on validation questions at the last step, mean (by seed).\n\n" + "\n".join(lines) + "\n"


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
    return _write(folder / "table_gate_seeds", {**record, "contrasts": contrasts}, text)


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


def _write(path: Path, record: Mapping[str, Any], text: str) -> Path:
    atomic_write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    atomic_write_text(path.with_suffix(".md"), text)
    print(text)
    return path.with_suffix(".md")
