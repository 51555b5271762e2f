"""A retrieval server of the usual shape, to measure others against: Search-R1's protocol, one request at a time.

Each request is encoded, searched and answered in a thread of FastAPI's pool; nothing is batched across requests,
passages are read row by row from a Hugging Face dataset, and FAISS and torch keep their defaults. `--num-threads 1`
gives every operation one thread instead of one per core, which is faster under load: the best that this shape does.

Used by scripts/bench/retrieval.py, which starts it with the same encoder and index as the server under test.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by retriever_data.py")
    parser.add_argument("--encoder", required=True, help="as in retriever_data.py")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--num-threads", type=int, help="of one operation (default: FAISS's and torch's own)")
    options = parser.parse_args()
    if options.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(options.num_threads)
    os.environ["HF_DATASETS_CACHE"] = str(options.data / "datasets")

    import datasets
    import faiss
    import torch
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from retriever_data import index_file, load_bench_encoder

    datasets.disable_progress_bars()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    encoder = load_bench_encoder(options.encoder, options.data)
    index = faiss.read_index(str(index_file(options.data, options.encoder)))
    corpus = datasets.load_dataset("json", data_files=str(options.data / "corpus.jsonl"), split="train")
    print(
        f"reference: torch {torch.get_num_threads()} and FAISS {faiss.omp_get_max_threads()} threads per operation, "
        f"BLAS threshold {faiss.cvar.distance_compute_blas_threshold}, {type(index).__name__} of {index.ntotal} x "
        f"{index.d}, requests in a pool of 40 threads",
        file=sys.stderr,
        flush=True,
    )
    app = FastAPI()

    class RetrieveRequest(BaseModel):
        queries: list[str]
        topk: int | None = None
        return_scores: bool = False

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/retrieve")
    def retrieve(request: RetrieveRequest) -> dict[str, Any]:
        scores, rows = index.search(encoder.encode_queries(request.queries), request.topk or 3)
        found = [[corpus[int(row)] for row in query_rows] for query_rows in rows]
        if not request.return_scores:
            return {"result": found}
        pairs = [
            zip(documents, query_scores, strict=True) for documents, query_scores in zip(found, scores, strict=True)
        ]
        return {
            "result": [[{"document": document, "score": float(score)} for document, score in pair] for pair in pairs]
        }

    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
