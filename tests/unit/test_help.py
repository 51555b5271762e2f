"""What `--help` says of the configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dgpo.config.help import SECTIONS, describe, meanings
from dgpo.config.load import config_keys
from dgpo.config.schema import Config


def test_every_key_has_a_meaning():
    assert [key for key, meaning in meanings(Config) if not meaning] == []


def test_the_meanings_are_of_the_keys_that_the_configuration_has():
    leaves = [key for key, _ in meanings(Config)]
    assert len(leaves) == len(set(leaves))
    assert {leaf for leaf in leaves if not leaf.startswith("hardware.env")} == {
        key for key in config_keys() if not key.startswith("hardware.env")
    }


def test_a_comment_above_and_one_beside_are_one_meaning():
    meaning = dict(meanings(Config))
    assert meaning["train.clip_ratio"] == "PPO's epsilon"
    assert meaning["train.init_kl_form"].startswith("reward (Search-R1's PPO")
    assert meaning["teacher.path"] == meaning["student.path"] == "a Hugging Face folder or hub name"
    assert "null: all" in meaning["hardware.fsdp_size"]


@pytest.mark.parametrize("command", SECTIONS)
def test_every_section_of_a_command_exists_and_no_other_is_listed(command):
    leaves = [key for key, _ in meanings(Config)]
    for section in SECTIONS[command]:
        assert any(f"{leaf}.".startswith(f"{section}.") for leaf in leaves), section
    listed = [line.split("=")[0].strip() for line in describe(command).splitlines() if line.startswith("  ")]
    assert ("train.clip_ratio" in listed) == (command == "train")
    assert ("download.folder" in listed) == (command == "download")


def test_a_reader_that_has_enough_ends_no_command_in_a_traceback():
    """The help is longer than what a pipe holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dgpo", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
