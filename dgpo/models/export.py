"""The model of a run as a folder for others: weights, tokenizer, generation config, and a card made from the run.

python -m dgpo export run_dir=runs/dgpo export.out=models/dgpo-0.5b export.dtype=bfloat16
python -m dgpo export run_dir=runs/dgpo export.out=models/dgpo-0.5b export.push=user/dgpo-0.5b
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from dgpo.config.model_files import check_model_folder
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.files import atomic_write_text
from dgpo.models.card import model_card
from dgpo.runs.artifacts import MANIFEST, read_manifest, write_manifest
from dgpo.runs.checkpoints import writing
from dgpo.runs.identity import model_identity
from dgpo.runs.replacing import check_target
from dgpo.runs.settings import check_same

DTYPES = ("float32", "bfloat16", "float16")
CARD = "README.md"
STAGES = ("distill", "train")  # that leave a model


def export(config: Config) -> Path:
    """Writes the folder `export.out`, and pushes it where `export.push` names a repository.

    What is there already, of the same weights, is pushed as it is, so that a push that failed can be repeated.

    Raises:
        ConfigError: no finished stage with a model, a setting that is not understood, or `export.out` exists: nothing
            is to be pushed, or it is of other weights.
        DataError: the model was changed since it was written.
        DgpoError: the hub refuses, or cannot be reached.
    """
    settings = config.export
    if not settings.out:
        raise ConfigError("export.out is not set: name the folder to write")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise ConfigError(f"export.dtype={settings.dtype}: expected one of {', '.join(DTYPES)}, or null to keep it")
    out = Path(settings.out)
    if settings.push and out.exists():
        check_same(read_manifest(out, stage="export").get("settings") or {}, _settings(config), made=out)
    else:
        check_target(out, key="export.out", stage="export", replace=False)
    run = Path(config.run_dir)
    stage, _ = find_stage(run, settings.stage)
    check_model_folder(str(run / stage / "model"), key="run_dir")
    if settings.push and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", settings.push):
        raise ConfigError(f"export.push={settings.push}: expected user/name of a repository on the hub")
    if config.dry_run:
        pushed = f", and pushed to {settings.push}" if settings.push else ""
        print(f"dry run: {run / stage / 'model'} would be exported as {out}{pushed}")
        return out
    if not out.exists():
        _write(config, out)
    if settings.push:
        from dgpo.models.push import push

        print(push(out, settings.push, endpoint=settings.endpoint, private=settings.private))
    return out


def _write(config: Config, out: Path) -> None:
    run = Path(config.run_dir)
    stage, manifest = find_stage(run, config.export.stage)
    model = run / stage / "model"
    with writing(out) as target:
        dtype = _copy_model(model, target, dtype=config.export.dtype)
        name = config.export.push or out.name
        atomic_write_text(target / CARD, model_card(run, stage, manifest, name=name, dtype=dtype))
        write_manifest(
            target,
            stage="export",
            inputs={"run_dir": str(run), "stage": stage},
            config={"dtype": dtype},
            counts=manifest["counts"],
            seed=manifest["seed"],
            settings=_settings(config),
        )
    print(f"exported {model} as {out}; next: python -m dgpo ask ask.model={out}", file=sys.stderr)


def _settings(config: Config) -> dict[str, Any]:
    run = Path(config.run_dir)
    stage, _ = find_stage(run, config.export.stage)
    return {"weights": model_identity(str(run / stage / "model")), "export.dtype": config.export.dtype}


def find_stage(run: Path, stage: str | None) -> tuple[str, dict[str, Any]]:
    """The stage to export and its manifest, its files checked.

    Args:
        stage: None for the last one that left a model.

    Raises:
        ConfigError: the run has none, or not this one.
    """
    manifests = {"train": run / "train" / "model", "distill": run / "distill"}
    if stage is not None and stage not in manifests:
        raise ConfigError(f"export.stage={stage}: expected one of {', '.join(STAGES)}, or null for the last one")
    finished = [name for name in STAGES if (manifests[name] / MANIFEST).is_file() and stage in (None, name)]
    if not finished:
        raise ConfigError(
            f"run_dir={run} has no finished {' or '.join([stage] if stage else STAGES)}: let the stage end, or import "
            "a checkpoint of it (python -m dgpo import)"
        )
    found = [(name, read_manifest(manifests[name], stage=name)) for name in finished]
    return max(found, key=lambda each: (each[1]["created_at"], STAGES.index(each[0])))


def _copy_model(model: Path, target: Path, *, dtype: str | None) -> str:
    """Loads and saves the model once: what is exported has been loaded. Returns the weights' dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dgpo.models.model_folders import save_model_folder, weights_dtype

    chosen = dtype or weights_dtype(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=chosen)
    save_model_folder(loaded, AutoTokenizer.from_pretrained(model), target)
    return chosen
