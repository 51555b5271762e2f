"""Stand-ins that are cheap to check: model folders without a model, a data row, a server that only knows its health."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from dgpo.agent.trajectory import Trajectory, Turn
from dgpo.runs.artifacts import write_manifest

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def make_model(
    folder: Path, *, weights: bytes = b"student", vocabulary: Sequence[str] = ("a", "b"), positions: int = 8192
) -> str:
    """A folder that passes for a Hugging Face model as long as nobody loads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + weights)  # a header of no tensors
    vocab = {token: index for index, token in enumerate(vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": []}, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a", "chat_template": TEMPLATE}))
    return str(folder)


EPISODE = Trajectory(
    episode_id="nq-train-0",
    prompt_ids=[1],
    response_ids=[0],
    response_mask=[1],
    log_probs=[0.0],
    turns=[Turn(0, 1, "answer", "a")],
    searches=[],
    answer="a",
    status="answered",
)


def make_collection(run: Path, text: str = f"{EPISODE.to_json()}\n") -> None:
    """`collect/` of a run, finished, in the tokens of `make_model`."""
    (run / "collect").mkdir(parents=True)
    (run / "collect" / "episodes.jsonl").write_text(text)
    write_manifest(run / "collect", stage="collect", inputs={}, config=None, counts={}, seed=1)


def make_row(index: int, corpus: str | None = "real") -> dict[str, Any]:
    return {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "who?"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["me"]}},
        "extra_info": {"split": "train", "index": index, "corpus": corpus},
    }


@contextlib.contextmanager
def healthy_server() -> Iterator[str]:
    """A server at the yielded URL that says it serves the corpus `real`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "ok", "corpora": {"real": {}}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
