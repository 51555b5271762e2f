"""Cheap checks before anything expensive starts. Each problem is a `ConfigError`: one line that names the fix.

The checks of a stage return notes. A real run has none; a dry run has one for each input that cannot be looked into
yet: what an earlier stage of the experiment will write, and hub models where there is no hub to ask.
"""

from dgpo.checks.ask import check_ask
from dgpo.checks.collect import check_collect
from dgpo.checks.distill import check_distill
from dgpo.checks.settings import check_named, check_pipeline, check_settings
from dgpo.checks.test import check_test
from dgpo.checks.train import check_train

__all__ = [
    "check_ask",
    "check_collect",
    "check_distill",
    "check_named",
    "check_pipeline",
    "check_settings",
    "check_test",
    "check_train",
]
