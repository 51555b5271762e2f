"""What each token id of a tokenizer stands for, as text or, where it holds part of a character, as bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

Piece = str | list[int]


class TokenPieces:
    """The pieces of one tokenizer, whose concatenation is the decoded text, byte for byte.

    Only `tokenizer.json` is read: opening a report's tokenizers takes no model library.

    Args:
        file: a Hugging Face `tokenizer.json`.
    """

    def __init__(self, file: str | Path) -> None:
        text = Path(file).read_text(encoding="utf-8")
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._tokenizer = Tokenizer.from_str(text)
        description = json.loads(text)
        self._added = {token["id"]: token["content"] for token in description.get("added_tokens", [])}
        self._byte_level = "ByteLevel" in json.dumps(description.get("decoder"))

    def pieces(self, ids: Iterable[int]) -> dict[int, Piece]:
        """The piece of each id; an id that the tokenizer does not know shows as its number in brackets."""
        return {token_id: self._piece(token_id) for token_id in ids}

    def _piece(self, token_id: int) -> Piece:
        token = self._added.get(token_id)
        if token is not None:
            return token
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"[{token_id}]"
        if not self._byte_level:
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not all(character in _BYTE_OF for character in token):
            return token
        data = bytes(_BYTE_OF[character] for character in token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return list(data)


def find_tokenizer(checkpoint: str | Path) -> Path | None:
    """`tokenizer.json` of a checkpoint folder, or of a hub name that was downloaded before; None without one."""
    file = Path(checkpoint) / "tokenizer.json"
    if file.is_file():
        return file
    if Path(checkpoint).is_dir() or Path(checkpoint).is_absolute():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(checkpoint), "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: 188 bytes stand for themselves, the others follow 255."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
