import json

import pytest

from dgpo.agent.trajectory import SearchRecord, Trajectory, Turn, read_trajectories, write_trajectories


def make_trajectory(episode_id="e1"):
    document = {"id": "0", "contents": '"Orléans"\nà côté'}
    return Trajectory(
        episode_id=episode_id,
        prompt_ids=[1, 2],
        response_ids=[3, 4, 5],
        response_mask=[1, 0, 1],
        log_probs=[-0.1234567890123, 0.0, float("-inf")],
        turns=[Turn(0, 1, "search", "Orléans"), Turn(2, 3, "answer", "x")],
        searches=[SearchRecord(0, "Orléans", [document], num_cut_passages=1, query_cut=True, latency_s=0.1)],
        answer="x",
        status="answered",
        counters={"num_cut_passages": 1},
        corpus="real",
    )


def test_a_trajectory_survives_json_exactly():
    trajectory = make_trajectory()
    line = trajectory.to_json()
    assert "\n" not in line
    assert "Orléans" in line
    assert Trajectory.from_json(line) == trajectory
    assert trajectory.num_searches == 1


def test_files_keep_the_order_and_leave_nothing_beside(tmp_path):
    path = tmp_path / "new" / "episodes.jsonl"
    trajectories = [make_trajectory(name) for name in ("b", "a")]
    assert write_trajectories(path, iter(trajectories)) == 2
    assert list(read_trajectories(path)) == trajectories
    assert [entry.name for entry in path.parent.iterdir()] == ["episodes.jsonl"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "episodes.jsonl"
    write_trajectories(path, [make_trajectory()])

    def interrupted():
        yield make_trajectory("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trajectories(path, interrupted())
    assert [trajectory.episode_id for trajectory in read_trajectories(path)] == ["e1"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("line", ["{", "{}", json.dumps({"turns": [], "searches": [], "unknown": 1})])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "episodes.jsonl"
    path.write_text(make_trajectory().to_json() + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"episodes.jsonl, line 2 is no recorded episode"):
        list(read_trajectories(path))
