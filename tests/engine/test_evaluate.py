"""Evaluation and `ask` for real: vLLM, a retrieval server, a killed process, and a page in a real browser."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dgpo.pipeline import tiny
from dgpo.runs.asking import write_asking
from tests.browser.chromium import Chromium, find_chromium
from tests.conftest import ROOT, TinyWorld, run_command

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_QUESTIONS = 150
START_TIMEOUT_S = 200


def evaluation(world: TinyWorld, run_dir: Path) -> list[str]:
    """Arguments of `test`; few episodes at a time, so that some are finished long before the others."""
    return [
        *("-m", "dgpo", "test"),
        *world.overrides(run_dir),
        f"test.models.student={world.student}",
        f"data.test_files.real={world.folder / 'data' / 'test.parquet'}",
        f"test.max_questions={NUM_QUESTIONS}",
        "hardware.engine.concurrency=4",
    ]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_killed_test_resumes_to_the_same_numbers_and_plays_no_question_twice(tiny_world: TinyWorld, tmp_path: Path):
    straight = run_command(*evaluation(tiny_world, tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr[-3000:]
    arguments = evaluation(tiny_world, tmp_path / "killed")
    model = tmp_path / "killed" / "test" / "student"
    kept = _kill_in_mid_run(arguments, model / "trajectories.jsonl.partial", at_least=NUM_QUESTIONS // 5)
    resumed = run_command(*arguments, "resume=true")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{NUM_QUESTIONS}/{NUM_QUESTIONS} episodes" in resumed.stderr

    final = lines_of(model / "trajectories.jsonl")
    assert len({json.loads(line)["episode_id"] for line in final}) == len(final) == NUM_QUESTIONS
    # Lines hold the measured time of every search: an episode that was played again would not be the same text.
    assert set(kept) < set(final)
    ours, theirs = (
        json.loads((tmp_path / name / "test" / "results.json").read_text()) for name in ("killed", "straight")
    )
    assert ours == theirs
    assert ours["models"]["student"]["num_questions"] == NUM_QUESTIONS
    assert 0 < ours["models"]["student"]["average"]["em"] < 1
    assert not (model / "trajectories.jsonl.partial").exists()


def _kill_in_mid_run(arguments: list[str], partial: Path, *, at_least: int) -> list[str]:
    """kill -9 of the command alone once so many episodes are finished; its engine must end by itself.

    Returns the whole lines that it left.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(lines_of(partial)) < at_least:
        assert process.poll() is None, "the evaluation ended before it could be killed"
        assert time.monotonic() < deadline, f"fewer than {at_least} episodes in {START_TIMEOUT_S} s"
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "the engine outlived its command"
    text = partial.read_text()
    kept = text[: text.rfind("\n") + 1].splitlines()
    assert at_least <= len(kept) < NUM_QUESTIONS, "killed in the middle"
    return kept


@pytest.mark.browser
def test_the_ask_page_streams_the_trace_and_lists_the_sources(tiny_world: TinyWorld, tmp_path: Path):
    if find_chromium() is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    model = tiny_world.folder / "models" / "teacher"
    write_asking(tmp_path / "run", overrides=tiny.OVERRIDES, model=model, corpus=tiny.CORPUS, examples=[])
    command = [*("-m", "dgpo", "ask"), *tiny_world.overrides(tmp_path / "run")]
    command += [f"ask.model={model}", "ask.web=true", "ask.port=0"]
    with (tmp_path / "stdout").open("w") as log:
        server = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        browser = Chromium(tmp_path / "profile")
        try:
            browser.visit(_wait_for_address(server, tmp_path / "stdout"))
            browser.run(WATCH_AND_ASK)
            trace = browser.run("finished")
            browser.screenshot(tmp_path / "ask.png")
        finally:
            browser.close()
        assert not browser.errors
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(timeout=30)
    assert status == 0, "Ctrl-C ends the page"
    lengths = trace["lengths"]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4, "the trace grows while it is written"
    assert trace["kinds"][0] == "think"
    assert trace["kinds"][-1] == "answer"
    assert trace["kinds"].index("search") < trace["kinds"].index("information")
    assert trace["answer"]
    assert trace["sources"], "what was retrieved is listed"
    assert any(title.startswith("Lyon") for title in trace["sources"])


def _wait_for_address(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        line = next((line for line in lines_of(log) if line.startswith("open http://")), None)
        if line:
            return line.split()[1]
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, "no page"
        time.sleep(0.2)


WATCH_AND_ASK = """
var lengths = [], episodes = document.getElementById("episodes");
new MutationObserver(() => {
  const trace = document.querySelector(".trace");
  if (trace) lengths.push(trace.textContent.length);
}).observe(episodes, {subtree: true, childList: true, characterData: true});
var finished = new Promise((resolve) => {
  const look = () => {
    if (!document.querySelector(".how, .error")) return setTimeout(look, 20);
    const texts = (selector) => [...document.querySelectorAll(selector)].map((element) => element.textContent);
    resolve({
      lengths,
      kinds: [...document.querySelectorAll(".piece")].map((element) => element.dataset.kind),
      answer: texts(".answer span")[0],
      sources: texts(".sources summary"),
    });
  };
  look();
});
document.getElementById("question").value = "In which country is Lyon ?";
document.getElementById("send").click();
"""
