import fcntl
import hashlib
import json
import random

import pytest
from huggingface_hub import constants

from dgpo.__main__ import main
from dgpo.config.schema import Config
from dgpo.data.benchmarks import PINS
from dgpo.data.download import download
from dgpo.errors import ConfigError, DgpoError
from tests.unit.hub_server import serving

ALL = ("corpus", "index", "train")
CHUNK = 1000  # bytes that are written at once
INDEX = {"part_aa": random.Random(1).randbytes(25_000), "part_ab": random.Random(2).randbytes(9_500)}
SMALL = b'{"question": "who?"}\n'


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with serving() as server:
        server.add(
            "PeterJinGo/wiki-18-corpus", {"wiki-18.jsonl.gz": random.Random(3).randbytes(5_000), "README.md": b""}
        )
        server.add("PeterJinGo/wiki-18-e5-index", INDEX)
        server.add("PeterJinGo/nq_hotpotqa_train", {"train.parquet": b"P" * 500})
        server.add("RUC-NLPIR/FlashRAG_datasets", {"nq/test.jsonl": SMALL})
        yield server


def settings(endpoint, folder, what=("index",), **changes):
    """A configuration; `index__repo="me/mirror"` changes `download.index.repo`."""
    config = Config()
    config.download.endpoint, config.download.folder, config.download.what = endpoint, str(folder), list(what)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config.download
        for each in sections:
            section = getattr(section, each)
        setattr(section, name, value)
    return config


def run(hub, folder, what=("index",), *, free_bytes=None, **changes):
    download(settings(hub.url, folder, what, **changes), free_bytes=free_bytes)


def manifest(folder, what):
    return json.loads((folder / what / "download.json").read_text())["files"]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_everything_arrives_and_is_recorded(hub, tmp_path):
    run(hub, tmp_path, ALL)
    assert files(tmp_path) == [
        "corpus/download.json",
        "corpus/wiki-18.jsonl.gz",
        "index/download.json",
        "index/e5_Flat.index",
        "train/download.json",
        "train/train.parquet",
    ]
    joined = INDEX["part_aa"] + INDEX["part_ab"]
    assert (tmp_path / "index" / "e5_Flat.index").read_bytes() == joined
    entry = manifest(tmp_path, "index")["e5_Flat.index"]
    assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(joined).hexdigest(), 34_500)
    assert entry["commit"] == hub.data_sets["PeterJinGo/wiki-18-e5-index"][0]
    assert (entry["repo"], entry["revision"], entry["endpoint"]) == ("PeterJinGo/wiki-18-e5-index", "main", hub.url)
    assert [(part["name"], part["size"]) for part in entry["parts"]] == [("part_aa", 25_000), ("part_ab", 9_500)]


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    run(hub, tmp_path, ALL)
    hub.refused = True
    run(hub, tmp_path, ALL, free_bytes=lambda folder: 0)


def test_files_in_folders_and_small_files_are_checked_by_their_git_hash(hub, tmp_path):
    run(hub, tmp_path, ["benchmarks"], benchmarks__files=["nq/test.jsonl"], pinned=False)
    assert (tmp_path / "benchmarks" / "nq" / "test.jsonl").read_bytes() == SMALL
    assert list(manifest(tmp_path, "benchmarks")) == ["nq/test.jsonl"]


def test_a_test_set_of_other_bytes_than_the_published_ones_is_refused(hub, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"nq/test\.jsonl .* has SHA-256 .*, not 843bebb.*download\.pinned=false"):
        run(hub, tmp_path, ["benchmarks"], benchmarks__files=["nq/test.jsonl"])
    assert "download.json" not in files(tmp_path)
    monkeypatch.setitem(PINS, "nq/test.jsonl", hashlib.sha256(SMALL).hexdigest())
    run(hub, tmp_path, ["benchmarks"], benchmarks__files=["nq/test.jsonl"])
    assert list(manifest(tmp_path, "benchmarks")) == ["nq/test.jsonl"]


def test_a_listing_without_sizes_is_completed_from_the_files_headers(hub, tmp_path):
    hub.with_sizes = False
    run(hub, tmp_path)
    assert manifest(tmp_path, "index")["e5_Flat.index"]["bytes"] == 34_500


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.cuts = [10_400, 3_000]
    run(hub, tmp_path)
    # Whole chunks are kept: 10 of the first try, 3 of the second. Then part_ab from its start.
    assert hub.ranges == ["", "bytes=10000-", "bytes=13000-", ""]
    assert (tmp_path / "index" / "e5_Flat.index").read_bytes() == INDEX["part_aa"] + INDEX["part_ab"]


@pytest.mark.parametrize(
    ("cuts", "broken_at", "first_range"), [([7_000], 7_000, 7_000), ([25_000, 4_000], 4_000, 4_000)]
)
def test_a_stopped_download_goes_on_in_the_next_run(hub, tmp_path, monkeypatch, cuts, broken_at, first_range):
    hub.cuts = cuts
    # The server stays away after the cut, until the second run.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: setattr(hub, "refused", True))
    with pytest.raises(DgpoError, match=rf"broke off after {broken_at:,} of .* bytes .*: run the same command again"):
        run(hub, tmp_path)
    assert files(tmp_path) == ["index/e5_Flat.index.partial", "index/e5_Flat.index.partial.json"]
    hub.refused, hub.ranges = False, []
    run(hub, tmp_path)
    assert hub.ranges[0] == f"bytes={first_range}-"
    assert (tmp_path / "index" / "e5_Flat.index").read_bytes() == INDEX["part_aa"] + INDEX["part_ab"]


def test_a_wrong_checksum_removes_that_part_and_keeps_those_before(hub, tmp_path):
    hub.served = {"part_ab": b"x" * 9_500}
    with pytest.raises(DgpoError, match=r"part_ab of .* has another checksum than the hub names"):
        run(hub, tmp_path)
    assert (tmp_path / "index" / "e5_Flat.index.partial").read_bytes() == INDEX["part_aa"]
    hub.served, hub.ranges = {}, []
    run(hub, tmp_path)
    assert hub.ranges == [""]
    assert (tmp_path / "index" / "e5_Flat.index").read_bytes() == INDEX["part_aa"] + INDEX["part_ab"]


def test_a_part_that_went_bad_on_disk_is_found_when_the_download_goes_on(hub, tmp_path):
    hub.served = {"part_ab": b"x" * 9_500}
    with pytest.raises(DgpoError):
        run(hub, tmp_path)
    (tmp_path / "index" / "e5_Flat.index.partial").write_bytes(b"y" * 25_000)
    with pytest.raises(DgpoError, match=r"part_aa of .* has another checksum"):
        run(hub, tmp_path)


def test_space_is_checked_first_with_the_numbers(hub, tmp_path):
    with pytest.raises(DgpoError) as caught:
        run(hub, tmp_path, ["index", "train"], free_bytes=lambda folder: 20_000)
    assert str(caught.value) == (
        f"the download needs 35.0 kB more (e5_Flat.index 34.5 kB, train.parquet 0.5 kB), but {tmp_path} has 20.0 kB "
        "free: free 15.0 kB, or choose another download.folder or fewer download.what"
    )
    assert files(tmp_path) == []
    assert hub.ranges == []


def test_bytes_that_are_there_need_no_space(hub, tmp_path):
    hub.served = {"part_ab": b"x" * 9_500}
    with pytest.raises(DgpoError):
        run(hub, tmp_path)
    hub.served = {}
    with pytest.raises(DgpoError, match=r"needs 9\.5 kB more \(e5_Flat.index 9\.5 kB\)"):
        run(hub, tmp_path, free_bytes=lambda folder: 9_499)
    run(hub, tmp_path, free_bytes=lambda folder: 9_500)


def test_a_disk_that_fills_up_on_the_way_keeps_what_came(hub, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DgpoError, match=r"the disk is full: .*e5_Flat.index.partial has 0 of 34,500 bytes; make space"):
        run(hub, tmp_path)


def test_a_wrong_revision_repo_file_or_item_is_named(hub, tmp_path):
    for changes, message in (
        ({"index__revision": "v9"}, r"download.index.revision=v9: .* has no such branch, tag or commit"),
        ({"index__repo": "me/none"}, r"download.index.repo=me/none: .* has no such data set"),
        ({"index__files": ["part_aa", "z"]}, r"download.index.files: .* has no z; it has part_aa, part_ab"),
        ({"index__joined": "../x"}, r"'\.\./x' leads out of"),
        ({"index__files": []}, r"download.index.files is empty"),
        ({"what": ["indx"]}, r"download.what=\['indx'\]: expected one or more of corpus, index, train, benchmarks"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(hub, tmp_path, **changes)
    assert files(tmp_path) == []


def test_a_commit_can_be_pinned(hub, tmp_path):
    commit = hub.data_sets["PeterJinGo/nq_hotpotqa_train"][0]
    run(hub, tmp_path, ["train"], train__revision=commit)
    assert manifest(tmp_path, "train")["train.parquet"]["revision"] == commit


def test_an_endpoint_that_is_down_is_named(tmp_path):
    with serving() as server:
        url = server.url
    with pytest.raises(DgpoError, match=rf"{url} does not answer .*: try again, or set download.endpoint"):
        download(settings(url, tmp_path))


def test_a_partial_file_is_never_completed_with_other_bytes(hub, tmp_path):
    hub.served = {"part_ab": b"x" * 9_500}
    with pytest.raises(DgpoError):
        run(hub, tmp_path)
    before = hub.data_sets["PeterJinGo/wiki-18-e5-index"][0]
    hub.add("PeterJinGo/wiki-18-e5-index", {**INDEX, "part_aa": b"z" * 25_000})
    with pytest.raises(ConfigError, match=f"holds other bytes: set download.index.revision={before} to finish it, or"):
        run(hub, tmp_path)


def test_a_mirror_of_the_same_bytes_may_finish_a_download(hub, tmp_path):
    hub.served = {"part_ab": b"x" * 9_500}
    with pytest.raises(DgpoError):
        run(hub, tmp_path)
    hub.served = {}
    hub.add("me/mirror", INDEX)
    run(hub, tmp_path, index__repo="me/mirror")
    assert manifest(tmp_path, "index")["e5_Flat.index"]["repo"] == "me/mirror"


def test_a_file_that_was_there_before_is_adopted_if_it_is_the_right_one(hub, tmp_path):
    path = tmp_path / "train" / "train.parquet"
    path.parent.mkdir()
    path.write_bytes(b"P" * 500)
    run(hub, tmp_path, ["train"])
    assert hub.ranges == []
    assert manifest(tmp_path, "train")["train.parquet"]["bytes"] == 500
    path.write_bytes(b"Q" * 500)
    run(hub, tmp_path, ["train"])
    with pytest.raises(ConfigError, match=r"is there, but is not what PeterJinGo/nq_hotpotqa_train@.* holds"):
        run(hub, tmp_path, ["train"], verify=True)
    assert path.read_bytes() == b"Q" * 500


def test_two_downloads_of_one_file_do_not_mix(hub, tmp_path):
    hub.served = {"part_ab": b"x" * 9_500}
    with pytest.raises(DgpoError):
        run(hub, tmp_path)
    with (tmp_path / "index" / "e5_Flat.index.partial").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DgpoError, match=r"another process is downloading .*e5_Flat.index.partial"):
            run(hub, tmp_path)


def test_the_command_tells_mistakes_from_faults_by_its_exit_code(hub, tmp_path, capsys):
    overrides = [f"download.endpoint={hub.url}", f"download.folder={tmp_path}", "download.what=[train]"]
    assert main(["download", *overrides]) == 0
    assert main(["download", *overrides, "download.train.revision=v9"]) == 2
    hub.add("PeterJinGo/nq_hotpotqa_train", {"train.parquet": b"P" * 700})
    hub.refused = True
    (tmp_path / "train" / "train.parquet").unlink()
    assert main(["download", *overrides]) == 1
    assert "dgpo download: train.parquet of PeterJinGo/nq_hotpotqa_train broke off" in capsys.readouterr().err


def test_a_log_gets_lines_of_progress(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dgpo.data.hub.SECONDS_PER_LINE", 0.0)
    run(hub, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("part_aa: ")]
    assert len(lines) == 25
    assert lines[11].startswith("part_aa: 12,000 of 25,000 bytes, ")


def test_a_dry_run_shows_the_plan_and_fetches_nothing(hub, tmp_path, capsys):
    config = settings(hub.url, tmp_path)
    config.dry_run = True
    download(config)
    assert f"{tmp_path}/index/e5_Flat.index: 34.5 kB from PeterJinGo/wiki-18-e5-index@" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_a_dry_run_without_a_hub_shows_what_is_known_and_ends_as_without_a_hub(tmp_path, capsys):
    with serving() as server:
        url = server.url
    overrides = [f"download.endpoint={url}", f"download.folder={tmp_path}", "dry_run=true"]
    assert main(["download", *overrides, "download.what=[corpus,index,benchmarks]"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/corpus/wiki-18.jsonl.gz: size unknown, from PeterJinGo/wiki-18-corpus@main" in said
    assert f"{tmp_path}/index/e5_Flat.index: about 64.6 GB, from PeterJinGo/wiki-18-e5-index@main" in said
    assert said.count(f"{tmp_path}/benchmarks/") == 9
    assert "note: no answer" in said
    assert f"dgpo download: {url} does not answer" in said.splitlines()[-1]
    assert files(tmp_path) == []


ADDRESS = "/bucket/v1.0-simplified/nq-dev-all.jsonl.gz"


def annotations(hub, folder, **changes):
    run(hub, folder, ["nq_annotations"], nq_annotations=hub.url + ADDRESS, **changes)


def test_nqs_annotations_come_from_their_address_without_the_hubs_login(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.plain[ADDRESS] = random.Random(4).randbytes(9_000)
    hub.cuts = [4_000]
    annotations(hub, tmp_path)
    path = tmp_path / "nq_annotations" / "nq-dev-all.jsonl.gz"
    assert path.read_bytes() == hub.plain[ADDRESS]
    assert manifest(tmp_path, "nq_annotations")[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [each.partition("=")[0] for each in hub.ranges] == ["", "bytes"], "it went on where it broke"
    annotations(hub, tmp_path)
    assert len(hub.ranges) == 2


def test_annotations_of_other_bytes_than_the_storage_names_are_refused(hub, tmp_path):
    hub.plain[ADDRESS] = b"x" * 500
    hub.served[ADDRESS] = b"y" * 500
    with pytest.raises(DgpoError, match="another checksum"):
        annotations(hub, tmp_path)
    hub.with_sizes = False  # a storage that names no MD5: only the size is known
    annotations(hub, tmp_path / "unnamed")


def test_an_address_without_a_file_is_named(hub, tmp_path):
    with pytest.raises(ConfigError, match=r"download\.nq_annotations=.*HTTP 404"):
        annotations(hub, tmp_path)
