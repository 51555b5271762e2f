"""Shapes and tokenizers of the families that tests/engine/test_families.py takes through every stage."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo.agent.protocol import STOP_STRINGS, TEMPLATE_VARIABLES, build_messages, encode_prompt
from dgpo.hardware.shapes import shape_from_config
from tests.engine.families import FAMILIES, save_family

TEXT = "<think> a </think>\n<search> the river of Orvella, 1203, é </search>"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_parameters_are_counted_and_its_tokens_are_the_text(name, tmp_path):
    save_family(name, tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert shape_from_config(settings).parameters == model.num_parameters()
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT
    prompt = encode_prompt(tokenizer, build_messages("Who is the mayor of Orvella?"))
    assert prompt[0] == tokenizer.bos_token_id or name != "Gemma 3"
    assert prompt.count(tokenizer.bos_token_id) <= 2  # SmolLM2's begins every turn


def test_qwen3_thinks_in_its_own_words(tmp_path):
    save_family("Qwen3", tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.decode(encode_prompt(tokenizer, build_messages("Who?")))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert not any(stop in prompt.rpartition("<|im_start|>")[2] for stop in STOP_STRINGS)
    unthinking = {**TEMPLATE_VARIABLES, "enable_thinking": False}
    messages = build_messages("Who?")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **unthinking)
    assert text.endswith("<think>\n\n</think>\n\n")
