"""A folder for `dgpo own` from passages and questions of public sets, as the measured one of docs/own.md was made.

    python scripts/bench/own_folder.py --passages passages.jsonl.gz --questions questions.jsonl.gz --out folder

Passages are `{"id", "title", "text"}`, questions `{"question", "golden_answers", "source", "gold_passages"}` with the
ids of passages. Documents are all passages of the titles that answer the chosen questions, and others. PopQA's on
places of birth have one wording, those of NQ each their own; both are divided by document.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

TRAIN = {"popqa": 80, "nq": 80}
HELD_OUT = {"popqa": 30, "nq": 40}
NUM_OTHERS = 200
ONE_WORDING = "In what city was "


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def choose(questions: list[dict[str, Any]], title_of: dict[str, str], generator: random.Random) -> list[dict[str, Any]]:
    """Questions on a title each, that of the first gold passage, which no other has, marked with their split."""
    taken: set[str] = set()
    chosen = []
    generator.shuffle(questions)
    for source in TRAIN:
        splits = ["test"] * HELD_OUT[source] + ["train"] * TRAIN[source]
        for question in questions:
            title = title_of[question["gold_passages"][0]]
            fits = question["question"].startswith(ONE_WORDING) if source == "popqa" else True
            if splits and question["source"] == source and fits and title not in taken:
                taken.add(title)
                line = {"question": question["question"], "answers": question["golden_answers"], "data_source": source}
                chosen.append({**line, "document": title, "split": splits.pop(0)})
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("passages", "questions", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    generator = random.Random(1)
    texts: dict[str, list[str]] = defaultdict(list)
    title_of = {}
    for passage in read(options.passages):
        title_of[passage["id"]] = passage["title"]
        texts[passage["title"]].append(passage["text"])
    chosen = choose(read(options.questions), title_of, generator)
    documents = sorted({question["document"] for question in chosen})
    documents += generator.sample(sorted(set(texts) - set(documents)), NUM_OTHERS)
    options.out.mkdir(parents=True)
    lines = [{"title": title, "text": "\n\n".join(texts[title])} for title in documents]
    for name, records in (("documents", lines), ("questions", chosen)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(lines)} documents, {len(chosen)} questions")


if __name__ == "__main__":
    main()
