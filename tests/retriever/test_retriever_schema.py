"""Requests generated from the server's own OpenAPI schema, valid and not: no 5xx, and every answer as documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Server, get, post, served_here

from retriever.collection import load_collection
from retriever.options import ServerLimits

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def run_schemathesis(url: str, folder: Path, *arguments: str) -> None:
    command = [str(SCHEMATHESIS), "run", f"{url}/openapi.json", "--checks", "all", *arguments]
    run = subprocess.run(command, cwd=folder, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No issues found" in run.stdout
    assert "Selected: 6/6" in run.stdout


def test_generated_requests_get_documented_answers(server: Server, tmp_path: Path) -> None:
    run_schemathesis(server.url, tmp_path, "--max-examples", "8", "--seed", "1")
    assert post(server.url + "/retrieve", {"query": "planet with rings"}).status == 200


@pytest.mark.slow
def test_many_generated_requests_get_documented_answers(server: Server, tmp_path: Path) -> None:
    run_schemathesis(server.url, tmp_path, "--max-examples", "300")


@pytest.mark.slow
def test_generated_requests_with_a_token(indexes: dict[str, Path], tmp_path: Path) -> None:
    limits = ServerLimits(max_query_chars=200, max_queries=20)
    with served_here(load_collection({"words": indexes["words"]}), limits=limits, token="s3cret") as url:
        run_schemathesis(url, tmp_path, "--max-examples", "50", "--header", "Authorization: Bearer s3cret")
        assert get(url + "/health").status == 200
