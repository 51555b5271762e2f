"""What a stage leaves on the disk while it runs, and in the end: bytes, from parameters."""

from __future__ import annotations

from dgpo.config.schema import Config
from dgpo.hardware.budget import Models
from dgpo.hardware.memory import ADAM, FLOAT32

STATE = FLOAT32 + ADAM  # weights and moments
DISTILL_CHECKPOINTS = 3  # the newest, the one before it, and the best (dgpo/coldstart/train.py)
DOWNLOAD = 70e9  # of Wikipedia: corpus, index, training questions (docs/data.md)


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
