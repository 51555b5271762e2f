"""Every option of every command at its limits and beyond: one line that names it, before anything is loaded or made."""

from __future__ import annotations

import importlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FACTS, Server, get, started_server, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever.build import build_indexes
from retriever.command import OUR_MISTAKE, run
from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError
from retriever.options import SearchOptions, ServerLimits, parse_options

COMMANDS = ["build", "convert", "recall", "serve"]
Outcome = tuple[int, str]
RunHere = Callable[..., Outcome]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and its BM25 index."""
    root = tmp_path_factory.mktemp("options")
    build_indexes({"words": write_corpus(root / "facts.jsonl", FACTS)}, root, method="bm25")
    return root


@pytest.fixture
def run_here(facts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """Runs a command in this process, in the folder of the corpus; exit status and stderr."""
    monkeypatch.chdir(facts)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    # What an option lets through must not be loaded here, and is not what is tested
    for name in ("retriever.build.load_encoder", "retriever.collection.load_encoder", "retriever.recall.load_encoder"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("an encoder was loaded"))

    def run_command(command: str, *arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"retriever.{command}").main(list(arguments))
        return int(ended.value.code or 0), capsys.readouterr().err

    return run_command


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


BUILD = ["--corpus", "facts.jsonl", "--out", "out"]
CONVERT = ["--index", "words", "--out", "out"]
RECALL = ["--index", "words", "--exact", "words"]
SERVE = ["--index", "words"]
WRONG = [
    ("build", [*BUILD, "--device", "tpu"], "--device"),
    ("build", [*BUILD, "--device", "cuda:-1"], "--device"),
    ("build", [*BUILD, "--num-threads", "0"], "--num-threads"),
    ("build", [*BUILD, "--num-threads", "1e3"], "--num-threads"),
    ("build", [*BUILD, "--num-threads", str(10**12)], "--num-threads"),
    ("build", [*BUILD, "--workers", "-1"], "--workers"),
    ("build", [*BUILD, "--passages-per-part", "0"], "--passages-per-part"),
    ("build", [*BUILD, "--max-passage-tokens", "0"], "--max-passage-tokens"),
    ("build", [*BUILD, "--max-query-tokens", "-5"], "--max-query-tokens"),
    ("build", [*BUILD, "--bm25-k1", "nan"], "--bm25-k1"),
    ("build", [*BUILD, "--bm25-k1", "-1"], "--bm25-k1"),
    ("build", [*BUILD, "--bm25-b", "1.5"], "--bm25-b"),
    ("build", [*BUILD, "--bm25-b", "inf"], "--bm25-b"),
    ("build", [*BUILD, "--method", "tfidf"], "--method"),
    ("build", [*BUILD, "--dtype", "int8"], "--dtype"),
    ("build", [*BUILD, "--index-type", "Plat"], "'Plat'"),
    ("build", [*BUILD, "--index-type", "IVF4096,Flat"], "4096 inverted lists"),
    ("build", [*BUILD, "--index-type", "IVF2,PQ8"], "256 centroids"),
    ("build", [*BUILD, "--search-params", "nprobe=3"], "'nprobe=3'"),
    ("build", [*BUILD, "--encoder", "./absent"], "./absent"),
    ("build", [*BUILD, "--encoder", "package:no_such_package", "--preset", "e5"], "no-such-package"),
    ("build", [*BUILD, "--encoder", "someone/model"], "--preset"),
    ("build", ["--corpus", "absent.jsonl", "--out", "out"], "absent.jsonl"),
    ("build", ["--corpus", ".", "--out", "facts.jsonl"], "facts.jsonl"),
    ("build", ["--out", "out"], "--corpus"),
    ("build", [*BUILD, "--wokers", "2"], "--wokers"),
    ("convert", ["--index", "absent", "--out", "out"], "absent"),
    ("convert", CONVERT, "BM25"),
    ("convert", [*CONVERT, "--num-threads", "0"], "--num-threads"),
    ("convert", ["--index", "facts.jsonl", "--corpus", "facts.jsonl", "--out", "out"], "not a FAISS index file"),
    ("recall", ["--index", "absent", "--exact", "words"], "absent"),
    ("recall", [*RECALL, "--k", "0"], "--k"),
    ("recall", [*RECALL, "--num-queries", "0"], "--num-queries"),
    ("recall", [*RECALL, "--engine", "warp"], "--engine"),
    ("recall", [*RECALL, "--queries", "absent.txt"], "absent.txt"),
    ("recall", RECALL, "Flat"),
    ("serve", ["--index", "absent"], "absent"),
    ("serve", [], "--index"),
    ("serve", [*SERVE, "--port", "70000"], "--port"),
    ("serve", [*SERVE, "--port", "-1"], "--port"),
    ("serve", [*SERVE, "--port", "http"], "--port"),
    ("serve", [*SERVE, "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ("serve", [*SERVE, "--port-file", "absent/port"], "absent"),
    ("serve", [*SERVE, "--port-file", "facts.jsonl"], "facts.jsonl"),
    ("serve", [*SERVE, "--port-file", "words"], "words"),
    ("serve", [*SERVE, "--token-file", "absent"], "absent"),
    ("serve", [*SERVE, "--device", "gpu"], "--device"),
    ("serve", [*SERVE, "--num-threads", "0"], "--num-threads"),
    ("serve", [*SERVE, "--engine", "warp"], "--engine"),
    ("serve", [*SERVE, "--engine", "torch"], "--engine torch: no index here reads it"),
    ("serve", [*SERVE, "--search-params", "nprobe=2"], "words (BM25)"),
    ("serve", [*SERVE, "--num-candidates", "0"], "num_candidates"),
    ("serve", [*SERVE, "--num-reranked", "-1"], "num_reranked"),
    ("serve", [*SERVE, "--default", "other"], "--default"),
    *[("serve", [*SERVE, "--" + name.replace("_", "-"), "-1"], name) for name in vars(ServerLimits())],
    *[("serve", [*SERVE, "--" + name.replace("_", "-"), str(2**31)], name) for name in vars(ServerLimits())],
]


@pytest.mark.parametrize(("command", "arguments", "named"), WRONG, ids=lambda value: None)
def test_a_wrong_value_is_one_line_that_names_it(
    run_here: RunHere, facts: Path, command: str, arguments: list[str], named: str
) -> None:
    before = entries(facts)
    code, error = run_here(command, *arguments)
    assert code in (1, 2), error
    assert error.count("\n") == 1
    assert error.startswith(f"retriever.{command}: ")
    assert named in error
    assert entries(facts) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(("command", "arguments"), [("build", BUILD), ("recall", RECALL)])
def test_a_device_that_is_not_there_is_named(run_here: RunHere, command: str, arguments: list[str]) -> None:
    code, error = run_here(command, *arguments, "--device", "cuda:1")
    assert code == 1
    assert "--device cuda:1: PyTorch sees 0 CUDA devices here" in error or command == "recall"


def test_values_at_their_limits_are_taken(facts: Path) -> None:
    parse_options(["--index", "a=x", "--port", "65535", "--num-threads", "4096", "--device", "cuda:7"], description="")
    for name in vars(ServerLimits()):
        least = 0 if name == "cache_mb" else 1
        ServerLimits(**({"default_topk": 1} | {name: least}))
        ServerLimits(**({"max_topk": 2**31 - 1} | {name: 2**31 - 1}))
    SearchOptions(num_candidates=1, num_reranked=2**31 - 1)
    EncoderConfig(max_query_tokens=1, max_passage_tokens=1)
    assert parse_options(["--index", "a=x", "--host", "[::1]"], description="").host == "::1"
    (facts / "port").write_text("8000\n")
    assert parse_options(["--index", "a=x", "--port-file", str(facts / "port")], description="").port_file
    (facts / "port").unlink()


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.sampled_from(
    [
        "-1",
        "0",
        "1",
        "3.5",
        "nan",
        "inf",
        "1e9",
        str(2**63),
        "cuda",
        "Flat",
        "IVF0,Flat",
        "PQ0",
        ".",
        "..",
        "/",
        "~",
        "facts",
    ]
)
FLAGS = {
    "build": [
        "--method", "--index-type", "--search-params", "--device", "--num-threads", "--workers", "--passages-per-part",
        "--bm25-k1", "--bm25-b", "--encoder", "--library", "--preset", "--pooling", "--max-query-tokens", "--dtype",
    ],
    "convert": ["--to", "--search-params", "--num-threads", "--from-type", "--corpus", "--index"],
    "recall": ["--k", "--num-queries", "--engine", "--device", "--search-params", "--queries", "--index", "--exact"],
}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_ends_in_a_mistake_of_ours(data: st.DataObject, run_here: RunHere, facts: Path) -> None:
    """The corpus has a wrong row behind the options, so that no build gets as far as an encoder."""
    (facts / "wrong.jsonl").write_text("{}\n")
    command = data.draw(st.sampled_from(sorted(FLAGS)))
    arguments = {"build": ["--corpus", "wrong.jsonl", "--out", "out"], "convert": CONVERT, "recall": RECALL}[command]
    before = entries(facts)
    flag = data.draw(st.sampled_from(FLAGS[command]))
    code, error = run_here(command, *arguments, f"{flag}={data.draw(TEXT)}")
    assert code in (1, 2), error
    assert error.count("\n") == 1, error
    assert entries(facts) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_the_last_net(command: str) -> None:
    source = Path(importlib.import_module(f"retriever.{command}").__file__ or "").read_text()
    assert f'run("{command}", ' in source


def broken() -> None:
    raise KeyError("a mistake of ours")


def refused() -> None:
    error = RetrieverError("a wrong\nfile")
    error.add_note("what is encoded is kept")
    raise error


def full() -> None:
    raise OSError(28, "No space left on device", "x.index")


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "code", "last"),
    [
        (broken, OUR_MISTAKE, "retriever.x: this is a mistake of the program: please report the lines above"),
        (refused, 1, "retriever.x: a wrong file; what is encoded is kept"),
        (full, 1, "retriever.x: [Errno 28] No space left on device: 'x.index'"),
        (interrupted, 130, "retriever.x: interrupted"),
    ],
)
def test_what_a_command_raises_ends_it_in_words(
    command: Callable[[], Any], code: int, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("x", command)
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, lines[-1]) == (code, last)
    assert (len(lines) == 1) == (command is not broken)
    if command is broken:
        assert lines[0] == "Traceback (most recent call last):"
        assert any("in broken" in line for line in lines)


def test_a_server_may_open_as_many_files_as_the_system_lets_it(facts: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with started_server(tmp_path / "port", f"--index={facts / 'words'}") as server:
            limits = Path(f"/proc/{server.process.pid}/limits").read_text()
            [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
            assert line.split()[3:5] == [str(hard), str(hard)]
            assert many_connections(server, 300) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def many_connections(server: Server, num: int) -> int:
    """Open connections at once that are answered."""
    import socket
    from urllib.parse import urlsplit

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    address = urlsplit(server.url)
    connections = [socket.create_connection((address.hostname, address.port), timeout=20) for _ in range(num)]
    try:
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
        return sum(connection.recv(64).startswith(b"HTTP/1.1 200") for connection in connections)
    finally:
        assert get(server.url + "/ready").status == 200
        for connection in connections:
            connection.close()


def test_a_mapped_file_that_is_cut_short_does_not_end_the_server_without_a_word(facts: Path, tmp_path: Path) -> None:
    """The index's own check finds it before a search touches the file, so the process lives and says why."""
    write_corpus(tmp_path / "facts.jsonl", FACTS)
    folder = build_indexes({"words": tmp_path / "facts.jsonl"}, tmp_path, method="bm25")["words"]
    with started_server(tmp_path / "port", f"--index={folder}", "--cache-mb=0") as server:
        os.truncate(folder / "corpus.jsonl", 10)
        reply = get(server.url + "/ready")
        assert (reply.status, reply.json["status"]) == (503, "rewritten")
        assert server.process.poll() is None


def test_without_an_index_the_folder_of_the_environment_is_served(facts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RETRIEVER_DATA_PATH", str(facts))
    assert parse_options([], description="").indexes == {"words": facts / "words"}
    monkeypatch.setenv("RETRIEVER_DATA_PATH", str(tmp_path))
    with pytest.raises(RetrieverError, match=r"RETRIEVER_DATA_PATH=.* holds no index folder; .*retriever\.convert"):
        parse_options([], description="")
    monkeypatch.delenv("RETRIEVER_DATA_PATH")
    with pytest.raises(RetrieverError, match="no --index NAME=FOLDER, and RETRIEVER_DATA_PATH is not set"):
        parse_options([], description="")
