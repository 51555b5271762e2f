"""The trace on a terminal: coloured by kind, as it comes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dgpo.ask.asker import Asker, QuestionError, ending, sources
from dgpo.ask.trace import Piece, titles_of

STYLES = {"think": "blue", "search": "yellow", "information": "green", "answer": "bold", "text": "dim", "note": "red"}
LABEL_WIDTH = 13
SOURCE_CHARS = 100  # shown per passage
# A model or a passage may hold escape sequences, which a terminal would obey.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TerminalTrace:
    """Prints pieces; a label opens each run of one kind."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._kind: str | None = None
        self._started = False

    def show(self, piece: Piece) -> None:
        """Passages are folded to their titles: their texts follow as sources."""
        folded = " · ".join(titles_of(piece.text)) if piece.kind == "information" else ""
        text = printable(folded or piece.text)
        if piece.kind != self._kind:
            if not text.strip():
                return
            self._open(piece.kind)
        if not self._started:
            text = text.lstrip()
        self._started = self._started or bool(text)
        self.console.print(Text(text, STYLES[piece.kind]), end="", soft_wrap=True)

    def close(self) -> None:
        if self._kind is not None:
            self.console.print()
        self._kind = None

    def _open(self, kind: str) -> None:
        self.close()
        self._kind, self._started = kind, False
        self.console.print(
            Text(f"{kind:<{LABEL_WIDTH}}", f"reverse {STYLES[kind]}" if kind == "answer" else "dim"), end=""
        )


def printable(text: str) -> str:
    """The text without control characters but tabs and line ends."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


async def answer_once(asker: Asker, question: str, console: Console) -> None:
    """Asks one question and prints the trace, which ends with the answer, then the sources, and how long it took.

    Raises:
        QuestionError: it cannot be asked.
    """
    started = time.perf_counter()
    trace = TerminalTrace(console)
    try:
        trajectory = await asker.ask(question, trace.show)
    finally:
        trace.close()
    for number, source in enumerate(sources(trajectory), start=1):
        beginning = " ".join(source["text"].split())[:SOURCE_CHARS]
        console.print(Text(printable(f"  [{number}] {source['title']}: {beginning}"), "green dim"), soft_wrap=True)
    seconds = time.perf_counter() - started
    if ending(trajectory):
        console.print(Text(ending(trajectory), "red"))
    searches = "1 search" if trajectory.num_searches == 1 else f"{trajectory.num_searches} searches"
    console.print(Text(f"{searches}, {seconds:.1f} s", "dim"))


def prompt_loop(
    asker: Asker,
    console: Console,
    *,
    run: Callable[[Coroutine[Any, Any, None]], None],
    examples: Sequence[str] = (),
) -> None:
    """Asks what is typed, until an empty line, Ctrl-D or Ctrl-C. Ctrl-C during an answer ends that answer only.

    Args:
        run: runs one answer to its end, such as `asyncio.Runner.run`.
        examples: questions to begin with.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # with it, `input` has line editing and a history

    for example in examples:
        console.print(Text(f"  {printable(example)}", "dim"))
    console.print(Text("Type a question; an empty line ends. Ctrl-C stops an answer.", "dim"))
    while True:
        try:
            question = input("? ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not question.strip():
            return
        try:
            run(answer_once(asker, question, console))
        except QuestionError as error:
            console.print(Text(str(error), "red"))
        except KeyboardInterrupt:
            console.print(Text("stopped", "dim"))
