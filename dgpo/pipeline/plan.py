"""Which stages make a table of the paper, in order, each once however many rows share it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.config.stages import MODEL_STEPS, reported_model, stage_model
from dgpo.evaluation import gate
from dgpo.evaluation.paper import ARMS, BASELINES, ROWS, RULES, TEACHERLESS, UNTRAINED
from dgpo.runs.artifacts import MANIFEST

# The folder that shows a stage to be complete, below its run folder.
RESULTS = {"collect": "collect", "distill": "distill", "train": "train/model", "test": "test", "arcap": "arcap"}
# What a stage writes last.
LAST_FILES = {"test": "results.json", "arcap": "arcap.json"}
ARCAP_SETS = ("nq", "musique")  # the paper's
START = "start"  # the run folder in which the cold start of table=gate is sampled


@dataclass(frozen=True)
class PlannedStage:
    """One command `python -m dgpo <stage> <overrides>`.

    Attributes:
        name: unique in a plan, also of its log: "qwen3b_05b/dgpo/train".
        models: of a test, what it tests: name in the table -> checkpoint. The last step comes first.
        mode: how they are asked, where not as agents.
    """

    name: str
    stage: str
    run_dir: Path
    overrides: tuple[str, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    mode: str | None = None

    @property
    def config(self) -> Config:
        """As the stage will see it, but for models that turn out to be one."""
        return load_config([*self.overrides, *self._tested(self.models)])

    @property
    def command(self) -> list[str]:
        """The stage and its overrides, now that the stages before it are done."""
        return [self.stage, *self.overrides, *self._tested(distinct(self.models).values())]

    def _tested(self, names: Iterable[str]) -> list[str]:
        names = list(dict.fromkeys(names))
        modes = [f"test.modes.{name}={self.mode}" for name in names] if self.mode else []
        return [*(f"test.models.{name}={self.models[name]}" for name in names), *modes]

    @property
    def is_done(self) -> bool:
        """Whether what it writes last is there."""
        return (self.run_dir / RESULTS[self.stage] / LAST_FILES.get(self.stage, MANIFEST)).exists()

    @property
    def has_begun(self) -> bool:
        """Whether it must be resumed."""
        return (self.run_dir / self.stage).is_dir()


@dataclass
class Plan:
    """Stages in an order in which each finds its inputs, and the test of each row."""

    stages: list[PlannedStage] = field(default_factory=list)
    results: dict[str, PlannedStage] = field(default_factory=dict)  # row -> its test
    runs: dict[str, Path] = field(default_factory=dict)  # row -> run folder of its training

    def add(self, stage: PlannedStage) -> None:
        if all(stage.name != planned.name for planned in self.stages):
            self.stages.append(stage)


def distinct(models: Mapping[str, str]) -> dict[str, str]:
    """Name -> the first name of the same checkpoint, by the steps that the training left beside its models."""
    first: dict[tuple[Path, int] | str, str] = {}
    return {name: first.setdefault(_identity(Path(path)), name) for name, path in models.items()}


def _identity(model: Path) -> tuple[Path, int] | str:
    """(folder of the stage, step) where the stage says which step a model is; else its path."""
    in_models = model.parent.name == "models"
    stage = model.parents[1] if in_models else model.parent
    path = stage / MODEL_STEPS
    steps = json.loads(path.read_text()) if path.exists() else {}
    name = model.name if in_models else "model"
    return (stage, steps[name]) if name in steps else str(model)


def row_models(row: str, config: Config) -> dict[str, str]:
    """The checkpoints of a row: its last step; the best on validation; what the paper reports.

    The best of a cold start is by its held-out loss, which is also what later stages start from; the paper does not say
    which epoch it reports, TAID's library keeps the best.
    """
    stage = config.stages[-1]
    last, models = stage_model(config, stage), Path(config.run_dir) / stage / "models"
    if stage == "train":
        paper = reported_model(config, "train") if RULES.get(row, "").startswith("step_") else last
        paper = models / RULES[row] if RULES.get(row) == "before_collapse" else paper
        best = {f"{row}-best": models / "best"} if config.data.validation_file else {}
        found = {row: last, **best, f"{row}-paper": paper}
    elif config.distill.held_out_share and config.distill.loss != "distillm":
        found = {row: models / "last", f"{row}-best": last, f"{row}-paper": last}
    else:
        found = {row: last}
    return {name: str(path) for name, path in found.items()}


def plan_table(
    table: str,
    folder: Path,
    shared: Path,
    inputs: Sequence[str],
    overrides: Sequence[str],
    rows: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """The stages behind the rows of a table, for one pair.

    The teacher's episodes are collected once, and a cold start is shared by all rows that begin with the same loss.

    Args:
        table: a key of `ROWS`.
        folder: one run folder for each row is made below it.
        shared: instead of `folder`, for the rows that no teacher takes part in: pairs with one student share them.
        inputs: overrides that every stage gets (models, data, retriever).
        overrides: the user's, laid over everything.
        rows: row -> overrides of its own, laid over those.
    """
    plan = Plan()
    config = load_config([*inputs, *overrides])
    own_settings = {row: arm.own(config.teacher.path) for row, arm in ARMS.items()}
    rows = {row: [*own_settings.get(row, ()), *(rows or {}).get(row, ())] for row in ROWS[table]}
    tested = table in ("main", "ablation", "contrasts", "pairs", "gate")

    def stage(row: str, name: str, *more: str, experiment: str | None = None) -> PlannedStage:
        own = [f"experiment={experiment}"] if experiment else []
        run_dir = (shared if row in TEACHERLESS else folder) / row
        everything = (*own, *inputs, *more, *overrides, *rows.get(row, ()), f"run_dir={run_dir}")
        return PlannedStage(f"{run_dir.parent.name}/{row}/{name}", name, run_dir, everything)

    def test(row: str, models: Mapping[str, str]) -> None:
        base = stage(row, "test")
        plan.results[row] = replace(base, models=models, mode=BASELINES.get(row))
        plan.add(plan.results[row])

    def sample_start(model: str) -> None:
        """On validation questions: what decides about the arms looks at no test question."""
        file = config.data.validation_file
        asked = [f"data.test_files.{START}={file}", f"test.sets=[{START}]"] if file else []
        base = stage(START, "test", *asked, "test.samples=4", "test.temperature=1")
        plan.add(replace(base, models={START: model}))

    _plan_teacher(plan, config, inputs, overrides)
    reported: dict[str, str] = {}
    for row in ROWS[table]:
        preset = ARMS[row].preset if row in ARMS else row
        if preset in UNTRAINED:
            models_of_row = load_config([*inputs, *overrides, *rows[row]])
            models = {row: (models_of_row.teacher if preset == "teacher" else models_of_row.student).path or ""}
        else:
            config_of_row = load_config([f"experiment={preset}", *inputs, *overrides, *rows[row]])
            settings = _plan_training(plan, row, preset, stage, folder, config_of_row)
            plan.runs[row] = Path(settings.run_dir)
            models = row_models(row, settings)
            if table in gate.TABLES:  # what RL starts from, and its last step
                models = {row: str(stage_model(settings, settings.stages[-1]))}
            if table in gate.TABLES and row == "kd":
                sample_start(models[row])
        reported[row] = models.get(f"{row}-paper", models[row])
        if tested:
            test(row, models)
    if table == "arcap":
        sets = [name for name in ARCAP_SETS if name in config.data.test_files]
        chosen = [f"test.sets=[{','.join(sets)}]"] if sets else []
        base = stage("arcap", "arcap", *chosen)
        plan.add(PlannedStage(base.name, "arcap", folder, (*base.overrides[:-1], f"run_dir={folder}"), reported))
    return plan


def _plan_training(
    plan: Plan, row: str, preset: str, make: Callable[..., PlannedStage], folder: Path, settings: Config
) -> Config:
    """Plans the stages of a row that is trained. Returns its settings, with its run folder."""
    init: list[str] = []
    for name in settings.stages:
        if name == "collect":
            plan.add(make("teacher", "collect"))
            continue
        episodes = [f"distill.episodes={folder / 'teacher' / 'collect'}"]
        if name == "distill" and "train" in settings.stages[settings.stages.index("distill") :]:
            cold_start = settings.distill.loss
            plan.add(make(cold_start, "distill", *episodes, experiment=cold_start))
            init = [f"train.init={folder / cold_start / 'distill' / 'model'}"]
            continue
        plan.add(make(row, name, *(episodes if name == "distill" else init), experiment=preset))
    settings.run_dir = str(make(row, settings.stages[-1]).run_dir)
    return settings


def _plan_teacher(plan: Plan, config: Config, inputs: Sequence[str], overrides: Sequence[str]) -> None:
    """Where the teacher is a folder that `teacher_ppo` has to make first, that stage comes first."""
    path = Path(config.teacher.path or "")
    made_here = config.teacher.init and path.parts[-2:] == ("train", "model")
    if made_here:
        run_dir = path.parents[1]
        everything = ("experiment=teacher_ppo", *inputs, *overrides, f"run_dir={run_dir}")
        plan.add(PlannedStage(f"{run_dir.name}/train", "train", run_dir, everything))
