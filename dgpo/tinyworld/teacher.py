"""Train the tiny teacher on ideal episodes: it stands in for a large model that can already search.

The student never sees those: it learns from episodes that the trained teacher samples itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from transformers import AutoTokenizer

from dgpo.coldstart.train import train_on_examples
from dgpo.config.schema import DistillConfig, HardwareConfig
from dgpo.errors import ConfigError
from dgpo.runs.artifacts import MANIFEST, read_manifest, write_manifest
from dgpo.tinyworld.build import WorldSettings, real_world
from dgpo.tinyworld.models import TEACHER_SIZE, make_model
from dgpo.tinyworld.oracle import Bias, oracle_examples

# About 35 CPU-seconds on one thread; every example is seen once.
TEACHER_RECIPE = DistillConfig(
    loss="seqkd", epochs=1, batch_size=32, learning_rate=3e-3, warmup_ratio=0.1, held_out_share=0.0
)
NUM_STEPS = 180


def train_teacher(
    world_folder: Path,
    output: Path,
    *,
    seed: int,
    hardware: HardwareConfig,
    bias: Bias | None = None,
) -> None:
    """Trains the teacher of the world in `world_folder` and saves it to `output` as a Hugging Face folder.

    With `bias` it learns to be wrong about a relation (docs/results/gate.md).

    Raises:
        ConfigError: there is such a teacher already.
        DataError: the folder is no whole world.
    """
    if (output / MANIFEST).exists():
        raise ConfigError(f"{output} exists: a teacher is trained once; choose another --out, or move it away")
    read_manifest(world_folder, stage="world")
    settings = WorldSettings(**json.loads((world_folder / "world.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(world_folder / "tokenizer")
    world, train_isos, _ = real_world(settings)
    recipe = replace(TEACHER_RECIPE, max_steps=NUM_STEPS)
    count = NUM_STEPS * recipe.batch_size
    template = settings.prompt_template
    examples = oracle_examples(world, train_isos, tokenizer, count=count, template=template, seed=seed, bias=bias)
    model = make_model(TEACHER_SIZE, tokenizer, seed=seed)
    train_on_examples(
        model,
        None,
        examples,
        tokenizer,
        checkpoint=output,
        metrics=output / "metrics.jsonl",
        settings=recipe,
        hardware=hardware,
        seed=seed,
        name="teacher",
    )
    write_manifest(
        output,
        stage="tiny_teacher",
        inputs={"world": str(world_folder)},
        config=asdict(recipe) | ({"bias": asdict(bias)} if bias else {}),
        counts={"examples": count, "parameters": model.num_parameters()},
        seed=seed,
    )
