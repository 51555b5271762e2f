import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FACTS, ROOT, WordHashEncoder, write_corpus

from retriever.build import build_indexes
from retriever.encoder_config import EncoderConfig
from retriever.encoding import ProgressPrinter
from retriever.errors import RetrieverError

STUB = EncoderConfig(spec="models/stub", query_prefix="", passage_prefix="", dtype="float32")
TIMEOUT_S = 600
# Ray gives itself 30 s to start, which a busy machine exceeds
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "300"}
NUM_PASSAGES, PASSAGES_PER_PART = 600, 30


class Killed(BaseException):
    """Stands for what ends a process in the middle."""


class FailingEncoder(WordHashEncoder):
    """Fails after `num_parts` calls."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self._left = num_parts

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        if not self._left:
            raise Killed
        self._left -= 1
        return super().encode_passages(texts)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_build_goes_on_where_it_stopped(
    tmp_path: Path, word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    whole = build_indexes({"facts": corpus}, tmp_path / "whole", STUB)["facts"]
    word_hash_encoder.passages.clear()
    with monkeypatch.context() as patch:
        patch.setattr("retriever.build.load_encoder", lambda *_, **__: FailingEncoder(2))
        with pytest.raises(Killed):
            build_indexes({"facts": corpus}, tmp_path / "out", STUB, passages_per_part=5)
    assert not (tmp_path / "out" / "facts").exists()
    seen: list[tuple[int, int]] = []
    folder = build_indexes(
        {"facts": corpus}, tmp_path / "out", STUB, passages_per_part=5, progress=lambda *done: seen.append(done)
    )["facts"]
    assert len(word_hash_encoder.passages) == 2  # of 12, ten were there
    assert seen == [(10, 12), (12, 12)]
    assert content(folder) == content(whole)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["facts"]


def test_unfinished_work_of_other_settings_or_another_corpus_is_not_mixed_in(
    tmp_path: Path, word_hash_encoder: WordHashEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    other = EncoderConfig(spec="models/stub", query_prefix="", passage_prefix="p: ", dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr("retriever.build.load_encoder", lambda *_, **__: FailingEncoder(2))
        with pytest.raises(Killed):
            build_indexes({"facts": corpus}, tmp_path, STUB, passages_per_part=5)
    with pytest.raises(RetrieverError, match=r"unfinished build with other settings.*--overwrite to discard"):
        build_indexes({"facts": corpus}, tmp_path, other, passages_per_part=5)
    write_corpus(corpus, dict(reversed(FACTS.items())))
    build_indexes({"facts": corpus}, tmp_path, STUB, passages_per_part=5)
    assert len(word_hash_encoder.passages) == len(FACTS)


def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path, word_hash_encoder: WordHashEncoder) -> None:
    corpus = write_corpus(tmp_path / "facts.jsonl", FACTS)
    refusals = []

    def build_again(num_done: int, num_all: int) -> None:
        with pytest.raises(RetrieverError, match="another process builds this index") as refusal:
            build_indexes({"facts": corpus}, tmp_path, STUB)
        refusals.append(refusal)

    build_indexes({"facts": corpus}, tmp_path, STUB, progress=build_again)
    assert len(refusals) == 2


def test_time_left_counts_only_what_this_run_encoded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 110.0, 112.0, 130.0])
    monkeypatch.setattr("retriever.encoding.time.perf_counter", lambda: next(times))
    printer = ProgressPrinter()
    for done in (500, 520, 525, 560):  # the third comes 2 s after a line, and is not printed
        printer(done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "500 of 1000 passages were encoded before",
        "encoded 520/1000 passages, 500.00 ms each, 240 s left",
        "encoded 560/1000 passages, 500.00 ms each, 220 s left",
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = {f"Place {row}": f"Number {row} lies {row * row % 97} miles from the sea" for row in range(NUM_PASSAGES)}
    return write_corpus(tmp_path_factory.mktemp("corpus") / "places.jsonl", facts)


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "places"
    code, errors = finish(start_build(corpus, out))
    assert code == 0, errors
    return content(out)


def start_build(corpus: Path, out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "retriever.build", "--corpus", str(corpus), "--out", str(out)]
    command += ["--passages-per-part", str(PASSAGES_PER_PART), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | ENVIRONMENT)


def finish(build: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr of a build; one that hangs does not outlive the test."""
    try:
        _, errors = build.communicate(timeout=TIMEOUT_S)
    finally:
        build.kill()
    return build.returncode, errors.decode()


@pytest.mark.slow
def test_a_killed_build_is_resumed_to_the_same_bytes(
    corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    build = start_build(corpus, tmp_path / "places")
    deadline = time.monotonic() + TIMEOUT_S
    while len(before := list(tmp_path.glob(".places.building/part-*.npy"))) < 3:
        assert build.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    build.send_signal(signal.SIGKILL)
    assert build.wait(10) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".places.building/part-*.npy")}
    assert 3 <= len(before) < NUM_PASSAGES // PASSAGES_PER_PART
    assert not (tmp_path / "places").exists()
    code, errors = finish(start_build(corpus, tmp_path / "places"))
    assert code == 0, errors
    assert f"{len(before) * PASSAGES_PER_PART} of {NUM_PASSAGES} passages were encoded before" in errors
    assert content(tmp_path / "places") == uninterrupted


@pytest.mark.slow
def test_two_ray_workers_make_the_bytes_of_one(corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    code, errors = finish(start_build(corpus, tmp_path / "places", "--workers", "2"))
    assert code == 0, errors
    assert content(tmp_path / "places") == uninterrupted
