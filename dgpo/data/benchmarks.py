"""The paper's seven test sets and two training sets, as FlashRAG lays them out: `<set>/<split>.jsonl`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from dgpo.config.load import ConfigError
from dgpo.data.lines import BadLines
from dgpo.data.questions import Question, read_questions
from dgpo.data.rows import DataError


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    Attributes:
        test_split: the split that is tested on; the answers of three test splits are not public.
        num_test, num_train: published sizes; None: not trained on.
    """

    test_split: str
    num_test: int
    num_train: int | None = None


BENCHMARKS = {
    "nq": Benchmark("test", 3_610, 79_168),
    "triviaqa": Benchmark("test", 11_313),
    "popqa": Benchmark("test", 14_267),
    "hotpotqa": Benchmark("dev", 7_405, 90_447),
    "2wikimultihopqa": Benchmark("dev", 12_576),
    "musique": Benchmark("dev", 2_417),
    "bamboogle": Benchmark("test", 125),
}


def check_names(names: list[str], *, key: str, training: bool) -> None:
    """Raises `ConfigError` for a set that is unknown, named twice, or (where `training`) has no training questions."""
    choices = [name for name, each in BENCHMARKS.items() if each.num_train or not training]
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{key}: unknown set {name!r}: {hint}expected some of {', '.join(choices)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{key}={names}: a set is named twice")


def load_benchmark(
    folder: Path, name: str, *, training: bool, allow_other_sizes: bool, bad: BadLines
) -> list[Question]:
    """The test or training questions of a set.

    Raises:
        DataError: the file is not there, or does not have the published number of lines that can be used.
    """
    benchmark = BENCHMARKS[name]
    split = "train" if training else benchmark.test_split
    path = folder / name / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: `python -m dgpo download download.what=[benchmarks]` fetches it, or set "
            "prepare.benchmarks to a folder of FlashRAG's layout (<set>/<split>.jsonl)"
        )
    num_bad = len(bad.reasons)
    questions = read_questions(path, bad)
    expected = benchmark.num_train if training else benchmark.num_test
    bad.check()
    found = len(questions) + len(bad.reasons) - num_bad
    if found != expected and not allow_other_sizes:
        raise DataError(
            f"{path} has {found:,} questions, the published {name} has {expected:,}: download it again, or allow it "
            "with prepare.allow_other_sizes=true"
        )
    return questions
