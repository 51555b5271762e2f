"""Time and memory of starting the retrieval server on a large index: synthetic passages, the real server process.

python scripts/bench/index_start.py --num-passages 1000000        # 2 GB of disk, minutes to make, seconds to start

Memory is the server's resident set against that of the same server on a dozen passages. What the kernel keeps of the
mapped index and corpus may be dropped at any time and is shown apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the shell names
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not
NUM_QUERIES, BLOCK_ROWS, START_TIMEOUT_S = 200, 4096, 600


def make_folder(folder: Path, *, num_passages: int, index_type: str) -> int:
    """An index folder of random unit vectors, but for the probed rows, which the encoder must reproduce."""
    from retriever.build import write_dense
    from retriever.corpus import Corpus, scan_offsets, write_offsets
    from retriever.encoder_config import EncoderConfig, resolve_config
    from retriever.encoders import load_encoder
    from retriever.manifest import CORPUS_FILE, NUM_PROBES, OFFSETS_FILE, probe_rows, read_manifest

    folder.mkdir(parents=True)
    with open(folder / CORPUS_FILE, "w") as file:
        for row in range(num_passages):
            contents = f'"Place {row}"\nNumber {row} lies {row * 7919 % 10007} miles from the sea, near {row // 7}.'
            file.write(json.dumps({"id": str(row), "contents": contents}) + "\n")
    write_offsets(folder / OFFSETS_FILE, scan_offsets(folder / CORPUS_FILE))
    corpus = Corpus(folder / CORPUS_FILE)
    config = resolve_config(EncoderConfig())
    encoder = load_encoder(config, num_threads=1)
    known = {row: encoder.encode_passages([corpus[row]["contents"]])[0] for row in probe_rows(num_passages, NUM_PROBES)}

    def read_rows(start: int, end: int) -> np.ndarray:
        blocks = []
        for block in range(start // BLOCK_ROWS, (end - 1) // BLOCK_ROWS + 1):
            vectors = np.random.default_rng(block).standard_normal((BLOCK_ROWS, encoder.dimension), dtype=np.float32)
            blocks.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        first = start // BLOCK_ROWS * BLOCK_ROWS
        rows = np.concatenate(blocks)[start - first : end - first]
        for row, vector in known.items():
            if start <= row < end:
                rows[row - start] = vector
        return rows

    write_dense(
        folder,
        corpus,
        read_rows,
        dimension=encoder.dimension,
        index_type=index_type,
        search_params="",
        encoder=config,
    )
    manifest = read_manifest(folder)
    return manifest.files[manifest.index].bytes


def measure(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Start the server on `folder`, ask it, and stop it; seconds and megabytes."""
    port_file = folder.parent / f"{folder.name}.port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "retriever.serve", "--index", f"a={folder}", "--port", "0"]
    started = time.perf_counter()
    server = subprocess.Popen([*command, "--port-file", str(port_file), *arguments], cwd=ROOT)
    try:
        while not port_file.exists():
            if server.poll() is not None or time.perf_counter() - started > START_TIMEOUT_S:
                sys.exit(f"the server did not start: exit code {server.poll()}")
            time.sleep(0.01)
        row = {"ready_s": time.perf_counter() - started, "ready_cpu_s": cpu_s(server.pid)}
        row |= resident_mb(server.pid, "ready")
        url = f"http://127.0.0.1:{port_file.read_text().strip()}/retrieve"
        started = time.perf_counter()
        for number in range(NUM_QUERIES):
            body = json.dumps({"query": f"Place {number * 4391}", "topk": 3}).encode()
            DIRECT.open(urllib.request.Request(url, body), timeout=START_TIMEOUT_S).read()
        row["ms_per_query"] = (time.perf_counter() - started) / NUM_QUERIES * 1e3
        row["cpu_ms_per_query"] = (cpu_s(server.pid) - row["ready_cpu_s"]) / NUM_QUERIES * 1e3
        return row | resident_mb(server.pid, "used")
    finally:
        server.terminate()
        server.wait()


def cpu_s(pid: int) -> float:
    """Processor time of a process so far: what a busy machine does not stretch."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int, when: str) -> dict[str, float]:
    """Private memory, and pages of mapped files (libraries, index, corpus)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        f"private_mb_{when}": int(fields["RssAnon"].split()[0]) / 1024,
        f"file_mb_{when}": int(fields["RssFile"].split()[0]) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-passages", type=int, default=1_000_000)
    parser.add_argument("--index-type", default="Flat", help="FAISS factory string (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the index folders here and use them again")
    parser.add_argument("arguments", nargs="*", help="passed to retriever.serve, after --, e.g. -- --engine torch")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        rows, index_mb = {}, {}
        for num_passages in (12, options.num_passages):
            folder = root / f"{options.index_type.replace(',', '_')}-{num_passages}"
            if not folder.exists():
                started = time.perf_counter()
                make_folder(folder, num_passages=num_passages, index_type=options.index_type)
                print(f"made {folder} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            index_mb[num_passages] = sum(path.stat().st_size for path in folder.glob("*.index")) / 2**20
            rows[num_passages] = measure(folder, options.arguments)
    print(f"{options.index_type}, retriever.serve {' '.join(options.arguments)}".strip())
    print(f"{'':22}" + "".join(f"{f'{num} passages':>20}" for num in rows))
    print(f"{'index_mb':22}" + "".join(f"{value:20.1f}" for value in index_mb.values()))
    for name in next(iter(rows.values())):
        print(f"{name:22}" + "".join(f"{row[name]:20.1f}" for row in rows.values()))
    small, large = rows.values()
    millions = (options.num_passages - 12) / 1e6
    grown_mb = sum(large[f"{kind}_mb_used"] - small[f"{kind}_mb_used"] for kind in ("private", "file"))
    private_mb = large["private_mb_used"] - small["private_mb_used"]
    print(f"private memory per million passages: {private_mb / millions:.1f} MB")
    beyond_mb = grown_mb - index_mb[options.num_passages]
    print(f"resident beyond the index per million passages, mapped pages included: {beyond_mb / millions:.1f} MB")


if __name__ == "__main__":
    main()
