"""The plan behind a table: every row's stages, each once, in an order that works; and the table itself."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dgpo.__main__ import main
from dgpo.config.load import group_choices, load_config
from dgpo.errors import ConfigError
from dgpo.evaluation.evaluate import evaluate
from dgpo.evaluation.paper import ARMS, EXACT_MATCH, FIGURES, LABELS, ROWS, RULES, SETS, UNTRAINED, paper_value
from dgpo.files import append_jsonl, write_jsonl
from dgpo.hardware.gpu_hours import PAPER_GPU_HOURS, gpu_hours_range, paper_gpu_hours
from dgpo.pipeline import reproduce as module
from dgpo.pipeline.over_seeds import write_over_seeds
from dgpo.pipeline.plan import Plan, PlannedStage, distinct, plan_table
from dgpo.pipeline.processes import index_folders
from dgpo.pipeline.reproduce import _rule, _write_figure, _write_teacher_time, collect_rows, render_markdown
from dgpo.pipeline.reuse import is_current
from dgpo.runs.artifacts import write_manifest
from tests.unit.fake_model import FakeModel, fake_config, make_question, use_model
from tests.unit.stubs import make_model

ROOT = Path(__file__).parents[2]


def plan(table: str, tmp_path: Path, pair: str = "qwen3b_05b") -> Plan:
    return plan_table(table, tmp_path / pair, tmp_path / "student", [f"pair={pair}"], [])


def names(table: str, tmp_path: Path, pair: str = "qwen3b_05b") -> list[str]:
    return [stage.name for stage in plan(table, tmp_path, pair).stages]


def test_every_row_of_the_tables_is_a_preset_or_a_model():
    rows = {row for table in ROWS.values() for row in table}
    assert rows - set(UNTRAINED) - set(ARMS) == set(group_choices("experiment")) - {"teacher_ppo"}
    assert {arm.preset for arm in ARMS.values()} <= rows
    assert rows == set(LABELS)
    assert set(RULES) <= rows


@pytest.mark.parametrize("pair", EXACT_MATCH)
def test_the_papers_averages_are_the_means_of_its_sets(pair):
    for row, values in EXACT_MATCH[pair].items():
        assert len(values) == len(SETS) + 1
        assert sum(values[:-1]) / len(SETS) == pytest.approx(values[-1], abs=0.0006), row


def test_a_value_that_the_paper_does_not_print_is_none():
    assert paper_value("qwen3b_05b", "dgpo", "average") == 0.329
    assert paper_value("qwen3b_05b", "dgpo", "nq") == 0.378
    assert paper_value("qwen3b_05b", "dgpo_grpo", "average") is None
    assert paper_value("qwen3b_05b", "dgpo", "real") is None


def test_rows_share_the_collection_and_the_cold_start(tmp_path):
    stages = names("ablation", tmp_path)
    assert stages.count("qwen3b_05b/teacher/collect") == 1
    assert stages.count("qwen3b_05b/kd/distill") == 1
    assert len(stages) == len(set(stages))


def test_a_stage_comes_after_what_it_reads(tmp_path):
    for table in ("main", "ablation"):
        made: set[str] = set()
        for stage in plan(table, tmp_path).stages:
            config = stage.config
            init = getattr(getattr(config, stage.stage), "init", None)
            if init and str(tmp_path) in init:
                assert str(Path(init).parent) in made
            if stage.stage == "distill":
                assert config.distill.episodes in made
            if stage.stage == "test":
                for checkpoint in config.test.models.values():
                    stage_folder = checkpoint.partition("/model")[0]
                    assert str(tmp_path) not in checkpoint or stage_folder in made
            made.add(str(stage.run_dir / stage.stage))


def test_the_inverted_order_trains_first(tmp_path):
    stages = names("ablation", tmp_path)
    assert stages.index("qwen3b_05b/inverted/train") < stages.index("qwen3b_05b/inverted/distill")
    (distill,) = [s for s in plan("ablation", tmp_path).stages if s.name.endswith("inverted/distill")]
    from dgpo.config.stages import initial_model

    assert initial_model(distill.config, "distill")[1] == f"{tmp_path}/qwen3b_05b/inverted/train/models/step_200"
    short = plan_table("ablation", tmp_path / "a", tmp_path / "b", ["pair=qwen3b_05b", "train.num_steps=100"], [])
    (distill,) = [s for s in short.stages if s.name.endswith("inverted/distill")]
    assert initial_model(distill.config, "distill")[1] == f"{tmp_path}/a/inverted/train/model"


def test_sft_ppo_starts_from_the_seqkd_row(tmp_path):
    (train,) = [s for s in plan("main", tmp_path).stages if s.name.endswith("sft_ppo/train")]
    assert train.config.train.init == f"{tmp_path}/qwen3b_05b/seqkd/distill/model"
    assert train.config.train.init_kl_coef == 0.001


def test_an_unpublished_teacher_is_trained_first(tmp_path):
    first = plan("pairs", tmp_path, "llama8b_1b").stages[0]
    assert (first.name, first.stage) == ("llama8b/train", "train")
    assert first.config.train.init == "meta-llama/Llama-3.1-8B-Instruct"


def test_pairs_with_one_student_share_the_rows_without_a_teacher(tmp_path):
    (a,) = [s for s in plan("pairs", tmp_path, "qwen3b_05b").stages if s.name.endswith("ppo/train")]
    (b,) = [s for s in plan("pairs", tmp_path, "qwen7b_05b").stages if s.name.endswith("ppo/train")]
    assert a.run_dir == b.run_dir == tmp_path / "student" / "ppo"


def test_a_stage_is_done_when_its_manifest_is_there(tmp_path):
    (stage,) = [s for s in plan("main", tmp_path).stages if s.name.endswith("dgpo/train")]
    assert not stage.is_done
    assert not stage.has_begun
    (stage.run_dir / "train" / "model").mkdir(parents=True)
    assert stage.has_begun
    assert not stage.is_done
    (stage.run_dir / "train" / "model" / "manifest.json").write_text("{}")
    assert stage.is_done


@pytest.fixture
def no_hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_papers_run_takes_the_papers_day(no_hub):
    config = load_config(["experiment=dgpo", "pair=qwen3b_05b"])
    assert paper_gpu_hours(config) == pytest.approx(PAPER_GPU_HOURS)
    without = load_config(["experiment=no_teacher", "pair=qwen3b_05b"])
    assert paper_gpu_hours(without) == pytest.approx(PAPER_GPU_HOURS / 1.095)


def test_the_arithmetic_is_a_lower_bound_of_what_the_paper_took(no_hub):
    config = load_config(["experiment=dgpo", "pair=qwen3b_05b"])
    counted, measured = gpu_hours_range(config, "train")
    assert 0 < counted < measured == pytest.approx(PAPER_GPU_HOURS)
    assert gpu_hours_range(config, "collect")[0] == gpu_hours_range(config, "collect")[1]


def test_models_of_unknown_shape_have_no_estimate(tmp_path):
    models = [f"student.path={make_model(tmp_path / 'student')}", f"teacher.path={make_model(tmp_path / 'teacher')}"]
    assert gpu_hours_range(load_config([*models, "train.init=" + models[0].split("=")[1]]), "train") is None


@pytest.fixture
def finished(tmp_path):
    """Test folders of two rows: kd right on 2 of 4 questions, dgpo on 3 of them."""
    results = {}
    for row, em in (("kd", [1, 1, 0, 0]), ("dgpo", [1, 1, 1, 0])):
        folder = tmp_path / row / "test" / row
        folder.mkdir(parents=True)
        scores = [{"episode_id": f"real/{i}", "set": "real", "em": float(value)} for i, value in enumerate(em)]
        (folder / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
        model = {
            "num_questions": 4,
            "average": {"em": sum(em) / 4, "em_ci95": [0.0, 1.0], "num_searches": 1.5, "answered": 1.0},
            "sets": {"real": {"em": sum(em) / 4}},
        }
        tested = {"models": {row: model}, "temperature": 0.0, "protocol": "ours"}
        (folder.parent / "results.json").write_text(json.dumps(tested))
        models = {row: "a", **({f"{row}-best": "a"} if row == "dgpo" else {})}
        results[row] = PlannedStage(f"x/{row}/test", "test", tmp_path / row, (), models)
    return Plan([], results)


def test_a_row_holds_the_last_step_the_best_and_the_paired_difference(finished):
    kd, dgpo = collect_rows({"tiny": finished}, baseline="kd")
    assert (kd["best"], kd["paper"]) == (None, None)
    assert dgpo["best"] == dgpo["last"]  # one checkpoint, tested once
    assert dgpo["last"]["difference"][0] == pytest.approx(0.25)
    text = render_markdown([kd, dgpo], baseline="kd")
    assert "| KD | 0.500 | [0.000, 1.000] | - | - |  | 1.50 | 100% |" in text
    assert "| DGPO | 0.750 | [0.000, 1.000] | 0.750 | [0.000, 1.000] | +0.250 [" in text
    assert "(" not in text.splitlines()[-1], "the paper's number is of another world"


def test_the_papers_rule_stands_beside_the_papers_number_with_both_protocols(finished):
    rows = collect_rows({"qwen3b_05b": finished}, baseline="kd")
    text = render_markdown(rows, baseline="kd")
    assert "single samples at temperature 1" in text
    assert "ours are greedy" in text
    assert text.splitlines()[-1] == "| qwen3b_05b | DGPO | last | 0.750 | 0.750 (0.329) |"


def test_checkpoints_of_one_step_are_tested_once(tmp_path):
    train = tmp_path / "train"
    models = {
        "ppo": str(train / "model"),
        "ppo-best": str(train / "models" / "best"),
        "ppo-paper": str(train / "models" / "step_200"),
    }
    assert list(distinct(models).values()) == list(models), "before training nothing is known"
    (train / "models").mkdir(parents=True)
    (train / "models" / "steps.json").write_text(json.dumps({"model": 1000, "best": 200, "step_200": 200}))
    assert distinct(models) == {"ppo": "ppo", "ppo-best": "ppo-best", "ppo-paper": "ppo-best"}
    stage = PlannedStage("a/rag/test", "test", tmp_path, ("x=1",), models, mode="rag")
    assert stage.command == [
        "test",
        "x=1",
        f"test.models.ppo={train}/model",
        f"test.models.ppo-best={train}/models/best",
        "test.modes.ppo=rag",
        "test.modes.ppo-best=rag",
    ]


def test_rows_report_by_the_papers_rule(tmp_path):
    more = ["pair=qwen3b_05b", "data=prepared"]
    found = {
        row: [Path(path).relative_to(tmp_path) for path in test.models.values()]
        for table in ("main", "ablation")
        for row, test in plan_table(table, tmp_path / "p", tmp_path / "s", more, []).results.items()
        if row in ("ppo", "no_cold_start", "dgpo", "kd")
    }
    assert [str(path) for path in found["ppo"]] == [
        "s/ppo/train/model", "s/ppo/train/models/best", "s/ppo/train/models/step_200"
    ]  # fmt: skip
    assert found["no_cold_start"][2].name == "before_collapse"
    assert found["dgpo"][2] == found["dgpo"][0]
    assert [str(path) for path in found["kd"][:2]] == ["p/kd/distill/models/last", "p/kd/distill/model"]


def test_arcap_and_figures_are_of_the_same_runs(tmp_path):
    arcap = plan("arcap", tmp_path).stages[-1]
    assert arcap.config.test.models["ppo"].endswith("ppo/train/models/step_200")
    assert not any(stage.stage == "test" for stage in plan("figures", tmp_path).stages)
    assert [stage.stage for stage in plan("teacher_time", tmp_path).stages] == ["collect", "distill", "train"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["table=fig6"], "expected one of main, ablation, contrasts, pairs, arcap, figures, teacher_time, gate"),
        (["experiment=kd"], "the rows of the table decide that"),
        (["table=pairs", "world=tiny"], "the tiny world has one pair"),
    ],
)
def test_a_request_without_sense_is_refused(overrides, message, tmp_path, capsys):
    assert main(["reproduce", *overrides, f"run_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_made_with_other_overrides_is_refused(tmp_path, capsys):
    (tmp_path / "reproduce.json").write_text(json.dumps({"overrides": ["train.num_steps=5"], "versions": {}}))
    assert main(["reproduce", "train.num_steps=6", f"run_dir={tmp_path}"]) == 2
    assert 'was made with other settings (train.num_steps was "5", now "6")' in capsys.readouterr().err


@pytest.mark.parametrize("table", ["main", "pairs", "arcap", "figures"])
def test_a_dry_run_prints_the_plan_and_all_that_is_missing_once(no_hub, tmp_path, capsys, table):
    overrides = [f"table={table}", f"run_dir={tmp_path / 'tables'}", "data=prepared", "prepare.out=/nowhere"]
    assert main(["reproduce", *overrides, "retriever.url=http://127.0.0.1:9", "dry_run=true"]) == 2
    captured = capsys.readouterr()
    assert f"Stages for {'llama8b_1b' if table == 'pairs' else 'qwen3b_05b'}" in captured.out
    assert "total" in captured.out
    assert captured.out.count("all together: ") == 1
    lines = [line for line in captured.out.splitlines() if line.startswith("missing: ")]
    assert len(lines) == len(set(lines))
    assert sum("data.collect_file: data file '/nowhere/train.parquet'" in line for line in lines) == 1
    assert sum("data.test_files.musique" in line for line in lines) == (table not in ("figures", "teacher_time"))
    assert sum("retriever" in line for line in lines) == 1
    assert f"{len(lines)} things are missing, listed above" in captured.err
    assert not (tmp_path / "tables").exists()


def test_a_plan_counts_stages_that_pairs_share_once(no_hub, tmp_path, capsys):
    """PPO of the 0.5B student is in two pairs, and is run once; the same disk is planned as for a run of its own."""
    overrides = ["data=prepared", "retriever.url=http://127.0.0.1:9", f"run_dir={tmp_path}", "dry_run=true"]
    main(["reproduce", "table=pairs", "dry_run.assume=h200x8", *overrides])
    said = " ".join(capsys.readouterr().out.split())
    rows = [row.split("│") for row in re.findall(r"│ total │ │([^A-Z]*?)│ │", said)]
    counted, _, hours, disk = (sum(map(float, column)) for column in zip(*rows, strict=True))
    ppo = re.search(r"│ Qwen2.5-0.5B-Instruct/ppo/train │ │ ([\d.]+) │ [\d.]+ │ ([\d.]+) │ ([\d.]+)", said)
    together = re.search(r"all together: (\d+) hours \((\d+) GPU hours counted, \d+ as in the paper\), (\d+) GB", said)
    assert len(rows) == 3
    assert int(together[1]) == pytest.approx(hours - float(ppo[2]), abs=1)
    assert int(together[2]) == pytest.approx(counted - float(ppo[1]), abs=2)
    assert int(together[3]) == pytest.approx(disk - float(ppo[3]), abs=2)
    assert "besides: corpus and index of Wikipedia 70 GB, the hub's models " in said


def test_the_methods_page_is_what_the_presets_say():
    result = subprocess.run(
        [sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_stopped_pipeline_takes_its_stages_with_it(tmp_path):
    """SIGTERM to the driver: the stage that it runs, in a process group of its own, ends as well."""
    script = (
        "from dgpo.pipeline.processes import Stages\n"
        "from dgpo.runs.stopping import stopped_by_sigterm\n"
        "from pathlib import Path\n"
        f"with stopped_by_sigterm():\n    Stages(Path({str(tmp_path)!r})).run(nap=['sh', '-c', 'echo $$; sleep 60'])\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "logs" / "nap.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stage = int(log.read_text())
    driver.terminate()
    assert driver.wait(timeout=30) == 143
    assert not psutil.pid_exists(stage)


def test_an_index_that_is_being_built_is_not_served(tmp_path):
    for name in ("wiki", ".bm25.building", "facts"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in index_folders(tmp_path)] == ["facts", "wiki"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A finished stage `test` of one model, as a table would reuse it."""
    config = fake_config(tmp_path, {"own": [make_question(0, "right")]}, {"x": ["y"]})
    use_model(monkeypatch, FakeModel(lambda text, seed: "<answer>right</answer>"))
    evaluate(config)
    monkeypatch.setattr(PlannedStage, "config", property(lambda _: config))
    return PlannedStage("row/test", "test", Path(config.run_dir), ()), config


def test_a_finished_test_is_reused_for_the_weights_and_questions_that_it_measured(measured):
    stage, config = measured
    assert stage.is_done
    assert is_current(stage)
    weights = Path(config.test.models["mine"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert stage.is_done
    assert not is_current(stage)


def test_a_table_of_a_test_that_was_interrupted_is_not_reused(measured):
    """The model was played again, and results.json is still of before."""
    stage, config = measured
    results = Path(config.run_dir) / "test" / "results.json"
    results.write_text(results.read_text().replace(json.loads(results.read_text())["models"]["mine"]["weights"], "0"))
    assert not is_current(stage)


def test_another_stage_of_something_else_is_refused_and_an_old_one_stands_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dgpo.pipeline.reuse.distill_settings", lambda config: {"seed": config.seed})
    stage = PlannedStage("kd/distill", "distill", tmp_path, ("seed=2",))
    made = {"stage": "distill", "inputs": {}, "config": {}, "counts": {}, "seed": 1}
    write_manifest(tmp_path / "distill", **made)
    assert is_current(stage)
    assert "what it was made from was not recorded" in capsys.readouterr().err
    write_manifest(tmp_path / "distill", **made, settings={"seed": 2})
    assert is_current(stage)
    write_manifest(tmp_path / "distill", **made, settings={"seed": 1})
    with pytest.raises(ConfigError, match=r"distill was made with other settings \(seed was 1, now 2\)"):
        is_current(stage)


def test_of_two_quickstarts_in_one_folder_one_is_refused(tmp_path, capsys, monkeypatch):
    """The other makes the folder after this one has looked."""
    folder, exists = tmp_path / "run", Path.exists
    folder.mkdir()
    monkeypatch.setattr(Path, "exists", lambda path: path != folder and exists(path))
    assert main(["quickstart", f"run_dir={folder}"]) == 2
    assert f"{folder} exists: choose another run_dir" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def write_seed(folder, seed, values):
    rows = [{"row": row, "last": {"average": em}, "best": None} for row, em in values.items()]
    (folder / f"seed_{seed}").mkdir(parents=True)
    (folder / f"seed_{seed}" / "table_contrasts.json").write_text(json.dumps({"baseline": "kd", "rows": rows}))


def test_a_table_of_several_seeds_shows_means_and_contrasts_paired_by_seed(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.1), (3, -0.1), (4, 0.05)):
        noise = 0.001 * seed
        ems = {"kd": 0.4 + shift, "dgpo": 0.5 + shift + noise, "uniform_kl": 0.498 + shift, "no_teacher": 0.45}
        write_seed(tmp_path, seed, ems)
    path = write_over_seeds(tmp_path, "contrasts", [1, 2, 3, 4])
    text = path.read_text()
    assert text in capsys.readouterr().out
    assert "| KD | 4 | 0.413 | 0.085 | 0.300, 0.500 | - |" in text
    assert path.with_suffix(".svg").read_text().count("<circle") == 1 + 4 * 4, "a legend, and a point per row and seed"
    first, second, third = json.loads(path.with_suffix(".json").read_text())["contrasts"]
    assert first["mean"] == pytest.approx(0.1025)
    assert first["p_holm"] == pytest.approx(3 * first["p"])
    assert second["equivalence"]["p"] < 0.05
    assert "within 0.02: shown" in text
    assert third["p_holm"] > 0.05
    assert text.splitlines()[-1].endswith("| not shown |")


def test_settings_of_a_row_are_of_that_row_alone(tmp_path):
    rows = {"dgpo": ["train.actor_learning_rate=3e-4"]}
    planned = plan_table("contrasts", tmp_path, tmp_path, ["pair=qwen3b_05b"], [], rows).stages
    rates = {stage.name: stage.config.train.actor_learning_rate for stage in planned if stage.stage == "train"}
    assert {name.split("/")[-2]: rate for name, rate in rates.items()} == {
        "dgpo": 3e-4,
        "uniform_kl": 1e-6,
        "no_teacher": 1e-6,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=[1,1]"], "a seed is named twice"),
        (["seeds=[1,2]", "table=figures"], "expected one of main, ablation, contrasts, pairs, gate, gate_tuning, tun"),
        (['rows.inverted=["seed=1"]'], "rows.inverted: no row of table=main"),
    ],
)
def test_seeds_and_rows_without_sense_are_refused(overrides, message, tmp_path, capsys):
    assert main(["reproduce", *overrides, f"run_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("step", "rule"), [(4, "before_collapse"), (5, "step 5, the first kept: none is from before")])
def test_a_checkpoint_that_is_not_from_before_the_collapse_is_not_called_so(tmp_path, step, rule):
    stage = tmp_path / "train"
    (stage / "models").mkdir(parents=True)
    (stage / "models" / "steps.json").write_text(json.dumps({"before_collapse": step}))
    test = SimpleNamespace(models={"grpo-paper": str(stage / "models" / "before_collapse")})
    assert _rule("grpo", test) == "before_collapse", "no alarm"
    append_jsonl(stage / "alarms.jsonl", [{"step": 8, "first_step": 6}])
    assert _rule("grpo", test).startswith(rule)
    assert _rule("ppo", test) == "step_200"


def test_what_the_teacher_adds_is_of_the_steps_without_it(tmp_path, capsys):
    """Steps of 10 and 12 s, of which the teacher takes 1 s each: 1 s on top of 10."""
    folder = tmp_path / "dgpo" / "train"
    folder.mkdir(parents=True)
    steps = [{"timing_s/step": 10.0, "timing_s/teacher": 1.0}, {"timing_s/step": 12.0, "timing_s/teacher": 1.0}]
    write_jsonl(folder / "metrics.jsonl", steps)
    plans = {pair: Plan(runs={"dgpo": tmp_path / "dgpo"}) for pair in ("qwen3b_05b", "tiny")}
    table = _write_teacher_time(tmp_path, plans).read_text()
    assert "| qwen3b_05b DGPO | 2 | 11.0 | 1.00 | 10.0% | 9.5% |" in table
    assert "| tiny DGPO | 2 | 11.0 | 1.00 | 10.0% | - |" in table
    assert capsys.readouterr().out.strip() == table.strip()


def test_a_figure_has_a_page_and_a_drawing_of_each_runs_exact_match(tmp_path):
    runs = {row: tmp_path / row for row in FIGURES["6"]}
    for number, run in enumerate(runs.values()):
        (run / "train").mkdir(parents=True)
        records = [{"step": step, "episode/em": number / 10, "episode/reward": 0.1} for step in (1, 2)]
        append_jsonl(run / "train" / "metrics.jsonl", records)
    page = _write_figure(tmp_path, "tiny", Plan(runs=runs), "6")
    assert page == tmp_path / "figure_6_tiny.html"
    assert "kd_gkd" in page.read_text()
    drawing = page.with_suffix(".svg").read_text()
    assert drawing.count("<polyline") == len(runs)
    assert all(f">{LABELS[row].replace('>', '&gt;')}</text>" in drawing for row in runs)


def test_a_folder_is_of_one_setting_but_a_rows_own_may_follow_its_tuning(tmp_path, monkeypatch):
    """What was made with another value of a row is refused by the stage's own record (`is_current`)."""
    monkeypatch.setattr(module, "_inputs", lambda *_: contextlib.nullcontext([]))
    monkeypatch.setattr(module, "_plan", lambda *_: Plan())
    monkeypatch.setattr(module, "_write", lambda folder, *_: folder)
    given = ["table=contrasts", "world=tiny", "hardware=cpu", f"run_dir={tmp_path}"]
    module.reproduce(given)
    module.reproduce([*given, 'rows.no_teacher=["train.actor_learning_rate=3e-4"]'])
    with pytest.raises(ConfigError, match=r"was made with other settings \(train\.num_steps"):
        module.reproduce([*given, "train.num_steps=2"])
