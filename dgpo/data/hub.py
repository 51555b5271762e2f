"""Data sets on the Hugging Face hub, or a mirror of its layout: what a revision holds, and its bytes from any offset.

`hf_hub_download` starts a file over when the process ended in the middle of it, and cannot append to one. Corpora of
tens of gigabytes need both, so the library's building blocks are used: look-up, URLs, login, retries, range requests.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dgpo.errors import ConfigError, DgpoError, first_line

# What a model's repository may hold besides its weights in safetensors: the same in other forms.
OTHER_FRAMEWORKS = ["*.onnx", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "original/*", "*.gguf", "*.pth"]
BLOCK_BYTES = 1 << 22
LOOK_UP_TIMEOUT_S = 30.0
SECONDS_PER_LINE = 30.0
UNCOMPRESSED = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class HubFile:
    """One file of a revision.

    Attributes:
        name: path in the repository.
        size: bytes.
        checksum: SHA-256 of large files (LFS), git's SHA-1 of a blob for small ones, MD5 of a plain web address, as
            hexadecimal digits; "" where a web address names none.
    """

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class HubRevision:
    """Chosen files of a data set at one commit."""

    repo: str
    commit: str
    endpoint: str
    files: tuple[HubFile, ...]

    def url(self, file: HubFile) -> str:
        """Where the file's bytes are; large ones redirect to a content server, through a link that expires."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, file.name, repo_type="dataset", revision=self.commit, endpoint=self.endpoint)

    def headers(self) -> dict[str, str]:
        """What a request sends: these, and the hub's login."""
        from huggingface_hub.utils import build_hf_headers

        return {**build_hf_headers(), **UNCOMPRESSED}


@dataclass(frozen=True)
class WebFile(HubRevision):
    """One file at a plain address, fetched without the hub's login: `repo` is its folder there, `commit` its ETag."""

    def url(self, file: HubFile) -> str:
        return f"{self.repo}/{file.name}"

    def headers(self) -> dict[str, str]:
        return UNCOMPRESSED


class ProgressLines:
    """Progress for log files, in place of the library's bar: a line every 30 s."""

    def __init__(self, *, desc: str, total: int | None, initial: int = 0, **_: object) -> None:
        self.name, self.total, self.done = desc, total, initial
        self.started = self.printed = time.monotonic()
        self.initial = initial

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        """`count` more bytes; fewer than none where a server started over."""
        self.done += count
        now = time.monotonic()
        if now - self.printed >= SECONDS_PER_LINE:
            rate = (self.done - self.initial) / (now - self.started) / 1e6
            total = f" of {self.total:,}" if self.total else ""
            print(f"{self.name}: {self.done:,}{total} bytes, {rate:.1f} MB/s", file=sys.stderr, flush=True)
            self.printed = now


def look_up(repo: str, revision: str, files: Sequence[str], *, endpoint: str | None, key: str) -> HubRevision:
    """Sizes and checksums of `files` at a revision.

    Args:
        revision: branch, tag or commit.
        endpoint: None: HF_ENDPOINT, else the hub.
        key: the config section to name, such as "download.index".

    Raises:
        ConfigError: no such data set, revision or file.
        DgpoError: the endpoint does not answer.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(endpoint=endpoint.rstrip("/") if endpoint else None)
    try:
        info = api.dataset_info(repo, revision=revision, files_metadata=True, timeout=LOOK_UP_TIMEOUT_S)
    except HFValidationError as error:
        raise ConfigError(f"{key}.repo={repo}: {error}") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{key}.repo={repo}: {api.endpoint} has no such data set, or hides it; correct the name, or log in "
            "(`hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(
            f"{key}.revision={revision}: {repo} has no such branch, tag or commit; `main` is its newest"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise _no_answer(api.endpoint, error) from error
    if info.sha is None:
        raise DgpoError(
            f"{api.endpoint} does not name the commit of {repo}@{revision}: expected an "
            "endpoint that answers as huggingface.co does"
        )
    listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    missing = [name for name in files if name not in listed]
    if missing:
        raise ConfigError(
            f"{key}.files: {repo}@{revision} has no {', '.join(missing)}; it has {', '.join(sorted(listed)[:20])}"
        )
    known = [_file_of_listing(listed[name]) or _file_of_headers(api, repo, info.sha, name) for name in files]
    return HubRevision(repo, info.sha, api.endpoint, tuple(known))


def _file_of_listing(sibling: Any) -> HubFile | None:
    """What the listing itself says; mirrors may leave sizes out."""
    checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return HubFile(sibling.rfilename, sibling.size, checksum) if sibling.size is not None and checksum else None


def _file_of_headers(api: Any, repo: str, commit: str, name: str) -> HubFile:
    """What the headers of the file say."""
    import httpx
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repo, name, repo_type="dataset", revision=commit, endpoint=api.endpoint)
    try:
        metadata = get_hf_file_metadata(url, endpoint=api.endpoint, retry_on_errors=True)
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise _no_answer(url, error) from error
    if metadata.size is None or metadata.etag is None:
        raise DgpoError(f"{url} has no size or no ETag, so nothing to check it by: choose another download.endpoint")
    return HubFile(name, metadata.size, metadata.etag)


def look_up_address(url: str, *, key: str) -> WebFile:
    """A file at a plain address: its size, and its MD5 where the server names it, as Google's storage does.

    Raises:
        ConfigError: no such address, or it does not say how large the file is.
        DgpoError: it does not answer.
    """
    import httpx

    folder, _, name = url.rpartition("/")
    try:
        answer = httpx.head(url, headers=UNCOMPRESSED, follow_redirects=True, timeout=LOOK_UP_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DgpoError(f"{key}={url} does not answer ({first_line(error)}): try again, or set another") from error
    if answer.status_code != 200 or "Content-Length" not in answer.headers:
        raise ConfigError(f"{key}={url}: HTTP {answer.status_code}, expected a file and its size; correct the address")
    hashes = dict(each.strip().partition("=")[::2] for each in answer.headers.get("x-goog-hash", "").split(","))
    md5 = base64.b64decode(hashes.get("md5", "")).hex()
    file = HubFile(name, int(answer.headers["Content-Length"]), md5)
    return WebFile(folder, answer.headers.get("ETag", "unknown").strip('"'), folder, (file,))


def fetch(source: HubRevision, part: HubFile, file: BinaryIO, *, present: int) -> None:
    """Appends the part's bytes from `present` on to `file`, whose position is where they go; shows progress.

    A connection that breaks is taken up again where it broke, until five attempts in a row bring nothing.

    Raises:
        DgpoError: it broke for good; what came stays in the file.
        OSError: the disk is full.
    """
    import httpx
    from huggingface_hub.file_download import http_get

    start = file.tell() - present
    try:
        # Without `expected_size`: given one above 50 GB, http_get refuses, whatever the mirror can serve.
        http_get(
            source.url(part),
            file,
            resume_size=present,
            headers=source.headers(),
            displayed_filename=part.name,
            tqdm_class=None if sys.stderr.isatty() else ProgressLines,  # type: ignore[arg-type]
        )
    except (httpx.HTTPError, OSError, ValueError) as error:  # the hub's own errors are OSErrors
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        came = file.tell() - start
        raise DgpoError(
            f"{part.name} of {source.repo} broke off after {came:,} of {part.size:,} bytes ({first_line(error)}): run "
            "the same command again, it goes on from there"
        ) from error


def fetch_model(repo: str, *, endpoint: str | None) -> str:
    """Brings a model's files into the hub's cache, but for those of other frameworks. Returns their folder.

    Raises:
        ConfigError: no such model, or it is gated and its licence not accepted.
        DgpoError: the hub does not answer, or refuses; the same command goes on from there.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return snapshot_download(repo, ignore_patterns=OTHER_FRAMEWORKS, endpoint=endpoint)
    except GatedRepoError:
        raise ConfigError(
            f"{repo} is gated: accept its licence on its page of the hub, then log in (`hf auth login`, or HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{repo}: the hub has no such model, or hides it; correct the name, or log in (`hf auth login`)"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise DgpoError(f"{repo} did not come ({first_line(error)}): run the same command again, it goes on") from error


def check(file: BinaryIO, part: HubFile, *, start: int, whole: Any) -> bool:
    """Whether the bytes of `file` from `start` are the part's; feeds them to the hash `whole` too."""
    own = _hash(part)
    file.seek(start)
    left = part.size
    while left and (block := file.read(min(BLOCK_BYTES, left))):
        own.update(block)
        whole.update(block)
        left -= len(block)
    return left == 0 and part.checksum in ("", own.hexdigest())


def _hash(part: HubFile) -> Any:
    """The kind of hash that the part's checksum is, told by its length."""
    if len(part.checksum) == 40:
        return hashlib.sha1(f"blob {part.size}\0".encode(), usedforsecurity=False)
    return hashlib.md5(usedforsecurity=False) if len(part.checksum) == 32 else hashlib.sha256()


def verified_sha256(path: Path, parts: Sequence[HubFile]) -> str | None:
    """The file's SHA-256, or None where it is not the parts, one after the other."""
    if path.stat().st_size != sum(part.size for part in parts):
        return None
    whole, start = hashlib.sha256(), 0
    with path.open("rb") as file:
        for part in parts:
            if not check(file, part, start=start, whole=whole):
                return None
            start += part.size
    return str(whole.hexdigest())


def _no_answer(url: str, error: BaseException) -> DgpoError:
    return DgpoError(f"{url} does not answer ({first_line(error)}): try again, or set download.endpoint")
