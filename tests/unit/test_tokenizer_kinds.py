"""Pairs whose tokenizers do the same in other words, and tokenizers without a pad token."""

import json
from pathlib import Path

import pytest
import torch

from dgpo.checks.models import check_teacher
from dgpo.coldstart.train import train_on_examples
from dgpo.config.load import load_config
from dgpo.config.model_files import tokenizer_difference
from dgpo.errors import ConfigError
from tests.distill_stage import tiny_model, varied_examples
from tests.unit.stubs import make_model
from tests.unit.tokenizer_kinds import CONSTANT_DATE, TODAYS_DATE, llama_like


@pytest.fixture
def pair(tmp_path):
    config = load_config(["hardware=cpu"])
    config.student.path = make_model(tmp_path / "student")
    config.teacher.path = make_model(tmp_path / "teacher", weights=b"teacher")
    llama_like(tmp_path / "teacher", template=CONSTANT_DATE)
    return config


def check(config, *, template):
    llama_like(Path(config.student.path), template=template)
    check_teacher(config, "student.path", config.student.path, [])


def test_templates_that_name_the_date_in_other_words_are_one_tokenizer(pair):
    check(pair, template=TODAYS_DATE)
    keys = ("student.path", "teacher.path")
    assert tokenizer_difference(pair.student.path, pair.teacher.path, keys=keys) == "different chat template"


def test_templates_that_render_another_prompt_are_refused(pair):
    with pytest.raises(ConfigError, match="different chat template"):
        check(pair, template=CONSTANT_DATE.replace("Today", "Now"))


def test_splitting_rules_that_cut_a_sample_otherwise_are_refused(pair):
    llama_like(Path(pair.student.path))
    file = Path(pair.student.path) / "tokenizer.json"
    data = json.loads(file.read_text())
    data["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="different splitting rules"):
        check_teacher(pair, "student.path", pair.student.path, [])


def test_the_cold_start_trains_with_a_tokenizer_that_has_no_pad_token(tmp_path):
    tokenizer = llama_like(tmp_path)
    assert tokenizer.pad_token_id is None
    tokenizer.model_max_length = 128
    config = load_config(["hardware=cpu", "distill.batch_size=4", "distill.epochs=3", "distill.held_out_share=0"])
    model = tiny_model(tokenizer, 0)
    before = model.model.embed_tokens.weight.detach().clone()
    counts = train_on_examples(
        model,
        tiny_model(tokenizer, 1),
        varied_examples(4),  # of different lengths
        tokenizer,
        checkpoint=tmp_path / "model",
        metrics=tmp_path / "metrics.jsonl",
        settings=config.distill,
        hardware=config.hardware,
        seed=1,
        name="distill",
    )
    assert counts["steps"] == 3
    assert not torch.equal(model.model.embed_tokens.weight, before)
