"""LoRA in the cold start: what is trained, what is left, and that a stop changes nothing."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dgpo.checks.distill import check_distill
from dgpo.coldstart.distill import distill
from dgpo.coldstart.trainer import DistillationTrainer
from dgpo.config.load import ConfigError
from dgpo.hardware.budget import Models, distill_budget
from dgpo.hardware.shapes import known_shape
from tests.distill_stage import varied_examples, write_stage

LORA = ["distill.lora_rank=3", "distill.held_out_share=0.2", "distill.evaluate_every=4", "distill.max_steps=12"]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_trained_alone_and_merged_into_a_plain_model(tmp_path, dtype):
    out = distill(write_stage(tmp_path, [*LORA, f"hardware.dtype={dtype}"], examples=varied_examples(24)))
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [point["loss"] for point in curve if "loss" in point]
    assert losses[-1] < losses[0]
    assert not list(out.rglob("adapter*"))
    before, after = weights(tmp_path / "student"), weights(out / "model")
    assert before.keys() == after.keys()
    for name, old in before.items():
        change = (after[name] - old).double()
        if name.endswith("_proj.weight"):
            sizes = torch.linalg.svdvals(change)
            assert sizes[0] > 1e-3, name
            assert (sizes[3:] < (1e-6 if dtype == "float32" else 2e-2)).all(), name  # the frozen weight was rounded
        else:
            assert change.abs().max() <= (0 if dtype == "float32" else 1e-2), name


def test_a_run_with_adapters_that_was_cut_short_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    through = distill(write_stage(tmp_path / "a", LORA, examples=varied_examples(24)))
    config = write_stage(tmp_path / "b", LORA, examples=varied_examples(24))
    training_step = DistillationTrainer.training_step

    def until_killed(self, *arguments, **named):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return training_step(self, *arguments, **named)

    monkeypatch.setattr(DistillationTrainer, "training_step", until_killed)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    monkeypatch.undo()
    resumed = distill(replace(config, resume=True))
    torch.testing.assert_close(weights(resumed / "model"), weights(through / "model"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{"loss": "distillm"}, {"lora_rank": 0}])
def test_what_adapters_cannot_do_is_refused(tmp_path, change):
    config = write_stage(tmp_path, LORA)
    for name, value in change.items():
        setattr(config.distill, name, value)
    with pytest.raises(ConfigError, match=r"distill.lora_rank="):
        check_distill(config)


def test_adapters_save_the_states_of_all_other_weights(tmp_path):
    config = write_stage(tmp_path, [*LORA, "hardware.dtype=bfloat16"])
    shape = known_shape("qwen2.5-0.5b")
    parts = distill_budget(config, Models(shape)).phases["train"]
    sides = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)  # q and o, k and v, the three of the MLP
    assert parts["optimiser"] == 8 * 24 * 3 * sides
    assert parts["weights"] == 2 * shape.parameters + 4 * 24 * 3 * sides
