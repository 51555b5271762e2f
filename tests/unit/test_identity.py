"""What a model is: the same wherever it lies, another one when a byte of it changes, and quick to tell again."""

import json
import os
import shutil
from pathlib import Path

import pytest

from dgpo.config.load import load_config
from dgpo.errors import ConfigError, DataError
from dgpo.runs import identity
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.checkpoints import seal
from dgpo.runs.identity import file_identity, model_identity, retriever_identity
from tests.unit.stubs import healthy_server, make_model, make_row


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """A cache folder of the test's own, in which every file is worth remembering at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(identity, "SETTLED_NS", 0)
    return tmp_path / "cache" / "dgpo" / "checksums.json"


@pytest.fixture
def model(tmp_path):
    return Path(make_model(tmp_path / "model"))


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read to the end, one after the other."""
    read = []
    monkeypatch.setattr(identity, "file_sha256", lambda path: read.append(path.name) or _file_sha256(path))
    return read


_file_sha256 = identity.file_sha256


def swap_weights(folder):
    """Other weights of equal size in the same file, its modification time restored."""
    path = folder / "model.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_size", "st_mtime_ns", "st_ino")
    assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]


def seal_result(model):
    write_manifest(model, stage="train", inputs={}, config={}, counts={}, seed=0)


def seal_stage(model):
    write_manifest(model.parent, stage="distill", inputs={}, config={}, counts={}, seed=0)


def seal_checkpoint(model):
    seal(model.parent, step=1)


def test_a_model_is_the_same_wherever_it_lies_and_whatever_is_written_about_it(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere" / "copy"))
    (copy / "README.md").write_text("a card")
    seal_result(copy)
    assert model_identity(str(copy)) == model_identity(str(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_byte_is_another_model(model, name):
    before = model_identity(str(model))
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    assert model_identity(str(model)) != before


def test_a_chat_template_beside_the_tokenizer_is_part_of_the_model(model):
    before = model_identity(str(model))
    (model / "chat_template.jinja").write_text("{{ y }}")
    assert model_identity(str(model)) != before


@pytest.mark.parametrize("sealed_by", [seal_result, seal_stage, seal_checkpoint])
def test_weights_that_changed_inside_a_sealed_folder_are_refused_though_size_and_time_are_the_same(model, sealed_by):
    sealed_by(model)
    model_identity(str(model))  # remembered
    swap_weights(model)
    with pytest.raises(DataError, match=r"model\.safetensors has changed since .*manifest\.json was written"):
        model_identity(str(model))


def test_weights_that_changed_in_a_folder_without_a_seal_are_another_model(model):
    before = model_identity(str(model))
    swap_weights(model)
    assert model_identity(str(model)) != before


def test_another_programs_manifest_seals_nothing(model):
    (model / "manifest.json").write_text('["assets"]')
    before = model_identity(str(model))
    swap_weights(model)
    assert model_identity(str(model)) != before


def test_what_was_read_once_is_not_read_again(model, hashed):
    first = model_identity(str(model))
    assert sorted(hashed) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    hashed.clear()
    assert model_identity(str(model)) == first
    assert hashed == []
    os.utime(model / "model.safetensors")
    assert model_identity(str(model)) == first
    assert hashed == ["model.safetensors"]


def test_a_file_that_has_just_changed_is_read_again(model, hashed, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_NS", 60_000_000_000)
    model_identity(str(model))
    hashed.clear()
    model_identity(str(model))
    assert len(hashed) == 4


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_without_a_place_for_the_memory_files_are_read_again(model, hashed, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    assert model_identity(str(model)) == model_identity(str(model))
    assert len(hashed) == 8


@pytest.mark.parametrize("content", ["", "[]", '{"x'])
def test_a_damaged_memory_is_none(model, memory, content):
    expected = model_identity(str(model))
    memory.write_text(content)
    assert model_identity(str(model)) == expected
    assert len(json.loads(memory.read_text())) == 4


def test_a_hub_model_is_known_by_the_names_of_its_blobs_and_equals_a_copy_of_it(model, tmp_path, hashed, monkeypatch):
    """The cache as huggingface_hub lays it out; no hub can be reached."""
    import huggingface_hub.constants

    expected = model_identity(str(model))
    weights = file_identity(model / "model.safetensors")
    repository = tmp_path / "hub" / "models--me--agent"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for path in model.iterdir():
        blob = repository / "blobs" / (weights if path.suffix == ".safetensors" else path.name.encode().hex()[:40])
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hashed.clear()
    assert model_identity("me/agent") == model_identity(str(snapshot)) == expected
    assert weights not in hashed, "a large file is not read"


def test_a_retriever_is_what_it_serves_to_these_questions_wherever_it_runs(monkeypatch):
    corpora = {"real": {"corpus_sha256": "1" * 64}, "other": {"corpus_sha256": "2" * 64}}
    told = {"corpora": corpora, "default": "real"}
    monkeypatch.setattr(identity, "check_health", lambda url, **_: told)
    config = load_config(["retriever.url=http://a:1"])
    rows = [make_row(0, "real"), make_row(1, None)]
    before = retriever_identity(config.retriever, rows)
    config.retriever.url = "http://b:2"
    corpora["other"] = {"corpus_sha256": "3" * 64}
    assert retriever_identity(config.retriever, rows) == before == {"real": {"corpus_sha256": "1" * 64}}
    corpora["real"] = {"corpus_sha256": "4" * 64}
    assert retriever_identity(config.retriever, rows) != before


def test_a_retriever_that_tells_no_checksums_is_its_url_and_a_backend_its_options():
    config = load_config()
    with healthy_server() as url:
        config.retriever.url = url
        assert retriever_identity(config.retriever, [make_row(0)]) == {"url": [url], "corpora": ["real"]}
    with pytest.raises(ConfigError, match="no retrieval server answers"):
        retriever_identity(config.retriever, [make_row(0)])
    config.retriever.backend, config.retriever.backend_options = "a:B", {"path": "c"}
    assert retriever_identity(config.retriever, []) == {"backend": "a:B", "options": {"path": "c"}}
