import json
from pathlib import Path

import pytest
import torch

from dgpo.agent.seeds import derive_seed
from dgpo.algorithms.selective_kl import compute_gate, gated_token_share, subtract_teacher_kl

CASES = json.loads((Path(__file__).parents[1] / "golden" / "selective_kl.json").read_text())["cases"]


def episode_batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "token_level_scores": torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]),
        "student_log_probs": -torch.rand(2, 4, generator=generator),
        "teacher_log_probs": -torch.rand(2, 4, generator=generator),
        "response_mask": torch.tensor([[1, 0, 0, 1], [1, 0, 0, 1]]),
        "gate": torch.tensor([1.0, 0.0]),
        "kl_coef": 0.1,
    }


def rewards(batch):
    return subtract_teacher_kl(batch["token_level_scores"], **{k: v for k, v in batch.items() if "scores" not in k})


@pytest.mark.parametrize("case", CASES)
def test_rewards_equal_the_authors(case):
    scores = torch.tensor(case["token_level_scores"])
    result = subtract_teacher_kl(
        scores,
        student_log_probs=torch.tensor(case["old_log_probs"]),
        teacher_log_probs=torch.tensor(case["teacher_log_probs"]),
        response_mask=torch.tensor(case["response_mask"]),
        gate=compute_gate((scores.sum(-1) >= 0.1).float(), "failed"),
        kl_coef=case["beta"],
    )
    torch.testing.assert_close(result, torch.tensor(case["token_level_rewards"]), atol=1e-6, rtol=1e-5)


def test_rewards_by_hand():
    result = subtract_teacher_kl(
        torch.tensor([[0.0, 0.0, 0.5]]),
        student_log_probs=torch.tensor([[-1.0, -2.0, -3.0]]),
        teacher_log_probs=torch.tensor([[-2.0, -9.0, -1.0]]),
        response_mask=torch.tensor([[1, 0, 1]]),
        gate=torch.tensor([1.0]),
        kl_coef=0.1,
    )
    # -0.1 * (-1 + 2), masked, 0.5 - 0.1 * (-3 + 1)
    torch.testing.assert_close(result, torch.tensor([[-0.1, 0.0, 0.7]]))


def test_correct_episodes_and_environment_tokens_keep_their_scores():
    batch = episode_batch()
    result = rewards(batch)
    assert torch.equal(result[1], batch["token_level_scores"][1])
    assert torch.equal(result[:, 1:3], batch["token_level_scores"][:, 1:3])
    assert (result[0, [0, 3]] != 0).all()


def test_unscored_positions_may_hold_anything():
    batch = episode_batch()
    expected = rewards(batch)
    batch["teacher_log_probs"] = batch["teacher_log_probs"].clone()
    batch["teacher_log_probs"][1] = float("nan")
    batch["teacher_log_probs"][0, 1:3] = -torch.inf
    assert torch.equal(rewards(batch), expected)


def test_padding_does_not_change_the_rewards():
    batch = episode_batch()
    padded = {
        name: torch.nn.functional.pad(value, (0, 3)) if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        for name, value in batch.items()
    }
    torch.testing.assert_close(rewards(padded), torch.nn.functional.pad(rewards(batch), (0, 3)))


def test_a_student_equal_to_the_teacher_pays_nothing():
    batch = episode_batch()
    batch["teacher_log_probs"] = batch["student_log_probs"]
    assert torch.equal(rewards(batch), batch["token_level_scores"])


@pytest.mark.parametrize(("mode", "expected"), [("failed", [1, 0, 1]), ("all", [1, 1, 1]), ("none", [0, 0, 0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_gates(mode, expected, dtype):
    assert compute_gate(torch.tensor([0, 1, 0]).to(dtype), mode).tolist() == expected


def test_the_random_gate_takes_as_many_as_failed_with_the_smallest_coins():
    coins = {"coin": torch.tensor([0.9, 0.1, 0.5, 0.3])}
    assert compute_gate(torch.tensor([0.0, 1.0, 1.0, 0.0]), "random", scores=coins).tolist() == [0, 1, 0, 1]
    assert compute_gate(torch.ones(4), "random", scores=coins).tolist() == [0, 0, 0, 0]


def test_the_random_gates_coins_are_of_the_run_and_the_episode():
    """Nothing but seed and key decides, so a resumed step draws the same; another step draws others."""

    def chosen(seed, step):
        keys = [f"{step:07d}-{row:06d}_0" for row in range(64)]
        coins = {"coin": torch.tensor([derive_seed("gate", seed, key) / 2**31 for key in keys])}
        return compute_gate((torch.arange(64) % 4 == 0).float(), "random", scores=coins).tolist()

    assert sum(chosen(41, 1)) == 48
    assert chosen(41, 1) == chosen(41, 1)
    assert chosen(41, 1) != chosen(41, 2)
    assert chosen(41, 1) != chosen(42, 1)


def test_the_share_of_tokens_under_the_gate_by_hand():
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert gated_token_share(torch.tensor([0, 1, 1]), mask).item() == pytest.approx(1 / 4)
    assert gated_token_share(torch.tensor([1, 0, 0]), mask).item() == pytest.approx(3 / 4)
    assert gated_token_share(torch.ones(3), torch.zeros(3, 4)).item() == 0


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="unknown gate 'wrong': expected one of failed, all, random, none"):
        compute_gate(torch.zeros(1), "wrong")


def test_shapes_that_would_broadcast_are_refused():
    batch = episode_batch()
    with pytest.raises(ValueError, match=r"gate is \(2, 1\)"):
        rewards({**batch, "gate": batch["gate"][:, None]})
    with pytest.raises(ValueError, match=r"response_mask \(4,\)"):
        rewards({**batch, "response_mask": batch["response_mask"][0]})
