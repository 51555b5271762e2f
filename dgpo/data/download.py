"""`dgpo download`: corpus, index, questions and models from the hub, NQ's annotations; resumable, checked, one copy.

Each goes to `<download.folder>/<what>/`. A file grows under the name `<file>.partial` and gets its own once its
checksum is right. The index's parts are appended to one file while they arrive, so that no second copy ever exists. The
corpus stays gzipped: `retriever.build` reads it so, and expands it once, into its own folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dgpo.agent.search import is_address
from dgpo.config.model_files import is_hub_name
from dgpo.config.schema import Config, HubFilesConfig
from dgpo.data.benchmarks import PINS
from dgpo.data.hub import HubFile, HubRevision, check, fetch, fetch_model, look_up, look_up_address, verified_sha256
from dgpo.errors import ConfigError, DgpoError
from dgpo.files import atomic_write_text

ITEMS = ("corpus", "index", "train", "benchmarks", "nq_annotations", "models")
MANIFEST = "download.json"
KNOWN_BYTES = {"PeterJinGo/wiki-18-e5-index": 64.6e9}  # by data set, for plans without a network
FreeBytes = Callable[[Path], int]


@dataclass(frozen=True)
class Target:
    """One file to have on disk: its parts on the hub, one after the other."""

    what: str
    folder: Path  # holds `what` and its manifest
    name: str  # below it
    source: HubRevision
    revision: str  # as it was asked for
    parts: tuple[HubFile, ...]

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def partial_record(self) -> Path:
        """What the partial file is a part of: it must never be completed with other bytes."""
        return self.path.with_name(f"{self.path.name}.partial.json")

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        there = next((path.stat().st_size for path in (self.path, self.partial) if path.is_file()), 0)
        return max(0, self.size - there)


def download(config: Config, *, free_bytes: FreeBytes | None = None) -> None:
    """Fetches what `download.what` names and is not there yet.

    Args:
        config: reads `download` and `dry_run`, which prints the plan and fetches nothing.
        free_bytes: free space of the file system that holds a folder.

    Raises:
        ConfigError: no such item, data set, revision or file; a file that is there and is another.
        DgpoError: no connection, too little space, or a wrong checksum.
    """
    settings = config.download
    unknown = [what for what in settings.what if what not in ITEMS]
    if unknown or not settings.what:
        raise ConfigError(f"download.what={settings.what}: expected one or more of {', '.join(ITEMS)}")
    if settings.endpoint is not None and not is_address(settings.endpoint):
        raise ConfigError(f"download.endpoint={settings.endpoint}: expected an address such as https://huggingface.co")
    targets, unanswered = _look_up(config)
    for target in targets:
        there = ", there already" if target.path.is_file() else ""
        _say(f"{target.path}: {readable(target.size)} from {target.source.repo}@{target.source.commit[:12]}{there}")
    check_space(targets, free_bytes or _free_bytes)
    models = hub_models(config) if "models" in settings.what else []
    for name in models:
        _say(f"{name}: a model of the hub, into {_cache()}")
    if unanswered:
        _say("note: no answer, so this is what the configuration names, at sizes as far as they are known")
        raise unanswered
    if config.dry_run:
        return
    for target in targets:
        if settings.pinned:  # large files are known by their SHA-256 before they come
            _check_pin(target, target.parts[0].checksum)
        _provide(target, verify=settings.verify, pinned=settings.pinned)
    for name in models:
        _say(f"{name}: {fetch_model(name, endpoint=settings.endpoint)}")


def _look_up(config: Config) -> tuple[list[Target], DgpoError | None]:
    """What is to be had, and, of a dry run, the first address that did not answer: the hub is not asked again then."""
    targets, unanswered = [], None
    for what in config.download.what:
        if what == "models":
            continue
        try:
            if unanswered and what != "nq_annotations":
                raise unanswered
            targets += _targets(config, what)
        except ConfigError:
            raise
        except DgpoError as error:
            if not config.dry_run:
                raise
            unanswered = unanswered or error
            _say_unseen(config, what)
    return targets, unanswered


def _say_unseen(config: Config, what: str) -> None:
    folder = Path(config.download.folder) / what
    if what == "nq_annotations":
        address = config.download.nq_annotations
        _say(f"{folder / Path(address).name}: size unknown, from {address}")
        return
    settings: HubFilesConfig = getattr(config.download, what)
    size = KNOWN_BYTES.get(settings.repo)
    for name in [settings.joined] if settings.joined else settings.files:
        about = f"about {readable(size)}" if size else "size unknown"
        _say(f"{folder / name}: {about}, from {settings.repo}@{settings.revision}")


def hub_models(config: Config) -> list[str]:
    """The models of the configuration that are named as on the hub: student, teacher, what it is made from, and more.

    Raises:
        ConfigError: neither a student nor a teacher is named.
    """
    named = [config.student.path, config.teacher.path, config.teacher.init]
    if not any(named):
        raise ConfigError("download.what=[models] fetches the pair's models: add pair=qwen3b_05b, or student.path=...")
    return list(dict.fromkeys(name for name in [*named, *config.download.models] if name and is_hub_name(name)))


def _targets(config: Config, what: str) -> list[Target]:
    if what == "nq_annotations":
        source: HubRevision = look_up_address(config.download.nq_annotations, key="download.nq_annotations")
        folder, file = Path(config.download.folder) / what, source.files[0]
        return [Target(what, folder, file.name, source, source.commit, (file,))]
    settings: HubFilesConfig = getattr(config.download, what)
    key, folder = f"download.{what}", Path(config.download.folder) / what
    if not settings.files:
        raise ConfigError(f"{key}.files is empty: name the files of {settings.repo} to fetch")
    for name in (*settings.files, settings.joined or "x"):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{key}: {name!r} leads out of {folder}: expected a path inside the data set")
    source = look_up(settings.repo, settings.revision, settings.files, endpoint=config.download.endpoint, key=key)
    groups = [source.files] if settings.joined else [(file,) for file in source.files]
    names = [settings.joined] if settings.joined else [file.name for file in source.files]
    return [
        Target(what, folder, name, source, settings.revision, parts) for name, parts in zip(names, groups, strict=True)
    ]


def check_space(targets: Sequence[Target], free_bytes: FreeBytes) -> None:
    """Raises `DgpoError`, with the numbers, where the missing bytes do not fit; file systems are counted apart."""
    by_device: dict[int, list[Target]] = {}
    for target in targets:
        by_device.setdefault(_existing(target.path).stat().st_dev, []).append(target)
    for group in by_device.values():
        folder = _existing(group[0].path)
        needed, free = sum(target.missing for target in group), free_bytes(folder)
        if needed > free:
            parts = ", ".join(f"{target.path.name} {readable(target.missing)}" for target in group if target.missing)
            raise DgpoError(
                f"the download needs {readable(needed)} more ({parts}), but {folder} has {readable(free)} free: free "
                f"{readable(needed - free)}, or choose another download.folder or fewer download.what"
            )


def _check_pin(target: Target, digest: str) -> None:
    """Raises `ConfigError` for a test set of other bytes; a checksum that is no SHA-256 says nothing."""
    pin = PINS.get(target.name) if target.what == "benchmarks" else None
    if pin and len(digest) == len(pin) and digest != pin:
        raise ConfigError(
            f"{target.name} of {target.source.repo}@{target.source.commit[:12]} has SHA-256 {digest}, not {pin}: its "
            "questions may be others than the published ones; take another revision, or download.pinned=false"
        )


def _provide(target: Target, *, verify: bool, pinned: bool = False) -> None:
    """Makes sure that the target is there, whole and right, and recorded."""
    if target.path.is_file():
        if _recorded(target) and not verify:
            return
        _say(f"{target.path}: checking {readable(target.size)}")
        digest = verified_sha256(target.path, target.parts)
        if digest is None:
            raise ConfigError(
                f"{target.path} is there, but is not what {target.source.repo}@{target.source.commit[:12]} holds "
                f"({target.path.stat().st_size:,} bytes, expected {target.size:,} with other checksums): move it away"
            )
    else:
        digest = _download_missing(target)
    if pinned:
        _check_pin(target, digest)
    _record(target, digest)
    _say(f"{target.path}: sha256 {digest}")


def _download_missing(target: Target) -> str:
    """Appends what is missing to the partial file, part by part, each checked; then renames it. Returns its SHA-256."""
    target.path.parent.mkdir(parents=True, exist_ok=True)
    _check_partial(target)
    target.partial.touch()
    with target.partial.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DgpoError(f"another process is downloading {target.partial}: wait for it, or stop it") from None
        whole, start = hashlib.sha256(), 0
        try:
            for part in target.parts:
                _append(target, part, file, start)
                _say(f"{target.path}: checking {part.name}, {readable(part.size)}")
                if not check(file, part, start=start, whole=whole):
                    file.truncate(start)
                    raise DgpoError(
                        f"{part.name} of {target.source.repo} has another checksum than the hub names "
                        f"({part.checksum}): it was removed; run the same command again, or try another endpoint"
                    )
                start += part.size
            file.truncate(start)
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DgpoError(
                f"the disk is full: {target.partial} has {target.partial.stat().st_size:,} of {target.size:,} bytes; "
                "make space and run the same command again, it goes on from there"
            ) from error
    target.partial.replace(target.path)
    target.partial_record.unlink(missing_ok=True)
    return str(whole.hexdigest())


def _append(target: Target, part: HubFile, file: Any, start: int) -> None:
    present = min(part.size, file.seek(0, os.SEEK_END) - start)
    if present == part.size:
        return
    if present:
        _say(f"{target.path}: {part.name} goes on at {readable(present)} of {readable(part.size)}")
    fetch(target.source, part, file, present=present)
    file.flush()


def _check_partial(target: Target) -> None:
    """A partial file goes on only with the bytes that it began with, from whatever mirror they come."""
    parts = [asdict(part) for part in target.parts]
    if target.partial.is_file():
        began = json.loads(target.partial_record.read_text()) if target.partial_record.is_file() else {}
        if [_content(part) for part in began.get("parts", ())] != [_content(part) for part in parts]:
            raise ConfigError(
                f"{target.partial} is a part of {began.get('repo')}@{began.get('commit')}, and "
                f"{target.source.repo}@{target.source.commit} holds other bytes: set download.{target.what}.revision="
                f"{began.get('commit')} to finish it, or delete it"
            )
    record = {"repo": target.source.repo, "commit": target.source.commit, "parts": parts}
    atomic_write_text(target.partial_record, json.dumps(record))


def _content(part: dict[str, Any]) -> tuple[int, str]:
    return part["size"], part["checksum"]


def _recorded(target: Target) -> bool:
    """Whether the manifest says that this file was checked against these very parts; its size must still fit."""
    entry = _manifest(target).get(target.name)
    if entry is None or target.path.stat().st_size != target.size:
        return False
    return [_content(part) for part in entry["parts"]] == [_content(asdict(part)) for part in target.parts]


def _record(target: Target, digest: str) -> None:
    entry = {
        "sha256": digest,
        "bytes": target.size,
        "repo": target.source.repo,
        "revision": target.revision,
        "commit": target.source.commit,
        "endpoint": target.source.endpoint,
        "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": [asdict(part) for part in target.parts],
    }
    files = {**_manifest(target), target.name: entry}
    atomic_write_text(target.folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def _manifest(target: Target) -> dict[str, Any]:
    path = target.folder / MANIFEST
    return dict(json.loads(path.read_text())["files"]) if path.is_file() else {}


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def readable(count: float) -> str:
    """Bytes in the largest decimal unit that leaves at least a tenth."""
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s / 10), ("kB", 1e3))
    return f"{count / size:.1f} {unit}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
