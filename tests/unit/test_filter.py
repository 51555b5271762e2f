"""Only correct episodes are kept, and every other one is counted under its reason."""

from dgpo.agent.trajectory import Trajectory
from dgpo.coldstart.filter import keep_correct


def make_trajectory(name, answer, status="answered"):
    return Trajectory(name, [1], [2], [1], [-0.1], [], [], answer, status, {}, None)


def test_correct_answers_are_kept_and_the_rest_is_counted_by_reason():
    trajectories = [
        make_trajectory("a", "The Paris"),
        make_trajectory("b", "Lyon"),
        make_trajectory("c", None, "no_answer"),
        make_trajectory("d", None, "overflow"),
        make_trajectory("e", None, "search_failed"),
        make_trajectory("f", "paris."),
    ]
    kept, counts = keep_correct(trajectories, {name: ["Paris"] for name in "abcdef"})
    assert [trajectory.episode_id for trajectory in kept] == ["a", "f"]
    assert counts == {"kept": 2, "wrong": 1, "no_answer": 1, "overflow": 1, "search_failed": 1}
