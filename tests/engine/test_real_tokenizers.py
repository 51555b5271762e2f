"""Published tokenizers, where DGPO_TOKENIZERS names a folder of their folders.

Nobody's vocabulary is part of the project: elsewhere the kinds of `tests/unit/tokenizer_kinds.py` stand for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dgpo.agent.protocol import build_messages, encode_prompt, parse_action
from dgpo.checks.prompts import PromptReader
from dgpo.engines.play import load_tokenizer
from dgpo.evaluation.token_pieces import TokenPieces
from tests.engine.test_turn_sampling import HARDWARE, evaluation_params, export_environment, rl_params, stopped_turn

pytestmark = pytest.mark.engine

FOLDERS = sorted(path for path in Path(os.environ.get("DGPO_TOKENIZERS", "/nonexistent")).glob("*/"))
TAGGED = '\n\n<information>Doc 1(Title: "Brasília") the capital, São Paulo</information>\n\n<answer> x </answer>'

if not FOLDERS:
    pytest.skip("DGPO_TOKENIZERS names no folder of published tokenizers", allow_module_level=True)


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request):
    export_environment(HARDWARE)
    return str(request.param)


@pytest.mark.parametrize("make_params", [rl_params, evaluation_params])
def test_a_turn_stops_on_the_token_that_completes_its_tag(folder, make_params):
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    turn = stopped_turn(tokenizer, make_params(tokenizer, seed=3))
    assert turn in ("I look. <search> who </search>", "I look. <search> who </search>.")
    assert parse_action(turn).content == "who"


def test_the_prompt_that_is_checked_is_the_prompt_that_is_played(folder):
    """Rendered without transformers by the checks, with it by the episode loop."""
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    messages = build_messages("Who wrote “São Bernardo”?")
    ids = encode_prompt(tokenizer, messages)
    reader = PromptReader(folder, key="student.path")
    assert reader._render(messages) == tokenizer.decode(ids, skip_special_tokens=False)
    assert reader._count(messages) == len(ids)


def test_the_pieces_of_the_report_are_the_text(folder):
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    ids = tokenizer.encode(TAGGED, add_special_tokens=False)
    pieces = TokenPieces(Path(folder) / "tokenizer.json").pieces(ids)
    written = b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in map(pieces.get, ids))
    assert written.decode() == TAGGED
