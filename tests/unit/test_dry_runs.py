"""Every experiment composes with every pair and passes a dry run of each of its stages, before any stage has run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from dgpo.__main__ import main
from dgpo.config import schema
from dgpo.config.help import SECTIONS
from dgpo.config.load import group_choices, load_config
from dgpo.config.methods import support_table
from dgpo.config.schema import Config
from dgpo.data.rows import write_rows
from dgpo.hardware.checks import check_engine, check_heads, check_training
from dgpo.hardware.machine import Machine, VisibleGpu
from dgpo.hardware.stages import stage_budget, stage_models
from tests.unit.stubs import healthy_server, make_model, make_row

EXPERIMENTS = group_choices("experiment")
PAIRS = group_choices("pair")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Questions and a retrieval server; no model, no earlier stage."""
    folder = tmp_path_factory.mktemp("dry")
    rows = str(folder / "rows.parquet")
    write_rows(rows, [make_row(index) for index in range(512)])
    with healthy_server() as url:
        yield [
            f"run_dir={folder / 'run'}",
            f"retriever.url={url}",
            f"data.collect_file={rows}",
            f"data.train_file={rows}",
            "dry_run=true",
        ]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """These machines may have no hub: its models are then noted as not checked, and nothing waits for a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def dry_run(stage: str, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = main([stage, *overrides])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def test_the_rows_of_the_paper_are_all_there():
    assert len(EXPERIMENTS) == 18
    assert len(PAIRS) == 3


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_with_a_pair_fits_one_node_of_eight_or_several(experiment, pair, inputs, capsys):
    overrides = [f"experiment={experiment}", f"pair={pair}", "dry_run.assume=h200x8", *inputs]
    config = load_config(overrides)
    for stage in config.stages:
        output = dry_run(stage, overrides, capsys)
        assert "Memory per GPU, GiB (of h200" in output
        if stage == "train" and "distill" in config.stages[: config.stages.index("train")]:
            assert "train.init=" in output
            assert "will be written by an earlier stage" in output
    config.hardware.fsdp_size = 8
    for config.hardware.num_nodes in (2, 4):
        for stage in config.stages:
            models, unknown = stage_models(config, stage)
            assert models is not None, unknown
            check_engine(config)
            check_heads(config, models.student.heads)
            if stage == "train":
                check_training(config)
            assert stage_budget(config, stage, models).problem is None


def test_several_nodes_differ_from_one_in_their_number_and_in_shards_within_a_node():
    one, many = load_config(["hardware=h200x8"]), load_config(["hardware=h200x8xN", "hardware.num_nodes=4"])
    one.hardware.num_nodes, one.hardware.fsdp_size = 4, 8
    assert one == many


@pytest.mark.parametrize("stage", ["collect", "distill", "train"])
def test_the_main_pair_fits_one_consumer_gpu(stage, inputs, capsys):
    output = dry_run(stage, ["pair=qwen3b_05b", "dry_run.assume=gpu24gb", *inputs], capsys)
    assert "of rtx4090, 23.5 usable" in output


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("train", ["pair=llama8b_1b", "dry_run.assume=gpu24gb"]),
        ("train", ["pair=qwen7b_05b", "dry_run.assume=gpu24gb", "hardware.offload=none"]),
        ("train", ["pair=qwen3b_05b", "dry_run.assume=h200x8", "hardware.engine.gpu_memory_utilization=0.99"]),
        ("train", ["pair=llama8b_1b", "dry_run.assume=h200x8", "hardware.max_tokens_per_gpu=4194304"]),
        ("collect", ["pair=llama8b_1b", "dry_run.assume=gpu24gb", "hardware.engine.gpu_memory_utilization_alone=0.5"]),
        ("distill", ["pair=qwen3b_05b", "dry_run.assume=gpu24gb", "hardware.micro_batch_size=8"]),
    ],
)
def test_what_does_not_fit_is_refused_with_a_setting_that_does(stage, overrides, inputs, capsys):
    assert main([stage, *overrides, *inputs]) == 2
    captured = capsys.readouterr()
    assert "Memory per GPU" in captured.out
    assert captured.err.count("\n") == 1
    reason, _, suggested = captured.err.strip().partition("; the nearest setting that fits: ")
    assert "GiB per GPU" in reason or "KV cache" in reason
    dry_run(stage, [*overrides, *suggested.split(), *inputs], capsys)


def test_a_machine_without_the_gpus_is_told_how_to_plan_for_one_that_has_them(inputs, capsys, monkeypatch):
    monkeypatch.setattr("dgpo.hardware.machine.visible_gpus", list)
    assert main(["train", "pair=qwen3b_05b", *inputs]) == 2
    assert "nvidia-smi finds no GPUs on this machine: use hardware=cpu, or plan for another machine with dry_run." in (
        capsys.readouterr().err
    )


def test_another_gpu_than_configured_is_named(inputs, capsys, monkeypatch):
    h100 = VisibleGpu("NVIDIA H100 80GB HBM3", 79.6 * 2**30, 79 * 2**30, "580.65.06")
    node = Machine([h100] * 8, 64, 2e12, 1e12, "gcc", Path("/usr/include"))
    monkeypatch.setattr("dgpo.hardware.machine.this_machine", lambda: node)
    monkeypatch.setattr("dgpo.hardware.machine._check_flash_attention", lambda *_: None)
    assert main(["train", "pair=qwen3b_05b", *inputs]) == 2
    assert "hardware.gpu=h200 has 139.8 GiB, but this machine's NVIDIA H100 80GB HBM3 has 79.6" in (
        capsys.readouterr().err
    )
    dry_run("train", ["pair=qwen3b_05b", "hardware.gpu=h100", *inputs], capsys)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_on_the_tiny_world(experiment, inputs, tmp_path, capsys):
    models = [
        f"student.path={make_model(tmp_path / 'student')}",
        f"teacher.path={make_model(tmp_path / 'teacher', weights=b'teacher')}",
        f"teacher.init={make_model(tmp_path / 'teacher_untrained', weights=b'untrained')}",
    ]
    overrides = [f"experiment={experiment}", "world=tiny", "hardware=cpu", *models, *inputs]
    for stage in load_config(overrides).stages:
        dry_run(stage, overrides, capsys)


def test_a_teacher_that_is_not_published_is_planned(inputs, capsys):
    output = dry_run("collect", ["experiment=kd", "pair=qwen7b_05b", "dry_run.assume=h200x8", *inputs], capsys)
    assert "will be made from Qwen/Qwen2.5-7B-Instruct by experiment=teacher_ppo" in output


def test_a_real_run_misses_what_no_stage_has_written(inputs, tmp_path, capsys):
    overrides = [f"student.path={make_model(tmp_path / 'student')}", "train.teacher_term.gate=none", *inputs[:-1]]
    assert main(["train", "hardware=cpu", *overrides]) == 2
    error = capsys.readouterr().err
    assert "run the stage before it (distill) with this run_dir first, or set train.init" in error


def test_without_a_cold_start_training_begins_at_the_student(inputs, tmp_path):
    from dgpo.config.stages import initial_model

    config = load_config(["experiment=no_cold_start", f"student.path={tmp_path}", *inputs])
    assert initial_model(config, "train") == ("student.path", str(tmp_path))


def test_the_inverted_order_distils_what_rl_made(inputs):
    from dgpo.config.stages import initial_model

    config = load_config(["experiment=inverted", "student.path=s", *inputs])
    assert initial_model(config, "train") == ("student.path", "s")
    assert initial_model(config, "distill")[1] == f"{config.run_dir}/train/models/step_200"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["experiment=gkd", "train.teacher_term.gate=none"], "nothing is left to learn from"),
        (["experiment=gkd", "train.teacher_term.form=reward"], "choose exact or token"),
        (["experiment=gkd", "train.init_kl_coef=0.001"], "set it to 0"),
        (["experiment=dgpo_grpo", "train.samples_per_question=1"], "train.samples_per_question=1 leaves nothing"),
        (["train.teacher_term.form=exact", "train.temperature=0.7"], "train.temperature=0.7"),
        (["hardware.verl.algorithm.adv_estimator=rloo"], "adv_estimator cannot be set: set train.algorithm"),
        (["hardware.verl.actor_rollout_ref.model.lora_rank=8"], "lora_rank cannot be set: RL trains all weights"),
        (
            ["hardware.verl.trainer.critic_warmpu=5"],
            "hardware.verl.trainer.critic_warmpu: veRL has no such key: did you mean critic_warmup?",
        ),
        (
            ["hardware.verl.actor_rollout_ref.actr.x=5"],
            "hardware.verl.actor_rollout_ref.actr: veRL has no such key: did you mean actor?",
        ),
        (["train.loggers=[foo]"], "train.loggers: unknown logger 'foo'"),
        (["train.loggers=[console,mlflow]"], "mlflow is not installed"),
        (["train.loggers=[wandb]"], "there is no key for api.wandb.ai: run `wandb login`, set WANDB_API_KEY"),
        (["stages=[train,train]"], "at most once"),
        (["stages=[distil]"], "expected each of collect, distill, train, test"),
    ],
)
def test_a_combination_without_sense_is_refused_with_the_reason(overrides, reason, inputs, capsys):
    assert main(["train", "pair=qwen3b_05b", *overrides, *inputs]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_the_support_table_covers_every_combination():
    table = support_table()
    assert len(table) == 36
    assert sum(reason is None for *_, reason in table) == 30
    assert {algorithm for algorithm, *_, reason in table if reason} == {"gkd"}


def test_a_retriever_that_the_other_nodes_will_not_find_is_noted(inputs, capsys):
    overrides = ["pair=qwen3b_05b", "dry_run.assume=h200x8xN", "hardware.num_nodes=2", *inputs]
    output = dry_run("train", overrides, capsys)
    assert "is another machine on every node" in output
    assert "0      0-7 " in output
    assert "1      8-15" in output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("quickstart", "would hold world, indexes, teacher, collect, distill, train, test and report"),
        ("report", "report.html would be written"),
        ("contamination", "512 training questions would be compared with nq (512)"),
        ("test", "mine would be tested on nq (512 questions)"),
        ("ask", "would answer"),
        ("prepare", "would hold"),
    ],
)
def test_every_command_has_a_dry_run_that_writes_nothing(command, said, inputs, tmp_path, capsys):
    rows = next(override.partition("=")[2] for override in inputs if override.startswith("data.train_file="))
    (tmp_path / "own.jsonl").write_text('{"question": "who?", "answers": ["me"]}\n' * 4)
    model = make_model(tmp_path / "model")
    if command == "report":
        (tmp_path / "run" / "train").mkdir(parents=True)
        (tmp_path / "run" / "train" / "metrics.jsonl").write_text('{"step": 1, "episode/em": 0.5}\n')
    before = sorted(tmp_path.rglob("*"))
    overrides = [
        "hardware=cpu",
        f"data.test_files.nq={rows}",
        f"test.models.mine={model}",
        f"ask.model={model}",
        f"prepare.source={tmp_path / 'own.jsonl'}",
        f"prepare.out={tmp_path / 'prepared'}",
        *inputs,
        f"run_dir={tmp_path / 'run'}",
    ]
    assert said in dry_run(command, overrides, capsys)
    assert sorted(tmp_path.rglob("*")) == before


# Every plan is of the whole experiment, and every choice is checked: these read other stages' keys too.
OF_ALL_STAGES = ("dgpo.config.", "dgpo.hardware.", "dgpo.checks.values")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Key -> modules of ours that ask the command's configuration for it; copying all of it is no asking."""
    found: dict[str, set[str]] = {}
    prefixes: dict[int, str] = {}
    sections: list[Any] = []  # kept alive, so that no other object gets the address of one

    def name(section: Any, prefix: str) -> None:
        sections.append(section)
        prefixes[id(section)] = prefix
        for each in fields(section):
            if is_dataclass(value := getattr(section, each.name)):
                name(value, f"{prefix}{each.name}.")

    def load(overrides: Sequence[str]) -> Config:
        config = load_config(overrides)
        name(config, "")
        return config

    def recorded(section: Any, attribute: str) -> Any:
        value = object.__getattribute__(section, attribute)
        reader = sys._getframe(1).f_globals["__name__"]
        is_key = id(section) in prefixes and attribute in type(section).__dataclass_fields__ and not is_dataclass(value)
        if is_key and reader.startswith("dgpo.") and reader != "dgpo.config.ranges":
            found.setdefault(prefixes[id(section)] + attribute, set()).add(reader)
        return value

    for each in vars(schema).values():
        if isinstance(each, type) and is_dataclass(each):
            monkeypatch.setattr(each, "__getattribute__", recorded)
    monkeypatch.setattr("dgpo.__main__.load_config", load)
    return found


@pytest.mark.parametrize("command", ["collect", "distill", "train", "test", "arcap"])
def test_help_lists_what_a_command_reads(command, reads, inputs, tmp_path, capsys):
    rows = next(each for each in inputs if each.startswith("data.train_file")).partition("=")[2]
    tested = [f"test.models.ours={make_model(tmp_path / 'model')}", f"data.test_files.nq={rows}"]
    dry_run(command, ["pair=qwen3b_05b", "dry_run.assume=h200x8", *inputs, *tested], capsys)
    listed = SECTIONS[command]
    own = {key for key, readers in reads.items() if any(not each.startswith(OF_ALL_STAGES) for each in readers)}
    assert [key for key in own if not any(f"{key}.".startswith(f"{each}.") for each in listed)] == []
    unread = [each for each in listed if not any(f"{key}.".startswith(f"{each}.") for key in reads)]
    assert unread == ["seed"], "which a plan, that plays nothing, does not need"
