"""A run's model as a folder for others: it loads, it says where it comes from, and it reaches a hub."""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dgpo.__main__ import main
from dgpo.config.load import load_config, to_yaml
from dgpo.files import file_sha256
from dgpo.models.card import lineage
from dgpo.models.licences import inherited, licence_of
from dgpo.models.model_folders import write_dtype, write_generation_config
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.identity import model_identity
from dgpo.tinyworld.models import save_model
from tests.distill_stage import tiny_model, tiny_tokenizer
from tests.unit.hub_server import serving

STUDENT, TEACHER = "Qwen/Qwen2.5-0.5B-Instruct", "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    for stage, seed in (("distill", 1), ("train", 2)):
        save_model(tiny_model(tokenizer, seed), tokenizer, folder / stage / "model")
    return folder


@pytest.fixture
def run(models, tmp_path):
    """A run as its stages leave it: a cold start, RL on top of it, and its test; with a base model's own decoding."""
    folder = shutil.copytree(models, tmp_path / "run")
    base = {"do_sample": True, "repetition_penalty": 1.1, "top_k": 20, "eos_token_id": [1, 3], "pad_token_id": 0}
    (folder / "train" / "model" / "generation_config.json").write_text(json.dumps(base))
    config = load_config(
        [f"student.path={STUDENT}", f"teacher.path={TEACHER}", f"run_dir={folder}", "train.num_steps=7"]
    )
    config.data.train_file = str(tmp_path / "private" / "data" / "train.parquet")
    write_manifest(
        folder / "distill",
        stage="distill",
        inputs={"student": STUDENT, "teacher": TEACHER, "episodes": "collect/episodes.jsonl"},
        config=to_yaml(config),
        counts={"episodes": 1234, "steps": 60, "best_step": 40},
        seed=3,
    )
    write_manifest(
        folder / "train" / "model",
        stage="train",
        inputs={"init": str(folder / "distill" / "model"), "teacher": TEACHER},
        config=to_yaml(config),
        counts={"steps": 7, "rollbacks": 1},
        seed=3,
    )
    scores = {"em": 0.25, "em_ci95": [0.2, 0.31], "f1": 0.3, "num_searches": 1.5, "num_questions": 600}
    other = {**scores, "em": 0.99}
    models = {
        name: {
            "checkpoint": str(folder / stage / "model"),
            "weights": model_identity(str(folder / stage / "model")),
            "sets": {"nq": each},
            "average": each,
            "num_questions": 600,
        }
        for name, stage, each in (("cold", "distill", other), ("ours", "train", scores))
    }
    (folder / "test").mkdir()
    (folder / "test" / "results.json").write_text(json.dumps({"models": models, "baseline": None, "samples": 1}))
    return folder


def export(run, out, *more):
    return main(["export", f"run_dir={run}", f"export.out={out}", *more])


def logits(folder, dtype="auto"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


def test_an_exported_model_is_the_runs(run, tmp_path):
    assert export(run, tmp_path / "out") == 0
    assert torch.equal(logits(tmp_path / "out"), logits(run / "train" / "model"))
    exported, own = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", run / "train" / "model"))
    assert exported.get_vocab() == own.get_vocab()
    assert exported.chat_template == own.chat_template


def test_weights_keep_their_dtype_whatever_the_configuration_says(run, tmp_path):
    """veRL saves float32 weights with a configuration of bfloat16."""
    path = run / "distill" / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    manifest = json.loads((run / "distill" / "manifest.json").read_text())
    manifest["sha256"]["model/config.json"] = file_sha256(path)
    (run / "distill" / "manifest.json").write_text(json.dumps(manifest))
    assert export(run, tmp_path / "out", "export.stage=distill") == 0
    assert torch.equal(logits(tmp_path / "out"), logits(run / "distill" / "model", torch.float32))
    write_dtype(run / "distill" / "model")
    assert logits(run / "distill" / "model").dtype == torch.float32


def test_the_weights_dtype_is_chosen(run, tmp_path):
    assert export(run, tmp_path / "out", "export.dtype=bfloat16") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    expected = logits(run / "train" / "model", torch.bfloat16)
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_it_decodes_greedily_and_stops_at_the_tags_whatever_its_base_did(run, tmp_path):
    export(run, tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.stop_strings == ["</search>", "</answer>"]
    assert generation.do_sample is False
    assert generation.eos_token_id == [1, 3]
    assert (generation.repetition_penalty or 1.0, generation.top_k or 50) == (1.0, 50)


def test_tokens_come_from_the_models_configuration_where_there_is_no_generation_config(tmp_path):
    write_generation_config(tmp_path, fallback={"eos_token_id": 7, "hidden_size": 32})
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": 7,
        "do_sample": False,
        "stop_strings": ["</search>", "</answer>"],
    }


def test_the_card_says_what_the_run_recorded(run, tmp_path):
    export(run, tmp_path / "my-agent")
    card = (tmp_path / "my-agent" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == STUDENT
    assert metadata["license"] == "other", "student and teacher have different ones"
    for expected in (
        "# my-agent",
        "PPO with a teacher on the episodes that it got wrong (form `reward`, coefficient 0.001)",
        f"| student | `{STUDENT}` |",
        f"| teacher | `{TEACHER}` |",
        "| started from | `distill/model`, a model of an earlier stage |",
        "| data | questions of `data/train.parquet` |",
        "7 of 512 questions x 1, after 1 rollbacks",
        "| seed | 3 |",
        "| reward | exact match |",
        "| weights | float32 |",
        "| nq | 600 | 0.250 | 0.200 to 0.310 | 0.300 | 1.50 |",
        f"| `{STUDENT}` | Apache-2.0 |",
        "Built with Qwen",
        "ask.model=my-agent",
        "arxiv.org/abs/2508.20324",
    ):
        assert expected in body
    assert "0.99" not in card, "of another model"
    assert str(tmp_path) not in card, "where it was on this machine is no one's business"


def change_result(run, change):
    path = run / "test" / "results.json"
    results = json.loads(path.read_text())
    change(results["models"]["ours"])
    path.write_text(json.dumps(results))


def test_no_number_of_other_weights_gets_into_the_card(run, tmp_path):
    """The run went on after its test; or was tested before results recorded their weights."""
    change_result(run, lambda ours: ours.update(weights="f" * 64))
    export(run, tmp_path / "later")
    change_result(run, lambda ours: ours.pop("weights"))
    export(run, tmp_path / "old")
    for out in ("later", "old"):
        card = (tmp_path / out / "README.md").read_text()
        assert "These weights were not evaluated in their run." in card
        assert "0.250" not in card


def test_the_same_weights_tested_in_another_folder_count(run, tmp_path):
    change_result(run, lambda ours: ours.update(checkpoint="elsewhere/model"))
    export(run, tmp_path / "out")
    assert "| nq | 600 | 0.250 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_cards_own_python_runs(run, tmp_path, monkeypatch, capsys):
    export(run, tmp_path / "my-agent")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "my-agent" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new_tokens=500", "max_new_tokens=5"), {})
    assert len(capsys.readouterr().out) > 1


def test_a_stage_is_chosen_and_an_untested_model_says_so(run, tmp_path):
    (run / "test" / "results.json").unlink()
    assert export(run, tmp_path / "cold", "export.stage=distill") == 0
    assert torch.equal(logits(tmp_path / "cold"), logits(run / "distill" / "model"))
    card = (tmp_path / "cold" / "README.md").read_text()
    assert "knowledge distillation (`kd`) on a teacher's own correct episodes" in card
    assert "1,234 correct episodes of the teacher" in card
    assert "the best on held-out episodes, of step 40" in card
    assert "Not evaluated in its run." in card


def test_student_and_teachers_are_found_through_the_stages(run):
    """RL without a teacher, on a cold start on text that another teacher played."""
    (run / "collect").mkdir()
    (run / "collect" / "manifest.json").write_text('{"inputs": {"teacher": "my/teacher"}}')
    cold = {"stage": "distill", "inputs": {"student": STUDENT, "teacher": None, "episodes": f"{run}/collect/e.jsonl"}}
    (run / "distill" / "manifest.json").write_text(json.dumps(cold))
    config = to_yaml(load_config(["train.teacher_term.gate=none"]))
    inputs = {"init": str(run / "distill" / "model"), "teacher": TEACHER}
    assert lineage({"stage": "train", "inputs": inputs, "config": config}) == (STUDENT, ["my/teacher"])
    redone = {"stage": "train", "inputs": inputs, "config": config, "settings": {"weights at the start": "f" * 64}}
    assert lineage(redone) == (inputs["init"], []), "the cold start was made again since"
    assert lineage({"stage": "distill", "inputs": {"student": "s", "teacher": "t"}}) == ("s", ["t"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["export.out=null"], "export.out is not set"),
        (["export.dtype=int8"], "export.dtype=int8: expected one of float32, bfloat16, float16"),
        (["export.stage=collect"], "export.stage=collect: expected one of distill, train"),
        (["run_dir=nowhere"], "run_dir=nowhere has no finished distill or train"),
    ],
)
def test_what_cannot_be_exported_is_told(run, tmp_path, capsys, more, message):
    assert export(run, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_written_over(run, tmp_path, capsys):
    export(run, tmp_path / "out")
    assert export(run, tmp_path / "out") == 2
    assert "out exists: choose another export.out" in capsys.readouterr().err


def test_a_changed_model_is_not_exported(run, tmp_path, capsys):
    weights = run / "train" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert export(run, tmp_path / "out", "export.stage=train") == 2
    assert "model.safetensors is missing or changed" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving() as server:
        server.token = "secret"
        yield server


def push(run, out, hub, repo="me/agent"):
    return export(run, out, f"export.push={repo}", f"export.endpoint={hub.url}")


def test_a_pushed_model_is_the_folder(run, tmp_path, hub, capsys):
    assert push(run, tmp_path / "out", hub) == 0
    there = hub.models["me/agent"]
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "manifest.json"}
    assert there == here
    assert "model.safetensors" in there
    assert b"ask.model=me/agent" in there["README.md"]
    assert f"{hub.url}/me/agent/commit/" in capsys.readouterr().out


def test_a_push_that_failed_is_repeated(run, tmp_path, hub, capsys):
    hub.token = "another"
    assert push(run, tmp_path / "out", hub) == 1
    error = capsys.readouterr().err
    assert "refuses me/agent" in error
    assert "log in with `hf auth login`, or set HF_TOKEN" in error
    hub.token = "secret"
    assert push(run, tmp_path / "out", hub) == 0
    assert "model.safetensors" in hub.models["me/agent"]


def test_a_folder_of_other_weights_than_the_run_has_now_is_not_pushed(run, tmp_path, hub, capsys):
    export(run, tmp_path / "out")
    manifest = json.loads((run / "train" / "model" / "manifest.json").read_text())
    weights = run / "train" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    manifest["sha256"]["model.safetensors"] = file_sha256(weights)
    (run / "train" / "model" / "manifest.json").write_text(json.dumps(manifest))
    assert push(run, tmp_path / "out", hub) == 2
    assert "out was made with other settings (weights was" in capsys.readouterr().err
    assert "me/agent" not in hub.models


def test_a_server_that_is_not_there_is_told(run, tmp_path, hub, capsys):
    export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", "export.push=me/agent", "export.endpoint=http://127.0.0.1:9") == 1
    assert "could not be pushed to http://127.0.0.1:9" in capsys.readouterr().err


def test_a_repository_needs_a_name(run, tmp_path, hub, capsys):
    assert push(run, tmp_path / "out", hub, repo="me/agent/x") == 2
    assert "expected user/name" in capsys.readouterr().err


def test_licences_are_those_of_the_projects_list():
    assert licence_of(STUDENT) == "Apache-2.0"
    assert licence_of("Qwen/Qwen2.5-3B-Instruct") == "Qwen Research License: not for commercial use"
    assert licence_of("meta-llama/Llama-3.2-1B-Instruct") == "Llama 3.2 Community License"
    assert licence_of("my/own") is None
    assert "Built with Llama" in inherited("meta-llama/Llama-3.2-1B-Instruct", ["SearchR1-ppo-llama3.1-8b"])[0]
    assert len(inherited(STUDENT, [TEACHER])) == 1
    assert inherited(STUDENT, []) == inherited("models/student", ["models/teacher"]) == []


def test_a_dry_run_writes_and_pushes_nothing(run, tmp_path, capsys):
    export = ["export", f"run_dir={run}", f"export.out={tmp_path / 'out'}", "dry_run=true"]
    with serving() as hub:
        assert main([*export, "export.push=user/agent", f"export.endpoint={hub.url}"]) == 0
        assert not hub.models
    assert f"exported as {tmp_path / 'out'}, and pushed to user/agent" in capsys.readouterr().out
    assert main([*export, "export.push=me/agent/x"]) == 2
    assert "export.push=me/agent/x: expected user/name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
