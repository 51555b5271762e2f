"""Two runs beside each other: configuration, metrics, and paired tests on hand-counted questions."""

import json
import math
from fractions import Fraction
from math import comb

import pytest

from dgpo.__main__ import main
from dgpo.config.load import load_config, to_yaml
from dgpo.evaluation.compare import compare_runs, match_scores, to_markdown
from dgpo.files import write_jsonl
from dgpo.metrics.mcnemar import mcnemar_exact
from dgpo.runs.artifacts import write_manifest


def test_mcnemar_of_hand_worked_counts():
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 0) == 1.0


@pytest.mark.parametrize(("a", "b"), [(3, 12), (40, 61), (500, 640)])
def test_mcnemar_is_the_exact_binomial_sum_and_symmetric(a, b):
    exact = min(Fraction(1), Fraction(2 * sum(comb(a + b, i) for i in range(min(a, b) + 1)), 2 ** (a + b)))
    assert mcnemar_exact(a, b) == mcnemar_exact(b, a) == pytest.approx(float(exact), rel=1e-12)


def test_mcnemar_of_thousands_of_questions_is_finite():
    assert 0 < mcnemar_exact(9_500, 10_500) < 1e-10
    with pytest.raises(ValueError, match="none below 0"):
        mcnemar_exact(-1, 2)


def make_run(folder, *, right, overrides=(), em_in_training=0.5, model="dgpo"):
    """A run of one tested model on 20 + 10 questions of two sets; `right` are the numbers of the correct ones."""
    place = folder / "test" / model
    place.mkdir(parents=True)
    scores = [
        {
            "episode_id": f"{set_name}/{number}",
            "set": set_name,
            "question": f"q{number}",
            "golds": ["g"],
            "em": float(number in right),
        }
        for set_name, numbers in (("nq", range(20)), ("popqa", range(20, 30)))
        for number in numbers
    ]
    (place / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    results = {"models": {model: {}}, "baseline": None, "difference_to_baseline": {}}
    (folder / "test" / "results.json").write_text(json.dumps(results))
    config = load_config(["world=tiny", "hardware=cpu", f"run_dir={folder}", *overrides])
    config.train.init = f"{folder}/distill/model"
    for stage in (folder / "test" / model, folder / "train"):
        stage.mkdir(exist_ok=True)
    (folder / "train" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "episode/em": em_in_training}) + "\n" for step in range(1, 4))
    )
    (folder / "train" / "model").mkdir()
    for stage, where in (("test", place), ("train", folder / "train" / "model")):
        write_manifest(where, stage=stage, inputs={}, config=to_yaml(config), counts={}, seed=1)
    return folder


@pytest.fixture
def runs(tmp_path):
    a = make_run(tmp_path / "a", right=range(0, 12), overrides=["train.clip_ratio=0.3"], em_in_training=0.75)
    b = make_run(tmp_path / "b", right=[*range(8, 15), 25])
    return a, b


def test_only_keys_that_differ_are_listed_and_a_runs_own_folder_is_no_difference(runs):
    table = compare_runs(*runs)[0]
    assert table.rows == [("train.clip_ratio", "0.3", "0.2", "train, test")]


def test_training_metrics_stand_beside_each_other(runs):
    rows = {row[0]: row[1:] for row in compare_runs(*runs)[1].rows}
    assert rows == {"steps": ("3", "3"), "episode/em": ("0.75", "0.5")}


def test_training_is_averaged_over_the_last_steps_that_both_runs_logged(runs):
    a, b = runs
    first = [{"step": step, "episode/em": step, "teacher/kl_failed": 1.0} for step in range(1, 21)]
    second = [{"step": step, "episode/em": 2 * step} for step in range(1, 14)] + [{"step": 14, "episode/em": math.nan}]
    for run, records in ((a, first), (b, second)):
        write_jsonl(run / "train" / "metrics.jsonl", records)
    table = compare_runs(a, b)[1]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["episode/em"] == ("8.5", "17")  # 4 to 13
    assert rows["teacher/kl_failed"] == ("1", "-")
    assert "Both logged 1 to 14." in table.note


def test_runs_without_a_shared_step_have_no_means_and_a_run_alone_has_its_own(runs):
    a, b = runs
    (a / "train" / "metrics.jsonl").write_text('{"step": 9, "episode/em": 0.5}\n')
    table = compare_runs(a, b)[1]
    assert [row[0] for row in table.rows] == ["steps"]
    assert "They share no step." in table.note
    (b / "train" / "metrics.jsonl").unlink()
    assert {row[0]: row[1:] for row in compare_runs(a, b)[1].rows}["episode/em"] == ("0.5", "-")


def test_paired_tests_count_the_questions_that_one_run_alone_got_right(runs):
    table = compare_runs(*runs)[2]
    assert table.head[5] == "b minus a"
    rows = {row[1]: row for row in table.rows}
    # a: 0-11, b: 8-14 of nq; a alone 0-7, b alone 12-14. p = 2 (1 + 11 + 55 + 165) / 2^11.
    nq = rows["nq"]
    assert nq[2:6] == ("20", "0.600", "0.350", "-0.250")
    assert float(nq[6].strip("[]").split(", ")[0]) < -0.25 < float(nq[6].strip("[]").split(", ")[1])
    assert nq[7:] == ("8", "3", f"{2 * 232 / 2048:.2g}")
    assert rows["popqa"][3:6] == ("0.000", "0.100", "+0.100")
    assert rows["mean of sets"][3:6] == ("0.300", "0.225", "-0.075")


def test_models_of_different_names_are_compared_as_the_ends_of_their_runs(tmp_path):
    a = make_run(tmp_path / "a", right=range(5), model="dgpo")
    b = make_run(tmp_path / "b", right=range(5), model="ppo")
    rows = compare_runs(a, b)[2].rows
    assert rows[0][:2] == ("dgpo, ppo", "nq")
    assert rows[0][-1] == "1"


def test_several_samples_of_a_question_are_averaged_and_leave_nothing_to_count(tmp_path):
    a, b = (make_run(tmp_path / name, right=range(5)) for name in "ab")
    path = a / "test" / "dgpo" / "scores.jsonl"
    scores = [json.loads(line) for line in path.read_text().splitlines()]
    sampled = [
        {**score, "episode_id": f"{score['episode_id']}#{sample}", "question_id": score["episode_id"], "em": em}
        for score in scores
        for sample, em in enumerate((score["em"], 0.0))
    ]
    path.write_text("".join(json.dumps(score) + "\n" for score in sampled))
    row = compare_runs(a, b)[2].rows[0]
    assert row[2:6] == ("20", "0.125", "0.250", "+0.125")
    assert row[7:] == ("", "", "")


def test_another_question_under_the_same_id_is_no_pair():
    score = {"episode_id": "nq/1", "question": "q", "golds": ["g"], "em": 1.0}
    both, left_out = match_scores([score], [{**score, "question": "another"}])
    assert both == ([], [])
    assert left_out == 2
    assert match_scores([score], [score]) == (([score], [score]), 0)


def test_the_comparison_is_printed_and_written_as_markdown(runs, tmp_path, capsys):
    a, b = runs
    assert main(["compare", str(a), str(b)]) == 0
    assert "train.clip_ratio" in capsys.readouterr().out
    text = (a / "compare_b.md").read_text()
    assert "| train.clip_ratio | 0.3 | 0.2 | train, test |" in text
    assert main(["compare", str(a), str(b), f"out={tmp_path / 'c.md'}"]) == 0
    assert (tmp_path / "c.md").read_text() == to_markdown(compare_runs(a, b), title=f"{a} and {b}")


def test_compare_says_what_it_takes_and_what_is_missing(runs, tmp_path, capsys):
    assert main(["compare", str(runs[0])]) == 2
    assert "two run folders" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(tmp_path / "none")]) == 1
    assert "is no run folder" in capsys.readouterr().err
    (runs[1] / "test" / "results.json").unlink()
    assert compare_runs(*runs)[2].note == "b was not tested: run `python -m dgpo test` first."
