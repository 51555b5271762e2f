"""Every list of overrides that a step of scripts/gpu_smoke.py uses, on a GPU or on the CPU, composes and passes."""

import importlib
import itertools

import pytest

from dgpo.config.load import load_config
from dgpo.hardware.checks import check_engine, check_training
from tests.conftest import ROOT


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    names = ("engines", "training", "generation", "coldstart")
    return {name: importlib.import_module(f"smoke.{name}") for name in names}


@pytest.fixture(params=[True, False], ids=["flash", "no flash"])
def flash(smoke, request, monkeypatch):
    """With flash-attn installed, and without; what looks for it at its import has done so."""
    found = object() if request.param else None
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found if name == "flash_attn" else real(name))
    return request.param


def check(overrides):
    config = load_config(overrides)
    check_engine(config)
    check_training(config)
    return config


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_engines_and_the_training(smoke, flash, device, tmp_path):
    engines, training = smoke["engines"], smoke["training"]
    for packed, offload in itertools.product((engines.can_pack(device), False), engines.OFFLOADS):
        config = check(engines.settings(device, tmp_path, packed=packed, offload=offload))
        assert (config.hardware.attention != "sdpa") == (flash and packed and device == "cuda")
    shared = [*training.hardware(device), *training.inputs(device, tmp_path), "student.path=x", "teacher.path=y"]
    for form in ("exact", "reward"):
        check([*shared, *training.form(form, tmp_path), "train.num_steps=2"])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_generation_and_the_cold_start(smoke, flash, device):
    generation, coldstart = smoke["generation"], smoke["coldstart"]
    check_engine(load_config(generation.settings(device)))
    for sharding, layers in itertools.product(("none", "full"), (None, coldstart.TINY)):
        load_config(coldstart.settings(coldstart.Variant("any", device, sharding=sharding, layers=layers)))
