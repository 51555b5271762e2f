"""Frozen models in bfloat16 score as the trained one does, at every position."""

import json
import socket

import pytest

from dgpo.tinyworld.models import ModelSize, make_model, save_model
from tests.conftest import ROOT, run_command
from tests.distill_stage import tiny_tokenizer

pytestmark = pytest.mark.engine


def test_a_frozen_copy_of_the_actor_scores_as_the_actor_does(tmp_path):
    tokenizer = tiny_tokenizer()
    model = make_model(ModelSize(hidden_size=64, num_layers=2, num_heads=2), tokenizer, seed=0)
    save_model(model, tokenizer, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = run_command(str(ROOT / "tests" / "engine" / "frozen_copy.py"), str(tmp_path), str(port))
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["weights"] == ["torch.float32", "torch.bfloat16"]
    assert found["tables"] == ["torch.float32", "torch.float32"]
    assert found["difference"] == 0.0
