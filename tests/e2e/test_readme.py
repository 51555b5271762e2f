"""The README's recipe for real hardware, typed: each line as printed, from `download` to `report`, on the CPU.

A hub of our own holds data and models in the layouts of the real one (tests/e2e/local_hub.py); what differs from a GPU
node stands in one file of overrides. No stage's output is placed by hand. Every line is also rehearsed, the stages as
dry runs by that file, in a fraction of the time. Lines, seconds and exit statuses are written to runs/readme/.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgpo.data.benchmarks import BENCHMARKS
from tests.conftest import ROOT, read_metrics, run_command
from tests.e2e.cluster_of_one import ClusterOfOne, Ran, can_have_a_network_of_its_own
from tests.e2e.local_hub import SIZES
from tests.e2e.pixi import command

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not can_have_a_network_of_its_own(), reason="no name spaces here: unshare, ip"),
]

SECTION = (ROOT / "README.md").read_text().partition("\n## On real hardware\n")[2].partition("\n## ")[0]
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)]
OVERRIDES = [
    *SIZES,
    "download.pinned=false",
    "prepare.allow_other_sizes=true",
    "collect.max_questions=16",
    "collect.temperature=0.5",
    "distill.batch_size=8",
    "distill.epochs=2",
    "distill.learning_rate=1e-3",
    "train.num_steps=2",
    "train.batch_size=8",
    "train.mini_batch_size=8",
    "train.teacher_term.num_monitored=2",
    "test.max_questions=4",
]
TYPED, PIXI, SLURM = BLOCKS
INSTALL = re.compile(r"bash scripts/install\.sh (gpu|cpu|retriever|retriever-gpu)")
STAGES = ("collect", "distill", "train", "test", "report")
SERVER = ["python", "-m", "retriever.serve"]
READY = "python -c \"import urllib.request as u; u.urlopen('http://node0:8000/ready')\""


def words_of(line: str) -> list[str]:
    """What the line executes: a task of pixi's by its command, `dgpo X` as `python -m dgpo X`."""
    words = shlex.split(line, comments=True)
    if words[0] == "pixi":
        words = command(words[1:], ROOT / "pixi.toml")
    return ["python", "-m", *words] if words[0] == "dgpo" else words


def play(cluster: ClusterOfOne, lines: list[str], *, rehearse: bool = False) -> None:
    """Runs the lines in their order; the first that fails ends it. Of installations the lock alone is looked for."""
    for line in lines:
        words = words_of(line)
        is_dry = rehearse and words[2:3] == ["dgpo"] and words[3] in STAGES
        cluster.write_overrides([*OVERRIDES, *(["dry_run=true"] if is_dry else [])])
        if match := INSTALL.fullmatch(" ".join(words)):  # what it does: tests/unit/test_install_script.py
            assert "--hash=sha256:" in (ROOT / "requirements" / f"{match[1]}.lock").read_text()
            continue
        ran = cluster.serve(line, READY) if words[:3] == SERVER else cluster.run(line)
        assert ran.rc == 0, f"{line}\n{ran.output[-6000:]}"


def write_log(name: str, log: list[Ran]) -> None:
    path = ROOT / "runs" / "readme" / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{ran.seconds:.1f}\t{ran.rc}\t{ran.line}" for ran in log]
    path.write_text("\n".join(["seconds\trc\tline", *rows, f"{sum(ran.seconds for ran in log):.1f}\t\ttotal", ""]))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    result = run_command("-m", "tests.e2e.local_hub", str(folder))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def typing(name: str, lines: list[str], cluster: ClusterOfOne, *, rehearse: bool = False) -> None:
    try:
        play(cluster, lines, rehearse=rehearse)
    finally:
        write_log(name, cluster.log)


@pytest.fixture(scope="module")
def typed(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfOne]:
    """The first block, typed."""
    with ClusterOfOne(tmp_path_factory.mktemp("readme") / "node", hub, OVERRIDES) as cluster:
        typing("typed", TYPED, cluster)
        yield cluster


def test_every_line_is_claimed_and_rehearsed(hub: Path, tmp_path: Path):
    with ClusterOfOne(tmp_path / "node", hub, OVERRIDES, runs_jobs=False) as cluster:
        typing("rehearsed", [*TYPED, *SLURM], cluster, rehearse=True)
        assert [ran.line for ran in cluster.log] == [*TYPED[1:], *SLURM]
        assert INSTALL.match(TYPED[0])
        assert len(list(Path(cluster.environment["JOBS"]).glob("*.log"))) == 4, "four jobs, which bash can read"


def test_the_block_of_pixi_is_the_first_one_line_by_line():
    assert [words_of(line) for line in PIXI] == [words_of(line) for line in TYPED]


def test_recipe_is_typed_and_the_teachers_correct_episodes_are_learned(typed: ClusterOfOne):
    assert [ran.line for ran in typed.log] == TYPED[1:]
    run = typed.checkout / "runs" / "dgpo"
    manifest = json.loads((run / "collect" / "manifest.json").read_text())
    assert manifest["counts"]["kept"] >= 5
    assert read_metrics(run / "distill" / "metrics.jsonl")
    assert [record["step"] for record in read_metrics(run / "train" / "metrics.jsonl")] == [1, 2]


def test_recipe_ends_with_the_seven_sets_in_the_report(typed: ClusterOfOne):
    run = typed.checkout / "runs" / "dgpo"
    results, report = (run / "test" / "results.json").read_text(), (run / "report.html").read_text()
    for name in BENCHMARKS:
        assert f'"{name}' in results
        assert name in report


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("pixi", PIXI), ("slurm", [*TYPED[:7], *SLURM])])
def test_recipe_of_the_other_blocks_ends_well_too(name: str, lines: list[str], hub: Path, tmp_path: Path):
    with ClusterOfOne(tmp_path / "node", hub, OVERRIDES) as cluster:
        typing(name, lines, cluster)
