"""The README's recipe for real hardware, typed: each line as printed, from `download` to `report`, on the CPU.

A hub of our own holds data and models in the layouts of the real one (tests/e2e/local_hub.py); what differs from a GPU
node stands in one file of overrides. No stage's output is placed by hand. Every line is also rehearsed, the stages as
dry runs by that file, in a fraction of the time. Lines, seconds and exit statuses are written to runs/readme/. The
commands that a page gives to the users of the authors' release are typed in the same way, `train` and `test` dry; and
where the recipe was typed, all that README and docs print besides (tests/e2e/rehearsal.py).
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
from tests.e2e.hub_cache import provide
from tests.e2e.local_hub import LLAMAS, SIZES
from tests.e2e.pixi import command
from tests.e2e.rehearsal import rehearsed

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
    "test.upstream_batch_size=4",
]
TYPED, PIXI, SLURM = BLOCKS
# Of 32 GPUs, and no more than the hub's questions.
BATCHES = ["distill.batch_size=32", "train.batch_size=32", "train.mini_batch_size=32"]
REFUSED = {  # what cannot end well here
    "pixi run download download.what=[nq_annotations]": "does not answer",  # another host than the hub's
    "RAY_ADDRESS=node0:6379 python -m dgpo train hardware=h200x8xN hardware.num_nodes=4 ...": "finds no GPUs",
}
INSTALL = re.compile(r"bash scripts/install\.sh (gpu|cpu|retriever|retriever-gpu)")
STAGES = ("collect", "distill", "train", "test", "report")
SERVER = ["python", "-m", "retriever.serve"]
RELEASE_PAGE = (ROOT / "docs" / "from-the-release.md").read_text()
RELEASE_ROWS = re.findall(r"^\| (-|`[^`]*`) \| `([^`]*)` \| .+ \|$", RELEASE_PAGE, re.MULTILINE)
# The commands of the release's README; its installation of pixi and `git clone` are not of the project.
RELEASE = """
pixi install -a
pixi task list
pixi run login-hf
pixi run download
pixi run download-corpus
pixi run download-dataset
pixi run start
pixi run login-wandb
pixi run train
pixi run train {data_name} {student} {teacher} {exp_name}
pixi run test {data_name} {model} {exp_name}
pixi run format-toml
""".strip().splitlines()
READY = "python -c \"import urllib.request as u; u.urlopen('http://node0:8000/ready')\""


def words_of(line: str) -> list[str]:
    """What the line executes: a task of pixi's by its command, `dgpo X` as `python -m dgpo X`."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["pixi", "run"]:
        words = command(words[1:], ROOT / "pixi.toml")
    return ["python", "-m", *words] if words[0] == "dgpo" else words


def play(cluster: ClusterOfOne, lines: list[str], *, rehearse: bool = False, ready: str = READY) -> None:
    """Runs the lines in their order; the first that fails ends it. Of installations the lock alone is looked for."""
    for line in lines:
        words = words_of(line)
        is_dry = rehearse and words[2:3] == ["dgpo"] and words[3] in STAGES
        cluster.write_overrides([*OVERRIDES, *(["dry_run=true"] if is_dry else [])])
        if words[:2] == ["pixi", "exec"]:  # another project's tool, which pixi fetches
            continue
        if match := INSTALL.fullmatch(" ".join(words)):  # what it does: tests/unit/test_install_script.py
            assert "--hash=sha256:" in (ROOT / "requirements" / f"{match[1]}.lock").read_text()
            continue
        ran = cluster.serve(line, ready) if words[:3] == SERVER else cluster.run(line)
        if is_dry and words[3] == "report":  # rehearsed, no stage has written anything to show
            assert ran.rc == 1, ran.output
            assert "holds no test results and no training metrics" in ran.output
            continue
        assert ran.rc == 0, f"{line}\n{ran.output[-6000:]}"


def write_log(name: str, log: list[Ran]) -> None:
    path = ROOT / "runs" / "readme" / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{ran.seconds:.1f}\t{ran.rc}\t{ran.line}" for ran in log]
    path.write_text("\n".join(["seconds\trc\tline", *rows, f"{sum(ran.seconds for ran in log):.1f}\t\ttotal", ""]))


@pytest.fixture(scope="session")
def hub(pytestconfig: pytest.Config) -> Path:
    return provide(pytestconfig.cache.mkdir("local_hub"), make_hub)


def make_hub(folder: Path) -> None:
    result = run_command("-m", "tests.e2e.local_hub", str(folder), timeout_s=1200)
    assert result.returncode == 0, result.stderr[-3000:]


def typing(name: str, lines: list[str], cluster: ClusterOfOne, *, rehearse: bool = False, ready: str = READY) -> None:
    try:
        play(cluster, lines, rehearse=rehearse, ready=ready)
    finally:
        write_log(name, cluster.log)


def test_the_hub_is_not_made_twice(hub: Path):
    def never(_: Path) -> None:
        raise AssertionError("the hub is there already")

    assert provide(hub.parent, never) == hub


def test_every_command_of_the_release_has_its_row_and_is_typed(hub: Path, tmp_path: Path):
    assert [there.strip("`") for there, _ in RELEASE_ROWS if there != "-"] == RELEASE
    lines = [here for _, here in RELEASE_ROWS]
    variables = re.search(r"```toml\n(.*?)```", RELEASE_PAGE, re.DOTALL)
    assert variables
    with ClusterOfOne(tmp_path / "node", hub, OVERRIDES) as cluster:
        manifest = cluster.checkout / "pixi.toml"
        manifest.unlink()
        manifest.write_text(f"{(ROOT / 'pixi.toml').read_text()}\n{variables[1]}")
        logins = {
            "HF_TOKEN": "hf_of_a_user",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": cluster.environment["HF_ENDPOINT"],
        }
        cluster.environment |= {**logins, "HOME": str(tmp_path)}
        for name in ("RETRIEVER_DATA_PATH", "EXP_ROOT", "DATA_ROOT"):
            cluster.environment.pop(name, None)
        typing("release", lines, cluster, rehearse=True, ready=READY.replace("node0", "127.0.0.1"))
        assert [ran.line for ran in cluster.log] == lines[1:-1], "all but the installation and tombi"
        planned = {ran.line: ran.output for ran in cluster.log}
    bare, full = (planned[here] for there, here in RELEASE_ROWS if there.startswith("`pixi run train"))
    assert "omron-sinicx/Qwen2.5-0.5B-Instruct-kd" in full
    assert strip_times(bare) == strip_times(full), "bare, it has these arguments"


def strip_times(output: str) -> str:
    """A command's output without numbers of seconds and the like, which differ from run to run."""
    return re.sub(r"[\d.]+", "", output)


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


def test_what_the_pages_print_besides_is_run_or_rehearsed(typed: ClusterOfOne):
    typed.write_overrides([*OVERRIDES, *BATCHES])
    ran = typed.run("python -m tests.e2e.rehearsal")
    lines = [Ran(**json.loads(line)) for line in ran.output.splitlines() if line.startswith("{")]
    write_log("besides", lines)
    assert [each.line for each in lines] == list(rehearsed())
    assert [(each.line, each.output[-600:]) for each in lines if each.rc and each.line not in REFUSED] == []
    for line, reason in REFUSED.items():
        assert [reason in each.output for each in lines if each.line == line] == [True]
    assert ran.rc == 0, ran.output[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("pixi", PIXI), ("slurm", [*TYPED[:7], *SLURM])])
def test_recipe_of_the_other_blocks_ends_well_too(name: str, lines: list[str], hub: Path, tmp_path: Path):
    with ClusterOfOne(tmp_path / "node", hub, OVERRIDES) as cluster:
        typing(name, lines, cluster)


@pytest.mark.slow
def test_recipe_with_the_llama_pair_ends_well_too(hub: Path, tmp_path: Path):
    pair = f"pair=llama8b_1b teacher.path={LLAMAS[0].name}"
    lines = [line.replace("pair=qwen3b_05b", pair) for line in TYPED]
    with ClusterOfOne(tmp_path / "node", hub, OVERRIDES) as cluster:
        typing("llama", lines, cluster)
        manifest = json.loads((cluster.checkout / "runs" / "dgpo" / "collect" / "manifest.json").read_text())
    assert manifest["counts"]["kept"] >= 5
