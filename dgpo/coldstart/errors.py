"""Why a distillation stops in a way that its user can act on."""


class CheckpointMismatchError(ValueError):
    """The checkpoints were made under other settings, so that continuing them would be neither run."""


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite; nothing was updated with it."""


class RankLostError(RuntimeError):
    """The process of a rank died; the stage can be resumed from its last checkpoint."""


class NothingKeptError(RuntimeError):
    """A collection that has no episode to distil."""
