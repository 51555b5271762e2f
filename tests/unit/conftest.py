"""What a command has learned of the hub in one test, no other one may know."""

import os
import sys
from collections.abc import Iterator

import pytest

OFFLINE = "HF_HUB_OFFLINE"
REMEMBERED = {"dgpo.config.model_files": "hub_answers", "dgpo.hardware.shapes": "_hub_shape"}


@pytest.fixture(autouse=True)
def unknown_hub() -> Iterator[None]:
    """A command that finds no hub says so to the library and to processes that it starts; here that ends with it."""
    for module, name in REMEMBERED.items():
        remembered = getattr(sys.modules.get(module), name, None)
        if hasattr(remembered, "cache_clear"):  # a test's own stands there in some modules
            remembered.cache_clear()
    constants = sys.modules.get("huggingface_hub.constants")
    variable, constant = os.environ.get(OFFLINE), getattr(constants, OFFLINE, None)
    yield
    os.environ.pop(OFFLINE, None)
    if variable is not None:
        os.environ[OFFLINE] = variable
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_OFFLINE = bool(variable) if constant is None else constant
