"""What a stage leaves on the disk while it runs, and in the end: bytes, from parameters."""

from __future__ import annotations

from dgpo.config.model_files import is_hub_name
from dgpo.config.schema import Config
from dgpo.hardware.budget import Models
from dgpo.hardware.memory import ADAM, FLOAT32
from dgpo.hardware.shapes import find_shape

HUB = 2  # bytes of a parameter there
STATE = FLOAT32 + ADAM  # weights and moments
DISTILL_CHECKPOINTS = 3  # the newest, the one before it, and the best (dgpo/coldstart/train.py)
DOWNLOAD = 70e9  # Wikipedia's corpus, its index and the training questions (docs/data.md)


def stage_disk(config: Config, stage: str, models: Models) -> dict[str, float]:
    """Bytes in `run_dir` by part; nothing worth counting where a stage only plays."""
    count = models.student.parameters
    if stage == "distill":
        return {"checkpoints": DISTILL_CHECKPOINTS * STATE * count, "model": FLOAT32 * count}
    if stage != "train":
        return {}
    train = config.train
    kept = train.keep_last + (train.keep_best if config.data.validation_file else 0)
    # The actor is also written as a Hugging Face model. One more checkpoint is there while it is being written.
    each = (STATE + FLOAT32) * count + STATE * (models.student.critic if models.critic else 0)
    return {"checkpoints": (kept + 1) * each, "model": FLOAT32 * count}


def hub_disk(config: Config) -> tuple[dict[str, float], list[str]]:
    """(bytes by model, models of unknown size) of what is named on the hub: models, and the retriever's encoder."""
    named = [config.student.path, config.teacher.path, config.teacher.init, *config.download.models]
    names = dict.fromkeys(name for name in named if name and is_hub_name(name))
    shapes = {name: find_shape(config, name) for name in names}
    sizes = {name: float(HUB * shape.parameters) for name, shape in shapes.items() if shape}
    return sizes, [name for name in names if name not in sizes]
