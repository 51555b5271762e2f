"""Values recorded from the sources' own code: TAID's library (t, optimiser, schedule) and Search-R1's GRPO loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import open_dict
from transformers import TrainingArguments
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, kl_penalty

from dgpo.algorithms.taid import TaidSchedule, initial_state, update_state
from dgpo.coldstart.train import _training_arguments
from dgpo.config.load import load_config
from dgpo.rl.verl_config import to_verl

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_taids_t_is_the_librarys_where_its_adaptive_branch_leads():
    recorded = golden("taid_adaptive")
    num_steps = recorded["num_steps"]
    schedule = TaidSchedule(num_steps=num_steps, **load_config([]).distill.taid.__dict__)
    state, found, leads = initial_state(schedule), {}, 0
    for step in range(num_steps):
        loss = 2 * math.exp(-step / 2500) + 0.3 + 0.05 * math.sin(0.7 * step)
        state = update_state(state, loss, step=step, schedule=schedule)
        leads += state.t > 0.4 + 0.6 * step / num_steps + 1e-12
        if str(step) in recorded["t"]:
            found[str(step)] = state.t
    assert found == pytest.approx(recorded["t"], abs=1e-9)
    assert leads > num_steps / 2


def arguments(overrides, output) -> TrainingArguments:
    config = load_config(["hardware=cpu", *overrides])
    return _training_arguments(
        config.distill,
        config.hardware,
        seed=1,
        output=output,
        every=1,
        held_out=True,
        keep_best=True,
        evaluate_first=False,
    )


def test_the_papers_recipe_is_taids_optimiser_and_schedule(tmp_path):
    recorded, ours = golden("taid_optimizer"), arguments(["recipe=paper"], tmp_path)
    (decayed, bare) = recorded["groups"]
    assert [ours.adam_beta1, ours.adam_beta2] == decayed["betas"]
    assert (ours.adam_epsilon, ours.weight_decay) == (decayed["eps"], decayed["weight_decay"])
    assert bare["weight_decay"] == 0
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=ours.learning_rate)
    from transformers import get_scheduler

    scheduler = get_scheduler(
        ours.lr_scheduler_type,
        optimizer,
        num_warmup_steps=ours.get_warmup_steps(len(recorded["learning_rates"])),
        num_training_steps=len(recorded["learning_rates"]),
        scheduler_specific_kwargs=ours.lr_scheduler_kwargs,
    )
    rates = []
    for _ in recorded["learning_rates"]:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(recorded["learning_rates"], rel=1e-9)
    assert arguments(["recipe=recommended"], tmp_path).adam_beta2 == 0.98


def test_plain_grpos_loss_is_search_r1s(tmp_path):
    """With the whole batch as one micro-batch, where both denominators are the same, by the settings of the preset."""
    recorded = golden("grpo_loss")
    names = ("log_probs", "ref_log_probs", "old_log_probs", "advantages", "mask", "kl")
    tensors = {name: torch.tensor(recorded[name]) for name in names}
    kl = kl_penalty(tensors["log_probs"], tensors["ref_log_probs"], "low_var_kl")
    torch.testing.assert_close(kl, tensors["kl"])
    config = load_config(["experiment=grpo", "hardware=cpu", "student.path=here"])
    actor = to_verl(config, tmp_path).actor_rollout_ref.actor
    with open_dict(actor):
        actor.global_batch_info = {}  # this batch alone
    policy_loss, _ = compute_policy_loss_vanilla(
        tensors["old_log_probs"], tensors["log_probs"], tensors["advantages"], tensors["mask"], "token-mean", actor
    )
    assert float(policy_loss) == pytest.approx(recorded["policy_loss"], rel=1e-6)
    term = agg_loss(loss_mat=kl, loss_mask=tensors["mask"], loss_agg_mode="token-mean")
    assert float(policy_loss + config.train.init_kl_coef * term) == pytest.approx(recorded["loss"], rel=1e-6)


@pytest.mark.parametrize("experiment", ["grpo", "dgpo_grpo"])
def test_a_step_of_grpo_makes_ten_updates(experiment):
    """As both releases cut it: 512 questions, five episodes each, 256 episodes an update."""
    train = load_config([f"experiment={experiment}"]).train
    assert train.batch_size * train.samples_per_question / train.mini_batch_size == 10
