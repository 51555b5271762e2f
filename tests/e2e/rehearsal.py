"""What the pages print besides the README's recipe, in a checkout where that was typed: run, or rehearsed as dry runs.

python -m tests.e2e.rehearsal    in that checkout; writes a line of JSON for each command: the line, seconds, rc, output

One process for all of them, since loading takes longer than most dry runs. What is small and ends by itself is run, and
servers are started. What a line is about to write is not there yet; `...` and the like stand for what the recipe has,
`/shared/` for this folder, `cuda` for `cpu`. Programs of others, installation, shell scripts and benchmarks are left to
tests/unit/test_command_blocks.py, which reads their arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from dgpo.files import write_jsonl
from dgpo.runs.asking import write_asking
from tests.e2e.pixi import command
from tests.unit.test_command_blocks import PAGES, lines
from tests.unit.test_import_checkpoint import save_shards
from tests.unit.test_natural_questions import simplified

INPUTS = ["pair=qwen3b_05b", "data=prepared", "retriever.url=http://node0:8000"]
QUICKSTART = "runs/quickstart-20260101-120000"
WORLD = [
    "student.path=runs/dgpo/distill/model",
    "teacher.path=runs/dgpo/train/model",
    "data.train_file=data/prepared/train.parquet",
    "retriever.url=http://node0:8000",
    "run_dir=runs/tiny",
]
STANDS_FOR = {
    "$Q": QUICKSTART,
    "/shared/": "",
    "FOLDER": "documents",
    "=MODEL": "=runs/dgpo/train/model",
    "checkpoint=...": "checkpoint=runs/dgpo/train/model",
    "out=...": "out=models/imported",
    "cuda": "cpu",
}
RUN = ("compare", "doctor", "import", "prepare", "report")
READY_S = 120
servers: list[subprocess.Popen[bytes]] = []


def rehearsed() -> dict[str, list[str]]:
    """The lines as printed, each once, with the words of the command that they come to."""
    recipe = PAGES[0].read_text().partition("\n## On real hardware\n")[2].partition("\n## ")[0]
    known = [words(" ".join(line.split())) for line in recipe.splitlines()]
    found: dict[str, list[str]] = {}
    for line in (line for page in PAGES for line in lines(page)):
        of = words(line)
        if of and of not in [*known, *found.values()]:
            found[line] = of
    return found


def words(line: str) -> list[str]:
    """MODULE and arguments of `python -m MODULE ...`; empty for what is no command of ours."""
    try:
        found = shlex.split(line.replace(" & ", " "), comments=True)
    except ValueError:  # prose
        return []
    while found and re.match(r"[A-Z_]+=", found[0]):
        del found[0]
    if found[:1] == ["srun"]:
        found = found[found.index("python") :]
    if found[:2] == ["pixi", "run"]:
        found = command(found[1:], Path("pixi.toml"))
    found = ["python", "-m", *found] if found[:1] == ["dgpo"] else found
    return found[2:] if found[:2] == ["python", "-m"] else []


def set_the_stage() -> None:
    """What the pages take for granted: other runs, a user's documents, another trainer's checkpoint."""
    for other in ("runs/ppo", "runs/no_teacher", QUICKSTART):
        shutil.copytree("runs/dgpo", other)
    shutil.copytree("runs/dgpo/distill/model", f"{QUICKSTART}/world/models/student_untrained")
    shutil.copytree("data/prepared", f"{QUICKSTART}/world/data")
    for name in ("real", "permuted"):
        shutil.copytree("indexes/wiki", f"{QUICKSTART}/indexes/{name}")
    for name in ("own-docs", "own-documents"):
        run = Path("runs", name)
        shutil.copytree("indexes", run / "indexes")
        write_asking(run, overrides=["hardware=cpu"], model="runs/dgpo/train/model", corpus="wiki", examples=[])
    rows = [{"question": f"Who wrote book {number}?", "answers": [f"Ruth {number}"]} for number in range(16)]
    write_jsonl(Path("mine.jsonl"), rows)
    for folder in ("handbook", "documents"):
        Path(folder).mkdir()
        for number in range(len(rows)):
            Path(folder, f"{number}.md").write_text(f"# Book {number}\n\nRuth {number} wrote book {number} in 1912.\n")
    shutil.copy("mine.jsonl", "documents/questions.jsonl")
    Path("data/nq_annotations").mkdir()
    write_jsonl(Path("data/nq_annotations/nq-dev-all.jsonl"), [simplified("who wrote it", (6, 16))])
    save_shards(Path("verl_checkpoints/nq-ppo/global_step_300"))
    Path("e5_Flat.index").symlink_to("data/index/e5_Flat.index")
    Path("wiki-18.jsonl.gz").symlink_to("data/corpus/wiki-18.jsonl.gz")


def run(line: str, words: Sequence[str]) -> dict[str, object]:
    started, said = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            rc = call(words)
    except SystemExit as end:
        rc = end.code if isinstance(end.code, int) else 1
    except Exception:  # a traceback is a finding, and the other lines are of interest too
        rc = 70
        said.write(traceback.format_exc())
    return {"line": line, "seconds": time.monotonic() - started, "rc": rc, "output": said.getvalue()}


def call(words: Sequence[str]) -> int:
    module, *given = words
    arguments = []
    for word in given:
        for name, text in STANDS_FOR.items():
            word = word.replace(name, text)
        arguments += [word] if word != "..." else WORLD if "world=tiny" in given else INPUTS
    if module == "retriever.serve":
        return serve(arguments)
    if module == "dgpo.slurm":
        arguments.insert(0, "--dry-run")
    if module == "dgpo" and arguments[0] not in RUN:
        arguments.append("dry_run=true")
    package = f"{module}.__main__" if module.startswith("dgpo") else module
    with without(written(arguments)):
        return importlib.import_module(package).main(arguments) or 0


def written(arguments: Sequence[str]) -> Path | None:
    """What the command writes: the folder of a stage, or an index."""
    for before, word in itertools.pairwise(arguments):
        if before == "--out":
            return Path(word)
    folders = [word.partition("=")[2] for word in arguments if word.startswith("run_dir=")]
    return Path(folders[0], arguments[0]) if folders and "resume=true" not in arguments else None


@contextlib.contextmanager
def without(path: Path | None) -> Iterator[None]:
    """The path is not there at first, and afterwards as it was, or as the command has left it."""
    if path is None or not path.exists():
        yield
        return
    aside = path.rename(path.with_name(f"{path.name}.aside"))
    try:
        yield
    finally:
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


def serve(arguments: list[str]) -> int:
    """Starts a server and waits until it is ready. One with a port of its own is there for the lines that follow."""
    own = "--port" in arguments
    port = arguments[arguments.index("--port") + 1] if own else "8100"
    process = subprocess.Popen(
        [sys.executable, "-m", "retriever.serve", *arguments, "--port", port], stdout=sys.__stderr__
    )
    servers.append(process)
    started, answers = time.monotonic(), False
    while process.poll() is None and time.monotonic() - started < READY_S and not answers:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
            answers = True
        time.sleep(0.1)
    if not own:
        process.terminate()
        process.wait()
    return 0 if answers else process.returncode or 1


if __name__ == "__main__":
    out = sys.stdout
    set_the_stage()
    try:
        for line, of in rehearsed().items():
            print(json.dumps(run(line, of)), file=out, flush=True)
    finally:
        for server in servers:
            server.terminate()
