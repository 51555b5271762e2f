"""The logged sample of RL's episodes: which, what is written of them, and that the report shows it."""

import json
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from dgpo.evaluation.browser_section import browser_section
from dgpo.rl.episode_log import FIELDS, EpisodeLog, choose_logged
from tests.browser.synthetic import make_tokenizer

TEXT = [
    (1, "<think>é</think><search>city of Lyon</search>"),
    (0, "<information>x</information>"),
    (1, "<answer>F</answer>"),
]


class Tokenizer:
    """The few methods of a Hugging Face tokenizer that are used."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = make_tokenizer(folder)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "tokenizer.json").write_bytes((self.folder / "tokenizer.json").read_bytes())


@pytest.fixture
def batch(tmp_path):
    """Four episodes of one text: right, wrong, wrong and scored, and one that raised."""
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    ids, mask = [], []
    for generated, text in TEXT:
        piece = tokenizer.tokenizer.encode(text).ids
        ids += piece
        mask += [generated] * len(piece)
    keys = [f"{row}_0_0" for row in range(4)]
    scores = [
        {"em": 1.0, "answered": 1.0, "num_searches": 1.0, "hit": 0.0},
        {"em": 0.0, "answered": 0.0, "overflow": 1.0, "num_searches": 1.0, "hit": 0.0},
        {"em": 0.0, "answered": 1.0, "num_searches": 1.0, "hit": 0.0},
        {"em": 0.0, "error": 1.0},
    ]
    teacher = {keys[2]: torch.full((len(ids),), -1.25)}

    def fetch(chosen):
        def nested(row):
            return torch.nested.as_nested_tensor([torch.tensor(row)] * len(chosen), layout=torch.jagged)

        data = {
            "prompts": nested([7, 8]),
            "responses": nested(ids),
            "response_mask": nested(mask),
            "old_log_probs": nested([-0.123456] * len(ids)),
            "raw_prompt": NonTensorStack(*([{"role": "user", "content": f"Question: {key}?"}] for key in chosen)),
            "reward_model": NonTensorStack(*({"ground_truth": {"target": ["F"]}} for _ in chosen)),
        }
        assert set(data) == set(FIELDS)
        return TensorDict(data, batch_size=len(chosen))  # as TransferQueue builds it

    def write(step, *, every=10, num_episodes=3):
        log = EpisodeLog(tmp_path / "train", tokenizer, every=every, num_episodes=num_episodes)
        log.write(step, keys, scores=scores, teacher_log_probs=teacher, fetch=fetch)
        return tmp_path / "train" / "episodes" / f"step_{step}.jsonl"

    return write


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_holds_the_tokens_who_wrote_them_and_both_log_probs(batch):
    first, second, third = read(batch(10))
    assert [record["episode_id"] for record in (first, second, third)] == [
        "step 10/0_0_0",
        "step 10/1_0_0",
        "step 10/2_0_0",
    ]
    assert first["question"] == "0_0_0?"
    assert first["golds"] == ["F"]
    assert first["answer"] == "F"
    assert first["searches"] == [{"query": "city of Lyon"}]
    assert sum(first["response_mask"]) < len(first["response_mask"]) == len(first["response_ids"])
    assert first["student_log_probs"] == [-0.1235] * len(first["response_ids"])
    assert (first["teacher_log_probs"], second["teacher_log_probs"]) == (None, None)
    assert third["teacher_log_probs"] == [-1.25] * len(third["response_ids"])
    assert [record["status"] for record in (first, second, third)] == ["answered", "overflow", "answered"]


@pytest.mark.parametrize(
    ("step", "every", "written"), [(1, 10, True), (9, 10, False), (20, 10, True), (20, None, False)]
)
def test_a_sample_is_written_in_the_first_step_and_at_the_interval(batch, step, every, written):
    assert batch(step, every=every).exists() == written


def test_the_sample_is_half_failed_half_correct_and_prefers_what_the_teacher_scored():
    correct = [1, 1, 1, 0, 0, 0]
    scored = [False, False, True, False, True, True]
    everyone = [True] * 6
    assert choose_logged(correct, scored=scored, played=everyone, num_logged=2) == [2, 4]
    assert choose_logged(correct, scored=scored, played=everyone, num_logged=4) == [0, 2, 4, 5]
    assert choose_logged([0, 0, 0], scored=[False] * 3, played=[True] * 3, num_logged=2) == [0, 1]
    assert choose_logged([1, 1, 1, 0], scored=[True] * 4, played=[True] * 4, num_logged=3) == [0, 1, 3]
    assert choose_logged([0, 0], scored=[True] * 2, played=[False, True], num_logged=8) == [1]


def test_the_report_shows_the_sample_with_its_log_probs(batch, tmp_path):
    batch(10)
    batch(1)
    section = browser_section(tmp_path, None)
    data = json.loads(section.split('id="episode-data">')[1].split("</script>")[0])
    assert data["models"] == ["in training"]
    assert data["sets"] == ["training, step 1", "training, step 10"]
    episodes = data["chunks"]["0-0"]
    assert [("teacher" in episodes[str(row)]) for row in range(6)] == [False, False, True] * 2
    assert data["scores"][0]["queries"][0] == "city of Lyon"
