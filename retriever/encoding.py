"""Passages encoded in numbered parts: the unit of work, of resuming after a kill, and of spreading over GPUs.

A part file appears whole or not at all, and holds the same bytes whoever encodes it: parts have fixed borders, and a
vector does not depend on other parts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from retriever.corpus import Corpus, read_offsets
from retriever.encoder_config import EncoderConfig
from retriever.encoders import Encoder
from retriever.errors import RetrieverError
from retriever.manifest import CORPUS_FILE, OFFSETS_FILE

# Called with the number of passages encoded so far, and of all; first with what was there at the start
Progress = Callable[[int, int], None]

PASSAGES_PER_PART = 4096
TEXTS_FILE = "texts.npy"


@dataclass(frozen=True)
class EncodingJob:
    """What is encoded where: enough for a worker on another machine that sees the same files."""

    folder: Path  # holds a folder per corpus, `texts.npy` and the parts
    corpora: tuple[str, ...]
    encoder: EncoderConfig
    passages_per_part: int = PASSAGES_PER_PART


class EncodedParts:
    """The texts of a job, its part files, and the vectors in them."""

    def __init__(self, job: EncodingJob) -> None:
        self.job = job
        self._corpora = [_open_corpus(job.folder / name) for name in job.corpora]
        # One row per text to encode: the number of its corpus, and its row there
        self._texts = np.load(job.folder / TEXTS_FILE, mmap_mode="r", allow_pickle=False)
        self._paths: dict[int, Path] = {}
        self._mapped: dict[int, np.ndarray] = {}

    @property
    def num_texts(self) -> int:
        return len(self._texts)

    @property
    def num_parts(self) -> int:
        return -(-self.num_texts // self.job.passages_per_part)

    def missing(self) -> list[int]:
        """Numbers of the parts that are still to encode."""
        self._paths = self._list()
        return [number for number in range(self.num_parts) if number not in self._paths]

    def num_passages(self, number: int) -> int:
        return len(self._texts[self._span(number)])

    def num_truncated(self) -> int:
        """Passages that were cut to the encoder's limit, over all parts."""
        return sum(int(path.stem.rsplit("-", 1)[1]) for path in self._list().values())

    def encode(self, number: int, model: Encoder) -> None:
        """Encodes one part and writes it."""
        texts = [self._corpora[corpus][int(row)]["contents"] for corpus, row in self._texts[self._span(number)]]
        before = model.num_truncated
        vectors = model.encode_passages(texts)
        self._check_finite(vectors, number)
        path = self.job.folder / f"part-{number:06d}-{model.num_truncated - before}.npy"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.save(file, vectors.astype(np.float32, copy=False), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def _check_finite(self, vectors: np.ndarray, number: int) -> None:
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            which, row = self._texts[self._span(number)][bad[0]].tolist()
            raise RetrieverError(
                f"the encoder gives {len(bad)} of {len(vectors)} passages of part {number} a vector that is not finite "
                f"(NaN or infinite), the first to row {row} (id {self._corpora[which][row]['id']!r}) of corpus "
                f"{self.job.corpora[which]}: encode with --dtype float32, or with another encoder"
            )

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Vectors `[n, dimension]` of texts by their number."""
        which = numbers // self.job.passages_per_part
        found = None
        for number in np.unique(which):
            part = self._map(int(number))
            if found is None:
                found = np.empty((len(numbers), part.shape[1]), dtype=np.float32)
            mine = which == number
            found[mine] = part[numbers[mine] - number * self.job.passages_per_part]
        assert found is not None
        return found

    def _span(self, number: int) -> slice:
        return slice(number * self.job.passages_per_part, (number + 1) * self.job.passages_per_part)

    def _list(self) -> dict[int, Path]:
        """The part files that are there, by number."""
        return {int(path.stem.split("-")[1]): path for path in self.job.folder.glob("part-*.npy")}

    def _map(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            if number not in self._paths:
                self._paths = self._list()
            if len(self._mapped) >= 64:  # reading goes forward: what was mapped first is done
                self._mapped.pop(next(iter(self._mapped)))
            self._mapped[number] = np.load(self._paths[number], mmap_mode="r", allow_pickle=False)
        return self._mapped[number]


def write_texts(folder: Path, corpora: Mapping[str, Corpus]) -> dict[str, np.ndarray]:
    """List the texts to encode in `folder`, and return the text number of every row of each corpus.

    A text that occurs in several corpora (permuted worlds share passages) is listed once.
    """
    if len(corpora) == 1:
        [(name, corpus)] = corpora.items()
        numbers = {name: np.arange(len(corpus))}
        texts = np.zeros((len(corpus), 2), dtype=np.int32)
        texts[:, 1] = np.arange(len(corpus))
    else:
        known: dict[bytes, int] = {}
        places: list[tuple[int, int]] = []
        numbers = {}
        for which, (name, corpus) in enumerate(corpora.items()):
            numbers[name] = np.empty(len(corpus), dtype=np.int64)
            for row, document in enumerate(corpus):
                key = blake2b(document["contents"].encode(errors="surrogatepass"), digest_size=16).digest()
                if key not in known:
                    known[key] = len(places)
                    places.append((which, row))
                numbers[name][row] = known[key]
        texts = np.array(places, dtype=np.int32)
    np.save(folder / TEXTS_FILE, texts, allow_pickle=False)
    return numbers


def _open_corpus(folder: Path) -> Corpus:
    return Corpus(folder / CORPUS_FILE, read_offsets(folder / OFFSETS_FILE, folder / CORPUS_FILE))


class ProgressPrinter:
    """Writes passages done, their rate and the time left to stderr, every few seconds and at the end."""

    EVERY_S = 5.0

    def __init__(self, done: str = "encoded") -> None:
        self._done = done
        self._started_s = self._printed_s = 0.0
        self._num_before: int | None = None

    def __call__(self, num_done: int, num_all: int) -> None:
        now_s = time.perf_counter()
        if self._num_before is None:
            self._num_before, self._started_s = num_done, now_s
            if num_done:
                print(f"{num_done} of {num_all} passages were {self._done} before", file=sys.stderr, flush=True)
            return
        if now_s - self._printed_s < self.EVERY_S and num_done < num_all:
            return
        self._printed_s = now_s
        each_s = (now_s - self._started_s) / max(1, num_done - self._num_before)
        print(
            f"{self._done} {num_done}/{num_all} passages, {each_s * 1e3:.2f} ms each, "
            f"{each_s * (num_all - num_done):.0f} s left",
            file=sys.stderr,
            flush=True,
        )
