"""Step 6: the cold start, whole (DDP's kind) and as FSDP2 of one rank, resumed, and against float32 on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from smoke.checks import Checks
from smoke.models import make_examples, make_model, make_tokenizer

from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.errors import StoppedOnRequestError
from dgpo.files import read_jsonl
from dgpo.hardware.budget import Models, distill_budget
from dgpo.hardware.shapes import shape_from_config
from dgpo.runs.stopping import REQUEST

STEPS = 5
TINY = 2  # layers


@dataclass(frozen=True)
class Variant:
    """One training, in a process of its own: Hugging Face's Trainer settles devices once per process.

    Attributes:
        layers: of both models; None: the real shapes.
        stops: after the first step, as a signal asks for.
    """

    name: str
    device: str
    sharding: str = "none"
    layers: int | None = None
    resume: bool = False
    stops: bool = False
    folder: str = ""


def run(checks: Checks, *, device: str, folder: Path) -> None:
    whole = _in_process(Variant("whole", device), folder)
    sharded = _in_process(Variant("sharded", device, sharding="full"), folder)
    for name, result in (("whole", whole), ("FSDP2", sharded)):
        losses = result["losses"]
        checks.below(f"{name}: the last loss of {STEPS} steps over the first", losses[-1] / losses[0], 1)
        if result["peak"]:
            checks.within(f"{name}: peak GiB", result["peak"] / 2**30, result["estimate"] / 2**30, 0.15)
        checks.number(f"{name}: tokens per s", result["tokens_per_s"])
    checks.within("FSDP2's last loss", sharded["losses"][-1], whole["losses"][-1], 0.01)
    here = _in_process(Variant("tiny", device, layers=TINY), folder)
    if device == "cuda":
        cpu = _in_process(Variant("tiny-cpu", "cpu", layers=TINY), folder)
        checks.within("a tiny model's loss, against float32 on the CPU", here["losses"][-1], cpu["losses"][-1], 0.01)
    _in_process(Variant("stopped", device, layers=TINY, stops=True), folder)
    resumed = _in_process(Variant("resumed", device, layers=TINY, resume=True, folder="stopped"), folder)
    checks.within("the last loss after a stop and a resume", resumed["losses"][-1], here["losses"][-1], 1e-3)


def _in_process(variant: Variant, folder: Path) -> dict[str, Any]:
    variant = replace(variant, folder=str(folder / (variant.folder or variant.name)))
    process = multiprocessing.get_context("spawn").Process(target=train, args=(variant,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the training {variant.name!r} ended with {process.exitcode}, see the log")
    return json.loads((Path(variant.folder) / f"{variant.name}.json").read_text())


def train(variant: Variant) -> None:
    """A training's process: models, five steps, and what was seen of them."""
    from dgpo.coldstart.train import train_on_examples

    folder, device = Path(variant.folder), variant.device
    folder.mkdir(exist_ok=True)
    if variant.sharding == "full":
        _alone_in_a_group()
    config, small = load_config(settings(variant)), variant.layers is not None
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None  # as Llama's
    # On a CPU from the same numbers as on the GPU: they are drawn here, and moved.
    place = "cpu" if small else device
    student = make_model(
        "qwen2.5-0.5b", seed=0, device=place, attention=config.hardware.attention, layers=variant.layers
    )
    kind = getattr(torch, config.hardware.dtype)
    name = "qwen2.5-0.5b" if small else "qwen2.5-3b"
    teacher = make_model(name, seed=1, device=place, attention=config.hardware.attention, layers=variant.layers)
    teacher = teacher.to(device, kind)
    examples = make_examples(32, vocab=student.config.vocab_size, longest=512 if device == "cuda" else 96, seed=3)
    if variant.stops:
        (folder / REQUEST).touch()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        train_on_examples(
            student,
            teacher,
            examples,
            tokenizer,
            checkpoint=folder / "model",
            metrics=folder / "metrics.jsonl",
            settings=config.distill,
            hardware=config.hardware,
            seed=1,
            name=variant.name,
            checkpoints=folder / "checkpoints" if small else None,
            resume=variant.resume,
        )
    except StoppedOnRequestError:
        (folder / REQUEST).unlink()
    lines = read_jsonl(folder / "metrics.jsonl")
    seen = {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "tokens_per_s": lines[-1].get("tokens_per_s", 0.0),
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "estimate": _estimate(config, student, teacher),
    }
    (folder / f"{variant.name}.json").write_text(json.dumps(seen))


def settings(variant: Variant) -> list[str]:
    hardware = ["hardware=cpu"] if variant.device == "cpu" else ["hardware=h200x8", "hardware.gpus_per_node=1"]
    if variant.device == "cuda" and (variant.layers or not _has_flash_attention()):
        hardware += ["hardware.attention=sdpa"]
    distill = [f"distill.max_steps={STEPS}", "distill.batch_size=8", "distill.micro_batch_size=4"]
    distill += ["distill.held_out_share=0", "distill.warmup_ratio=0", "distill.learning_rate=1e-3"]
    distill += ["distill.kl_ratio=0.5", "distill.evaluate_every=1", f"distill.sharding={variant.sharding}"]
    if variant.device == "cuda":
        distill += ["episode.max_prompt_tokens=64", "episode.max_response_tokens=448"]
    return [*hardware, *distill]


def _has_flash_attention() -> bool:
    import importlib.util

    return importlib.util.find_spec("flash_attn") is not None


def _estimate(config: Config, student: Any, teacher: Any) -> float:
    """Bytes that the plan has for this stage, without what is no tensor of torch's."""
    shapes = [shape_from_config(model.config.to_dict()) for model in (student, teacher)]
    if shapes[0] is None:
        return 0.0
    parts = dict(distill_budget(config, Models(student=shapes[0], teacher=shapes[1])).phases["train"])
    parts.pop("reserve", None)
    return sum(parts.values())


def _alone_in_a_group() -> None:
    """The variables of torch.distributed for one rank, which sharding asks for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
