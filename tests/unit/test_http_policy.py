"""A teacher behind an OpenAI-compatible server: its texts in our tokens, what is retried, and what is counted."""

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dgpo.agent.episode import Generation, run_episode
from dgpo.agent.protocol import STOP_STRINGS
from dgpo.agent.trajectory import read_trajectories
from dgpo.coldstart.collect import COLLECT_STOP_STRINGS
from dgpo.config.load import load_config
from dgpo.engines.episode_runner import plan_episodes, play_episodes
from dgpo.engines.http_policy import HttpPolicy
from dgpo.errors import DgpoError
from tests.unit.fake_model import ChatTokenizer, FakeModel, make_question
from tests.unit.scripted import EOS_ID, RecordingSearch, make_limits

SEARCH, ANSWER = "<think>é</think><search>Lyon</search>", "<answer> Paris </answer>"


def reply(text, _=None):
    return ANSWER if "Doc 1(" in text else SEARCH


class Server:
    """Completes texts by `reply` as OpenAI's API does: the stop string is left out. Fails as it is told to first."""

    def __init__(self, *failures):
        self.failures, self.bodies, self.playing, self.most = list(failures), [], 0, 0

    async def complete(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.playing += 1
        self.most = max(self.most, self.playing)
        await asyncio.sleep(0.01)
        self.playing -= 1
        if self.failures:
            return web.json_response({"error": "busy"}, status=self.failures.pop(0), headers={"Retry-After": "0"})
        given = body["prompt"]
        text = reply(given if isinstance(given, str) else bytes(i for i in given if i < EOS_ID).decode())
        choice = {"text": text.removesuffix("</search>"), "finish_reason": "stop", "index": 0}
        if body.get("return_token_ids"):
            ids = list(text.encode()) + [EOS_ID] * text.endswith("</answer>")
            choice |= {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})

    def app(self):
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        return app


def make_policy(url, **options):
    prompts = {"e": "<s>Q?"}
    defaults = {"model": "big", "tokenizer": ChatTokenizer(), "temperature": 0.0, "num_prompt_tokens": {"e": 2}}
    return HttpPolicy(str(url), **{**defaults, "prompts": prompts, **options})


async def play(server, **options):
    async with TestServer(server.app()) as running, make_policy(running.make_url("/v1"), **options) as policy:
        settings = {"search": RecordingSearch(), "tokenizer": ChatTokenizer(), "limits": make_limits()}
        episode = await run_episode(
            episode_id="e", prompt_ids=[257, 258], policy=policy, stop=COLLECT_STOP_STRINGS, **settings
        )
    return episode, policy


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("dgpo.engines.http_policy.FIRST_WAIT_S", 0.0)


async def test_a_text_becomes_turns_of_our_tokens_with_the_stop_string_and_the_end_token_put_back():
    server = Server()
    episode, policy = await play(server)
    mine = [i for i, mask in zip(episode.response_ids, episode.response_mask, strict=True) if mask]
    assert bytes(i for i in mine if i < EOS_ID).decode() == SEARCH + ANSWER
    assert mine[-1] == EOS_ID
    assert (episode.answer, policy.origin) == ("Paris", "text")
    first, second = server.bodies
    assert (first["prompt"], first["stop"], first["model"], first["temperature"]) == ("<s>Q?", ["</search>"], "big", 0)
    assert second["prompt"].startswith("<s>Q?" + SEARCH + "\n\n<information>Doc 1(")


async def test_a_server_of_token_ids_gives_the_same_episode_as_the_model_in_process():
    episode, policy = await play(Server(), ids=True)

    class WithEnd(FakeModel):
        async def generate(self, token_ids, **options):
            generation = await super().generate(token_ids, **options)
            ends = [EOS_ID] * bytes(generation.token_ids).endswith(b"</answer>")
            ids = generation.token_ids + ends
            return Generation(ids, [-0.5] * len(ids), "stop")

    settings = {"search": RecordingSearch(), "tokenizer": ChatTokenizer(), "limits": make_limits()}
    inside = await run_episode(
        episode_id="e", prompt_ids=[257, 258], policy=WithEnd(reply), stop=COLLECT_STOP_STRINGS, **settings
    )
    assert (episode.response_ids, episode.log_probs) == (inside.response_ids, inside.log_probs)
    assert policy.origin == "sampled"


async def test_what_is_busy_is_asked_again_and_everything_is_counted():
    _, policy = await play(Server(503, 429))
    assert policy.counts == {"requests": 4, "retries": 2, "prompt_tokens": 14, "completion_tokens": 6}


@pytest.mark.parametrize(
    ("failures", "message"), [([503] * 9, "did not answer 3 times"), ([400], "refuses the teacher's turn")]
)
async def test_a_server_that_stays_away_or_refuses_stops_the_run_with_a_way_to_go_on(failures, message):
    with pytest.raises(DgpoError, match=message):
        await play(Server(*failures), max_retries=2)


async def test_both_stop_strings_are_put_back_where_their_tags_are_open():
    policy = make_policy("http://127.0.0.1:9")
    for text, whole in (("<search>a", "<search>a</search>"), ("<answer>b", "<answer>b</answer>")):
        turn = policy._from_text({"text": text, "finish_reason": "stop"}, max_tokens=99, stop=STOP_STRINGS)
        assert bytes(turn.token_ids).decode() == whole
    cut = policy._from_text({"text": "abcdef", "finish_reason": "length"}, max_tokens=4, stop=STOP_STRINGS)
    assert (bytes(cut.token_ids), cut.finish_reason) == (b"abcd", "length")


async def collect(server, path, config, rows):
    tokenizer = ChatTokenizer()
    planned = plan_episodes(rows, tokenizer, config=config)
    async with TestServer(server.app()) as running:
        prompts = {each.episode_id: "Q?" for each in planned}
        lengths = {each.episode_id: len(each.prompt_ids) for each in planned}
        policy = make_policy(running.make_url(""), prompts=prompts, num_prompt_tokens=lengths, max_retries=0)
        async with policy:
            return await play_episodes(
                planned, policy=policy, tokenizer=tokenizer, config=config, path=path, settings={}, concurrency=3
            )


async def test_a_killed_server_loses_no_finished_episode_and_resuming_plays_the_others(tmp_path, monkeypatch):
    config = load_config(["hardware=cpu", "retriever.backend=tests.unit.scripted:RecordingSearch"])
    rows, path = [make_question(i, "Paris") for i in range(8)], tmp_path / "trajectories.jsonl"

    class Dies(Server):
        async def complete(self, request):
            if len(self.bodies) >= 9:
                return web.json_response({}, status=503)
            return await super().complete(request)

    first, second = Dies(), Server()
    with pytest.raises(DgpoError):
        await collect(first, path, config, rows)
    kept = [json.loads(line)["episode_id"] for line in (tmp_path / "trajectories.jsonl.partial").open()]
    assert 0 < len(kept) < 8
    await collect(second, path, config, rows)
    episodes = list(read_trajectories(path))
    assert len(episodes) == 8
    assert len(second.bodies) == 2 * (8 - len(kept))
    assert {episode.origin for episode in episodes} == {"text"}
    assert 1 < second.most <= 3
