"""Answers by question, bounded in bytes; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")

# A slot of the table, its key of three and its value; measured on 64-bit CPython.
ENTRY_BYTES = 500


class LRUCache(Generic[Value]):
    """At most `max_bytes` of values; not thread-safe (the server uses it from its event loop only)."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[tuple[str, str, int], tuple[Value, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: tuple[str, str, int]) -> Value | None:
        """The value of (corpus, query, topk), or None."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: tuple[str, str, int], value: Value, *, value_bytes: int) -> None:
        """Keeps `value`, whose own size is `value_bytes`, and drops what no longer fits."""
        size = ENTRY_BYTES + 4 * len(key[1]) + value_bytes  # a character takes up to 4 bytes
        if size > self._max_bytes:
            return
        if key in self._values:
            self.num_bytes -= self._values[key][1]
        self._values[key] = value, size
        self._values.move_to_end(key)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self.num_bytes -= freed
