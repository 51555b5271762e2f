"""What a policy writes, cut into what it thinks, searches and answers while it is still being written."""

from __future__ import annotations

import re
from dataclasses import dataclass

TAGGED = ("think", "search", "answer")
_TAGS = [f"<{slash}{name}>" for name in TAGGED for slash in ("", "/")]


@dataclass(frozen=True)
class Piece:
    """A stretch of the trace; pieces of one kind that follow each other belong together.

    `kind` is think, search or answer (of the policy, tags left out), text (of the policy, in no tag), information (what
    a search brought) or note (of the environment).
    """

    kind: str
    text: str


def titles_of(information: str) -> list[str]:
    """The titles of the passages in an observation (`dgpo.agent.protocol.render_passages`)."""
    return [title.strip('"') for title in re.findall(r"^Doc \d+\(Title: (.*?)\) ", information, re.MULTILINE)]


class TagStream:
    """Feeds on text as it comes, in portions of any size, and gives the same pieces however it was cut.

    An opening tag begins its kind, also inside another that was not closed; a closing tag ends its own kind only. What
    may be the beginning of a tag waits for the next portion.
    """

    def __init__(self) -> None:
        self._kind = "text"
        self._waiting = ""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that `text` completes."""
        text, pieces = self._waiting + text, []
        while "<" in text:
            before, rest = text[: text.index("<")], text[text.index("<") :]
            pieces.append(Piece(self._kind, before))
            tag = next((tag for tag in _TAGS if rest.startswith(tag)), None)
            if tag is None and any(each.startswith(rest) for each in _TAGS):
                text = rest
                break
            name = (tag or "").strip("</>")
            if tag is None or (tag.startswith("</") and name != self._kind):
                length = 1 if tag is None else len(tag)
                pieces.append(Piece(self._kind, rest[:length]))
                text = rest[length:]
                continue
            self._kind = "text" if tag.startswith("</") else name
            text = rest[len(tag) :]
        else:
            pieces.append(Piece(self._kind, text))
            text = ""
        self._waiting = text
        return [piece for piece in pieces if piece.text]

    def end_turn(self) -> list[Piece]:
        """What still waits, as it stands; the next turn begins outside of all tags."""
        rest = [Piece(self._kind, self._waiting)] if self._waiting else []
        self._kind, self._waiting = "text", ""
        return rest
