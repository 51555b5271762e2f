"""A finished collection and two tiny models on disk: what the distillation stage starts from."""

from dgpo.agent.trajectory import Trajectory, write_trajectories
from dgpo.coldstart.examples import TrainingExample
from dgpo.config.load import load_config
from dgpo.runs.artifacts import write_manifest
from dgpo.tinyworld.models import ModelSize, make_model, save_model
from dgpo.tinyworld.tokenizer import build_tokenizer

EXAMPLES = [
    TrainingExample([5, 6, 7], [8, 9, 20, 21, 10, 1], [1, 1, 0, 0, 1, 1]),
    TrainingExample([5, 6], [11, 22, 12], [1, 0, 1]),
]


def tiny_tokenizer():
    return build_tokenizer(["Lyon", "France"], ["What is the country of ?"])


def tiny_model(tokenizer, seed):
    return make_model(ModelSize(hidden_size=32, num_layers=1, num_heads=1), tokenizer, seed=seed).eval()


def varied_examples(count):
    """Different questions, of different lengths."""
    return [
        TrainingExample([5, 6, 7 + i], [11, 22, 12 + i % 3, *range(8, 8 + i % 7)], [1, 0, 1] + [1] * (i % 7))
        for i in range(count)
    ]


def overrides(folder, *more):
    return [
        "world=tiny",
        "hardware=cpu",
        f"run_dir={folder / 'run'}",
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        "distill.batch_size=8",
        "distill.learning_rate=1e-2",
        "distill.held_out_share=0",
        *more,
    ]


def write_stage(folder, more=(), *, examples=EXAMPLES * 8):
    """Writes the stage's input below `folder`. Returns its configuration, with `more` overrides."""
    tokenizer = tiny_tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        save_model(tiny_model(tokenizer, seed), tokenizer, folder / name)
    trajectories = [
        Trajectory(
            str(i), e.prompt_ids, e.response_ids, e.response_mask, [0.0] * len(e.response_ids), [], [], "x", "answered"
        )
        for i, e in enumerate(examples)
    ]
    collected = folder / "run" / "collect"
    write_trajectories(collected / "episodes.jsonl", trajectories)
    write_manifest(collected, stage="collect", inputs={}, config={}, counts={"kept": len(examples)}, seed=0)
    return load_config(overrides(folder, *more))
