"""A dense and BM25 passage retriever behind Search-R1's HTTP protocol.

Its own package: it shares a wire format with `dgpo`, not code.
`python -m retriever.build` turns a corpus into an index folder, `python -m retriever.convert` a published index;
`python -m retriever.serve` serves such folders, `python -m retriever.recall` tells what an approximate one misses.
"""

from __future__ import annotations
