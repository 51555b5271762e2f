"""The least recently used answers go first."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """At most `size` values; not thread-safe (the server uses it from its event loop only)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.num_hits = self.num_misses = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        value = self._values.get(key)
        if value is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value) -> None:
        if self._size <= 0:
            return
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)
