"""The one kind of mistake that a user of the retriever can make."""

from __future__ import annotations


class RetrieverError(ValueError):
    """Input, options or surroundings that cannot work: one line that says what is wrong and what to do.

    Attributes:
        exit_code: with which a command ends.
    """

    exit_code = 1
