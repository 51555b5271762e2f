"""`reproduce table=tuning`: five rows with three learning rates each, told apart by validation alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.config.load import load_config
from dgpo.evaluation.rates import GRID, RATES, TUNED
from dgpo.files import append_jsonl
from dgpo.pipeline.plan import plan_table
from dgpo.pipeline.tuning import write_tuning

INPUTS = ["world=tiny", "hardware=cpu", "student.path=s", "teacher.path=w/teacher", "data.validation_file=v.parquet"]


def test_each_rate_of_each_row_starts_from_one_cold_start_and_nothing_is_tested():
    stages = plan_table("tuning", Path("/run/tiny"), Path("/run/tiny"), INPUTS, []).stages
    shared, runs = stages[:2], stages[2:]
    assert [each.name for each in shared] == ["tiny/teacher/collect", "tiny/kd/distill"]
    assert {each.stage for each in runs} == {"train"}, "no test"
    assert {each.config.train.init for each in runs} == {"/run/tiny/kd/distill/model"}
    rates = {each.run_dir.name: each.config.train.actor_learning_rate for each in runs}
    assert rates == {f"{row}_{rate}": float(rate) for row in TUNED for rate in RATES}
    grpo = [each.config.train for each in runs if each.run_dir.name.startswith("dgpo_grpo")]
    assert {(each.algorithm, each.batch_size, each.samples_per_question) for each in grpo} == {("grpo", 16, 4)}
    assert {each.config.train.algorithm for each in runs if "gkd" in each.name} == {"gkd"}


def test_it_shows_every_rate_and_names_the_best_by_the_last_step(tmp_path, capsys):
    for row in GRID.tried():
        for seed in (901, 902):
            last = 0.7 if row.endswith("3e-3") and not row.startswith("kd_gkd") else 0.5 + (seed == 902) * 0.1
            path = tmp_path / f"seed_{seed}" / "tiny" / row / "train" / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            append_jsonl(path, [{"step": 10, "validation/em": 0.9}, {"step": 20, "validation/em": last}])
    path = write_tuning(tmp_path, "tuning", [901, 902], ["table=tuning"])
    text = path.read_text()
    assert text in capsys.readouterr().out
    assert "| arm | 3e-4 | 1e-3 | 3e-3 | best |" in text
    tried = "0.550 (0.500, 0.600) | 0.550 (0.500, 0.600) | 0.700 (0.700, 0.700)"
    assert f"| w/o selective KL | {tried} | `train.actor_learning_rate=3e-3` |" in text
    assert "'rows.dgpo=[\"train.actor_learning_rate=3e-3\"]'" in text
    assert "'rows.kd_gkd=[\"train.actor_learning_rate=3e-4\"]'" in text, "of equal ones the first"
    assert load_config(['rows.dgpo=["train.actor_learning_rate=3e-3"]']).rows == {
        "dgpo": ["train.actor_learning_rate=3e-3"]
    }
    assert json.loads(path.with_suffix(".json").read_text())["best"]["no_teacher"] == "3e-3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["world=tiny", "hardware=cpu"], "table=tuning without seeds: its page in docs/results names them"),
        (["seeds=[901]"], "table=tuning is of the tiny world: add world=tiny hardware=cpu"),
    ],
)
def test_a_request_without_sense_is_refused(overrides, message, tmp_path, capsys):
    assert main(["reproduce", "table=tuning", *overrides, f"run_dir={tmp_path / 'new'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
