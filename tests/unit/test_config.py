from pathlib import Path

import pytest
import yaml

from dgpo.algorithms.selective_kl import TEACHER_FORMS
from dgpo.config.load import (
    CONFIG_DIR,
    GROUPS,
    changed_settings,
    config_keys,
    group_choices,
    load_config,
    recipe_settings,
    to_yaml,
)
from dgpo.config.methods import teacher_coef
from dgpo.config.schema import Config
from dgpo.errors import ConfigError

PRESETS = [(group, choice) for group in GROUPS for choice in group_choices(group)]
LEFT_TO_THE_USER = {"h200x8xN": ["hardware.num_nodes=2"]}


def test_every_preset_is_known_to_this_test():
    fits = list(CONFIG_DIR.glob("fit/*.yaml"))
    assert len(PRESETS) == len(list(CONFIG_DIR.glob("*/*.yaml"))) - len(fits) == 30


def test_every_fit_belongs_to_a_world_and_an_experiment():
    names = {f"{world}_{experiment}" for world in group_choices("world") for experiment in group_choices("experiment")}
    assert {path.stem for path in CONFIG_DIR.glob("fit/*.yaml")} <= names


@pytest.mark.parametrize(("group", "choice"), PRESETS)
def test_every_preset_composes(group, choice):
    config = load_config([f"{group}={choice}", *LEFT_TO_THE_USER.get(choice, [])])
    assert config.train.teacher_term.form in TEACHER_FORMS


def test_the_paper_preset_has_the_papers_numbers():
    train = load_config(["experiment=dgpo", "pair=qwen3b_05b"]).train
    assert (train.num_steps, train.batch_size, train.mini_batch_size) == (1000, 512, 256)
    assert (train.actor_learning_rate, train.critic_learning_rate) == (1e-6, 1e-5)
    assert (train.teacher_term.form, train.teacher_term.gate) == ("reward", "failed")
    assert teacher_coef(train.teacher_term) == 0.001


def test_the_paper_is_in_force_by_default_and_the_tiny_world_keeps_what_we_recommend():
    paper, tiny = load_config([]), load_config(["world=tiny"])
    assert (paper.distill.adam_betas, paper.distill.weight_decay) == ([0.9, 0.999], 0.01)
    assert (paper.distill.warmup_ratio, paper.distill.min_learning_rate_share) == (0, 0)
    assert (paper.train.weight_decay, paper.train.dual_clip) == (0.01, None)
    assert load_config(["recipe=recommended"]).distill == Config().distill
    for section in ("distill", "train"):
        assert all("(recommended; the paper's: " in line for line in recipe_settings(tiny, section))
    assert load_config(["world=tiny", "recipe=paper"]).distill.weight_decay == 0.01


def test_a_dry_run_can_say_whose_value_is_in_force():
    config = load_config(["distill.weight_decay=0.1"])
    lines = recipe_settings(config, "distill")
    assert "distill.adam_betas=[0.9, 0.999] (the paper's; recommended: [0.9, 0.98])" in lines
    assert "distill.weight_decay=0.1 (the paper's: 0.01; recommended: 0.0)" in lines
    assert "train.dual_clip=None (the paper's; recommended: 3.0)" in recipe_settings(config, "train")


def test_the_warm_up_has_the_papers_steps_however_many_are_asked_for():
    for overrides in ([], ["train.num_steps=200"]):
        train = load_config(overrides).train
        assert (train.actor_warmup_steps, train.critic_warmup_steps) == (285, 15)


def test_cpu_and_gpu_differ_in_the_hardware_section_only():
    cpu, gpu = load_config(["hardware=cpu"]), load_config(["hardware=h200x8"])
    cpu.hardware = gpu.hardware
    assert cpu == gpu


def test_hydras_plus_signs_say_no_more_than_none():
    plain = ["world=tiny", "train.num_steps=3", "dry_run=true", "test.models.a=M"]
    assert load_config([f"{'+' * (1 + i % 2)}{each}" for i, each in enumerate(plain)]) == load_config(plain)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_step=3", "unknown config key 'train.num_step': did you mean train.num_steps?"),
        ("+train.num_step=3", "unknown config key 'train.num_step': did you mean train.num_steps?"),
        ("experimnt=dgpo", "unknown config key 'experimnt': did you mean experiment?"),
        ("train.num_steps=many", "train.num_steps=many: expected a whole number"),
        ("train.num_steps=null", "train.num_steps=null: expected a whole number"),
        ("train.num_steps=1,2", "train.num_steps=1,2 cannot be read, expected a whole number"),
        ("train.gamma=half", "train.gamma=half: expected a number"),
        ("train.max_restarts=[1]", "train.max_restarts=[1]: expected a whole number"),
        ("distill.max_steps=x", "distill.max_steps=x: expected a whole number or null"),
        ("resume=maybe", "resume=maybe: expected true or false"),
        ("dry_run=maybe", "dry_run=maybe: expected true or false"),
        ("train.loggers=wandb", "train.loggers=wandb: expected a list, such as [a,b]"),
        ("report.runs=[/größe]", "report.runs=[/größe] cannot be read, expected a list, such as [a,b]: quote"),
        ("test.models=runs/x", "test.models=runs/x: it has names of your own: expected test.models.NAME=value"),
        ("train=5", "train=5: it is a section of settings: set one of it, such as train.init"),
        ("gate=failed", "unknown config key 'gate': did you mean train.teacher_term.gate?"),
        ("test.smaples=2", "unknown config key 'test.smaples': did you mean test.samples?"),
        ("hardware=h100", "unknown choice 'hardware=h100': hardware is one of cpu"),
        ("~train.num_steps", "'~train.num_steps' is no setting: expected key=value"),
        (
            "pair=qwen3b_05b world=tiny",
            "pair=qwen3b_05b with world=tiny (quickstart's): that world has models of its own",
        ),
        ("resume", "'resume' is no setting: expected key=value"),
        ("world=wonder", "unknown choice 'world=wonder': world is one of own, tiny"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_fix(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(override.split(" "))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("guilty", ["hardware=h100", "test.samples=abc", "test.smaples=2", "report.runs=[(]"])
def test_the_guilty_override_is_accused_whatever_stands_beside_it(guilty):
    innocent = ["test.models.abc=M", "test.models.dgpo=M", "hardware.env.A=b", "run_dir=/data (1)"]
    for overrides in ([*innocent, guilty], [guilty, *innocent]):
        with pytest.raises(ConfigError) as caught:
            load_config(overrides)
        assert guilty.partition("=")[0] in str(caught.value)
        assert not any(each.partition("=")[0] in str(caught.value) for each in innocent)


@pytest.mark.parametrize(
    "text",
    [
        "/data (1)/nq.parquet",
        "/größe 1/東京",
        "~/runs",
        "/a=b/c,d",
        '/it\'s/a "quote"',
        "\\back\\",
        "[x]",
        "{a: b}",
        "1e-3",
        "007",
        "true",
        "mlx5_0:1,mlx5_3:1",
        "http://a:1,http://b:2",
        "range(1,3)",
        "'",
        "#1",
        "-",
    ],
)
def test_a_text_is_taken_as_it_is_typed(text):
    """Also by stages that are started by stages: they get the same override again."""
    overrides = [f"{key}={text}" for key in ("run_dir", "data.train_file", "test.models.mine", "hardware.env.X")]
    assert set(overrides) <= set(changed_settings(load_config(overrides)))


def test_a_text_may_still_be_quoted_for_hydra_and_null_is_nothing():
    assert (
        load_config(['run_dir="/x/größe 1"']).run_dir == load_config(["run_dir='/x/größe 1'"]).run_dir == "/x/größe 1"
    )
    assert load_config(["data.train_file=a", "data.train_file=null"]).data.train_file is None
    assert load_config(["run_dir=x", "data.train_file=${run_dir}/a"]).data.train_file == "x/a"


def test_many_nodes_need_a_number(monkeypatch):
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    with pytest.raises(ConfigError, match=r"hardware\.num_nodes is not set: add hardware\.num_nodes=N"):
        load_config(["hardware=h200x8xN"])
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert load_config(["hardware=h200x8xN"]).hardware.num_nodes == 4
    assert load_config(["hardware=h200x8xN", "hardware.num_nodes=2"]).hardware.num_nodes == 2


@pytest.mark.parametrize(
    ("overrides", "is_dry", "gpu"),
    [
        ([], False, "h200"),
        (["dry_run=true"], True, "h200"),
        (["dry_run=false"], False, "h200"),
        (["dry_run.assume=gpu24gb"], True, "rtx4090"),
        (["dry_run.assume=gpu24gb", "hardware=gpu24gb"], True, "rtx4090"),
    ],
)
def test_a_dry_run_can_assume_other_hardware(overrides, is_dry, gpu):
    config = load_config(overrides)
    assert bool(config.dry_run) is is_dry
    assert config.hardware.gpu == gpu


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dry_run.assume=h200"], "dry_run.assume=h200: expected one of cpu, gpu24gb, h200x8, h200x8xN"),
        (["dry_run.assume=h200x8", "hardware=cpu"], "the plan is for one of them"),
    ],
)
def test_an_assumption_that_makes_no_sense_is_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert message in str(caught.value)


def test_a_file_of_overrides_comes_before_what_is_typed(tmp_path, monkeypatch):
    file = tmp_path / "site.txt"
    file.write_text("# of this cluster\nhardware=cpu\n\ntrain.num_steps=7\ntrain.batch_size=32\n")
    monkeypatch.setenv("DGPO_OVERRIDES", str(file))
    config = load_config(["train.num_steps=9"])
    assert (config.hardware.platform, config.train.num_steps, config.train.batch_size) == ("cpu", 9, 32)
    assert load_config(["dry_run.assume=h200x8"]).hardware.gpu == "h200"
    assert "train.batch_size=32" in changed_settings(config)


def test_a_file_of_overrides_that_is_not_there_or_wrong_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DGPO_OVERRIDES", str(tmp_path / "site.txt"))
    with pytest.raises(ConfigError, match=r"DGPO_OVERRIDES=.*site\.txt cannot be read"):
        load_config()
    (tmp_path / "site.txt").write_text("train.num_step=7\n")
    with pytest.raises(ConfigError, match=r"did you mean train\.num_steps"):
        load_config()


def test_free_mappings_take_any_key():
    config = load_config(["test.models.mine=runs/a/train/model", "data.test_files.nq=nq.parquet"])
    assert config.test.models == {"mine": "runs/a/train/model"}
    assert config.data.test_files == {"nq": "nq.parquet"}


@pytest.mark.parametrize("hardware", group_choices("hardware"))
def test_the_hardware_says_which_runner_of_vllm_it_uses_and_the_manifest_will(hardware, monkeypatch):
    monkeypatch.setenv("SLURM_NNODES", "2")
    config = load_config([f"hardware={hardware}"])
    assert yaml.safe_load(to_yaml(config))["hardware"]["env"]["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    other = load_config([f"hardware={hardware}", "hardware.env.VLLM_USE_V2_MODEL_RUNNER='1'"])
    assert other.hardware.env["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_every_schema_key_is_read_somewhere():
    """A key that no code reads is a lie to its user."""
    root = Path(__file__).parents[2] / "dgpo"
    code = "\n".join(path.read_text() for path in root.rglob("*.py") if path.name != "schema.py")
    ours = [key for key in config_keys() if not key.startswith("hardware.env.")]  # variables that others read
    dead = [key for key in ours if key.rsplit(".", 1)[-1] not in code]
    assert dead == []


def test_changed_settings_are_those_that_differ():
    assert changed_settings(load_config()) == []
    overrides = ["train.num_steps=7", "hardware.env.A=b", "test.models.mine=x", "train.stability.patience=3"]
    assert changed_settings(load_config(overrides)) == ["hardware.env.A=b", "train.num_steps=7", "test.models.mine=x"]


def test_the_resolved_config_can_be_printed():
    assert "num_steps: 20" in to_yaml(load_config(["world=tiny"]))
