"""A frozen copy of the actor in bfloat16 beside the actor, both built by veRL on one rank. Run by test_frozen.py.

python tests/engine/frozen_copy.py MODEL PORT: prints the types of the rotary tables, and how far last states differ.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="dgpo.platforms.cpu", OMP_NUM_THREADS="1")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])

import torch
from verl.trainer.config import CheckpointConfig
from verl.workers.config import (
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker

from dgpo.rl.frozen import FrozenWorker

NUM_TOKENS = 900


def build(worker: type[TrainingWorker], **settings: object) -> torch.nn.Module:
    """With the mixed precision of a GPU's run (`dgpo.rl.verl_config`)."""
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    built = worker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(path=sys.argv[1], override_config={"attn_implementation": "sdpa"}),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2", mixed_precision=precision, use_torch_compile=False, **settings
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    built.reset()
    return built.engine.module.eval()


actor = build(TrainingWorker)
frozen = build(FrozenWorker, model_dtype="bf16", forward_only=True)
ids = torch.randint(0, actor.config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    # `TokenEngine` hands on the last states where nobody asks for terms of tokens.
    own, copied = (model(input_ids=ids, use_cache=False).logits.float() for model in (actor, frozen))
print(
    json.dumps(
        {
            "weights": [str(next(model.parameters()).dtype) for model in (actor, frozen)],
            "tables": [str(model.model.rotary_emb.inv_freq.dtype) for model in (actor, frozen)],
            "difference": float((own - copied).abs().max()),
        }
    )
)
