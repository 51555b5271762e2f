"""Plans where there is nothing yet: no data, no server, no hub; and what a laptop has."""

import json
import os

import pytest

from dgpo.__main__ import main
from dgpo.config import model_files
from dgpo.config.load import load_config
from dgpo.config.model_files import HubUnreachableError, model_file
from dgpo.hardware import dry_run
from dgpo.hardware.budget import rl_budget
from dgpo.hardware.disk import hub_disk, stage_disk
from dgpo.hardware.known_gpus import GIB
from dgpo.hardware.memory import weight_bucket
from dgpo.hardware.report import besides
from dgpo.hardware.shapes import known_shape, shape_from_config
from dgpo.hardware.stages import stage_models
from dgpo.rl.verl_config import has_request_seeds, to_verl
from tests.unit.stubs import make_model

SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)


@pytest.mark.parametrize("stage", ["collect", "distill", "train", "test"])
def test_a_plan_for_another_machine_needs_neither_data_nor_a_server(stage, no_hub, tmp_path, capsys):
    overrides = ["pair=qwen3b_05b", f"run_dir={tmp_path / 'run'}", "test.models.dgpo=Qwen/Qwen2.5-0.5B-Instruct"]
    assert main([stage, "dry_run.assume=h200x8", *overrides]) == 0
    plan = capsys.readouterr().out
    assert "note:" in plan
    assert "the hub's models 7" in plan or "the hub's models 1" in plan
    for row in ("collect", "distill", "train", "test", "total"):
        assert f"\n{row}" in plan.partition("The experiment, estimated")[2]
    assert main([stage, "dry_run=true", *overrides]) == 2


def test_a_laptops_plan_is_compared_with_its_memory(monkeypatch, no_hub, tmp_path, capsys):
    monkeypatch.setattr(dry_run, "memory_limit", lambda: 23e9)
    student = make_model(tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text(json.dumps(SMOLLM2))
    config = load_config(["hardware=cpu", f"student.path={student}", "train.teacher_term.gate=none", "stages=[train]"])
    models, _ = stage_models(config, "train")
    budget = rl_budget(dry_run._with_own_memory(config), models)
    assert budget.capacity == 23e9 - sum(budget.host.values())
    assert budget.problem.startswith("update actor needs")
    assert f"GiB per rank and its engine, of {budget.capacity / GIB:.1f}" in budget.problem
    config.episode.max_prompt_tokens, config.episode.max_response_tokens = 128, 512
    assert rl_budget(dry_run._with_own_memory(config), models).problem is None
    assert dry_run._with_own_memory(load_config(["dry_run.assume=cpu"])).hardware.host_memory_gb is None


def test_the_weight_bucket_of_a_cpu_holds_the_largest_weight(tmp_path):
    shape, tiny = shape_from_config(SMOLLM2), known_shape("qwen2.5-0.5b")
    config = load_config(["hardware=cpu"])
    assert weight_bucket(config, shape) >= 4 * 49152 * 576
    assert weight_bucket(config, None) == 64 * 2**20
    assert weight_bucket(load_config(["hardware=gpu24gb"]), tiny) == 512 * 2**20  # a GPU hands it over by itself
    student = make_model(tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text(json.dumps(SMOLLM2))
    verl = to_verl(load_config(["hardware=cpu", f"student.path={student}", "stages=[train]"]), tmp_path)
    assert verl.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes == 108


def test_threads_fit_the_machine_and_tiny_models_get_one():
    cores = len(os.sched_getaffinity(0))
    assert load_config(["hardware=cpu"]).hardware.env["OMP_NUM_THREADS"] == str(cores)
    assert load_config(["hardware=cpu", f"hardware.gpus_per_node={2 * cores}"]).hardware.env["OMP_NUM_THREADS"] == "1"
    assert load_config(["hardware=cpu", "world=tiny"]).hardware.env["OMP_NUM_THREADS"] == "1"
    assert load_config(["hardware=gpu24gb"]).hardware.env["OMP_NUM_THREADS"] == str(cores)


def test_requests_have_seeds_on_cpus_only_unless_asked_for():
    assert has_request_seeds(load_config(["hardware=cpu"]))
    assert not has_request_seeds(load_config([]))
    assert has_request_seeds(load_config(["train.request_seeds=true"]))
    assert not has_request_seeds(load_config(["hardware=cpu", "train.request_seeds=false"]))


def test_the_disk_of_rl_counts_the_checkpoint_that_is_being_written():
    config = load_config(["pair=qwen3b_05b"])
    models, _ = stage_models(config, "train")
    config.data.validation_file = None
    one = (16 + 12) * models.student.parameters
    assert stage_disk(config, "train", models)["checkpoints"] == pytest.approx(
        (config.train.keep_last + 1) * one, rel=0.01
    )


def test_the_disk_of_hub_models_is_two_bytes_a_parameter(no_hub):
    config = load_config(["pair=qwen3b_05b", "teacher.path=Qwen/Qwen2.5-3B-Instruct"])
    sizes, unknown = hub_disk(config)
    student, teacher = known_shape("qwen2.5-0.5b"), known_shape("qwen2.5-3b")
    assert sizes[config.student.path] == 2 * student.parameters
    assert sizes[config.teacher.path] == 2 * teacher.parameters
    assert unknown == ["intfloat/e5-base-v2"]
    assert besides(sizes, unknown).endswith(f"{sum(sizes.values()) / 1e9:.1f} GB without intfloat/e5-base-v2")


def test_a_cached_model_is_read_without_a_question_to_the_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--me--model" / "refs").mkdir()
    (tmp_path / "models--me--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(model_files, "hub_answers", lambda: pytest.fail("the hub was asked"))
    assert model_file("me/model", "config.json", key="student.path") == snapshot / "config.json"
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    assert model_file("me/model", "chat_template.jinja", key="student.path") is None
    with pytest.raises(HubUnreachableError, match=r"download.what=\[models\]"):
        model_file("me/other", "config.json", key="student.path")


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    import httpx

    asked = []

    def head(url, timeout):
        asked.append(url)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", head)
    model_files.hub_answers.cache_clear()
    for name in ("me/a", "me/b"):
        with pytest.raises(HubUnreachableError):
            model_file(name, "config.json", key="student.path")
    assert len(asked) == 1
    model_files.hub_answers.cache_clear()
