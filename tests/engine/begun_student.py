"""Trains the tests' student for a few seconds, so that its episodes search, and some of them are right."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from dgpo.config.load import load_config
from dgpo.engines.environment import export_environment

hardware = load_config(["world=tiny", "hardware=cpu"]).hardware
export_environment(hardware)

from transformers import AutoTokenizer  # noqa: E402  after the environment

from dgpo.coldstart.train import train_on_examples  # noqa: E402
from dgpo.tinyworld.build import WorldSettings, real_world  # noqa: E402
from dgpo.tinyworld.models import STUDENT_SIZE, make_model  # noqa: E402
from dgpo.tinyworld.oracle import oracle_examples  # noqa: E402
from dgpo.tinyworld.teacher import TEACHER_RECIPE  # noqa: E402

NUM_STEPS = 150

folder = Path(sys.argv[1])
settings = WorldSettings(**json.loads((folder / "world.json").read_text()))
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
world, train_isos, _ = real_world(settings)
recipe = replace(TEACHER_RECIPE, max_steps=NUM_STEPS, learning_rate=4e-3)
count = NUM_STEPS * recipe.batch_size
train_on_examples(
    make_model(STUDENT_SIZE, tokenizer, seed=1),
    None,
    oracle_examples(world, train_isos, tokenizer, count=count, template=settings.prompt_template, seed=2),
    tokenizer,
    checkpoint=folder / "models" / "student",
    metrics=folder / "models" / "student" / "metrics.jsonl",
    settings=recipe,
    hardware=hardware,
    seed=1,
    name="student",
)
