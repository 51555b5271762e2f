"""The Llama pair as a newcomer meets it: downloaded from a hub, tokenizers compared, a dry run of each stage."""

import pytest
from huggingface_hub import constants

from dgpo.__main__ import main
from dgpo.config import model_files
from dgpo.config.load import load_config
from dgpo.config.model_files import cached_file, tokenizer_difference
from dgpo.data.rows import write_rows
from tests.e2e.local_hub import LLAMAS, SIZES, train_rows, write_untrained_llamas
from tests.unit.hub_server import serving
from tests.unit.stubs import healthy_server

TEACHER, STUDENT = (model.name for model in LLAMAS)
PAIR = ["pair=llama8b_1b", f"teacher.path={TEACHER}", "download.models=[]", *SIZES]


@pytest.fixture
def overrides(tmp_path, monkeypatch):
    """The pair in the cache, as `dgpo download` leaves it, and no hub any more."""
    write_untrained_llamas(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as server:
        server.add_folder(tmp_path)
        assert main(["download", "download.what=[models]", f"download.endpoint={server.url}", *PAIR]) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model_files.hub_answers.cache_clear()
    rows = str(tmp_path / "train.parquet")
    write_rows(rows, train_rows())
    files = [f"data.{key}_file={rows}" for key in ("collect", "train")]
    return [*PAIR, *files, f"run_dir={tmp_path / 'run'}", "train.batch_size=8", "train.mini_batch_size=8"]


def test_the_pair_is_downloaded_checked_and_planned(overrides, capsys):
    assert cached_file(STUDENT, "model.safetensors")
    assert cached_file(TEACHER, "tokenizer_config.json")
    with healthy_server() as url:
        for stage in ("collect", "distill", "train"):
            code = main([stage, *overrides, f"retriever.url={url}", "dry_run=true", "train.num_steps=2"])
            output = capsys.readouterr()
            assert code == 0, output.err
            assert "not checked" not in output.out + output.err
    keys = ("student.path", "teacher.path")
    assert tokenizer_difference(STUDENT, TEACHER, keys=keys) == "different chat template", "3.1's and 3.2's differ"


def test_a_qwen_is_no_teacher_of_the_pair(overrides, tmp_path, capsys):
    from tests.e2e.local_hub import make_qwen, qwen_tokenizer

    tokenizer = qwen_tokenizer()
    make_qwen(tokenizer, seed=1).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    with healthy_server() as url:
        words = [*overrides, f"retriever.url={url}", f"teacher.path={tmp_path / 'qwen'}", "dry_run=true"]
        assert main(["train", *words]) == 2
    assert "have different tokenizers" in capsys.readouterr().err


def test_the_pairs_own_teacher_is_one_to_be_made(capsys):
    assert load_config(["pair=llama8b_1b"]).teacher.init == TEACHER
