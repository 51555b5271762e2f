"""Every wrong input is refused before anything expensive starts, in one line that names the fix."""

import json
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.checks import check_collect, check_distill, check_test, check_train
from dgpo.config.load import load_config
from dgpo.data.rows import write_rows
from dgpo.errors import ConfigError, DataError
from tests.unit.stubs import healthy_server, make_collection, make_model, make_row

STAGES = [(check_train, "train"), (check_distill, "distill"), (check_test, "test")]


@pytest.fixture(scope="module")
def retriever():
    with healthy_server() as url:
        yield url


@pytest.fixture
def config(tmp_path, retriever):
    """A configuration that passes every check."""
    write_rows(tmp_path / "rows.parquet", [make_row(index) for index in range(64)])
    run = tmp_path / "run"
    make_collection(run)
    config = load_config(["world=tiny", "hardware=cpu"])
    config.run_dir, config.retriever.url = str(run), retriever
    config.student.path = config.train.init = make_model(tmp_path / "student")
    config.teacher.path = make_model(tmp_path / "teacher", weights=b"teacher")
    config.data.train_file = str(tmp_path / "rows.parquet")
    config.data.test_files = {"nq": str(tmp_path / "rows.parquet")}
    config.test.models = {"kd": config.student.path}
    return config


def refused(check, config, *parts, error=ConfigError):
    with pytest.raises(error) as caught:
        check(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_good_configuration_passes(config, tmp_path):
    check_train(config)
    check_distill(config)
    check_test(config)
    config.run_dir, config.data.collect_file = str(tmp_path / "other"), config.data.train_file
    check_collect(config)


def test_rows_that_would_share_seeds_and_records_are_refused_before_they_are_played(config, tmp_path):
    """In training they do not: there a row is known by its place in the batch, and may stand in a file twice."""
    write_rows(tmp_path / "twice.parquet", [make_row(index % 32) for index in range(64)])
    config.data.train_file = config.data.collect_file = str(tmp_path / "twice.parquet")
    config.data.test_files = {"nq": config.data.train_file}
    check_train(config)
    config.run_dir = str(tmp_path / "other")
    for check, key in ((check_collect, "data.collect_file"), (check_test, "data.test_files.nq")):
        refused(check, config, key, "rows 0 and 32 have the id", "extra_info.id of its own")


def test_a_missing_data_file_is_named(config):
    config.data.train_file = "nowhere.parquet"
    refused(check_train, config, "data.train_file", "nowhere.parquet", "does not exist")


def test_an_unset_data_file_is_named(config):
    config.data.train_file = None
    refused(check_train, config, "data.train_file is not set")


@pytest.mark.parametrize(
    ("change", "part"),
    [({"prompt": []}, "`prompt`"), ({"reward_model": {"ground_truth": {"target": [""]}}}, "no accepted answer")],
)
def test_a_malformed_row_is_named(config, tmp_path, change, part):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([make_row(0), {**make_row(1), **change}]), tmp_path / "bad.parquet")
    config.data.train_file = str(tmp_path / "bad.parquet")
    refused(check_train, config, "row 1", part)


def test_too_few_questions_for_a_batch(config):
    config.train.batch_size = 128
    refused(check_train, config, "64 questions", "train.batch_size=128")


def test_the_teacher_may_not_be_the_student(config):
    config.teacher.path = config.student.path
    refused(check_train, config, "the teacher is the student", "teacher.path")


def test_a_copy_of_the_student_is_no_teacher(config, tmp_path):
    config.teacher.path = make_model(tmp_path / "copy")
    refused(check_train, config, "the teacher is the student")
    refused(check_distill, config, "the teacher is the student")


@pytest.mark.parametrize(
    "content", [b"", b"weights", (90).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"no"]
)
def test_weights_that_are_none_or_were_cut_off_are_refused(config, content):
    (Path(config.student.path) / "model.safetensors").write_bytes(content)
    refused(check_test, config, "test.models.kd", "model.safetensors is no whole file of weights", "again")


def test_weights_that_lack_their_end_are_refused(config):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(8)
    file = Path(config.student.path) / "model.safetensors"
    file.write_bytes(whole[:-1])
    refused(check_test, config, f"{len(whole) - 1} bytes, expected {len(whole)}")
    file.write_bytes(whole)
    check_test(config)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_file_of_a_model_that_is_no_json_is_named(config, name, content):
    (Path(config.train.init) / name).write_text(content)
    for check in (check_train, check_test, check_distill):
        refused(check, config, config.train.init, name)


def test_a_shard_that_is_not_there_is_named(config):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (Path(config.student.path) / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(check_test, config, "names model-2.safetensors, which is not there (2 of 3 files are missing)")


def test_what_a_trainer_left_beside_weights_is_no_weights(config):
    (Path(config.student.path) / "model.safetensors").rename(Path(config.student.path) / "training_args.bin")
    refused(check_test, config, "no *.safetensors or pytorch_model*.bin weights there")


def test_the_prompts_of_a_mode_are_counted_as_it_asks(config):
    config.episode.max_prompt_tokens = 8
    check_test(config)
    config.test.modes = dict.fromkeys(config.test.models, "closed_book")
    refused(check_test, config, "data.test_files.nq=", "row 0: its prompt has", "max_prompt_tokens=8: raise the limit")


@pytest.mark.parametrize(
    ("check", "key"),
    [(check_train, "data.train_file"), (check_test, "data.test_files.nq"), (check_collect, "data.collect_file")],
)
def test_a_prompt_above_the_limit_is_refused_before_it_is_drawn(config, tmp_path, check, key):
    rows = [make_row(index) for index in range(64)]
    rows[33]["prompt"] = [{"role": "user", "content": "ab" * 40}]
    write_rows(tmp_path / "rows.parquet", rows)
    config.run_dir, config.data.collect_file = str(tmp_path / "other"), config.data.train_file
    config.episode.max_prompt_tokens = 64
    refused(check, config, f"{key}=", "row 33: its prompt has 80 tokens, more than episode.max_prompt_tokens=64")
    config.episode.max_prompt_tokens = 80
    check(config)


def test_different_tokenizers_are_refused(config, tmp_path):
    config.teacher.path = make_model(tmp_path / "other", weights=b"other!!", vocabulary=("a", "c"))
    refused(check_train, config, "different tokenizers", "2 of them different")


def test_no_teacher_is_needed_without_a_teacher_term(config):
    config.teacher.path, config.train.teacher_term.gate = None, "none"
    check_train(config)


def test_the_exact_form_needs_temperature_1(config):
    config.train.temperature = 0.7
    refused(check_train, config, "train.temperature=0.7", "set it to 1.0")


def test_a_missing_teacher_is_named(config):
    config.teacher.path = None
    refused(check_train, config, "teacher.path is not set", "gate=none")


def test_a_missing_model_folder_is_named(config, tmp_path):
    config.train.init = str(tmp_path / "nothing")
    refused(check_train, config, "train.init", "no such folder")


def test_a_retriever_that_does_not_answer_is_named(config):
    config.retriever.url = "http://127.0.0.1:9"
    refused(check_train, config, "http://127.0.0.1:9", "python -m retriever.serve")


def test_a_corpus_that_is_not_served_is_named(config, tmp_path):
    write_rows(tmp_path / "rows.parquet", [make_row(index, corpus="permuted7") for index in range(64)])
    refused(check_train, config, "'permuted7'", "serves real")


def test_episodes_longer_than_the_model_are_refused(config):
    config.episode.max_response_tokens = 16384
    refused(check_train, config, "max_response_tokens", "8192 positions")


def test_passages_that_can_never_fit_are_refused(config):
    config.episode.max_passage_tokens = 500
    refused(check_train, config, "episode.max_response_tokens=320", "max_passage_tokens")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("mini_batch_size", 24, "train.mini_batch_size=24"),
        ("samples_per_question", 3, "train.samples_per_question=3"),
        ("mini_batch_size", 4, "hardware.micro_batch_size=8"),
    ],
)
def test_batches_that_do_not_divide_are_refused(config, key, value, part):
    setattr(config.train, key, value)
    refused(check_train, config, "not a multiple", part)


def test_batches_that_do_not_divide_over_gpus_are_refused(config):
    config.hardware.gpus_per_node = 3
    refused(check_train, config, "GPUs=3")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("teacher_term", "form", "exct"), ("teacher_term", "gate", "wrong"), (None, "num_steps", 0)],
)
def test_unknown_choices_and_impossible_values_are_refused(config, section, key, value):
    setattr(getattr(config.train, section) if section else config.train, key, value)
    refused(check_train, config, f"{key}={value}", "expected")


def test_an_unknown_platform_and_loss_are_refused(config):
    config.distill.loss = "kl"
    refused(check_distill, config, "distill.loss=kl", "kd, seqkd")
    config.hardware.platform = "tpu"
    refused(check_train, config, "hardware.platform=tpu", "cuda, cpu")


@pytest.mark.parametrize(("check", "stage"), STAGES)
def test_a_stage_folder_that_exists_needs_resume(config, tmp_path, check, stage):
    (tmp_path / "run" / stage).mkdir()
    (tmp_path / "run" / stage / "file").touch()
    refused(check, config, "resume=true", error=ConfigError)
    config.resume = True
    check(config)


def test_distilling_without_collected_episodes_names_the_command(config, tmp_path):
    (tmp_path / "run" / "collect" / "episodes.jsonl").unlink()
    refused(check_distill, config, "python -m dgpo collect")


def test_distilling_from_a_collection_that_did_not_finish_or_was_changed_is_refused(config, tmp_path):
    manifest = tmp_path / "run" / "collect" / "manifest.json"
    (tmp_path / "run" / "collect" / "episodes.jsonl").write_text("{ }\n")
    refused(check_distill, config, "episodes.jsonl is missing or changed", error=DataError)
    manifest.unlink()
    refused(check_distill, config, "'collect' did not finish there", error=DataError)


@pytest.mark.parametrize(("check", "stage"), STAGES)
def test_resuming_where_nothing_is_says_so(config, capsys, check, stage):
    config.run_dir, config.resume = f"{config.run_dir}-new", True
    if stage == "distill":
        make_collection(Path(config.run_dir))
    check(config)
    assert f"nothing to resume in {config.run_dir}/{stage}" in capsys.readouterr().out


def test_a_baseline_that_is_not_tested_is_refused(config):
    config.test.baseline = "dgpo"
    refused(check_test, config, "test.baseline=dgpo", "kd")


def test_one_question_sampled_greedily_twice_is_refused(config, tmp_path):
    config.run_dir, config.data.collect_file = str(tmp_path / "other"), config.data.train_file
    config.collect.samples_per_question, config.collect.temperature = 2, 0.0
    refused(check_collect, config, "collect.temperature=0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("action", "panic"),
        ("patience", 0),
        ("window", 0),
        ("max_kl_ratio", 1.0),
        ("max_entropy_ratio", 0.5),
        ("max_grad_norm_ratio", 1.0),
        ("rollback_learning_rate_scale", 0.0),
        ("rollback_learning_rate_scale", 1.5),
    ],
)
def test_a_detector_setting_that_makes_no_sense_is_refused(config, tmp_path, name, value):
    config.run_dir = str(tmp_path / "other")
    setattr(config.train.stability, name, value)
    refused(check_train, config, f"train.stability.{name}={value}: expected")


def test_a_reward_that_cannot_be_found_is_refused_before_anything_starts(config, tmp_path):
    config.run_dir, config.train.reward = str(tmp_path / "other"), "examples.format_reward:rewrad"
    refused(check_train, config, "train.reward=examples.format_reward:rewrad", "has no rewrad")


@pytest.mark.parametrize("check", [check_collect, check_train, check_test])
def test_every_stage_with_episodes_asks_a_backend_of_the_users_and_no_server(config, tmp_path, check):
    config.run_dir, config.data.collect_file = str(tmp_path / "other"), config.data.train_file
    config.retriever.url = "http://127.0.0.1:9"
    config.retriever.backend, config.retriever.backend_options = (
        "examples.jsonl_search:JsonlSearch",
        {"path": "x.jsonl"},
    )
    check(config)
    config.retriever.backend_options = {"file": "x.jsonl"}
    refused(check, config, "retriever.backend=examples.jsonl_search:JsonlSearch", "'path'")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "trian.num_steps=3"], "did you mean train.num_steps?"),
        (["trian"], "did you mean `train`?"),
        (["start"], "did you mean `python -m retriever.serve`?"),
        (["xyzzy"], "expected one of quickstart"),
        (["train", "hardware=gpu"], "cpu, gpu24gb, h200x8, h200x8xN"),
        (["collect", "hardware=cpu"], "data.collect_file"),
    ],
)
def test_the_command_line_prints_one_line_and_exits_with_2(arguments, part, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_help_lists_groups_and_keys_with_defaults(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "hardware=cpu|gpu24gb|h200x8|h200x8xN" in text
    assert "train.num_steps=1000" in text


def test_a_tolerance_of_nothing_for_the_rollouts_log_probs_is_refused(config):
    config.train.reuse_log_probs_within = 0.0
    refused(check_train, config, "train.reuse_log_probs_within=0.0", "more than 0")
    config.train.reuse_log_probs_within = 1e-3
    check_train(config)
