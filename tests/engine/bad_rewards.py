"""Reward functions that go wrong in the second step, for the guards to meet."""


def nan_in_step_2(trajectory, golds, scores):
    """NaN for the second step's first episode; the id of an episode begins with its step."""
    return float("nan") if trajectory.episode_id == "0000002-000000" else scores["em"]


def error_in_step_2(trajectory, golds, scores):
    if trajectory.episode_id.startswith("0000002-"):
        raise KeyError("no such thing")
    return scores["em"]
