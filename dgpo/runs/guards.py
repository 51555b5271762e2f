"""Guards in front of the update: a run with a NaN in its batch stops while its weights are still sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dgpo.errors import NonFiniteError

NUM_NAMED = 4  # episodes named in a message

SOURCES = {
    "rm_scores": "the reward function returned it: correct train.reward",
    "rollout_log_probs": "the rollout engine sampled with it: its copy of the weights is damaged",
    "old_log_probs": "the student computed it: its weights are damaged; go on from an earlier checkpoint with a lower "
    "train.actor_learning_rate",
    "ref_log_prob": "the initial policy computed it: check the checkpoint that training started from",
    "teacher_log_probs": "the teacher computed it: check teacher.path and hardware.dtype",
    "values": "the critic computed it: its weights are damaged; go on from an earlier checkpoint with a lower "
    "train.critic_learning_rate",
    "token_level_rewards": "it came with the rewards' KL terms",
    "advantages": "it came with the advantage estimate, from finite inputs",
    "returns": "it came with the advantage estimate, from finite inputs",
}
FROM_TRAINED_WEIGHTS = ("rollout_log_probs", "old_log_probs", "values")  # an earlier checkpoint may be sound


def check_finite(
    tensors: Mapping[str, torch.Tensor], *, response_mask: torch.Tensor, episode_ids: Sequence[str]
) -> None:
    """Looks at what an update is made of, on policy tokens: elsewhere a value may be anything.

    Args:
        tensors: name -> [B, T]; names are those of `SOURCES`.
        response_mask: [B, T] 1 on policy tokens.
        episode_ids: [B].

    Raises:
        NonFiniteError: names the first tensor with a NaN or an infinity, its episodes, and what to do.
    """
    for name, values in tensors.items():
        broken = ~torch.isfinite(values) & (response_mask > 0)
        rows = torch.nonzero(broken.any(dim=1))[:, 0].tolist()
        if not rows:
            continue
        named = ", ".join(episode_ids[row] for row in rows[:NUM_NAMED])
        more = f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
        value = values[broken][0].item()
        raise NonFiniteError(
            f"{name} is {value} on {int(broken.sum())} tokens of {len(rows)} of {len(values)} episodes "
            f"({named}{more}), expected finite numbers: {SOURCES[name]}. Nothing was updated with it; "
            "resume=true goes on from the last checkpoint",
            name,
        )
