"""`download.what=[models]`: which models are fetched, and what follows where there is no hub."""

import os

import huggingface_hub
import pytest
from huggingface_hub import constants

from dgpo.__main__ import main
from dgpo.config import model_files
from dgpo.config.load import load_config
from dgpo.config.model_files import check_model_folder
from dgpo.data.download import hub_models


@pytest.fixture
def fetched(monkeypatch):
    names = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: names.append(repo) or f"/cache/{repo}")
    return names


def test_the_pair_and_the_encoder_are_fetched_once_each(fetched, capsys):
    assert main(["download", "download.what=[models]", "pair=qwen3b_05b"]) == 0
    assert fetched == hub_models(load_config(["pair=qwen3b_05b"]))
    assert fetched[-1] == "intfloat/e5-base-v2"
    assert len(fetched) >= 3
    assert "/cache/intfloat/e5-base-v2" in capsys.readouterr().err


def test_folders_are_not_looked_for_on_the_hub(fetched, tmp_path):
    overrides = [f"student.path={tmp_path}", "teacher.path=me/teacher", "download.models=[]"]
    assert main(["download", "download.what=[models]", *overrides]) == 0
    assert fetched == ["me/teacher"]


def test_a_dry_run_fetches_nothing(fetched, capsys):
    assert main(["download", "download.what=[models]", "pair=llama8b_1b", "dry_run=true"]) == 0
    assert fetched == []
    assert "meta-llama/Llama-3.2-1B-Instruct" in capsys.readouterr().err


def test_without_a_model_the_pair_is_asked_for(fetched, capsys):
    assert main(["download", "download.what=[models]"]) == 2
    assert "add pair=qwen3b_05b" in capsys.readouterr().err


def test_a_cached_model_without_a_hub_is_used_without_asking_for_it(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--me--model" / "refs").mkdir()
    (tmp_path / "models--me--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    check_model_folder("me/model", key="student.path")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE
