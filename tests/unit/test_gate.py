"""The tables of docs/results/gate.md: their arms, the order of their stages, and what is made of the seeds together."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.config.load import load_config
from dgpo.errors import DgpoError
from dgpo.evaluation.gate import ARMS, FACTORS, GRID, RELATION, ROWS, TUNED, coefficient
from dgpo.evaluation.paper import ROWS as PLANNED_ROWS
from dgpo.files import append_jsonl
from dgpo.pipeline import reproduce as module
from dgpo.pipeline.gate import answer, check_cold_start, write_gate
from dgpo.pipeline.plan import Plan, PlannedStage, plan_table
from dgpo.pipeline.tuning import gate_command, write_tuning

INPUTS = ["world=tiny", "hardware=cpu", "student.path=s", "teacher.path=w/teacher", "data.validation_file=v.parquet"]


@cache  # a configuration for each row, half a second each
def plan(table: str) -> Plan:
    rows = {"biased_all": ["train.teacher_term.coef=3"]} if table == "gate" else {}
    return plan_table(table, Path("/run/tiny"), Path("/run/tiny"), INPUTS, [], rows)


def stage(planned: Plan, name: str) -> PlannedStage:
    (found,) = [each for each in planned.stages if each.name == f"tiny/{name}"]
    return found


def test_the_cold_start_is_shared_and_sampled_before_any_arm_of_rl():
    planned = plan("gate")
    names = [each.name.removeprefix("tiny/") for each in planned.stages]
    assert names[:3] == ["teacher/collect", "kd/distill", "start/test"]
    starts = {each.config.train.init for each in planned.stages if each.stage == "train"}
    assert starts == set(stage(planned, "start/test").models.values()) == {"/run/tiny/kd/distill/model"}
    config = stage(planned, "start/test").config
    assert (config.test.temperature, config.test.sets) == (1.0, ["start"])
    assert config.data.test_files["start"] == "v.parquet", "no test question decides"


def test_arms_differ_in_teacher_gate_form_and_coefficient_alone():
    planned = plan("gate")
    arms = {each.name.split("/")[1]: each.config for each in planned.stages if each.stage == "train"}
    terms = {row: config.train.teacher_term for row, config in arms.items()}
    assert {row: (arms[row].teacher.path, term.gate, term.form) for row, term in terms.items() if row != "none"} == {
        "good_failed": ("w/teacher", "failed", "exact"),
        "good_all": ("w/teacher", "all", "exact"),
        "good_random": ("w/teacher", "random", "exact"),
        "biased_failed": ("w/teacher_biased", "failed", "exact"),
        "biased_all": ("w/teacher_biased", "all", "exact"),
        "biased_random": ("w/teacher_biased", "random", "exact"),
        "biased_failed_reward": ("w/teacher_biased", "failed", "reward"),
    }
    assert terms["none"].gate == "none"
    assert [row for row, term in terms.items() if term.coef == 3] == ["biased_all"]
    assert stage(planned, "teacher/collect").config.teacher.path == "w/teacher"
    assert planned.results["good_teacher"].models == {"good_teacher": "w/teacher"}
    assert planned.results["biased_teacher"].models == {"biased_teacher": "w/teacher_biased"}


def test_tuning_tries_every_coefficient_and_tests_nothing(monkeypatch):
    assert len(ROWS["gate_tuning"]) == 1 + len(TUNED) * len(FACTORS)
    assert [coefficient("good_random", factor)[-6:] for factor in FACTORS] == ["0.3333", "coef=1", "coef=3"]
    tried = [f"biased_failed_reward_{factor}" for factor in FACTORS]
    monkeypatch.setitem(PLANNED_ROWS, "gate_tuning", ("kd", *tried))
    planned = plan("gate_tuning")
    assert [each.name.removeprefix("tiny/") for each in planned.stages] == [
        "teacher/collect", "kd/distill", "start/test", *(f"{row}/train" for row in tried)
    ]  # fmt: skip
    assert [each.config.train.teacher_term.coef for each in planned.stages[3:]] == [0.0003333, 0.001, 0.003]


def test_a_dry_run_lists_the_stages_in_order(tmp_path, capsys, monkeypatch):
    rows = ("kd", "good_teacher", "biased_teacher", "none", "biased_failed")
    monkeypatch.setitem(PLANNED_ROWS, "gate", rows)
    overrides = ["table=gate", "world=tiny", "hardware=cpu", f"run_dir={tmp_path}", "seeds=[41]", "dry_run=true"]
    assert main(["reproduce", *overrides]) == 0
    stages = re.findall(r"tiny/(\w+)/(\w+)", capsys.readouterr().out)
    assert [each for each in stages if each[1] != "test"] == [
        ("teacher", "collect"), ("kd", "distill"), ("none", "train"), ("biased_failed", "train")
    ]  # fmt: skip
    assert [row for row, name in stages if name == "test"] == ["start", *rows]
    assert stages.index(("biased_teacher", "test")) < stages.index(("none", "train"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["table=gate", "seeds=[41,42]"], "table=gate is of the tiny world: add world=tiny hardware=cpu"),
        (["table=gate_tuning", "world=tiny"], "table=gate_tuning without seeds"),
        (["table=gate", "world=tiny", "seeds=[41]", "rows.dgpo=['seed=1']"], "rows.dgpo: no row of table=gate"),
    ],
)
def test_a_request_without_sense_is_refused(overrides, message, tmp_path, capsys):
    assert main(["reproduce", *overrides, f"run_dir={tmp_path / 'new'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_cold_start_below_the_minimum_stops_with_its_value_and_the_way_out(tmp_path):
    results = tmp_path / "test" / "results.json"
    results.parent.mkdir()
    for em in (0.5, 0.4375):
        results.write_text(json.dumps({"models": {"start": {"average": {"em": em}}}}))
        if em < 0.5:
            with pytest.raises(
                DgpoError, match=r"is 0\.438, expected at least 0\.5: make it longer .* distill\.epochs="
            ):
                check_cold_start(tmp_path)
        else:
            check_cold_start(tmp_path)


def test_the_cold_starts_of_all_seeds_are_checked_before_an_arm_of_one(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_one_seed", lambda config, own, only_start: calls.append((config.seed, only_start)))
    monkeypatch.setattr(module, "write_gate", lambda folder, seeds: folder)
    module.reproduce(["table=gate", "world=tiny", "hardware=cpu", f"run_dir={tmp_path}", "seeds=[41,42]"])
    assert calls == [(41, True), (42, True), (41, False), (42, False)]


def test_the_best_coefficient_has_the_highest_mean_and_of_equal_ones_is_the_smallest():
    values = {row: {911: 0.5, 912: 0.5} for row in ROWS["gate_tuning"][1:]}
    values["biased_failed_three"] = {911: 0.9, 912: 0.2}  # mean .55
    values["biased_all_one"] = {911: 0.9, 912: 0.0}  # .45
    best = GRID.best(values)
    assert best["biased_failed"] == "three"
    assert best["biased_all"] == best["good_all"] == "third"
    assert set(best) == set(TUNED)


def write_metrics(folder, seed, row, records):
    path = folder / f"seed_{seed}" / "tiny" / row / "train" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    append_jsonl(path, records)


def test_tuning_shows_all_and_prints_the_command_with_the_best(tmp_path, capsys):
    for row in ROWS["gate_tuning"][1:]:
        for seed in (911, 912):
            last = 0.6 if row.endswith("one") else 0.4 + (seed == 912) * 0.1
            write_metrics(
                tmp_path, seed, row, [{"step": 10, "validation/em": 0.9}, {"step": 60, "validation/em": last}]
            )
    given = ["table=gate_tuning", "world=tiny", "hardware=cpu", f"run_dir={tmp_path}", "seeds=[911,912]"]
    text = write_tuning(tmp_path, "gate_tuning", [911, 912], [*given, "distill.epochs=12"]).read_text()
    assert text in capsys.readouterr().out
    assert "| good teacher, all | 0.450 (0.400, 0.500) | 0.600 (0.600, 0.600) | 0.450 (0.400, 0.500) | " in text
    assert "'rows.biased_failed_reward=[\"train.teacher_term.coef=0.001\"]'" in text
    command = gate_command([*given, "distill.epochs=12"], {"good_all": coefficient("good_all", "three")})
    assert command == (
        f"python -m dgpo reproduce table=gate world=tiny hardware=cpu run_dir={tmp_path} distill.epochs=12 "
        "'seeds=[41,42,43,44,45]' 'rows.good_all=[\"train.teacher_term.coef=3\"]'"
    )
    assert load_config(['rows.good_all=["train.teacher_term.coef=3"]']).rows == {
        "good_all": [coefficient("good_all", "three")]
    }


def test_the_table_of_the_seeds_has_both_contrasts_shares_and_teachers_passed(tmp_path, capsys):
    """By hand: failed - all is (.10, .12) with t = 11, failed - random (.05, .03) with t = 4."""
    on_relation = {"biased_failed": (0.50, 0.52), "biased_all": (0.40, 0.40), "biased_random": (0.45, 0.49)}
    for index, seed in enumerate((41, 42)):
        for row in ROWS["gate"]:
            em = {"biased_teacher": 0.7, "good_teacher": 0.9}.get(row, 0.8)
            values = on_relation.get(row, (0.1, 0.51) if row == "biased_teacher" else (0.6, 0.6))
            folder = tmp_path / f"seed_{seed}" / "tiny" / row / "test"
            folder.mkdir(parents=True)
            measured = {"average": {"em": em}, "slices": {"relation": {RELATION: {"em": values[index]}}}}
            (folder / "results.json").write_text(json.dumps({"models": {row: measured}}))
            if row in TUNED:
                write_metrics(tmp_path, seed, row, [{"teacher/gate_token_fraction": share} for share in (0.2, 0.4)])
    path = write_gate(tmp_path, [41, 42])
    text = path.read_text()
    assert text in capsys.readouterr().out
    assert (
        "| biased teacher, failed | 2 | 0.800 | 0.510 | 30.0% | yes, +0.100 (2 of 2) | yes, +0.205 (2 of 2) |" in text
    )
    assert "| good teacher, all | 2 | 0.800 | 0.600 | 30.0% | no, -0.100 (0 of 2) | yes, +0.000 (0 of 2) |" not in text
    assert "| cold start | 2 | 0.800 | 0.600 | - | - | - |" in text
    first, second = json.loads(path.with_suffix(".json").read_text())["contrasts"]
    assert (first["mean"], second["mean"]) == (pytest.approx(0.11), pytest.approx(0.04))
    # One degree of freedom is the Cauchy distribution: p = 2 (1/2 - atan(t) / pi).
    assert first["p"] == pytest.approx(0.05772, abs=1e-4)
    assert second["p"] == pytest.approx(0.15596, abs=1e-4)
    assert first["p_holm"] == pytest.approx(2 * first["p"])
    assert second["p_holm"] == pytest.approx(second["p"])
    assert "is not shown to differ from biased teacher, all." in text
    svg = path.with_suffix(".svg").read_text()
    assert svg.count("<circle") == 2 + 2 * 2 * len(ROWS["gate"])
    assert all(f">{ARMS[row].label}</text>" in svg for row in ROWS["gate"][1:])


def test_the_answer_says_what_is_shown_only():
    pair = {"row": "biased_failed", "other": "biased_all"}
    assert answer([{**pair, "mean": 0.1, "p_holm": 0.01}]) == (
        f"On `{RELATION}`, biased teacher, failed, does better than biased teacher, all."
    )
    assert "does worse than" in answer([{**pair, "mean": -0.1, "p_holm": 0.01}])
    assert "is not shown to differ from" in answer([{**pair, "mean": 0.1, "p_holm": 0.06}])
