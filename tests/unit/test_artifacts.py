import errno
import json
import os

import pytest

from dgpo import __version__
from dgpo.errors import ConfigError, DataError
from dgpo.files import atomic_path, atomic_write_text
from dgpo.runs.artifacts import prepare_run_folder, read_manifest, write_manifest


@pytest.fixture
def collected(tmp_path):
    folder = tmp_path / "collect"
    atomic_write_text(folder / "part" / "episodes.jsonl", "{}\n")
    write_manifest(folder, stage="collect", inputs={"data": "a.parquet"}, config={"x": 1}, counts={"kept": 3}, seed=7)
    return folder


def test_a_manifest_says_what_made_the_folder(collected):
    manifest = read_manifest(collected, stage="collect")
    assert (manifest["inputs"], manifest["config"], manifest["counts"]) == (
        {"data": "a.parquet"},
        {"x": 1},
        {"kept": 3},
    )
    assert (manifest["stage"], manifest["seed"]) == ("collect", 7)
    assert manifest["versions"]["dgpo"] == __version__
    assert list(manifest["sha256"]) == ["part/episodes.jsonl"]
    assert manifest["created_at"].endswith("+00:00")


def test_a_full_disk_is_told_with_the_name_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.html"
    atomic_write_text(path, "old")

    def fill_up():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device.*report.html"):
        fill_up()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_a_folder_without_a_manifest_is_of_an_unfinished_stage(tmp_path):
    with pytest.raises(DataError, match=r"manifest.json is missing: the stage 'collect' did not finish there"):
        read_manifest(tmp_path, stage="collect")


def test_another_stages_folder_is_refused(collected):
    with pytest.raises(DataError, match="made by stage 'collect', expected 'filter'"):
        read_manifest(collected, stage="filter")


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_changed_file_is_refused(collected, change):
    file = collected / "part" / "episodes.jsonl"
    file.write_text("[]\n") if change == "edit" else file.unlink()
    with pytest.raises(DataError, match=r"episodes.jsonl is missing or changed"):
        read_manifest(collected, stage="collect")


@pytest.mark.parametrize("text", ["{", json.dumps({"stage": "collect"}), "[]"])
def test_what_is_no_manifest_is_refused(collected, text):
    (collected / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="is no manifest"):
        read_manifest(collected, stage="collect")


def test_a_run_folder_is_never_taken_in_silence(tmp_path):
    folder = prepare_run_folder(tmp_path / "runs" / "a", resume=False)
    assert prepare_run_folder(folder, resume=False) == folder, "an empty folder is free"
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"runs/a exists: continue it with resume=true"):
        prepare_run_folder(folder, resume=False)
    assert prepare_run_folder(folder, resume=True) == folder


def test_a_file_in_the_place_of_a_run_folder_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError):
        prepare_run_folder(tmp_path / "a", resume=False)


def write_half(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk is full")


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk is full"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
