"""The test stage with a model whose answers are known, from configuration to results."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.agent.trajectory import read_trajectories
from dgpo.data.rows import write_rows
from dgpo.engines import episode_runner
from dgpo.engines.play import load_tokenizer
from dgpo.errors import ConfigError
from dgpo.evaluation.compare import compare_runs
from dgpo.evaluation.evaluate import evaluate
from dgpo.evaluation.report import write_report
from dgpo.evaluation.scores import compare
from tests.unit.fake_model import ChatTokenizer, FakeModel, fake_config, make_question, use_model
from tests.unit.stubs import make_model

SHELF = {"find Ada": ['"Ada"\nAda Lovelace wrote it.']}


def reply(text, seed):
    """Q0: searches, then right. Q1: wrong. Q2: never answers. Q3: by its seed."""
    if "Q0" in text:
        return "<answer>Ada Lovelace</answer>" if "wrote it" in text else "<search>find Ada</search>"
    if "Q3" in text:
        return f"<answer>{'right' if seed % 2 else 'wrong'}</answer>"
    return "<answer>Ada</answer>" if "Q1" in text else "<think>hm"


def questions():
    return [
        make_question(0, "Ada Lovelace", hops=2),
        make_question(1, "Charles", hops=1),
        make_question(2, "Beijing", hops=1),
    ]


@pytest.fixture
def model(monkeypatch):
    model = FakeModel(reply)
    use_model(monkeypatch, model)
    return model


def results_of(config):
    return json.loads((Path(config.run_dir) / "test" / "results.json").read_text())


def scores_of(config):
    lines = (Path(config.run_dir) / "test" / "mine" / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_question_is_in_the_denominator_by_set_and_by_hops(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions(), "more": questions()[:1]}, SHELF)
    evaluate(config)
    result = results_of(config)["models"]["mine"]
    own, more = result["sets"]["own"], result["sets"]["more"]
    assert (own["num_questions"], own["em"], own["answered"], own["hit"]) == (
        3,
        *[pytest.approx(v) for v in (1 / 3, 2 / 3, 1 / 3)],
    )
    assert own["status"] == {"answered": 2, "no_answer": 1}
    assert own["num_searches"] == pytest.approx(1 / 3)
    assert more["em"] == 1.0
    assert result["average"]["em"] == pytest.approx(2 / 3)
    assert {hops: group["em"] for hops, group in result["slices"]["hops"].items()} == {"1": 0.0, "2": 1.0}


def test_the_releases_metric_names_are_written_and_mean_what_they_say(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    assert results_of(config)["models"]["mine"]["metrics"] == {
        "val/test_score/own": pytest.approx(1 / 3),
        "val/search_count/own": pytest.approx(1 / 3),
        "val/search_present_ratio/own": pytest.approx(1 / 3),
        "val/info_contains_answer_ratio/own": pytest.approx(1 / 3),
    }


def test_samples_differ_and_are_averaged_by_question(model, tmp_path):
    config = fake_config(tmp_path, {"own": [make_question(3, "right"), make_question(0, "Ada Lovelace")]}, SHELF)
    config.test.samples = 8
    evaluate(config)
    scores = scores_of(config)
    assert [score["episode_id"] for score in scores[:2]] == ["own/own-test-3#0", "own/own-test-3#1"]
    share = sum(score["em"] for score in scores[:8]) / 8
    assert 0 < share < 1
    results = results_of(config)
    own = results["models"]["mine"]["sets"]["own"]
    assert (own["num_questions"], own["num_episodes"]) == (2, 16)
    assert own["em"] == pytest.approx((share + 1) / 2)
    by_sample = [(a["em"] + b["em"]) / 2 for a, b in zip(scores[:8], scores[8:], strict=True)]
    mean = sum(by_sample) / 8
    assert own["em_sd"] == pytest.approx((sum((x - mean) ** 2 for x in by_sample) / 7) ** 0.5)
    assert results["temperature"] == 1.0
    assert own["em_ci95"] == [pytest.approx(share), 1.0], "two questions, resampled whole"


def test_a_comparison_of_samples_is_over_questions(model, tmp_path):
    config = fake_config(tmp_path, {"own": [make_question(3, "right"), make_question(0, "Ada Lovelace")]}, SHELF)
    config.test.models["twin"], config.test.baseline, config.test.samples = config.test.models["mine"], "twin", 8
    evaluate(config)
    assert results_of(config)["difference_to_baseline"]["mine"]["average"] == [0.0, 0.0, 0.0]
    right, wrong = (
        [{**score, "question_id": name, "em": em} for _ in range(25) for score in scores_of(config)[:8]]
        for name, em in (("a", 1.0), ("b", 0.0))
    )
    nothing = [{**score, "em": 0.0} for score in right + wrong]
    assert compare(right + wrong, nothing)["sets"]["own"] == [0.5, 0.0, 1.0], "two questions, not 400 episodes"


def test_both_parses_stand_side_by_side_from_one_run(model, tmp_path):
    rows = questions()
    for row in rows:
        row["prompt"][0]["content"] = "For example, <answer> Beijing </answer>. " + row["prompt"][0]["content"]
    config = fake_config(tmp_path, {"own": rows}, SHELF)
    evaluate(config)
    own = results_of(config)["models"]["mine"]["sets"]["own"]
    # Q2 never answers; the release reads "Beijing" in the prompt, or "and" in the text on invalid actions.
    assert (own["em"], own["em_upstream"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert own["hit_upstream"] == pytest.approx(1 / 3)


def test_upstream_drops_the_last_batch_samples_once_and_says_so(model, tmp_path, capsys):
    rows = questions()
    rows[1]["prompt"][0]["content"] = "Beijing, <answer> Beijing </answer>: " + rows[1]["prompt"][0]["content"]
    rows[1]["reward_model"]["ground_truth"]["target"] = ["and"]
    rows[1]["prompt"][0]["content"] = rows[1]["prompt"][0]["content"].replace("Q1", "Q2")
    config = fake_config(tmp_path, {"own": rows}, SHELF)
    config.test.compat, config.test.upstream_batch_size = "upstream", 2
    evaluate(config)
    results = results_of(config)
    own = results["models"]["mine"]["sets"]["own"]
    assert (results["protocol"], results["num_dropped"], results["temperature"]) == ("upstream-compatible", 1, 1.0)
    assert own["num_questions"] == 2
    assert (own["em"], own["em_ours"]) == (1.0, 0.5), "an episode that never answers is graded as `and`"
    assert scores_of(config)[1]["answer"] == "and"
    searches = [(score["num_searches"], score["num_searches_ours"]) for score in scores_of(config)]
    assert searches == [(0.0, 1.0), (3.0, 0.0)], (
        "these prompts show no tag; the second has four invalid turns, each told of the tag"
    )
    assert "UPSTREAM-COMPATIBLE" in capsys.readouterr().out


def test_a_finished_model_is_not_played_again(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    first, config.resume = model.num_turns, True
    evaluate(config)
    assert model.num_turns == first
    config.test.max_questions = 1
    evaluate(config)
    assert results_of(config)["models"]["mine"]["num_questions"] == 1


def swap_weights(config, name="mine"):
    """Another checkpoint under the same path, of the same size, with its modification time."""
    path = Path(config.test.models[name]) / "model.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_questions(config):
    write_rows(config.data.test_files["own"], questions()[:2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_weights, "weights was"),
        (swap_questions, "data.test_files.own was"),
        (lambda c: setattr(c.episode, "topk", 1), "episode.topk was 3, now 1"),
        (lambda c: setattr(c.episode, "max_turns", 1), "episode.max_turns was 4, now 1"),
        (lambda c: setattr(c, "seed", 7), "seed was 1, now 7"),
        (lambda c: setattr(c.test, "temperature", 0.5), "temperature was 0.0, now 0.5"),
        (lambda c: setattr(c.test, "samples", 2), "test.samples was 1, now 2"),
        (
            lambda c: setattr(c.hardware.engine, "dtype", "float16"),
            'hardware.engine.dtype was "float32", now "float16"',
        ),
        (lambda c: c.retriever.backend_options.update(shelf={}), "retriever.options.shelf.find Ada was"),
    ],
)
def test_results_of_anything_else_are_played_again_and_that_is_said(model, tmp_path, capsys, change, named):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    before = results_of(config)["models"]["mine"]
    change(config)
    config.resume, model.num_turns = True, 0
    evaluate(config)
    assert model.num_turns > 0
    said = capsys.readouterr().err
    assert "test/mine: its episodes are played again (" in said
    assert named in said
    assert (results_of(config)["models"]["mine"]["weights"] != before["weights"]) == (change is swap_weights)
    model.num_turns = 0
    evaluate(config)
    assert model.num_turns == 0, "and only once"


def test_weights_that_change_while_they_are_played_give_no_result(model, tmp_path):
    """A training that goes on writes its model again while the engine starts."""
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    play = model.reply

    def changing(text, seed):
        swap_weights(config)
        return play(text, seed)

    model.reply = changing
    with pytest.raises(ConfigError, match="was changed while its episodes were played"):
        evaluate(config)
    assert not (Path(config.run_dir) / "test" / "results.json").exists()
    config.resume, model.reply, model.num_turns = True, play, 0
    evaluate(config)
    assert model.num_turns == 8


def test_only_the_model_that_changed_is_played_again(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.test.models["other"] = make_model(tmp_path / "other", weights=b"other")
    evaluate(config)
    once, config.resume, model.num_turns = model.num_turns // 2, True, 0
    swap_weights(config)
    evaluate(config)
    assert model.num_turns == once


def test_another_path_to_the_same_weights_is_not_played_again(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    (tmp_path / "model").rename(tmp_path / "moved")
    config.test.models, config.resume, model.num_turns = {"mine": str(tmp_path / "moved")}, True, 0
    evaluate(config)
    assert model.num_turns == 0


def test_results_without_a_record_of_their_weights_are_played_again(model, tmp_path, capsys):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    path = Path(config.run_dir) / "test" / "mine" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]
    path.write_text(json.dumps(manifest))
    config.resume, model.num_turns = True, 0
    evaluate(config)
    assert model.num_turns > 0
    assert "what they depend on was not recorded" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [False, True])
def test_episodes_of_an_unfinished_test_are_kept_for_their_own_weights_only(model, tmp_path, capsys, changed):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.hardware.engine.concurrency = 1
    play = model.reply

    def dying(text, seed):
        if "Q2" in text:
            raise OSError("gone")
        return play(text, seed)

    model.reply = dying
    with pytest.raises(OSError, match="gone"):
        evaluate(config)
    if changed:
        swap_weights(config)
    config.resume, model.num_turns, model.reply = True, 0, play
    evaluate(config)
    assert model.num_turns == (2 + 1 + 5 if changed else 5), "Q0 searches and answers, Q1 answers, Q2 never does"
    assert ("partial: its episodes are played again (weights was" in capsys.readouterr().err) == changed


def test_a_report_and_a_comparison_say_which_numbers_are_of_weights_that_are_gone(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    folder = Path(config.run_dir)
    assert "Out of date" not in write_report(folder).read_text()
    swap_weights(config)
    assert "the numbers of mine belong to other weights than" in write_report(folder).read_text()
    assert "the numbers of mine belong to other weights than" in compare_runs(folder, folder)[-1].note


def test_results_of_an_older_version_are_still_reported(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    evaluate(config)
    path = Path(config.run_dir) / "test" / "results.json"
    results = json.loads(path.read_text())
    del results["models"]["mine"]["weights"]
    path.write_text(json.dumps(results))
    assert "Out of date" not in write_report(Path(config.run_dir)).read_text()


def test_a_killed_run_resumes_to_the_same_numbers_and_plays_no_question_twice(monkeypatch, tmp_path):
    rows = [make_question(index, "right") for index in range(30, 40)]  # Q30 to Q39 answer by their seed
    config = fake_config(tmp_path, {"own": rows}, SHELF)
    config.test.samples, config.hardware.engine.concurrency = 3, 4
    played = tmp_path / "played"

    def dying(text, seed):
        with played.open("a") as file:
            file.write(f"{seed}\n")
        if played.read_text().count("\n") == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply(text, seed)

    use_model(monkeypatch, FakeModel(dying))
    child = os.fork()
    if child == 0:
        try:
            evaluate(config)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kept = (Path(config.run_dir) / "test" / "mine" / "trajectories.jsonl.partial").read_text().count("\n")
    assert 0 < kept < 14
    config.resume = True
    evaluate(config)
    resumed = results_of(config)
    assert len(played.read_text().split()) == 14 + 30 - kept, "what was kept is not played again"
    config.run_dir, config.resume = str(tmp_path / "straight"), False
    evaluate(config)
    assert results_of(config) == resumed
    assert len(scores_of(config)) == 30


def test_a_full_disk_is_one_clear_line_and_resuming_plays_what_is_missing(model, tmp_path, monkeypatch, capsys):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.hardware.engine.concurrency = 1
    append, room = episode_runner._Partial.append, 1

    def until_full(self, trajectory):
        nonlocal room
        if not room:
            self._file = FullFile(self._file)
        room = max(room - 1, 0)
        append(self, trajectory)

    monkeypatch.setattr(episode_runner._Partial, "append", until_full)
    monkeypatch.setattr("dgpo.__main__.load_config", lambda _: config)
    assert main(["test"]) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "trajectories.jsonl.partial" in message
    assert "resume=true" in message
    folder = Path(config.run_dir) / "test" / "mine"
    assert (folder / "trajectories.jsonl.partial").read_text().count("\n") == 1
    assert len(list(read_trajectories(folder / "trajectories.jsonl.partial"))) == 1, "no torn line"
    assert not (folder / "scores.jsonl").exists()
    monkeypatch.setattr(episode_runner._Partial, "append", append)
    config.resume, model.num_turns = True, 0
    evaluate(config)
    assert model.num_turns == 1 + 5, "Q0 was kept, Q1 and Q2 were played"
    assert results_of(config)["models"]["mine"]["num_questions"] == 3


class FullFile:
    """A file on a disk that has room for seven more bytes."""

    def __init__(self, file):
        self.file, self.room = file, 7

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written, self.room = self.file.write(data[: self.room]), 0
        return written


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: setattr(c.test, "sets", ["owm"]), ("unknown set 'owm'", "did you mean own?")),
        (lambda c: setattr(c.test, "compat", "upsteam"), ("test.compat=upsteam", "none, upstream")),
        (lambda c: setattr(c.test, "loggers", ["wandbb"]), ("'wandbb'", "did you mean wandb?")),
        (lambda c: setattr(c.test, "compat", "upstream"), ("3 questions", "upstream_batch_size=256")),
        (lambda c: setattr(c.test, "samples", 0), ("test.samples=0", "at least 1")),
        (
            lambda c: setattr(c.retriever, "max_queries_per_request", 0),
            ("retriever.max_queries_per_request=0", "at least 1"),
        ),
        (lambda c: (setattr(c.test, "samples", 4), setattr(c.test, "temperature", 0.0)), ("above 0",)),
        (lambda c: setattr(c.test, "temperature", -1.0), ("test.temperature=-1.0",)),
        (lambda c: setattr(c.test, "max_questions", 0), ("test.max_questions=0",)),
        (lambda c: c.test.models.update({"../x": "y"}), ("'../x'", "becomes a folder")),
        (lambda c: c.data.test_files.update(nq=c.data.test_files["bad"]), ("data.test_files.nq", "triviaqa")),
        (lambda c: c.data.test_files.update(own=c.data.test_files["twice"]), ("rows 0 and 2", "'own-test-0'")),
    ],
)
def test_wrong_settings_and_files_are_refused_before_anything_is_written(model, tmp_path, change, parts):
    sets = {"own": questions(), "bad": [make_question(0, "a", source="triviaqa")]}
    config = fake_config(tmp_path, {**sets, "twice": [*questions()[:2], make_question(0, "x")]}, SHELF)
    config.data.test_files = dict(config.data.test_files)
    change(config)
    for name in ("bad", "twice"):
        config.data.test_files.pop(name)
    with pytest.raises(ConfigError) as caught:
        evaluate(config)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(config.run_dir).exists()


def test_a_model_without_a_tokenizer_is_refused_before_any_model_plays(model, monkeypatch, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.test.models = {"mine": config.test.models["mine"], "broken": make_model(tmp_path / "broken")}
    (tmp_path / "broken" / "tokenizer.json").unlink(missing_ok=True)

    def load(path, **options):
        return ChatTokenizer() if path == config.test.models["mine"] else load_tokenizer(path, **options)

    monkeypatch.setattr("dgpo.evaluation.stage.load_tokenizer", load)
    with pytest.raises(ConfigError, match="broken: its tokenizer cannot be loaded"):
        evaluate(config)
    assert model.num_turns == 0
    assert not Path(config.run_dir).exists()


def test_tensorboard_gets_the_metrics_of_each_model(model, tmp_path):
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.test.loggers = ["tensorboard"]
    evaluate(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.run_dir) / "test" / "tensorboard" / "mine"))
    events.Reload()
    (event,) = events.Scalars("val/test_score/own")
    assert event.value == pytest.approx(1 / 3)


def test_wandb_keeps_the_metrics_of_each_model_offline(model, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.test.loggers = ["wandb"]
    evaluate(config)
    wandb.teardown()  # as at the end of the process: its service writes at its own time
    (log,) = (Path(config.run_dir) / "test" / "wandb").glob("offline-run-*/*.wandb")
    recorded = log.read_bytes()
    for text in ("val/test_score/own", str(1 / 3)[:15], f"{Path(config.run_dir).name}-test-mine"):
        assert text.encode() in recorded


def test_a_wandb_that_refuses_costs_no_result(model, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    config = fake_config(tmp_path, {"own": questions()}, SHELF)
    config.test.loggers = ["wandb"]
    evaluate(config)
    assert results_of(config)["models"]["mine"]["num_questions"] == 3
    assert "wandb did not take the metrics of mine (No API key configured.)" in capsys.readouterr().err


def test_results_are_also_shown_by_the_source_of_each_question(model, tmp_path):
    rows = [{**row, "data_source": source} for row, source in zip(questions(), ("a", "b", "b"), strict=True)]
    config = fake_config(tmp_path, {"own": rows}, SHELF)
    evaluate(config)
    slices = results_of(config)["models"]["mine"]["slices"]["data_source"]
    assert {name: (group["num_questions"], group["em"]) for name, group in slices.items()} == {
        "a": (1, 1.0),
        "b": (2, 0.0),
    }
