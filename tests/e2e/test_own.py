"""`dgpo own` on a small folder with a very small student: every stage by its real command, stopped once, then asked."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dgpo.agent.protocol import SEARCH_R1_PROMPT, render_observation, render_passages
from dgpo.agent.trajectory import read_trajectories
from dgpo.runs.artifacts import MANIFEST
from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.e2e

NUM_PEOPLE, NUM_CITIES = 60, 30
PLACES = ("lives in", "comes from")
SHORT = [
    *("distill.epochs=3", "distill.batch_size=8", "distill.learning_rate=3e-3", "distill.evaluate_every=5"),
    "episode.max_response_tokens=512",  # the student has 1,024 positions
]


def names(rng: random.Random, count: int) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(rng.sample(syllables, 3)).capitalize())
    return sorted(found)


def write_folder(folder: Path) -> list[str]:
    """A document per person, in every form that is read, and a question on each. Returns all names."""
    rng = random.Random(1)
    words = names(rng, NUM_PEOPLE + NUM_CITIES)
    rng.shuffle(words)
    people, cities = words[:NUM_PEOPLE], words[NUM_PEOPLE:]
    lines, questions = [], []
    for index, person in enumerate(people):
        city, place = rng.choice(cities), PLACES[index % 2]
        text = f"{person} {place} {city}."
        if index % 3 == 0:
            (folder / f"{person}.txt").write_text(text)
        elif index % 3 == 1:
            (folder / f"{person}.html").write_text(f"<title>{person}</title><script>x</script><p>{text}</p>")
        else:
            lines.append({"title": person, "text": text})
        asked = f"{'Where' if index % 2 else 'In what city'} is {person}?"
        questions.append({"question": asked, "answers": [city], "data_source": ("a", "b")[index % 2]})
    for name, records in (("more", lines), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return words


def write_student(folder: Path, words: list[str]) -> None:
    from dgpo.coldstart.oracle import EVIDENCE, FIRST_THOUGHTS
    from dgpo.models.model_folders import save_model_folder
    from dgpo.tinyworld.models import TEACHER_SIZE, make_model
    from dgpo.tinyworld.tokenizer import build_tokenizer

    observation = render_observation(render_passages([{"contents": f'"x"\nx {place} x.'} for place in PLACES]))
    texts = [SEARCH_R1_PROMPT, observation, "Where is x? In what city is x?", *FIRST_THOUGHTS, *EVIDENCE]
    tokenizer = build_tokenizer(words, texts)
    save_model_folder(make_model(TEACHER_SIZE, tokenizer, seed=1), tokenizer, folder)


def stop_after(path: Path, command: list[str]) -> None:
    """Asks a command to stop as soon as a file is there; nothing that it started is left."""
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert [child for child in children if child.is_running()] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The finished run folder and what stood on the screen."""
    base = tmp_path_factory.mktemp("own")
    documents = base / "documents"
    documents.mkdir()
    write_student(base / "student", write_folder(documents))
    folders = [str(documents), f"run_dir={base / 'run'}", f"student.path={base / 'student'}"]
    command = ["-m", "dgpo", "own", *folders, *SHORT]
    stop_after(base / "run" / "collect" / MANIFEST, [sys.executable, *command])
    result = run_command(*command, timeout_s=900)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return base / "run", result.stdout


def test_it_says_what_the_agent_gains_and_what_one_gets_without(run: tuple[Path, str]) -> None:
    folder, screen = run
    gains = json.loads((folder / "gains.json").read_text())
    assert gains["num_questions"] == 15
    assert "agent against before: " in screen
    assert "agent against rag: " in screen
    assert "always the top title 0.000" in screen
    assert gains["agent_minus_before"][0] == pytest.approx(gains["agent"] - gains["before"], abs=1e-9)
    assert gains["hit_at_k"] > 0.8
    assert f"next: python -m dgpo ask run_dir={folder}" in screen


def test_training_and_held_out_questions_share_no_document_and_keep_their_source(run: tuple[Path, str]) -> None:
    folder, _ = run
    counts = json.loads((folder / "data" / "manifest.json").read_text())["counts"]
    assert (counts["train"], counts["held_out"], counts["dropped"]) == (45, 15, 0)
    sets = sorted(file.name for file in (folder / "data").glob("*_test.parquet"))
    assert sets == ["a_test.parquet", "b_test.parquet"]
    trained = {episode.searches[0].documents[0]["contents"] for episode in episodes(folder / "collect")}
    assert len(trained) > 30


def episodes(folder: Path):
    return list(read_trajectories(folder / "episodes.jsonl"))


def test_the_finished_run_is_asked_by_its_folder_alone(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = {path: path.stat().st_mtime for path in folder.rglob("*")}
    question = json.loads((folder / "ask.json").read_text())["examples"][0]
    result = run_command("-m", "dgpo", "ask", f"run_dir={folder}", question, timeout_s=300)
    assert result.returncode == 0, result.stderr
    assert "search" in result.stdout
    assert {path: path.stat().st_mtime for path in folder.rglob("*")} == before, "asking writes into the run"
