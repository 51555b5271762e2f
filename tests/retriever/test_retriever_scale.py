import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "retrieval_at_scale.py"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("retrieval_at_scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_client_waits_for_loop_and_batch(scale: ModuleType) -> None:
    took_ms, latencies = scale.simulate(1, lambda size: 4.0, num_queries=10)
    assert latencies == pytest.approx([4 + scale.LOOP_MS_PER_REQUEST] * 10)
    assert took_ms == pytest.approx(10 * (4 + scale.LOOP_MS_PER_REQUEST))


def test_many_clients_fill_the_batches(scale: ModuleType) -> None:
    """Worker bound: batches of 8 in 10 ms. Loop bound: a batch costs less than its requests."""
    took_ms, latencies = scale.simulate(64, lambda size: 10.0, max_batch=8)
    assert len(latencies) / took_ms == pytest.approx(8 / 10, rel=0.02)
    took_ms, latencies = scale.simulate(64, lambda size: 0.001)
    assert len(latencies) / took_ms == pytest.approx(1 / scale.LOOP_MS_PER_REQUEST, rel=0.02)


def test_a_gpu_pass_is_bound_by_memory_then_by_arithmetic(scale: ModuleType) -> None:
    """32.3 GB at 4.3 TB/s are 7.5 ms; 512 queries are 16.5 TFLOP, 27.5 ms, and their scores 20 ms more."""
    assert scale.gpu_search_ms(1) == pytest.approx(7.5, rel=0.02)
    assert scale.gpu_search_ms(512) == pytest.approx(27.5 + 20, rel=0.02)


def test_the_script_prints_its_tables(scale: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(scale, "SIMULATED_MS", 100.0)
    monkeypatch.setattr(sys, "argv", ["retrieval_at_scale.py"])
    scale.main()
    printed = capsys.readouterr().out
    assert printed.count("| setting |") == 4
    assert "nan" not in printed.split("| CPU node")[0]
