"""Checkpoints on the disk: which are trusted, which are kept."""

import json
from types import SimpleNamespace

import pytest

from dgpo.runs.checkpoints import (
    checkpoint_steps,
    damage,
    newest_whole,
    read_seal,
    seal,
    set_aside_later,
    steps_to_delete,
    writing,
)

PREFIX = "step_"


def write(folder, step, text="weights"):
    with writing(folder / f"{PREFIX}{step}") as target:
        (target / "actor").mkdir()
        (target / "actor" / "model.pt").write_text(text)
        (target / "data.pt").write_text("position")
        seal(target, step=step)


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 20, 100):
        write(tmp_path, step)
    return tmp_path


def write_on_a_full_disk(folder):
    with writing(folder / "step_1") as target:
        (target / "model.pt").write_text("half of the ne")
        raise OSError("disk is full")


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path):
    write(tmp_path, 1, "old")
    with pytest.raises(OSError, match="disk is full"):
        write_on_a_full_disk(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"], "the space is given back"
    assert (tmp_path / "step_1" / "actor" / "model.pt").read_text() == "old"
    write(tmp_path, 1, "new")
    assert (tmp_path / "step_1" / "actor" / "model.pt").read_text() == "new"


def test_an_error_for_want_of_space_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match=r"No space left on device.*step_1"), writing(tmp_path / "step_1"):
        raise RuntimeError("unexpected pos 128 vs 0")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(RuntimeError, match="unexpected pos"), writing(tmp_path / "step_1"):
        raise RuntimeError("unexpected pos 128 vs 0")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_every_file_and_the_facts(folder):
    manifest = read_seal(folder / "step_5")
    assert manifest["step"] == 5
    assert list(manifest["files"]) == ["actor/model.pt", "data.pt"]
    sha256 = "5a452459503be70d2ed2fca46dd91e05e820a957f175686a77d03fff80f664fe"  # of "position", by another program
    assert manifest["files"]["data.pt"] == {"size": 8, "sha256": sha256}
    assert damage(folder / "step_5") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "half-written: it has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files": '), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path / "data.pt").unlink(), "data.pt is missing"),
        (lambda path: (path / "actor" / "model.pt").write_text("weigh"), "actor/model.pt has 5 bytes, expected 7"),
        (lambda path: (path / "actor" / "model.pt").write_text("weightz"), "actor/model.pt has changed: SHA-256"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(folder, capsys, change, message):
    change(folder / "step_100")
    assert newest_whole(folder, PREFIX) == folder / "step_20"
    error = capsys.readouterr().err
    assert "step_100 is skipped: " in error
    assert message in error


def test_without_a_whole_checkpoint_there_is_none(folder, capsys):
    for step in (5, 10, 20, 100):
        (folder / f"step_{step}" / "data.pt").unlink()
    assert newest_whole(folder, PREFIX) is None
    assert capsys.readouterr().err.count("data.pt is missing") == 4
    assert newest_whole(folder / "nothing", PREFIX) is None


def test_what_a_run_will_save_again_is_set_aside(folder):
    (folder / "step_100" / "data.pt").unlink()
    (folder / ".step_30.writing").mkdir()
    set_aside_later(folder, PREFIX, folder / "step_10")
    assert checkpoint_steps(folder, PREFIX) == [5, 10]
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["step_100", "step_20"]
    assert not (folder / ".step_30.writing").exists()


def test_other_folders_are_no_checkpoints(folder):
    (folder / "step_last").mkdir()
    (folder / "step_7").mkdir()  # without a manifest
    assert checkpoint_steps(folder, PREFIX) == [5, 10, 20, 100]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "deleted"),
    [
        (2, 0, [10, 20, 30]),
        (2, 1, [10, 30]),  # step 20 is the best
        (1, 2, [30, 40]),
        (0, 0, [10, 20, 30, 40]),  # the newest is always kept
        (9, 1, []),
    ],
)
def test_the_last_and_the_best_are_kept(keep_last, keep_best, deleted):
    scores = {10: 0.3, 20: 0.5, 40: 0.1, 99: 0.9}  # step 99 has no checkpoint, 30 and 50 no score
    assert steps_to_delete([50, 40, 30, 20, 10], scores, keep_last=keep_last, keep_best=keep_best) == deleted


def test_of_equal_scores_the_later_is_kept():
    assert steps_to_delete([1, 2, 3], {1: 0.5, 2: 0.5}, keep_last=1, keep_best=1) == [1]


def test_a_manifest_is_readable_text(folder):
    assert json.loads((folder / "step_5" / "manifest.json").read_text())["versions"]["dgpo"]
