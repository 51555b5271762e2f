"""Files of `torch.save` read without running what a pickle may hold: tensors, arrays and plain values only."""

from __future__ import annotations

import pickle
from _codecs import encode
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar

from dgpo.errors import DataError, first_line

# What an array is made of, as in the state of the random generator, and a number, as an adaptive KL coefficient is.
_ARRAY: list[Any] = [_reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
_SCALAR: list[Any] = [scalar, type(np.dtype(np.float64)), encode]


def save_plain(value: Any, path: Path) -> None:
    """Writes a file that `load_plain` reads.

    Raises:
        DataError: it would not.
    """
    torch.save(value, path)
    load_plain(path)


def load_plain(path: Path) -> Any:
    """What the file holds, on the CPU.

    Raises:
        DataError: it is cut off, or holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([*_ARRAY, *_SCALAR]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors and plain values, and is not unpickled ({first_line(error)}). If you "
            "trust its origin, merge it with `python -m verl.model_merger merge --backend fsdp` and use the folder "
            "that makes"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is no whole file of tensors ({first_line(error)}): copy the checkpoint again"
        ) from error
