"""Why a run stops before its end, in errors that survive pickling between Ray's processes."""

from __future__ import annotations


class RunStoppedError(RuntimeError):
    """The trainer stopped for a reason that its user can act on; the message says which, in one line."""


class CollapseError(RunStoppedError):
    """The run is to go back to before `first_step`, the first step that the trouble may have touched."""

    def __init__(self, message: str, first_step: int) -> None:
        super().__init__(message, first_step)
        self.first_step = first_step

    def __str__(self) -> str:
        return str(self.args[0])


class NonFiniteError(RunStoppedError):
    """`tensor` of the batch is not finite; nothing was updated with it."""

    def __init__(self, message: str, tensor: str) -> None:
        super().__init__(message, tensor)
        self.tensor = tensor

    def __str__(self) -> str:
        return str(self.args[0])


class FaultError(RunStoppedError):
    """A process of the run died or hangs. `log` holds the last lines that it wrote."""

    def __init__(self, message: str, log: list[str] | None = None) -> None:
        super().__init__(message, log)
        self.log = log or []

    def __str__(self) -> str:
        return str(self.args[0])
