"""Which stages make a table of the paper, in order, each once however many rows share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.config.stages import stage_model
from dgpo.evaluation.paper import ROWS, TEACHERLESS
from dgpo.runs.artifacts import MANIFEST

# The folder that shows a stage to be complete, below its run folder.
RESULTS = {"collect": "collect", "distill": "distill", "train": "train/model", "test": "test"}


@dataclass(frozen=True)
class PlannedStage:
    """One command `python -m dgpo <stage> <overrides>`."""

    name: str  # unique in a plan, also of its log: "qwen3b_05b/dgpo/train"
    stage: str
    run_dir: Path
    overrides: tuple[str, ...]

    @property
    def config(self) -> Config:
        """As the stage will see it."""
        return load_config(self.overrides)

    @property
    def is_done(self) -> bool:
        """Whether its last act, the manifest (of a test: the results), is there."""
        result = "results.json" if self.stage == "test" else MANIFEST
        return (self.run_dir / RESULTS[self.stage] / result).exists()

    @property
    def has_begun(self) -> bool:
        """Whether it must be resumed."""
        return (self.run_dir / self.stage).is_dir()


@dataclass
class Plan:
    """Stages in an order in which each finds its inputs, and the test folder of each row."""

    stages: list[PlannedStage] = field(default_factory=list)
    results: dict[str, Path] = field(default_factory=dict)  # row -> run folder of its test

    def add(self, stage: PlannedStage) -> None:
        if all(stage.name != planned.name for planned in self.stages):
            self.stages.append(stage)


def plan_table(table: str, folder: Path, shared: Path, inputs: Sequence[str], overrides: Sequence[str]) -> Plan:
    """The stages behind the rows of a table, for one pair.

    The teacher's episodes are collected once, and a cold start is shared by all rows that begin with the same loss.

    Args:
        table: a key of `ROWS`.
        folder: one run folder for each row is made below it.
        shared: instead of `folder`, for the rows that no teacher takes part in: pairs with one student share them.
        inputs: overrides that every stage gets (models, data, retriever).
        overrides: the user's, laid over everything.
    """
    plan = Plan()

    def stage(row: str, name: str, *more: str, experiment: str | None = None) -> PlannedStage:
        own = [f"experiment={experiment}"] if experiment else []
        run_dir = (shared if row in TEACHERLESS else folder) / row
        everything = (*own, *inputs, *more, *overrides, f"run_dir={run_dir}")
        return PlannedStage(f"{run_dir.parent.name}/{row}/{name}", name, run_dir, everything)

    def test(row: str, checkpoint: str | Path) -> None:
        planned = stage(row, "test", f"test.models.{row}={checkpoint}")
        plan.add(planned)
        plan.results[row] = planned.run_dir

    config = load_config([*inputs, *overrides])
    teacher = _plan_teacher(plan, config, inputs, overrides)
    for row in ROWS[table]:
        if row in ("untrained", "teacher"):
            test(row, teacher if row == "teacher" else config.student.path or "")
            continue
        settings = load_config([f"experiment={row}", *inputs, *overrides])
        init: list[str] = []
        for name in settings.stages:
            if name == "collect":
                plan.add(stage("teacher", "collect"))
                continue
            episodes = [f"distill.episodes={folder / 'teacher' / 'collect'}"]
            if name == "distill" and "train" in settings.stages[settings.stages.index("distill") :]:
                cold_start = settings.distill.loss
                plan.add(stage(cold_start, "distill", *episodes, experiment=cold_start))
                init = [f"train.init={folder / cold_start / 'distill' / 'model'}"]
                continue
            plan.add(stage(row, name, *(episodes if name == "distill" else init), experiment=row))
        settings.run_dir = str((shared if row in TEACHERLESS else folder) / row)
        test(row, stage_model(settings, settings.stages[-1]))
    return plan


def _plan_teacher(plan: Plan, config: Config, inputs: Sequence[str], overrides: Sequence[str]) -> str:
    """The teacher's path; where it is a folder that `teacher_ppo` has to make first, that stage comes first."""
    path = Path(config.teacher.path or "")
    made_here = config.teacher.init and path.parts[-2:] == ("train", "model")
    if made_here:
        run_dir = path.parents[1]
        everything = ("experiment=teacher_ppo", *inputs, *overrides, f"run_dir={run_dir}")
        plan.add(PlannedStage(f"{run_dir.name}/train", "train", run_dir, everything))
    return str(config.teacher.path)
