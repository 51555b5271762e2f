"""The paper's seven test sets and two training sets, as FlashRAG lays them out: `<set>/<split>.jsonl`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from dgpo.data.lines import BadLines
from dgpo.data.questions import Question, read_questions
from dgpo.errors import ConfigError, DataError


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    Attributes:
        test_split: the split that is tested on; the answers of three test splits are not public.
        num_test, num_train: published sizes; None: not trained on.
        sha256: of the test file as FlashRAG publishes it.
        has_evidence: its metadata annotates gold passages.
    """

    test_split: str
    num_test: int
    num_train: int | None = None
    sha256: str = ""
    has_evidence: bool = False

    def file(self, name: str) -> str:
        """The file of the test questions in FlashRAG's layout."""
        return f"{name}/{self.test_split}.jsonl"


BENCHMARKS = {
    "nq": Benchmark("test", 3_610, 79_168, sha256="843bebb083064abb6eb23751f2c8c187e5c448c23900b42ca92f91502a9b7488"),
    "triviaqa": Benchmark("test", 11_313, sha256="8f0891dece17a6a6472c87bf0e8c555c80673853d8dc7780be4d47158ec85290"),
    "popqa": Benchmark("test", 14_267, sha256="f976372fce3d7fe01b070357040391f10bd2710eeaa7c40d21c6574ffcad6cb8"),
    "hotpotqa": Benchmark(
        "dev",
        7_405,
        90_447,
        sha256="434ec155867019396312f3d466ce3406c71fe8a2917f49f63bb646ec5ad2ff52",
        has_evidence=True,
    ),
    "2wikimultihopqa": Benchmark(
        "dev",
        12_576,
        sha256="b4d74d73d1cb3c0632c665a85e1e5060e3411968b807721618cfd2464fc905e3",
        has_evidence=True,
    ),
    "musique": Benchmark(
        "dev",
        2_417,
        sha256="d1cc08bcc91b060ba67c1e12881789e1315fb9f85d46f03a3413dd5e0f2ed02c",
        has_evidence=True,
    ),
    "bamboogle": Benchmark("test", 125, sha256="c9703dae6bb1ceb9e2df77be45da28cb12aa040d2f471507890a461296968f3f"),
}
PINS = {benchmark.file(name): benchmark.sha256 for name, benchmark in BENCHMARKS.items()}  # file -> SHA-256


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
        path = path.with_suffix(".jsonl.gz")
    if not path.is_file():
        path = path.with_suffix("")
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
