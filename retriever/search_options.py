"""How a server searches; the one home of these defaults. `retriever.serve` has a flag for each."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Engine = Literal["auto", "faiss", "faiss-gpu", "torch"]
ScanDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    engine: Engine = field(
        default="auto",
        metadata={
            "choices": get_args(Engine),
            "help": "faiss (CPU), faiss-gpu, or torch: exact product in 16 bits, the best rescored in float32; auto is "
            "torch for Flat and SQfp16 indexes on a GPU, else faiss",
        },
    )
    scan_dtype: ScanDtype = field(
        default="auto",
        metadata={
            "choices": get_args(ScanDtype),
            "help": "of the torch engine's copy; auto is float16 on a GPU, bfloat16 on a CPU that multiplies it, else "
            "float32",
        },
    )
    num_candidates: int = field(
        default=16, metadata={"help": "rows scored again in float32, at least; a larger topk takes more"}
    )
    search_params: str = field(
        default="",
        metadata={"help": "FAISS's, such as efSearch=128 (HNSW) or nprobe=32 (IVF), instead of the manifest's"},
    )
    reranker: str = field(
        default="", metadata={"help": "folder or Hugging Face id of a cross-encoder that reorders the candidates"}
    )
    num_reranked: int = field(default=32, metadata={"help": "candidates of each query that the reranker reads"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that a model repository brings; only for models that you trust"}
    )

    def __post_init__(self) -> None:
        for name in ("num_candidates", "num_reranked"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
