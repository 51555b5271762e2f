"""What a DistiLLM step trains on, with a stand-in for the engine that plays the episodes."""

import pytest

from dgpo.agent.trajectory import Trajectory
from dgpo.coldstart.examples import TrainingExample
from dgpo.coldstart.student_episodes import StudentEpisodes
from dgpo.config.load import load_config
from dgpo.errors import ConfigError

TEACHERS = [TrainingExample([question], [99], [1], f"world{question}") for question in range(4)]
NUM_STEPS = 20


class StandIn(StudentEpisodes):
    """Answers question q with token `step`; loses the search of question 3."""

    async def _play(self, examples, *, step, weights):
        assert (weights / "model").exists()
        return [
            Trajectory(
                f"{step}/{e.prompt_ids[0]}",
                e.prompt_ids,
                [7, step],
                [0, 1],
                [0.0, -1.0],
                [],
                [],
                None,
                "search_failed" if e.prompt_ids == [3] else "answered",
                corpus=e.corpus,
            )
            for e in examples
        ]


def make(folder, *, threshold, rank=0, num_ranks=1):
    config = load_config(["world=tiny", "hardware=cpu", "distill.student_episodes.buffer_size=6"])
    config.distill.student_episodes.initial_threshold = threshold
    return StandIn(config, model="model", tokenizer=None, folder=folder, rank=rank, num_ranks=num_ranks)


def choose(episodes, step):
    def save_weights(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").touch()

    return episodes.choose(
        TEACHERS, step=step, num_steps=NUM_STEPS, save_weights=save_weights, on_all_ranks=lambda holds: holds
    )


def test_without_a_threshold_the_teachers_examples_come_back(tmp_path):
    with make(tmp_path, threshold=0.0) as episodes:
        assert choose(episodes, 1) == TEACHERS
    assert episodes.metrics(float)["sgo/teacher_steps"] == 1


def test_the_students_episodes_on_the_same_questions_without_those_that_lost_a_search(tmp_path):
    with make(tmp_path, threshold=1.0) as episodes:
        played = choose(episodes, 1)
    assert played == [TrainingExample([q], [7, 1], [0, 1], f"world{q}") for q in range(3)]
    metrics = episodes.metrics(float)
    assert (metrics["sgo/episodes"], metrics["sgo/failed_searches"], metrics["sgo/buffer_size"]) == (3, 1, 3)
    assert not (tmp_path / "student_weights").exists()


def test_a_full_buffer_is_replayed_and_the_last_step_plays_nothing(tmp_path):
    with make(tmp_path, threshold=1.0) as episodes:
        choose(episodes, 1)
        choose(episodes, 2)
        replayed = choose(episodes, NUM_STEPS)
    assert len(replayed) == 4
    assert {e.response_ids[1] for e in replayed} == {1, 2}
    assert episodes.metrics(float)["sgo/replay_steps"] == 1


def test_ranks_draw_the_same_source_and_share_the_buffer_size(tmp_path):
    with make(tmp_path, threshold=0.5) as one, make(tmp_path, threshold=0.5, rank=1, num_ranks=2) as two:
        for step in range(1, NUM_STEPS):
            choose(one, step)
            choose(two, step)
    assert two.buffer.capacity == 3
    assert min(one.counts["fresh"], one.counts["teacher"]) > 0
    assert one.counts["teacher"] == two.counts["teacher"]


def test_a_checkpoint_holds_what_later_steps_depend_on(tmp_path):
    with make(tmp_path / "a", threshold=0.7) as episodes, make(tmp_path / "b", threshold=0.0) as restored:
        for step in range(1, 8):
            choose(episodes, step)
        episodes.observe(loss=9.0, cross_entropy=1.0)
        episodes.observe(loss=0.0, cross_entropy=2.0)
        episodes.save_state(tmp_path)
        restored.load_state(tmp_path)
        assert restored.schedule.threshold == pytest.approx(0.8)
        assert restored.metrics(float) == episodes.metrics(float)
        for step in range(8, NUM_STEPS):
            assert choose(restored, step) == choose(episodes, step)


def test_buffers_of_another_number_of_ranks_are_refused(tmp_path):
    """With fewer, one rank would have none; with more, some would be lost in silence."""
    with make(tmp_path, threshold=0.5) as one, make(tmp_path, threshold=0.5, rank=1, num_ranks=2) as two:
        one.save_state(tmp_path)
        with pytest.raises(ConfigError, match=r"written by 1 ranks.*cannot go on with 2"):
            two.load_state(tmp_path)
        two.save_state(tmp_path)
        with pytest.raises(ConfigError, match=r"written by 2 ranks.*cannot go on with 1"):
            one.load_state(tmp_path)
