"""Stand-ins for the engine and the server that keep the real interfaces, with a byte-level tokenizer."""

from dataclasses import dataclass, field

from dgpo.agent.episode import EpisodeLimits, Generation
from dgpo.agent.search import SearchFailedError

EOS_ID = 256
EOS_TEXT = "<eos>"
PROMPT_IDS = [257, 258]  # ids that no text encodes to
PASSAGES = [
    {"id": "0", "contents": '"Lyon"\nLyon is a city in France.'},
    {"id": "1", "contents": '"France"\nThe capital of France is Paris.'},
]


class ByteTokenizer:
    def encode(self, text, *, add_special_tokens):
        ids = list(text.encode())
        return [257, *ids] if add_special_tokens else ids

    def decode(self, token_ids, *, skip_special_tokens):
        end = "" if skip_special_tokens else EOS_TEXT
        text = b"".join(bytes([i]) if i < EOS_ID else end.encode() for i in token_ids)
        return text.decode(errors="replace")


@dataclass
class ScriptedPolicy:
    """Writes its texts one a turn, obeying stop strings and budgets as an engine does; `<eos>` is the end token."""

    texts: list[str]
    calls: list[dict] = field(default_factory=list)

    async def generate(self, token_ids, *, max_tokens, stop, seed, request_id):
        text = self.texts[len(self.calls)]
        call = {"token_ids": list(token_ids), "max_tokens": max_tokens, "stop": tuple(stop), "seed": seed}
        self.calls.append({**call, "request_id": request_id})
        ends = [text.index(tag) + len(tag) for tag in stop if tag in text]
        written = text[: min(ends)] if ends else text
        ids = list(written.removesuffix(EOS_TEXT).encode()) + [EOS_ID] * written.endswith(EOS_TEXT)
        reason = "length" if len(ids) > max_tokens else "stop"
        ids = ids[:max_tokens]
        return Generation(ids, [-0.5 - len(self.calls)] * len(ids), reason)


@dataclass
class RecordingSearch:
    documents: list[dict] = field(default_factory=lambda: PASSAGES)
    queries: list[tuple] = field(default_factory=list)
    failing: bool = False

    async def search(self, query, *, topk, corpus):
        self.queries.append((query, topk, corpus))
        if self.failing:
            raise SearchFailedError("the server is gone")
        return self.documents[:topk]


def make_limits(**changes):
    limits = {
        "max_turns": 4,
        "max_turn_tokens": 500,
        "max_response_tokens": 4096,
        "min_turn_tokens": 32,
        "topk": 2,
        "max_passage_tokens": 150,
        "max_query_chars": 100,
    }
    return EpisodeLimits(**{**limits, **changes})
