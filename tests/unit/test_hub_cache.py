"""The test hub is made once: found again while nothing that made it has changed, whole or not there."""

import json

import pytest

from tests.e2e import hub_cache
from tests.e2e.hub_cache import MADE_OF, digest_of, provide


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A checkout of one source, a cache, and how often a hub was made in it."""
    monkeypatch.setattr(hub_cache, "ROOT", tmp_path)
    (tmp_path / "source.py").write_text("steps = 1")
    (tmp_path / "cache").mkdir()
    times = []

    def make(folder):
        times.append(folder)
        (folder / "model").write_text((tmp_path / "source.py").read_text())
        sources = {name: digest_of(name) for name in ("source.py", "package torch")}
        (folder / MADE_OF).write_text(json.dumps({"sources": sources}))

    return tmp_path, make, times


def test_a_second_session_finds_what_the_first_made(made):
    root, make, times = made
    first = provide(root / "cache", make)
    assert provide(root / "cache", make) == first
    assert len(times) == 1
    assert (first / "model").read_text() == "steps = 1"


def test_a_changed_source_makes_another_and_the_old_one_goes(made):
    root, make, times = made
    first = provide(root / "cache", make)
    (root / "source.py").write_text("steps = 2")
    second = provide(root / "cache", make)
    assert (second / "model").read_text() == "steps = 2"
    assert [path.name for path in (root / "cache").iterdir()] == [second.name]
    assert first != second
    assert len(times) == 2


def test_another_version_of_a_package_makes_another(made, monkeypatch):
    root, make, times = made
    provide(root / "cache", make)
    monkeypatch.setattr(hub_cache, "version", lambda _: "0.0")
    provide(root / "cache", make)
    assert len(times) == 2


def test_a_making_that_breaks_off_leaves_nothing(made):
    root, make, _ = made

    def broken(folder):
        make(folder)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        provide(root / "cache", broken)
    assert list((root / "cache").iterdir()) == []


def test_two_sessions_that_make_the_same_keep_one(made):
    root, make, _ = made

    def beaten(folder):
        provide(root / "cache", make)  # the other session is first
        make(folder)

    found = provide(root / "cache", beaten)
    assert [path.name for path in (root / "cache").iterdir()] == [found.name]
