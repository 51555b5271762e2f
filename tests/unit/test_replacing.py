"""What `prepare.overwrite=true` and its kin may delete: what our stage made, and nothing else."""

import json

import pytest

from dgpo.__main__ import main
from dgpo.errors import ConfigError
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.replacing import check_target


def made(folder, *, stage="prepare"):
    folder.mkdir(parents=True)
    (folder / "part").mkdir()
    (folder / "part" / "train.parquet").write_text("rows")
    write_manifest(folder, stage=stage, inputs={}, config={}, counts={}, seed=0)
    return folder


def check(path, *, replace=True, inputs=()):
    check_target(path, key="prepare.out", stage="prepare", replace=replace, inputs=inputs)


def test_what_is_not_there_or_empty_or_our_own_may_be_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        check(tmp_path / name, replace=False)
    check(made(tmp_path / "own"))
    with pytest.raises(ConfigError, match=r"own exists: choose another prepare\.out"):
        check(tmp_path / "own", replace=False)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (lambda out: out.write_text("an index"), "it is no folder"),
        (lambda out: out.symlink_to(made(out.with_name("elsewhere"))), "it is no folder"),
        (lambda out: out.symlink_to(out.with_name("nowhere")), "it is no folder"),
        (lambda out: (out / "thesis").mkdir(parents=True), "it holds no manifest.json of ours"),
        (lambda out: (out / "manifest.json").mkdir(parents=True), "it holds no manifest.json of ours"),
        (lambda out: (made(out) / "manifest.json").write_text("{}"), "it holds no manifest.json of ours"),
        (lambda out: made(out, stage="import"), "'import' made it, and not 'prepare'"),
        (lambda out: (made(out) / "part" / "thesis.txt").write_text("x"), "part/thesis.txt in it is not of 'prepare'"),
        (lambda out: (made(out) / "link").symlink_to(out.parent), "link in it is not of 'prepare'"),
    ],
)
def test_whatever_else_is_there_stays(tmp_path, plant, reason):
    plant(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        check(tmp_path / "out")
    assert f"is not replaced: {reason}; move it away" in str(caught.value)


@pytest.mark.parametrize("source", [".", "part/train.parquet"])
def test_a_folder_that_is_or_holds_the_source_stays(tmp_path, source):
    out = made(tmp_path / "out")
    (tmp_path / "alias").symlink_to(out)
    for inputs in ((out / source,), (None, tmp_path / "alias" / source)):
        with pytest.raises(ConfigError, match=r"prepare\.out=.*out holds what is read"):
            check(out, inputs=inputs)


def test_prepare_deletes_neither_its_source_nor_what_lies_beside_it(tmp_path, capsys):
    """Questions, documents and other files of a user in one folder, which is also named as the output."""
    data = tmp_path / "data"
    (data / "docs").mkdir(parents=True)
    (data / "docs" / "a.md").write_text("# Ada\n\nAda wrote it.\n")
    (data / "q.jsonl").write_text(json.dumps({"question": "who?", "answer": "Ada"}) + "\n")
    (data / "thesis.txt").write_text("years of work")
    before = sorted(data.rglob("*"))
    arguments = [f"prepare.source={data / 'q.jsonl'}", f"prepare.documents={data / 'docs'}", "prepare.name=h"]
    assert main(["prepare", *arguments, f"prepare.out={data}", "prepare.overwrite=true"]) == 2
    assert "holds what is read" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert main(["prepare", *arguments, f"prepare.out={other}", "prepare.overwrite=true"]) == 2
    assert "no manifest.json of ours" in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before
    assert (other / "thesis.txt").read_text() == "years of work"


def test_the_tiny_world_is_not_built_over_something_else(tmp_path):
    from dgpo.tinyworld.build import WorldSettings, build_world

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_text("a user's")
    with pytest.raises(ConfigError, match="choose another --out"):
        build_world(tmp_path, WorldSettings(seed=1))
    assert (tmp_path / "data" / "train.parquet").read_text() == "a user's"


def test_compare_writes_over_earlier_comparisons_only(tmp_path, capsys):
    for run in ("a", "b"):
        (tmp_path / run / "train").mkdir(parents=True)
    runs = [str(tmp_path / run) for run in ("a", "b")]
    for _ in range(2):
        assert main(["compare", *runs, f"out={tmp_path / 'new.md'}"]) == 0
    (tmp_path / "notes.md").write_text("mine")
    assert main(["compare", *runs, f"out={tmp_path / 'notes.md'}"]) == 2
    assert "is no comparison: choose another file" in capsys.readouterr().err
    assert (tmp_path / "notes.md").read_text() == "mine"
