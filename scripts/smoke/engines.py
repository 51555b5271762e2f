"""Step 3: veRL's engines as RL uses them, without vLLM: packed and padded, frozen, offloaded, saved; and memory.

Each part is a process of its own with a limit of its own.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from smoke.checks import Checks
from smoke.models import make_examples, save_model

from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.engines.environment import export_environment
from dgpo.hardware.budget import Models, rl_budget
from dgpo.hardware.shapes import shape_from_config

LIMIT = {"cuda": 80, "cpu": 300}  # seconds of a part
OFFLOADS = ("none", "idle", "full")
TOLERANCE = 0.02  # nats, of log-probs in bfloat16
SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def run(checks: Checks, *, device: str, folder: Path) -> None:
    export_environment(load_config(settings(device, folder)).hardware)  # veRL reads its platform at its import
    if device == "cpu":
        import verl.workers.engine_workers  # noqa: F401  once for all parts, which are forked
    _in_process(checks, "models", device, folder)
    _scores(checks, _in_process(checks, "scores", device, folder))
    _updates(checks, {offload: _in_process(checks, offload, device, folder) for offload in OFFLOADS})


def _scores(checks: Checks, seen: dict[str, Any]) -> None:
    if not seen:
        return
    if seen["attention"] == "sdpa":
        checks.number("packed by flash attention", "SKIP: flash-attn or CUDA is missing")
    if seen["is_packed"]:
        what = f"log-probs, packed by {seen['attention']} against padded by sdpa"
        checks.below(f"{what}, mean difference", seen["packed_difference"], TOLERANCE)
    checks.below(
        "log-probs of a frozen copy against the actor's, mean difference", seen["frozen_difference"], TOLERANCE
    )
    checks.true("the frozen copy's table of positions is in float32", seen["table"] == "torch.float32", seen["table"])


def _updates(checks: Checks, seen: dict[str, dict[str, Any]]) -> None:
    expected = seen["none"]
    for offload, update in seen.items():
        for name in ("loss", "grad_norm", "log_prob_after") if update and expected and offload != "none" else ():
            checks.within(f"offload={offload}: {name}", update[name], expected[name], 0.01)
        if update and update["peak"]:
            checks.within(f"offload={offload}: peak GiB of an update", update["peak"], update["plan"], 0.15)
    if expected:
        checks.true("an update changes the policy", expected["log_prob_after"] != expected["log_prob_before"])
        checks.true("a checkpoint is loaded to the last bit", expected["restored"], expected["num_tensors"])


def _in_process(checks: Checks, part: str, device: str, folder: Path) -> dict[str, Any]:
    """What the part found; nothing, and a failed check, where it did not end well."""
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")  # CUDA cannot be forked
    process = context.Process(target=work, args=(part, device, folder))
    process.start()
    process.join(LIMIT[device])
    if process.exitcode is None:
        process.kill()
        process.join()
        checks.true(f"part {part}", False, f"not done after {LIMIT[device]} s")
    elif process.exitcode:
        checks.true(f"part {part}", False, f"ended with {process.exitcode}, see the log")
    file = folder / f"{part}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def work(part: str, device: str, folder: Path) -> None:
    """A part's process."""
    if part == "models":
        for seed, name in enumerate(("student", "teacher")):
            save_model("qwen2.5-0.5b", folder / name, seed=seed, device=device)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = score(device, folder) if part == "scores" else update(device, folder, part)
    (folder / f"{part}.json").write_text(json.dumps(found))


def examples(device: str) -> list[Any]:
    """The episodes of one micro-batch."""
    return make_examples(8, vocab=2000, longest=1024 if device == "cuda" else 64, seed=4)


def attention_when_packed(device: str) -> str:
    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def can_pack(device: str) -> bool:
    """On a GPU packed episodes need flash attention."""
    return device == "cpu" or attention_when_packed(device) != "sdpa"


def settings(device: str, folder: Path, *, packed: bool | None = None, offload: str = "none") -> list[str]:
    packed = can_pack(device) if packed is None else packed
    episodes = examples(device)
    tokens = sum(len(each.prompt_ids) + len(each.response_ids) for each in episodes)
    group = (
        ["hardware=cpu"] if device == "cpu" else ["hardware=h200x8", "hardware.gpus_per_node=1", "hardware.gpu=null"]
    )
    return [
        *group,
        "hardware.dtype=bfloat16",
        f"hardware.attention={attention_when_packed(device) if packed else 'sdpa'}",
        f"hardware.remove_padding={packed}",
        f"hardware.max_tokens_per_gpu={tokens if packed else 'null'}",
        f"hardware.micro_batch_size={len(episodes)}",
        f"episode.max_prompt_tokens={len(episodes[0].prompt_ids)}",
        f"episode.max_response_tokens={max(len(each.response_ids) for each in episodes)}",
        f"hardware.offload={offload}",
        "train.teacher_term.form=exact",
        "train.actor_learning_rate=1e-4",
        "train.actor_warmup_steps=0",
        "stages=[train]",
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        f"run_dir={folder}",
    ]


def _build(config: Config, folder: Path, *, frozen: str | None = None) -> Any:
    """The actor as RL builds it, or a frozen model beside it, by veRL's worker."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    from dgpo.platforms import token_engine  # noqa: F401  registers veRL's engine of GPUs
    from dgpo.rl.frozen import FrozenWorker
    from dgpo.rl.verl_config import to_verl

    verl = to_verl(config, folder).actor_rollout_ref
    if frozen:
        verl.model.path = str(folder / frozen)
    actor = omega_conf_to_dataclass(verl.actor)
    engine = actor.engine
    if frozen:
        dtype = SHORT[config.hardware.dtype]
        engine = replace(engine, forward_only=True, model_dtype=dtype, param_offload=False, offload_policy=False)
        engine = replace(engine, optimizer_offload=False)
    worker = (FrozenWorker if frozen else TrainingWorker)(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=omega_conf_to_dataclass(verl.model),
            engine_config=engine,
            optimizer_config=actor.optim,
            checkpoint_config=replace(actor.checkpoint, save_contents=["model", "optimizer", "extra"]),
        )
    )
    worker.reset()
    return worker.engine


def _batch(config: Config, device: str, *, gate: bool = False) -> Any:
    from tensordict import TensorDict
    from torch.nested import as_nested_tensor
    from verl.utils import tensordict_utils as tu

    from dgpo.platforms.token_engine import GATE_KEY

    rows = examples(device)
    columns: dict[str, list[Any]] = {
        "input_ids": [[*row.prompt_ids, *row.response_ids] for row in rows],
        "position_ids": [range(len(row.prompt_ids) + len(row.response_ids)) for row in rows],
        "prompts": [row.prompt_ids for row in rows],
        "responses": [row.response_ids for row in rows],
        "response_mask": [row.response_mask for row in rows],
        "loss_mask": [row.response_mask for row in rows],
    }
    nested = {
        name: as_nested_tensor([torch.tensor(list(row)) for row in values], layout=torch.jagged)
        for name, values in columns.items()
    }
    gates = {GATE_KEY: torch.arange(len(rows)) % 2.0} if gate else {}
    data = TensorDict({**nested, **gates}, batch_size=len(rows))
    hardware = config.hardware
    way: dict[str, Any] = {"use_remove_padding": hardware.remove_padding, "use_dynamic_bsz": False}
    way["micro_batch_size_per_gpu"] = len(rows)
    tu.assign_non_tensor(data, temperature=1.0, calculate_entropy=True, pad_token_id=0, **way)
    return data


def _log_probs(engine: Any, config: Config, device: str) -> torch.Tensor:
    """[policy tokens] of the batch."""
    with engine.eval_mode():
        output = engine.infer_batch(_batch(config, device))
    values = output["model_output"]["log_probs"].values().float().cpu()
    return values[values != 0]


def score(device: str, folder: Path) -> dict[str, Any]:
    """Log-probs of the same tokens by the actor, packed and padded, and by a frozen copy."""
    packed, padded = (load_config(settings(device, folder, packed=each)) for each in (None, False))
    actor, copied = _build(packed, folder), _build(packed, folder, frozen="student")
    own = _log_probs(actor, packed, device)
    others = _log_probs(_build(padded, folder), padded, device), _log_probs(copied, packed, device)
    differences = [float((own - other).abs().mean()) for other in others]
    table = copied.module.model.rotary_emb.inv_freq.dtype
    found = dict(zip(("packed_difference", "frozen_difference"), differences, strict=True))
    hardware = packed.hardware
    return {"attention": hardware.attention, "is_packed": hardware.remove_padding, "table": str(table), **found}


def update(device: str, folder: Path, offload: str) -> dict[str, Any]:
    """One update with the exact teacher term; without offload also a checkpoint, loaded over a second update."""
    from dgpo.rl.exact_loss import TeacherReader

    config = load_config(settings(device, folder, offload=offload))
    engine = _build(config, folder)
    engine.read_teacher = TeacherReader(_build(config, folder, frozen="teacher"))
    before = float(_log_probs(engine, config, device).mean())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    output = _step(engine, config, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    found = {"peak": peak, "plan": _plan(config, folder), "log_prob_before": before}
    found |= {"loss": float(sum(output["loss"])), "grad_norm": float(output["metrics"]["grad_norm"])}
    found["log_prob_after"] = float(_log_probs(engine, config, device).mean())
    return found | (_restore(engine, config, device, folder) if offload == "none" else {})


def _step(engine: Any, config: Config, device: str) -> Any:
    with engine.train_mode():
        return engine.train_batch(_batch(config, device, gate=True), loss_function=_loss)


def _loss(*, model_output: Any, data: Any, dp_group: Any = None) -> Any:
    """Mean over the policy's tokens of -log p, and of KL(student || teacher) where the episode is gated."""
    from verl.workers.utils.padding import no_padding_2_padding

    from dgpo.platforms.token_engine import KL_KEY

    log_probs, kl = (no_padding_2_padding(model_output[name], data) for name in ("log_probs", KL_KEY))
    mask = data.select("response_mask").to_padded_tensor()["response_mask"]
    return ((kl - log_probs) * mask).sum() / mask.sum(), {}


def _plan(config: Config, folder: Path) -> float:
    """GiB that the plan has for the actor's update, without what is no tensor of torch's."""
    shapes = [
        shape_from_config(json.loads((folder / name / "config.json").read_text())) for name in ("student", "teacher")
    ]
    assert shapes[0] is not None
    parts = dict(rl_budget(config, Models(student=shapes[0], teacher=shapes[1])).phases["update actor"])
    parts.pop("reserve", None)
    return sum(parts.values()) / 2**30


def _restore(engine: Any, config: Config, device: str, folder: Path) -> dict[str, Any]:
    from dgpo.rl.rank_checkpoints import load_rank

    engine.save_checkpoint(str(folder / "checkpoint"))
    saved = _state(engine)
    _step(engine, config, device)
    assert not all(map(torch.equal, saved, _state(engine))), "a second update changed nothing"
    load_rank(engine, str(folder / "checkpoint"))
    return {"restored": all(map(torch.equal, saved, _state(engine))), "num_tensors": f"{len(saved)} tensors"}


def _state(engine: Any) -> list[torch.Tensor]:
    """Copies of all weights and of the optimiser's moments."""
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    tensors = [*engine.module.state_dict().values(), *filter(torch.is_tensor, moments)]
    return [getattr(tensor, "_local_tensor", tensor).detach().cpu().clone() for tensor in tensors]
