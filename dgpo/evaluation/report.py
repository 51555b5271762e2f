"""`report.html`: what a run achieved, on one page that opens from disk. Reads only what the stages left behind.

The page needs no network and may load nothing but the episode files beside it; its own content policy says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from dgpo.algorithms.selective_kl import GATES
from dgpo.config.load import CONFIG_DIR, changed_settings, group_choices
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.evaluation.arcap_chart import arcap_section, read_arcap
from dgpo.evaluation.browser_section import browser_section
from dgpo.evaluation.charts import stage_bars
from dgpo.evaluation.curves import RunCurves, curves_section, read_curves
from dgpo.evaluation.results_section import model_of_interest, results_section, runs_section
from dgpo.evaluation.stale import stale_models
from dgpo.files import atomic_write_text
from dgpo.runs.artifacts import recorded
from dgpo.runs.summary import read_results

PAGE = Path(__file__).parent / "page"


def report(config: Config) -> None:
    """Writes the page of `run_dir`, with curves and test results of `report.runs`, and prints where it is."""
    folder = Path(config.run_dir)
    others = [Path(run) for run in config.report.runs]
    if config.dry_run:
        _read(folder, others)
        print(f"dry run: {folder / 'report.html'} would be written from {folder}")
        return
    print(write_report(folder, others))


def write_report(folder: Path, others: Sequence[Path] = ()) -> Path:
    """Writes `report.html` into a run folder that was tested or trained. Returns its path.

    Args:
        folder: the run.
        others: run folders whose training curves are drawn over this one's, and whose test results are listed.

    Raises:
        FileNotFoundError: there is nothing to show in the folder, or in one of the others.
        ConfigError: two of the runs have one name.
    """
    folder = Path(folder)
    curves, tested = _read(folder, others)
    runs = [folder, *map(Path, others)]
    results, summary = tested.get(folder), _summary(folder)
    arcap = read_arcap(folder)
    pair = find_pair(folder)
    sections = [
        _stale(folder, tested, arcap),
        results_section(results, summary, pair=pair) if results else "",
        runs_section({path.name: each for path, each in tested.items()}) if tested.keys() - {folder} else "",
        arcap_section(arcap, pair=pair) if arcap else "",
        curves_section(curves),
        _stages(folder, summary),
        browser_section(folder, results),
        _configuration(folder, runs),
    ]
    path = folder / "report.html"
    atomic_write_text(path, _page(f"DGPO: {folder.name}", _opening(folder, results) + "".join(sections)))
    return path


def _read(folder: Path, others: Sequence[Path]) -> tuple[list[RunCurves], dict[Path, dict[str, Any]]]:
    """The curves of each run, and the test results of those that have them; raises as `write_report`."""
    runs = _named_apart([folder, *map(Path, others)])
    curves = [read_curves(path, path.name) for path in runs]
    tested = {path: read_results(path) for path in runs if (path / "test" / "results.json").exists()}
    for path, run in zip(runs, curves, strict=True):
        if not (run.training or run.distillation or path in tested):
            raise FileNotFoundError(
                f"{path} holds no test results and no training metrics: run `python -m dgpo test` or `train` with this "
                "run_dir first"
            )
    return curves, tested


def _page(title: str, body: str) -> str:
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("style.css", "browser.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}' 'self' file:"
    script = f"<script>{script}</script>" if 'id="episode-data"' in body else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{body}</main>{script}</body></html>\n"
    )


def _named_apart(folders: Sequence[Path]) -> list[Path]:
    """The folders as they are; two runs of one name would be one line in a legend."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(f"report.runs: two of the runs have one name ({', '.join(names)}); rename a folder")
    return list(folders)


def find_pair(folder: Path) -> str | None:
    """The paper's pair whose student and teacher a run used, by what its stages recorded; None for other models."""
    for config in filter(None, (recorded(folder, stage).get("config") for stage in ("test", "arcap", "train"))):
        for pair in group_choices("pair"):
            preset = yaml.safe_load((CONFIG_DIR / "pair" / f"{pair}.yaml").read_text())
            if all(config[who]["path"] == preset[who]["path"] for who in ("student", "teacher")):
                return pair
    return None


def _opening(folder: Path, results: Mapping[str, Any] | None) -> str:
    sentence = ""
    after = model_of_interest(results) if results else None
    if results and after and results["baseline"]:
        before = results["baseline"]
        difference, low, high = results["difference_to_baseline"][after]["average"]
        em, em_before = (results["models"][name]["average"]["em"] for name in (after, before))
        sentence = (
            f"<p><b>{escape(after)}</b> answers <b>{em:.1%}</b> of the questions exactly, {escape(before)} "
            f"{em_before:.1%}: a difference of <b>{100 * difference:+.1f} points</b> [{100 * low:+.1f}, "
            f"{100 * high:+.1f}] on the same questions.</p>"
        )
    return f"<header><h1>{escape(folder.name)}</h1>{_method(folder)}{sentence}</header>"


def _method(folder: Path) -> str:
    """What the run did, by the stages that are in its folder."""
    steps = []
    if (folder / "distill").is_dir():
        source = recorded(folder, "collect").get("config", {}).get("collect", {}).get("source", "teacher")
        steps.append("it copies a teacher that can" if source == "teacher" else "it copies demonstrations")
    if (folder / "train").is_dir():
        gate = recorded(folder, "train").get("config", {}).get("train", {}).get("teacher_term", {}).get("gate", "none")
        episodes = GATES[gate].episodes if gate in GATES else f"the episodes of the gate {gate}"
        guide = "" if gate == "none" else f", guided by the teacher on {episodes}"
        steps.append(f"it improves by reinforcement learning{escape(guide)}")
    return f"<p>A small model learns to search: {', then '.join(steps)}.</p>" if steps else ""


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _stale(folder: Path, tested: Mapping[Path, Mapping[str, Any]], arcap: Mapping[str, Any] | None) -> str:
    """Says which numbers below are of weights that are gone."""
    measured = [(path / "test", each["models"]) for path, each in tested.items()]
    measured += [(folder / "arcap", arcap["models"])] if arcap else []
    lines = [f"<p>{escape(line)}.</p>" for place, models in measured for line in stale_models(place, models)]
    return f"<section><h2>Out of date</h2>{''.join(lines)}</section>" if lines else ""


def _stages(folder: Path, summary: Mapping[str, Any]) -> str:
    seconds = {name: value for name, value in summary.get("wall_s", {}).items() if name != "total"}
    if not seconds:
        return ""
    total = summary["wall_s"].get("total")
    memory = folder / "memory.txt"
    notes = [f"{total:.0f} s in all."] if total else []
    notes += [memory.read_text().strip() + "."] if memory.exists() else []
    return f"<section><h2>Time</h2><p>{escape(' '.join(notes))}</p>{stage_bars(seconds)}</section>"


def _configuration(folder: Path, runs: Sequence[Path]) -> str:
    """Seed and versions of every run, by its summary or else by its last stage, and this one's settings."""
    records = {path: _last_record(path) for path in runs}
    lines = []
    for path, record in records.items():
        made = {**record, **_summary(path)}
        told = [f"seed {made['seed']}"] if "seed" in made else ["nothing recorded"]
        told += [f"{name} {version}" for name, version in made.get("versions", {}).items()]
        lines.append(f"<p>{escape(path.name)}: {escape(', '.join(told))}.</p>")
    config = records[folder].get("config")
    settings = "" if config is None else _settings(records[folder]["stage"], config)
    return f"<section><h2>How this was made</h2>{''.join(lines)}{settings}</section>"


def _last_record(run: Path) -> dict[str, Any]:
    """What the stage nearest to the result recorded, RL first; empty of a run without any record."""
    records = ({"stage": stage, **recorded(run, stage)} for stage in ("train", "distill", "collect", "test", "arcap"))
    return next((record for record in records if "config" in record), {})


def _settings(stage: str, config: dict[str, Any]) -> str:
    changed = escape("\n".join(changed_settings(config)))
    everything = escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return (
        f"<p>Settings of the stage <i>{escape(stage)}</i> that differ from the defaults:</p>"
        f'<pre class="changed">{changed}</pre>'
        f"<details><summary>All its settings</summary><pre>{everything}</pre></details>"
    )
