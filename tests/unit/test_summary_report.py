"""From scores to summary.json, the console table and report.html."""

import errno
import html
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.agent.trajectory import SearchRecord, Trajectory
from dgpo.config.load import load_config, to_yaml
from dgpo.evaluation.paper import SETS
from dgpo.evaluation.report import find_pair, write_report
from dgpo.evaluation.scores import compare, mean_of_sets, score_episode, summarize_model
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.summary import print_summary, write_summary

GOLD = "Mongolian <Khalkha>"


def make_row(index, corpus="real"):
    return {
        "data_source": "tinyworld",
        "question": f"What do people speak in city{index}?",
        "prompt": [{"role": "user", "content": f"city{index}?"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": [GOLD]}},
        "extra_info": {"index": index, "corpus": corpus, "kind": "two_hop" if index % 2 else "city"},
    }


def make_score(index, *, correct, status="answered", set_name="real"):
    answer = None if status != "answered" else GOLD if correct else "Lao"
    documents = [{"id": "0", "contents": f'"x"\nlanguage {GOLD if correct else "Lao"}'}]
    searches = [SearchRecord(0, "city language", documents, 0, False, 0.01)]
    trajectory = Trajectory(
        f"{set_name}/{index}", [1], [2], [1], [-0.1], [], searches, answer, status, {"num_cut_passages": 0}, "real"
    )
    return score_episode(trajectory, make_row(index), set_name=set_name)


def episode_data(page):
    return json.loads(
        re.search(r'<script type="application/json" id="episode-data">(.*?)</script>', page, re.DOTALL)[1]
    )


@pytest.fixture
def run(tmp_path):
    """A run folder as the stages leave it: kd right on 8 of 20 questions, dgpo on 16."""
    config = load_config(["world=tiny", "hardware=cpu", "seed=7"])
    folder = tmp_path / "run"
    checkpoints = {"untrained": folder / "none", "kd": folder / "distill" / "model", "dgpo": folder / "train" / "model"}
    for name, stage in (("kd", "distill"), ("dgpo", "train")):
        checkpoints[name].mkdir(parents=True)
        write_manifest(checkpoints[name], stage=stage, inputs={}, config=to_yaml(config), counts={}, seed=7)
    right = {"untrained": 0, "kd": 8, "dgpo": 16}
    scores = {
        name: [
            make_score(i, correct=i < right[name], status="no_answer" if name == "untrained" else "answered")
            for i in range(20)
        ]
        for name in checkpoints
    }
    for name, group in scores.items():
        path = folder / "test" / name
        path.mkdir(parents=True)
        path.joinpath("scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in group))
        segments = [
            ["policy", "<think>in Laos</think><search>city language</search>"],
            ["environment", '\n\n<information>Doc 1(Title: "x") & more</information>\n\n'],
            ["policy", "<think>so</think><answer>Lao</answer><eos>"],
        ]
        transcripts = [
            {"episode_id": s["episode_id"], "question": s["question"], "golds": s["golds"], "segments": segments}
            for s in group
        ]
        path.joinpath("transcripts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in transcripts))
    results = {
        "models": {name: {"checkpoint": str(checkpoints[name]), **summarize_model(scores[name])} for name in scores},
        "baseline": "kd",
        "difference_to_baseline": {name: compare(scores[name], scores["kd"]) for name in ("untrained", "dgpo")},
        "temperature": 0.0,
        "max_questions": None,
        "seed": 7,
    }
    (folder / "test" / "results.json").write_text(json.dumps(results))
    (folder / "train" / "config.yaml").write_text(to_yaml(config))
    (folder / "train" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "episode/em": 0.1 * i, "val-aux/tinyworld/em/mean@1": 0.3}) + "\n"
            for i in range(1, 4)
        )
    )
    (folder / "distill" / "model" / "metrics.jsonl").write_text(
        '{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.0}\n'
    )
    (folder / "memory.txt").write_text("peak memory of all processes: 6.00 GiB\n")
    write_summary(folder, wall_s={"collect": 30.0, "train": 120.0, "total": 160.0}, config=config)
    return folder


def test_the_summary_has_exactly_the_agreed_form(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {"methods", "wall_s", "versions", "seed"}
    assert list(summary["methods"]) == ["untrained", "kd", "dgpo"]
    for method in summary["methods"].values():
        assert set(method) == {"em", "em_ci95", "num_questions", "teacher_term"}
        assert method["em_ci95"][0] <= method["em"] <= method["em_ci95"][1]
    assert summary["methods"]["dgpo"]["em"] == pytest.approx(0.8)
    assert summary["methods"]["dgpo"]["num_questions"] == 20
    assert [m["teacher_term"] for m in summary["methods"].values()] == [None, None, "exact"]
    assert summary["seed"] == 7
    assert summary["wall_s"]["train"] == 120.0


def test_a_later_summary_keeps_the_times_of_other_stages(run):
    write_summary(run, wall_s={"test": 50.0}, config=load_config(["seed=7"]))
    assert set(json.loads((run / "summary.json").read_text())["wall_s"]) == {"test", "collect", "train", "total"}


def test_the_console_table_names_models_differences_and_the_teacher_term(run, capsys):
    print_summary(run)
    text = capsys.readouterr().out
    assert re.search(r"dgpo .*0\.800.*\+0\.400", text)
    assert "against kd" in text
    assert "`exact` form" in text


class Balance(HTMLParser):
    """Every element is closed where it was opened; nothing is fetched."""

    VOID = ("meta", "br", "input", "img", "link")

    def __init__(self):
        super().__init__()
        self.open, self.problems = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.problems += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("link", "img", "iframe"):
            self.problems.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"unbalanced {tag}")


def test_the_report_is_one_self_contained_well_formed_page(run):
    text = write_report(run).read_text()
    page = Balance()
    page.feed(text)
    assert page.problems == []
    assert page.open == []
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in html.unescape(text)


def test_the_report_shows_results_curves_times_and_episodes(run):
    text = write_report(run).read_text()
    assert "<b>0.800</b>" in text
    assert "Exact match during RL" in text
    assert "validation: tinyworld" in text
    assert "2.0 min" in text
    assert "6.00 GiB" in text
    assert "question kind: two_hop" in text


def test_the_page_holds_every_episode_with_its_score(run):
    data = episode_data(write_report(run).read_text())
    assert data["models"] == ["untrained", "kd", "dgpo"]
    assert data["golds"] == [[GOLD]] * 20
    assert [sum(scores["em"]) for scores in data["scores"]] == [0, 8, 16]
    assert data["models"][data["focus"]] == "dgpo"
    assert [data["models"][model] for model in data["shown"]] == ["kd", "dgpo"]
    first = data["chunks"]["2-0"]["0"]
    assert first["segments"][0] == [True, "<think>in Laos</think><search>city language</search>"]
    assert [generated for generated, _ in first["segments"]] == [True, False, True]


def test_the_browser_names_the_order_of_its_marks_and_says_what_permuted_worlds_are(run):
    (run / "train" / "episodes").mkdir()
    score = {**make_score(0, correct=False), "episode_id": "step 1/0", "step": 1}
    record = {**score, "response_ids": [], "response_mask": [], "searches": []}
    (run / "train" / "episodes" / "step_1.jsonl").write_text(json.dumps(record) + "\n")
    (run / "train" / "settings.json").write_text('{"retriever": {"wiki": {}}}')
    text = write_report(run).read_text()
    assert "in the order untrained, kd, dgpo, in training:" in text
    assert "permuted worlds" not in text
    (run / "train" / "settings.json").write_text('{"retriever": {"permuted0": {}, "permuted1": {}}}')
    assert "permuted worlds" in write_report(run).read_text()


def test_the_opening_says_what_the_stages_of_the_run_did(run):
    text = write_report(run).read_text()
    assert "it copies a teacher that can, then it improves by reinforcement learning, guided by the teacher on" in text
    shutil.rmtree(run / "distill")
    shutil.rmtree(run / "train" / "model")
    (run / "train" / "config.yaml").write_text(to_yaml(load_config(["experiment=no_teacher", "hardware=cpu"])))
    text = write_report(run).read_text()
    assert "<p>A small model learns to search: it improves by reinforcement learning.</p>" in text


def test_settings_that_differ_come_first_and_seed_and_versions_need_no_summary(run):
    (run / "summary.json").unlink()
    text = write_report(run).read_text()
    made = text[text.index("How this was made") :]
    changed, everything = made.split("<details>")
    assert re.search(r"<p>run: seed 7, dgpo .*torch .*</p>", changed)
    assert "train.teacher_term.form=exact" in changed
    assert "clip_ratio" not in changed
    assert "clip_ratio: 0.2" in everything
    shutil.rmtree(run / "train" / "model")  # not finished
    assert "<p>run: seed 7.</p>" in write_report(run).read_text()


def test_a_run_that_was_only_trained_has_a_report_of_its_curves(run):
    shutil.rmtree(run / "test")
    (run / "summary.json").unlink()
    text = write_report(run).read_text()
    assert "Exact match during RL" in text
    assert "episode-data" not in text


def test_the_papers_numbers_stand_beside_ours_only_for_its_own_pair_and_sets(run):
    assert "paper</span>" not in write_report(run).read_text()
    results = json.loads((run / "test" / "results.json").read_text())
    for model in results["models"].values():
        model["sets"] = dict.fromkeys(SETS, model["sets"]["real"])
    (run / "test" / "results.json").write_text(json.dumps(results))
    config = load_config(["pair=qwen3b_05b", "hardware=cpu"])
    write_manifest(run / "train" / "model", stage="train", inputs={}, config=to_yaml(config), counts={}, seed=7)
    assert find_pair(run) == "qwen3b_05b"
    text = write_report(run).read_text()
    assert '<span class="paper">0.329</span>' in text  # DGPO, average
    assert '0.800 <small>/</small> <small><span class="paper">0.378</span></small>' in text  # DGPO, NQ


def test_the_page_says_under_which_protocol_the_numbers_were_made(run):
    assert "greedy" in write_report(run).read_text()
    path = run / "test" / "results.json"
    results = json.loads(path.read_text())
    for model in results["models"].values():
        model["average"]["em_sd"] = 0.012
    how = {"protocol": "upstream-compatible", "samples": 3, "num_dropped": 1, "temperature": 1.0}
    path.write_text(json.dumps({**results, **how}))
    text = write_report(run).read_text()
    assert "sampled at temperature 1, 3 times each" in text
    assert "1 questions dropped" in text
    assert "Protocol: upstream-compatible." in text
    assert "<b>0.800</b> <small>±0.012</small>" in text


def test_the_report_command_needs_a_tested_run(run, tmp_path, capsys):
    assert main(["report", f"run_dir={run}"]) == 0
    assert main(["report", f"run_dir={tmp_path / 'empty'}"]) == 1
    assert "python -m dgpo test" in capsys.readouterr().err


def test_the_report_command_names_what_a_full_disk_has_no_room_for(run, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["report", f"run_dir={run}"]) == 1
    assert f"No space left on device: '{run / 'report.html'}'" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_the_report_command_overlays_other_runs(run, tmp_path, capsys):
    other = tmp_path / "ppo" / "train"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_text('{"step": 1, "episode/em": 0.2, "teacher/gate_fraction": 0.8}\n')
    assert main(["report", f"run_dir={run}", f"report.runs=[{other.parent}]"]) == 0
    text = (run / "report.html").read_text()
    assert '<i style="background:var(--line-2)"></i>ppo' in text
    assert "Share of episodes: gated" in text
    assert main(["report", f"run_dir={run}", f"report.runs=[{tmp_path / 'none'}]"]) == 1
    assert "no training metrics" in capsys.readouterr().err
    assert main(["report", f"run_dir={run}", f"report.runs=[{run}]"]) == 2


def test_the_overlay_lists_the_tests_of_every_run_that_has_some(run, tmp_path):
    trained, tested = tmp_path / "ppo", tmp_path / "tested"
    (trained / "train").mkdir(parents=True)
    (trained / "train" / "metrics.jsonl").write_text('{"step": 1, "episode/em": 0.2}\n')
    assert 'id="runs"' not in write_report(run, [trained]).read_text()
    shutil.copytree(run / "test", tested / "test")
    text = write_report(run, [trained, tested]).read_text()
    table = text[text.index('id="runs"') :].partition("</table>")[0]
    assert [row.count("<td>") for row in table.split("<tr")[2:]] == [6] * 6
    assert table.count("<td>run</td>") == table.count("<td>tested</td>") == 3
    assert re.search(r"<td>tested</td><td>dgpo</td><td>20 of real</td><td><b>0.800</b></td><td>.*0\.\d+ to ", table)
    assert "<p>ppo: nothing recorded.</p>" in text


def test_a_paired_difference_excludes_zero_when_one_model_is_right_where_the_other_is_not():
    better = [make_score(i, correct=i < 80) for i in range(100)]
    worse = [make_score(i, correct=i < 40) for i in range(100)]
    difference, low, high = compare(better, worse)["average"]
    assert difference == pytest.approx(0.4)
    assert 0.25 < low < 0.4 < high < 0.55


def test_models_tested_on_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="same questions"):
        compare([make_score(0, correct=True)], [make_score(1, correct=True)])


def test_several_sets_are_averaged_without_weights():
    mean, low, high = mean_of_sets([[1.0] * 90 + [0.0] * 10, [0.0, 1.0]])
    assert mean == pytest.approx(0.7)
    assert low < 0.5 < 0.9 < high


def test_an_episode_without_an_answer_is_wrong_and_stays_in_the_denominator():
    scores = [make_score(0, correct=True), make_score(1, correct=False, status="search_failed")]
    summary = summarize_model(scores)["sets"]["real"]
    assert (summary["em"], summary["num_questions"]) == (0.5, 2)
    assert summary["status"] == {"answered": 1, "search_failed": 1}
