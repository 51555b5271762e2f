"""Policy terms in chunks against autograd over whole logits: time and peak memory, forward and backward.

    python scripts/bench/chunked_head.py [--tokens 512] [--vocab 32000] [--chunk 64]

Log-probs, entropies and the exact teacher term, as `token_terms` makes them, and by torch operations on the whole
[tokens, vocabulary] logits of both models. The two run in turn, each repetition in a process of its own so that its
peak memory is its own; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

REPETITIONS = 3
WIDTH = 256


def measure(variant: str, *, tokens: int, vocab: int, chunk: int) -> dict[str, float]:
    """One forward and backward pass in this process: seconds, and GB above what was there before."""
    import torch

    from dgpo.algorithms.chunked_head import TeacherStates, token_terms

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden, other = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
    head, other_head = (torch.randn(vocab, WIDTH) / WIDTH**0.5 for _ in range(2))
    head.requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if variant == "chunked":
        teacher = TeacherStates(torch.ones(tokens, dtype=torch.bool), other, other_head)
        terms = token_terms(hidden, head=head, targets=targets, temperature=1.0, chunk_size=chunk, teacher=teacher).T
    else:
        log_p, log_q = (hidden @ head.T).log_softmax(-1), (other @ other_head.T).log_softmax(-1)
        log_probs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        terms = torch.stack([log_probs, entropy, (log_p.exp() * (log_p - log_q)).sum(-1)])
    terms.mean().backward()
    seconds = time.perf_counter() - started
    peak_gb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return {"seconds": seconds, "peak_gb": peak_gb, "kl": terms[2].mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--variant", choices=("chunked", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"tokens": options.tokens, "vocab": options.vocab, "chunk": options.chunk}
    if options.variant:
        print(json.dumps(measure(options.variant, **sizes)))
        return
    runs: dict[str, list[dict[str, float]]] = {"chunked": [], "plain": []}
    for _ in range(REPETITIONS):
        for variant, results in runs.items():
            flags = [f"--{name}={value}" for name, value in sizes.items()]
            output = subprocess.check_output([sys.executable, __file__, "--variant", variant, *flags])
            results.append(json.loads(output))
    print(f"{sizes}, medians of {REPETITIONS}; logits alone are {options.tokens * options.vocab * 4 / 2**30:.2f} GB")
    medians = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in runs.items()}
    for name, median in medians.items():
        print(f"{name:8} {median['seconds']:.3f} s  {median['peak_gb']:.2f} GB above the inputs  KL {median['kl']:.6f}")
    for key, label in (("seconds", "time"), ("peak_gb", "memory")):
        print(f"chunked / plain, {label}: {medians['chunked'][key] / medians['plain'][key]:.2f}")


if __name__ == "__main__":
    main()
