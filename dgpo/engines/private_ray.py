"""Ray's environment for a run of ours."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TOKEN = "ray_token"


def use_private_ray(folder: Path) -> None:
    """A token of the run's own: Ray listens on ports that every user of the machine can reach."""
    token = folder / TOKEN
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token.resolve()))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def forget_private_ray(folder: Path) -> None:
    """Removes the token in `folder`, if there is one, from the disk and from the environment."""
    token = folder / TOKEN
    if os.environ.get("RAY_AUTH_TOKEN_PATH") == str(token.resolve()):
        del os.environ["RAY_AUTH_TOKEN_PATH"]
    token.unlink(missing_ok=True)
