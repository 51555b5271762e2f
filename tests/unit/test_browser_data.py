"""The data of the episode browser: tokens as text and bytes, runs by writer, chunks, and JSON inside a page."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dgpo.evaluation import browser
from dgpo.evaluation.browser import ModelEpisodes, embed_json, write_browser_data
from dgpo.evaluation.token_pieces import TokenPieces, find_tokenizer

E_ACUTE = "Ã©"  # the two bytes of "é" in GPT-2's printable alphabet


@pytest.fixture
def tokenizer_file(tmp_path):
    vocabulary = {"a": 0, "Ġb": 1, E_ACUTE[0]: 2, E_ACUTE[1]: 3, E_ACUTE: 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(E_ACUTE[0], E_ACUTE[1])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["São"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_token_is_text_or_where_it_ends_inside_a_character_its_bytes(tokenizer_file):
    pieces = TokenPieces(tokenizer_file).pieces([0, 1, 2, 3, 4, 5, 99])
    assert pieces == {0: "a", 1: " b", 2: [0xC3], 3: [0xA9], 4: "é", 5: "São", 99: "[99]"}


def test_a_tokenizer_is_found_in_a_folder_and_a_missing_one_is_no_error(tokenizer_file, tmp_path):
    assert find_tokenizer(tokenizer_file.parent) == tokenizer_file
    assert find_tokenizer(tmp_path / "gone") is None
    assert find_tokenizer("no/such-model-here") is None
    assert find_tokenizer("not a/hub/name") is None


def make_model(tmp_path, name, episode_ids, *, pieces=None, teacher=None, mask=(1, 1, 0, 0, 0, 1)):
    file = tmp_path / f"{name}.jsonl"
    records = [
        {
            "episode_id": episode_id,
            "response_ids": [0, 1, 0, 0, 0, 4],
            "response_mask": list(mask),
            "searches": [{"query": f"about {episode_id}"}],
            **({"student_log_probs": [-0.5] * 6, "teacher_log_probs": teacher} if teacher else {}),
        }
        for episode_id in episode_ids
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = [
        {
            "episode_id": episode_id,
            "set": "s",
            "question": f"Q {episode_id}?",
            "golds": ["g"],
            "answer": "x",
            "status": "answered",
            "em": 1.0,
            "num_searches": 1.0,
            "hit": 1.0,
            "kind": "two_hop",
        }
        for episode_id in episode_ids
    ]
    return ModelEpisodes(name, scores, [file], pieces)


def write(models, folder, **options):
    return write_browser_data(models, folder, focus=models[-1].name, shown=[models[-1].name], **options)


def test_an_episode_is_its_ids_and_the_runs_by_policy_and_environment(tmp_path, tokenizer_file):
    data = write([make_model(tmp_path, "m", ["1"], pieces=TokenPieces(tokenizer_file))], tmp_path)
    assert data["chunks"] == {"0-0": {0: {"ids": [0, 1, 0, 0, 0, 4], "runs": [2, 3, 1]}}}
    assert data["pieces"] == [{0: "a", 1: " b", 4: "é"}]
    assert data["scores"][0]["queries"] == ["about 1"]
    assert data["properties"] == {"kind": ["two_hop"]}


def test_an_episode_that_no_loss_sees_begins_with_an_empty_run_of_the_policy(tmp_path, tokenizer_file):
    model = make_model(tmp_path, "m", ["1"], pieces=TokenPieces(tokenizer_file), mask=[0] * 6)
    assert write([model], tmp_path)["chunks"]["0-0"][0]["runs"] == [0, 6]


def test_log_probs_are_there_only_where_the_run_recorded_them(tmp_path, tokenizer_file):
    pieces = TokenPieces(tokenizer_file)
    models = [
        make_model(tmp_path, "scored", ["1"], pieces=pieces, teacher=[-1.0] * 6),
        make_model(tmp_path, "plain", ["1"], pieces=pieces),
    ]
    chunks = write(models, tmp_path)["chunks"]
    assert chunks["0-0"][0]["teacher"] == [-1.0] * 6
    assert chunks["0-0"][0]["student"] == [-0.5] * 6
    assert set(chunks["1-0"][0]) == {"ids", "runs"}


def test_models_that_played_other_questions_share_the_list_with_gaps(tmp_path, tokenizer_file):
    pieces = TokenPieces(tokenizer_file)
    data = write(
        [make_model(tmp_path, "a", "12", pieces=pieces), make_model(tmp_path, "b", "32", pieces=pieces)], tmp_path
    )
    assert data["ids"] == ["1", "2", "3"]
    assert data["scores"][0]["em"] == [1, 1, None]
    assert data["scores"][1]["em"] == [None, 1, 1]
    assert sorted(data["chunks"]["1-0"]) == [1, 2]
    assert data["vocabulary"] == [0, 0]


def test_many_episodes_go_into_files_that_replace_those_of_the_last_report(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr(browser, "CHUNK_SIZE", 2)
    model = make_model(tmp_path, "m", "12345", pieces=TokenPieces(tokenizer_file))
    folder = tmp_path / "report_episodes"
    folder.mkdir()
    (folder / "0-9.js").write_text("of an older report")
    monkeypatch.setattr(browser, "MAX_INLINE_BYTES", 10)
    data = write([model], tmp_path)
    assert (data["folder"], data["chunks"]) == ("report_episodes", {})
    assert sorted(path.name for path in folder.iterdir()) == ["0-0.js", "0-1.js", "0-2.js"]
    assert (folder / "0-2.js").read_text().startswith('receiveEpisodes("0-2",{"4":{"ids":[0,1,0,0,0,4]')
    monkeypatch.setattr(browser, "MAX_INLINE_BYTES", 10**6)
    assert write([model], tmp_path)["folder"] is None
    assert not folder.exists()


def test_no_text_can_end_the_element_that_holds_the_data():
    hostile = {"question": "</script><script>alert(1)</script><!--"}
    text = embed_json(hostile)
    assert "<" not in text
    assert json.loads(text) == hostile
