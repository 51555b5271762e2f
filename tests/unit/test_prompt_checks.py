"""Prompts and templates are rendered, and their lengths counted, before anything starts."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dgpo.agent.protocol import build_messages, encode_prompt
from dgpo.checks.prompts import PromptReader
from dgpo.data.rows import DataError, validate_rows
from dgpo.errors import ConfigError
from tests.distill_stage import tiny_tokenizer
from tests.unit.stubs import make_model, make_row
from tests.unit.tokenizer_kinds import CONSTANT_DATE, TODAYS_DATE, llama_like

QUESTIONS = ["Who was it?", "Ünïcödé, 東京 and \U0001fa90?", "  spaces \n and lines ", "a" * 300]


def questions(*texts, role="user"):
    return [{**make_row(number), "prompt": [{"role": role, "content": text}]} for number, text in enumerate(texts)]


def refusal(reader, rows, limit=64):
    with pytest.raises(ConfigError) as caught:
        reader.check_lengths(rows, source="data.train_file=t.parquet", limit=limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("template", [CONSTANT_DATE, TODAYS_DATE, None])
@pytest.mark.parametrize("text", QUESTIONS)
def test_a_prompt_has_as_many_tokens_as_the_run_will_count(tmp_path, template, text):
    folder = make_model(tmp_path / "model")
    if template:
        llama_like(Path(folder), template=template)
    else:
        tiny_tokenizer().save_pretrained(folder)
    reader, messages = PromptReader(folder, key="student.path"), build_messages(text)
    num_tokens = len(encode_prompt(AutoTokenizer.from_pretrained(folder), messages))
    rows = [make_row(0), {**make_row(1), "prompt": messages}]
    reader.check_lengths(rows, source="data.train_file=t.parquet", limit=num_tokens)
    assert f"t.parquet, row 1: its prompt has {num_tokens} tokens, more than episode.max_prompt_tokens" in refusal(
        reader, rows, limit=num_tokens - 1
    )


def test_one_long_prompt_among_short_ones_is_named_by_its_row(tmp_path):
    reader = PromptReader(make_model(tmp_path / "model"), key="student.path")
    rows = questions("a", "ab", "ab" * 40, "a")
    reader.check_lengths(rows, source="data.train_file=t.parquet", limit=80)
    assert "row 2: its prompt has 80 tokens, more than episode.max_prompt_tokens=79: raise" in refusal(reader, rows, 79)


def write_template(folder, template):
    (Path(folder) / "chat_template.jinja").write_text(template)
    return PromptReader(folder, key="test.models.a")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "its chat template fails on"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.parts[0] }}", "UndefinedError"),
        ("hello", "its chat template leaves out what"),
    ],
)
def test_a_template_that_fails_is_told_in_a_line(tmp_path, template, words):
    reader = write_template(make_model(tmp_path / "model"), template)
    with pytest.raises(ConfigError, match=r"^test.models.a=.*/model: its chat template") as caught:
        reader.check_template()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_role_that_the_template_does_not_know_is_named_with_its_row(tmp_path):
    template = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('who?') }}{% endif %}{{ m.content }}"
    reader = write_template(make_model(tmp_path / "model"), template + "{% endfor %}")
    assert "its chat template fails on data.train_file=t.parquet, row 1 (TemplateError: who?)" in refusal(
        reader, [*questions("a"), *questions("b", role="tool")]
    )


@pytest.mark.parametrize(
    "settings", [{}, {"chat_template": None}, {"chat_template": [{"name": "rag", "template": "x"}]}]
)
def test_a_model_without_a_chat_template_is_refused(tmp_path, settings):
    folder = make_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="its tokenizer has no chat template"):
        PromptReader(folder, key="student.path")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_json_are_named(tmp_path, name):
    folder = make_model(tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    with pytest.raises(ConfigError, match=rf"^student.path=.*: {name} "):
        PromptReader(folder, key="student.path")


@pytest.mark.parametrize("content", [[{"type": "text", "text": "who?"}], 3, "", None])
def test_a_message_that_is_no_text_is_refused_with_its_row(content):
    row = {**make_row(0), "prompt": [{"role": "user", "content": content}]}
    with pytest.raises(DataError, match="row 0: `prompt` is "):
        validate_rows([row], "t.parquet")
