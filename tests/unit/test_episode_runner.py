"""Many episodes through the loop: order, seeds, what survives an interruption, and when a run stops."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dgpo.agent.episode import Generation
from dgpo.agent.trajectory import read_trajectories
from dgpo.config.load import load_config
from dgpo.engines.episode_runner import forget_episodes, plan_episodes, play_episodes
from dgpo.errors import ConfigError, DataError, DgpoError
from tests.unit.scripted import PASSAGES, ByteTokenizer


class Tokenizer(ByteTokenizer):
    def apply_chat_template(self, messages, **_):
        return list(messages[-1]["content"].encode())


class SearchOnceThenAnswer:
    """Answers with its seed, so that a test sees which seed an episode got. Later episodes finish first."""

    def __init__(self, fail_after=None):
        self.num_calls, self.in_flight, self.most_in_flight = 0, 0, 0
        self.fail_after = fail_after

    async def generate(self, token_ids, *, max_tokens, stop, seed, request_id):
        self.num_calls += 1
        if self.fail_after is not None and self.num_calls > self.fail_after:
            raise RuntimeError("the engine died")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.02 / (1 + self.num_calls))
        self.in_flight -= 1
        searched = b"information" in bytes(i for i in token_ids if i < 256)
        ids = list((f"<answer>{seed}</answer>" if searched else "<search>x</search>").encode())
        return Generation(ids, [-1.0] * len(ids), "stop")


@pytest.fixture(scope="module")
def retriever():
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            body = json.dumps({"result": [[{"document": PASSAGES[0], "score": 1.0}] for _ in queries]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def config(retriever):
    config = load_config(["hardware=cpu", "retriever.max_retries=0", "retriever.max_outage_s=0"])
    config.retriever.url = retriever
    config.hardware.engine.concurrency = 3
    return config


def make_rows(count):
    return [
        {"data_source": "nq", "prompt": [{"role": "user", "content": f"q{i}?"}], "extra_info": {"index": i}}
        for i in range(count)
    ]


def play(config, path, policy, *, count=8, samples=1, settings=None):
    tokenizer = Tokenizer()
    planned = plan_episodes(make_rows(count), tokenizer, config=config, samples=samples)
    return asyncio.run(
        play_episodes(
            planned, policy=policy, tokenizer=tokenizer, config=config, path=path, settings=settings or {"model": "a"}
        )
    )


def test_trajectories_come_in_the_order_of_the_rows_with_bounded_concurrency(config, tmp_path):
    policy = SearchOnceThenAnswer()
    trajectories = play(config, tmp_path / "t.jsonl", policy)
    assert [t.episode_id for t in trajectories] == [f"nq-None-{i}" for i in range(8)]
    assert [t.episode_id for t in read_trajectories(tmp_path / "t.jsonl")] == [t.episode_id for t in trajectories]
    assert policy.most_in_flight == 3
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_seeds_depend_on_the_episode_and_not_on_the_order(config, tmp_path):
    first = play(config, tmp_path / "a.jsonl", SearchOnceThenAnswer(), samples=2)
    config.hardware.engine.concurrency = 16
    second = play(config, tmp_path / "b.jsonl", SearchOnceThenAnswer(), samples=2)
    assert [t.answer for t in first] == [t.answer for t in second]
    assert len({t.answer for t in first}) == 16


def test_an_interrupted_run_plays_only_what_is_missing(config, tmp_path):
    path = tmp_path / "t.jsonl"
    straight = play(config, tmp_path / "straight.jsonl", SearchOnceThenAnswer())
    with pytest.raises(RuntimeError, match="the engine died"):
        play(config, path, SearchOnceThenAnswer(fail_after=11))
    partial = tmp_path / "t.jsonl.partial"
    finished = partial.read_text().count("\n")
    assert 0 < finished < 8
    with partial.open("a") as file:
        file.write('{"episode_id": "torn')
    policy = SearchOnceThenAnswer()
    resumed = play(config, path, policy)
    assert policy.num_calls == 2 * (8 - finished)
    assert [t.response_ids for t in resumed] == [t.response_ids for t in straight]


def test_resuming_under_other_settings_is_refused(config, tmp_path):
    with pytest.raises(RuntimeError, match="the engine died"):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer(fail_after=11))
    with pytest.raises(ConfigError, match=r't\.jsonl\.partial was made with other settings \(model was "a", now "b"\)'):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer(), settings={"model": "b"})


def test_episodes_of_other_settings_are_forgotten_where_they_are_to_be_played_again(config, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    with pytest.raises(RuntimeError, match="the engine died"):
        play(config, path, SearchOnceThenAnswer(fail_after=11))
    forget_episodes(path, unless={"model": "a"})
    assert (tmp_path / "t.jsonl.partial").exists()
    forget_episodes(path, unless={"model": "b"})
    assert 'its episodes are played again (model was "a", now "b")' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_episodes_without_a_record_of_their_settings_are_not_used(config, tmp_path):
    with pytest.raises(RuntimeError, match="the engine died"):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer(fail_after=11))
    (tmp_path / "t.jsonl.settings.json").unlink()
    with pytest.raises(ConfigError, match="model was not recorded"):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer())


def test_a_dead_retriever_stops_the_run_with_a_way_to_go_on(config, tmp_path):
    config.retriever.url = "http://127.0.0.1:9"
    with pytest.raises(DgpoError, match="resume=true"):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer())
    assert (tmp_path / "t.jsonl.partial").read_text() == ""


def test_a_prompt_that_is_too_long_is_named(config, tmp_path):
    config.episode.max_prompt_tokens = 2
    with pytest.raises(DataError, match=r"nq-None-0.*max_prompt_tokens=2"):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer())


def test_two_rows_with_one_id_are_refused(config):
    with pytest.raises(DataError, match="two rows"):
        plan_episodes(make_rows(1) * 2, Tokenizer(), config=config)


def test_episodes_search_in_a_backend_of_the_users_without_a_server(config, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "7", "contents": '"X"\nx marks the spot'}) + "\n")
    config.retriever.url = "http://127.0.0.1:9"
    config.retriever.backend = "examples.jsonl_search:JsonlSearch"
    config.retriever.backend_options = {"path": str(corpus)}
    trajectories = play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer())
    found = [document["id"] for t in trajectories for record in t.searches for document in record.documents]
    assert found == ["7"] * 8


def test_a_backend_without_an_answer_counts_like_a_server_that_is_down(config, tmp_path, monkeypatch):
    (tmp_path / "users_down.py").write_text(
        "from dgpo.agent.search import SearchFailedError\n"
        "class Down:\n"
        "    async def search(self, query, *, topk, corpus): raise SearchFailedError('gone')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config.retriever.backend = "users_down:Down"
    with pytest.raises(DgpoError, match=r"lost a search at users_down:Down"):
        play(config, tmp_path / "t.jsonl", SearchOnceThenAnswer())
