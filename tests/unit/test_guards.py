import pickle

import pytest
import torch

from dgpo.errors import CollapseError, NonFiniteError
from dgpo.runs.guards import SOURCES, check_finite

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
IDS = ["one", "two", "three"]


def tensor_with(value, *, row, column):
    tensor = torch.zeros(3, 3)
    tensor[row, column] = value
    return tensor


@pytest.mark.parametrize("name", sorted(SOURCES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_tensor_and_episode(name, value):
    with pytest.raises(NonFiniteError) as caught:
        check_finite({name: tensor_with(value, row=2, column=1)}, response_mask=MASK, episode_ids=IDS)
    message = str(caught.value)
    assert message.startswith(f"{name} is {value} on 1 tokens of 1 of 3 episodes (three)")
    assert SOURCES[name] in message
    assert "\n" not in message


def test_values_off_the_mask_may_be_anything():
    check_finite({"values": tensor_with(float("nan"), row=1, column=2)}, response_mask=MASK, episode_ids=IDS)


def test_the_first_of_several_tensors_is_the_cause():
    broken = tensor_with(float("nan"), row=0, column=0)
    with pytest.raises(NonFiniteError, match=r"^old_log_probs is nan"):
        check_finite({"old_log_probs": broken, "advantages": broken}, response_mask=MASK, episode_ids=IDS)


def test_many_episodes_are_counted_and_a_few_named():
    ids = [f"e{index}" for index in range(9)]
    with pytest.raises(NonFiniteError, match=r"9 of 9 episodes \(e0, e1, e2, e3 and 5 more\)"):
        check_finite({"values": torch.full((9, 1), torch.nan)}, response_mask=torch.ones(9, 1), episode_ids=ids)


@pytest.mark.parametrize("error", [CollapseError("why", 7), NonFiniteError("why", "values")])
def test_errors_survive_the_way_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == ("why", vars(error))
